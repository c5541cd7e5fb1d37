"""Timing of contenders that alternate, so that a slowdown of the machine affects all of them.

A contender is anything whose work is timed: an implementation of this project, or a peer that runs
in its own process. Rounds run in counterbalanced order, every other one backwards, because a
contender leaves the machine hot for the next one. The reported values are medians of ratios over
pairs of rounds, with intervals that assume nothing about the distribution of the ratios.
"""

import concurrent.futures
import json
import os
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
    """Frees the contender's resources; no other method is called afterwards."""


class Unavailable(ValueError):
  """A contender cannot run here; the message says why. The other contenders continue."""


class CallTimer:
  """Measures the seconds per call of a function, averaged over the calls that fit a given time.

  Args:
    run: the function, which may return before its work is done. The constructor calls it, so that
      it is compiled and warm when it is timed.
    wait: blocks until the value that `run` returned is ready.
    seconds: approximate duration of a measurement; 0 for a single call.
  """

  def __init__(self, run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float):
    self._run, self._wait = run, wait
    self.result = run()
    wait(self.result)
    self._calls = 1
    if seconds:
      # The first calls find the GPU idle and are slow: if they set the count, too few calls would
      # be timed.
      self._calls = 3
      self._calls = max(1, round(seconds / min(self() for _ in range(5))))

  def __call__(self) -> float:
    started = time.perf_counter()
    for _ in range(self._calls):
      result = self._run()
    self._wait(result)
    return (time.perf_counter() - started) / self._calls


def call_timers[Name](runs: Mapping[Name, Callable[[], Any]],
                      wait: Callable[[Any], Any]) -> dict[Name, CallTimer]:
  """Returns timers of single calls, whose functions have compiled at the same time.

  Args:
    runs: the functions by name.
    wait: blocks until the value that one of them returned is ready.
  """
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(lambda run: wait(run()), runs.values()))
  return {name: CallTimer(run, wait, 0.0) for name, run in runs.items()}


def turns[Name](names: Iterable[Name], rounds: int) -> list[Name]:
  """Returns whose turn it is, in counterbalanced order: every other round runs backwards."""
  names = list(names)
  return [name for index in range(rounds) for name in (list, reversed)[index % 2](names)]


def alternate[Name](timed: Mapping[Name, Callable[[], float]],
                    rounds: int) -> dict[Name, list[float]]:
  """Returns the seconds of every contender, round by round, timed in counterbalanced order."""
  seconds = {name: [] for name in timed}
  for name in turns(timed, rounds):
    seconds[name].append(timed[name]())
  return seconds


def paired_rounds(seconds: Sequence[float]) -> list[float]:
  """Geometric means of the seconds of successive pairs of rounds, one round in each order.

  In one round of a pair, the contender at either end of the order follows itself; in the other it
  follows a contender that may have left the machine cooler.
  """
  return np.sqrt(np.asarray(seconds[::2]) * np.asarray(seconds[1::2])).tolist()


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
  """Median, over rounds, of their seconds divided by ours, with its 95 % interval."""
  return median_interval(np.asarray(theirs) / np.asarray(ours))


def median_interval(values: ArrayLike) -> tuple[float, float, float]:
  """The median of a sample, and a confidence interval of the population's median, at 95 % or more.

  The bounds are order statistics: nothing is assumed about the distribution, and outliers move
  neither the median nor the bounds. Fewer than six values give no bounds, because all n values lie
  on one side of the population's median with probability 0.5^(n - 1).

  Args:
    values: float [n].

  Returns:
    The median, the lower and the upper bound; the bounds are infinite if no order statistics are
    far enough apart.
  """
  values_n = np.sort(np.asarray(values, float))
  n, median = values_n.size, float(np.median(values_n))
  # Rank, from either end, of the bounds: the number of counts k for which a binomial variable of n
  # fair trials is at most k with a probability of 2.5 % or less.
  rank = sum(2 * special.bdtr(k, n, 0.5) <= 0.05 for k in range(n // 2))
  if not rank:
    return median, -np.inf, np.inf
  return median, float(values_n[rank - 1]), float(values_n[n - rank])


def describe(median: float, low: float | None, high: float | None) -> str:
  """A ratio with its interval as text; bounds that are infinite or None are left out."""
  known = low is not None and np.isfinite(low)
  return f"{median:.2f} ({low:.2f} to {high:.2f})" if known else f"{median:.2f}"


def attempt[C: Contender](contenders: list[C], action: Callable[[C], Any],
                          excluded: dict[str, str]) -> None:
  """Calls the action for each contender, and excludes those that are unavailable.

  Args:
    contenders: the contenders in order; those whose action raises `Unavailable` are removed from
      the list.
    action: called with each contender.
    excluded: receives the reason of each exclusion by the contender's name.
  """
  for contender in tuple(contenders):
    try:
      action(contender)
    except Unavailable as error:
      print(f"excluded: {contender.name}: {error}", file=sys.stderr)
      excluded[contender.name] = str(error)
      contender.quit()
      contenders.remove(contender)


def require_packages(python: str | None, packages: Iterable[str], setting: str) -> None:
  """Raises ValueError unless an interpreter can import what a peer needs.

  Args:
    python: path of the interpreter; None for the present one.
    packages: names of the packages that the peer imports.
    setting: the setting that names the interpreter, for the message.
  """
  script = ("import importlib.util, sys; "
            "print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))")
  try:
    found = subprocess.run([python or sys.executable, "-c", script, *packages], check=True,
                           capture_output=True, text=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise ValueError(f"{setting}={python} is not a Python interpreter that runs here: {error}"
                     ) from error
  if missing := found.stdout.split():
    where = python or "this interpreter"
    raise ValueError(f"the peer needs {' and '.join(missing)}, which {where} does "
                     f"not have: give an interpreter that has them, --set {setting}=PATH, or leave "
                     "bench.peer out")


class PeerProcess:
  """A peer in its own interpreter, which answers every command line with one line of JSON.

  Args:
    command: the program to start, with its arguments.
    timeout: longest time to wait for an answer, in seconds.
    **options: options of `subprocess.Popen`.
  """

  def __init__(self, command: Iterable[str], timeout: float, **options: Any):
    self._timeout = timeout
    self._process = subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

  def answer(self, timeout: float | None = None) -> dict[str, Any]:
    """Returns the next answer.

    Args:
      timeout: longest time to wait, in seconds; None for the `timeout` of the constructor.

    Raises:
      Unavailable: if the peer has stopped or does not answer in time.
    """
    seconds = self._timeout if timeout is None else max(0.0, timeout)
    if not select.select([self._process.stdout], [], [], seconds)[0]:
      raise Unavailable(f"the peer did not answer within {seconds:g} s: raise "
                        "bench.peer_timeout, or run without the peer")
    line = self._process.stdout.readline()
    if not line:
      raise Unavailable("the peer stopped; its messages above say why")
    return json.loads(line)

  def ask(self, command: str) -> dict[str, Any]:
    """Sends a command and returns its answer.

    Raises:
      Unavailable: if the peer has stopped or does not answer in time.
    """
    try:
      self._process.stdin.write(f"{command}\n".encode())
      self._process.stdin.flush()
    except BrokenPipeError:
      raise Unavailable("the peer stopped; its messages above say why") from None
    return self.answer()

  def quit(self) -> None:
    """Kills the peer's process."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()
