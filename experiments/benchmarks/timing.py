"""Timing contenders against each other: they alternate, so that a machine that slows, slows all.

A contender is whatever does the work that is timed: one of ours, or a peer in a process of its own.
Rounds run in counterbalanced order: every other one backwards, since what ran before leaves a
machine hot. What is quoted are medians of ratios over pairs of rounds, with intervals that assume
nothing about their distribution.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class Contender(Protocol):
  """Something that is timed; it raises `Unavailable` where it cannot run."""

  name: str

  def quit(self) -> None:
    """Frees what it holds; nothing else is called afterwards."""


class Unavailable(ValueError):
  """A contender cannot run here; the message says why. The others go on."""


class CallTimer:
  """Seconds of one call of a function, averaged over as many calls as fill the time given.

  Args:
    run: the function, which may return before its work is done. It is called at once, so that it is
      compiled and warm.
    wait: waits for what `run` returned.
    seconds: that a measurement takes, about.
  """

  def __init__(self, run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float):
    self._run, self._wait = run, wait
    self.result = run()
    wait(self.result)
    self._calls = 3
    # The first calls find the GPU idle and are slow: too few calls would be timed if they decided.
    self._calls = max(1, round(seconds / min(self() for _ in range(5))))

  def __call__(self) -> float:
    started = time.perf_counter()
    for _ in range(self._calls):
      result = self._run()
    self._wait(result)
    return (time.perf_counter() - started) / self._calls


def alternate[Name](timed: Mapping[Name, Callable[[], float]],
                    rounds: int) -> dict[Name, list[float]]:
  """Seconds of every contender, round by round, in counterbalanced order."""
  seconds = {name: [] for name in timed}
  for index in range(rounds):
    for name in (list, reversed)[index % 2](timed):
      seconds[name].append(timed[name]())
  return seconds


def paired_rounds(seconds: Sequence[float]) -> list[float]:
  """Geometric means of rounds two by two: one in each order.

  In one of the two a contender follows itself, in the other whatever may have run cooler.
  """
  return np.sqrt(np.asarray(seconds[::2]) * np.asarray(seconds[1::2])).tolist()


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
  """Their seconds over ours, round by round: the median and its 95 % interval."""
  return median_interval(np.asarray(theirs) / np.asarray(ours))


def median_interval(values: ArrayLike) -> tuple[float, float, float]:
  """The median, and order statistics with the population's median between them at 95 % or more.

  Nothing is assumed about the distribution, and outliers move neither. Fewer than six values bound
  nothing: all of n samples are on one side of the median with probability 0.5^(n - 1).

  Args:
    values: [n].

  Returns:
    Median, low and high; the bounds are infinite if no order statistics are far enough apart.
  """
  values_n = np.sort(np.asarray(values, float))
  n, median = values_n.size, float(np.median(values_n))
  # As many at each end as a binomial variable of n trials rarely falls to or below.
  left_out = sum(2 * special.bdtr(k, n, 0.5) <= 0.05 for k in range(n // 2))
  if not left_out:
    return median, -np.inf, np.inf
  return median, float(values_n[left_out - 1]), float(values_n[n - left_out])


def describe(median: float, low: float | None, high: float | None) -> str:
  """A ratio with its interval, as text; bounds that are infinite, or None, are left out."""
  known = low is not None and np.isfinite(low)
  return f"{median:.2f} ({low:.2f} to {high:.2f})" if known else f"{median:.2f}"


def attempt[C: Contender](contenders: list[C], action: Callable[[C], Any],
                          excluded: dict[str, str]) -> None:
  """Calls the action for each contender; those that are unavailable are removed and noted.

  Args:
    contenders: in order; the failing ones are removed from the list.
    action: what each is to do.
    excluded: gets the reason by the contender's name.
  """
  for contender in tuple(contenders):
    try:
      action(contender)
    except Unavailable as error:
      print(f"excluded: {contender.name}: {error}", file=sys.stderr)
      excluded[contender.name] = str(error)
      contender.quit()
      contenders.remove(contender)


class PeerProcess:
  """A peer in an interpreter of its own, which answers every command line with a line of JSON.

  Args:
    command: what to start.
    timeout: seconds that an answer may take.
    **options: of `subprocess.Popen`.
  """

  def __init__(self, command: Iterable[str], timeout: float, **options: Any):
    self._timeout = timeout
    self._process = subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

  def answer(self, timeout: float | None = None) -> dict[str, Any]:
    """The next answer.

    Args:
      timeout: seconds; None for the peer's own.

    Raises:
      Unavailable: if the peer stopped, or did not answer in time.
    """
    seconds = self._timeout if timeout is None else max(0.0, timeout)
    if not select.select([self._process.stdout], [], [], seconds)[0]:
      raise Unavailable(f"the peer did not answer within {self._timeout:g} s: allow more by "
                        "bench.peer_timeout, or leave it out")
    line = self._process.stdout.readline()
    if not line:
      raise Unavailable("the peer stopped: see its message above")
    return json.loads(line)

  def ask(self, command: str) -> dict[str, Any]:
    """Sends a command and returns its answer; raises what `answer` does."""
    try:
      self._process.stdin.write(f"{command}\n".encode())
      self._process.stdin.flush()
    except BrokenPipeError:
      raise Unavailable("the peer stopped: see its message above") from None
    return self.answer()

  def quit(self) -> None:
    """Kills the peer."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()
