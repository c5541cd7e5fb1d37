"""Signals that ask a run to stop, which it does after saving what there is to save."""

import contextlib
import os
import signal
import sys
import threading

_STOPPING = (signal.SIGTERM, signal.SIGINT)

# Number of the signal by which the last run of this process was stopped; None if there was none.
stopped_by: int | None = None


class Signals:
  """Records SIGTERM and SIGINT instead of acting on them, so that a loop can save before it stops.

  Before the loop has called `can_save`, there is nothing to save, and a signal ends the process at
  once, even if the main thread is compiling: compilation can take minutes, in which Python runs no
  signal handlers. So does a signal that follows a SIGINT. The exit status is then 128 plus the
  signal's number.

  Attributes:
    received: number of the last signal, None if there was none.
  """

  def __init__(self):
    self.received: int | None = None
    self._saves = False

  def __enter__(self):
    self._before, self._pipe, self._wakeup = {}, None, -1
    if threading.current_thread() is not threading.main_thread():
      return self  # only the main thread can handle signals
    for number in _STOPPING:
      self._before[number] = signal.signal(number, self._note)
    # The interpreter writes the number of a signal to the pipe when it arrives, not when the main
    # thread next runs Python code.
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
    threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
    return self

  def can_save(self) -> None:
    """From now on, a signal is left to the loop, which saves before it stops."""
    self._saves = True

  def _watch(self, descriptor: int) -> None:
    interrupted = False
    while number := os.read(descriptor, 1):
      if number[0] not in _STOPPING:
        continue
      name = signal.Signals(number[0]).name
      if not self._saves or interrupted:
        print(f"\nstopped by {name}"
              + ("" if self._saves else " before the first step; nothing to save"),
              file=sys.stderr, flush=True)
        os._exit(128 + number[0])
      interrupted = number[0] == signal.SIGINT
      print(f"\n{name}: stopping after this step"
            + ("; another Ctrl-C stops at once, without saving" if interrupted else ""),
            file=sys.stderr, flush=True)
    os.close(descriptor)

  def _note(self, number, frame):
    global stopped_by
    del frame
    self.received = stopped_by = number

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._pipe:
      signal.set_wakeup_fd(self._wakeup)
      with contextlib.suppress(OSError):
        os.close(self._pipe[1])  # ends the watching thread
