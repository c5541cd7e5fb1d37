"""Signals that ask a run to stop, which it does after saving."""

import contextlib
import signal


class Signals:
  """Records SIGTERM and SIGINT instead of acting on them, so that a loop can save before it stops.

  A signal that follows a SIGINT raises KeyboardInterrupt.

  Attributes:
    received: number of the last signal, None if there was none.
  """

  def __init__(self):
    self.received: int | None = None

  def __enter__(self):
    self._before = {}
    with contextlib.suppress(ValueError):  # raised outside the main thread
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
