"""A process that answers requests, and is killed and replaced if it does not come to an end."""

import contextlib
import pathlib
import select
import subprocess
import sys

_START_SECONDS = 120
# A process limits its own CPU time to far less. This limit is for one that hangs otherwise, and
# allows for a machine that is busy.
_WALL_SECONDS = 60


class Child:
  """A process, started when it is first needed and again after a kill.

  It writes a line when it has started, and then one for each line that it reads. It should limit
  the CPU time of each request itself, by a signal whose default action ends it.

  Args:
    program: the Python file that it runs.
    *args: arguments of the program.
  """

  def __init__(self, program: pathlib.Path, *args: str):
    self._command = [sys.executable, "-P", str(program), *args]
    self._process = None

  def ask(self, request: bytes) -> bytes | None:
    """Returns the reply to a request, or None if the process has ended or takes too long.

    Args:
      request: one line, without its end.

    Raises:
      RuntimeError: if the process does not start.
    """
    try:
      try:
        self._send(request + b"\n")
      except BrokenPipeError:  # something else has killed the process since the last request
        self.kill()
        self._send(request + b"\n")
      reply = self._line(_WALL_SECONDS)
    except BaseException:  # such as KeyboardInterrupt: the reply would be taken for the next one's
      self.kill()
      raise
    if not reply:
      self.kill()
    return reply or None

  def kill(self) -> None:
    """Ends the process; the next request starts another."""
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
        self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True)
    if not self._line(_START_SECONDS):
      self.kill()
      raise RuntimeError("the process that checks answers did not start: run `"
                         f"{' '.join(self._command)}` to see why, which should print null")

  def _line(self, seconds: float) -> bytes | None:
    """Returns the next line; None after the time limit or the process's end."""
    if not select.select([self._process.stdout], [], [], seconds)[0]:
      return None
    return self._process.stdout.readline()
