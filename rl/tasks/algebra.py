"""Comparison of LaTeX by math-verify, in processes that are killed if it does not come to an end.

math-verify limits its time by an alarm whose handler raises an exception. Only the main thread has
alarms, and computer algebra catches the exception where it happens to arrive in a callback.
"""

import atexit
import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterable

_CHILD = pathlib.Path(__file__).with_name("algebra_child.py")
_START_SECONDS = 120
# The process limits its own CPU time to far less. This limit is for a process that hangs otherwise,
# and allows for a machine that is busy.
_WALL_SECONDS = 60
_PROCESSES = min(8, os.cpu_count() or 1)
_CACHED = 200_000


class _Process:
  """A process that compares answers, started when it is first needed and again after a kill."""

  def __init__(self):
    self._process = None

  def same(self, given: str, gold: str) -> bool | None:
    request = json.dumps([given, gold]).encode() + b"\n"
    try:
      try:
        self._send(request)
      except BrokenPipeError:  # something else has killed the process since the last request
        self.kill()
        self._send(request)
      reply = self._line(_WALL_SECONDS)
    except BaseException:  # such as KeyboardInterrupt: the reply would be taken for the next one's
      self.kill()
      raise
    if not reply:
      self.kill()
      return False
    return json.loads(reply)

  def kill(self) -> None:
    process, self._process = self._process, None
    if process is not None:
      process.kill()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
      process.stdout.close()
      process.wait()

  def _send(self, request: bytes) -> None:
    if self._process is None:
      self._start()
    self._process.stdin.write(request)
    self._process.stdin.flush()

  def _start(self) -> None:
    # A session of its own, so that Ctrl-C in a terminal interrupts the trainer only.
    self._process = subprocess.Popen(
        [sys.executable, "-P", str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True)
    if not self._line(_START_SECONDS):
      self.kill()
      raise RuntimeError("the process that compares answers did not start: run `"
                         f"{sys.executable} -P {_CHILD}` to see why, which should print null")

  def _line(self, seconds: float) -> bytes | None:
    """Returns the next line; None after the time limit or the process's end."""
    if not select.select([self._process.stdout], [], [], seconds)[0]:
      return None
    return self._process.stdout.readline()


class _Pool:
  """Processes for several threads, and the verdicts so far."""

  def __init__(self):
    self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
    self._all = [_Process() for _ in range(_PROCESSES)]
    for process in self._all:
      self._idle.put(process)
    self._verdicts: dict[tuple[str, str], bool | None] = {}
    self._lock = threading.Lock()

  def same(self, given: str, gold: str) -> bool | None:
    key = given, gold
    with self._lock:
      if key in self._verdicts:
        return self._verdicts[key]
    process = self._idle.get()
    try:
      verdict = process.same(given, gold)
    finally:
      self._idle.put(process)
    with self._lock:
      if len(self._verdicts) >= _CACHED:
        self._verdicts.clear()
      self._verdicts[key] = verdict
    return verdict

  def close(self) -> None:
    for process in self._all:
      process.kill()


_pool = _Pool()


def same(given: str, gold: str) -> bool | None:
  """Whether an answer in LaTeX equals a reference; None if the reference cannot be used.

  A comparison that takes more than two seconds of CPU time is given up and gives False, as does an
  answer that is not LaTeX. A reference cannot be used if it is not LaTeX, or if even its own value
  takes that long or exceeds 10^10000. Verdicts are remembered.

  Args:
    given: the answer, as LaTeX without delimiters.
    gold: the reference, as LaTeX without delimiters.

  Raises:
    RuntimeError: if the process that compares does not start.
  """
  return _pool.same(given, gold)


def same_many(pairs: Iterable[tuple[str, str]]) -> list[bool | None]:
  """Returns `same` of each pair, comparing as many at a time as there are CPU cores, at most 8."""
  pairs = list(pairs)
  different = list(dict.fromkeys(pairs))
  if len(different) < 2:
    return [same(*pair) for pair in pairs]
  with concurrent.futures.ThreadPoolExecutor(_PROCESSES) as threads:
    verdicts = dict(zip(different, threads.map(lambda pair: same(*pair), different), strict=True))
  return [verdicts[pair] for pair in pairs]


def _forget() -> None:
  """Leaves the processes to the parent: two that share a process would read each other's lines."""
  global _pool
  _pool = _Pool()


atexit.register(lambda: _pool.close())
os.register_at_fork(after_in_child=_forget)
