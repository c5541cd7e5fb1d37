"""Stopping when told to, but not before everything is saved."""

import contextlib
import signal


class Signals:
  """Notes SIGTERM and SIGINT, so that a loop can save first; a second SIGINT interrupts.

  Attributes:
    received: the last one's number, or None.
  """

  def __init__(self):
    self.received: int | None = None

  def __enter__(self):
    self._before = {}
    with contextlib.suppress(ValueError):  # only the main thread may
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    if self.received == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)
