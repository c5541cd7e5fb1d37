"""Comparison of LaTeX by math-verify, in processes that are killed if it does not come to an end.

math-verify limits its time by an alarm whose handler raises an exception. Only the main thread has
alarms, and computer algebra catches the exception where it happens to arrive in a callback.
"""

import atexit
import concurrent.futures
import json
import os
import pathlib
import queue
import threading
from collections.abc import Iterable

from rl.tasks.child import Child

_CHILD = pathlib.Path(__file__).with_name("algebra_child.py")
_PROCESSES = min(8, os.cpu_count() or 1)
_CACHED = 200_000


class _Pool:
  """Processes for several threads, and the verdicts so far."""

  def __init__(self):
    self._idle: queue.LifoQueue[Child] = queue.LifoQueue()
    self._all = [Child(_CHILD) for _ in range(_PROCESSES)]
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
      reply = process.ask(json.dumps([given, gold]).encode())
      verdict = json.loads(reply) if reply else False
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
