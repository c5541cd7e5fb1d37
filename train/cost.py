"""The cost of a run, written to disk while it runs, so that killed processes are counted too."""

import json
import os
import pathlib
import time

import jax

from train.hardware import joules
from train.run_folder import write_json_atomic

_FOLDER = "cost"  # in the run folder; has one JSON file per process
_WRITE_SECONDS = 5.0
_KEYS = ("device_seconds", "flops", "tokens", "joules")


class CostMeter:
  """Counts what this process adds to a run's cost, in a file of its own; `total` sums the files.

  Args:
    path: the run folder.
    flops_per_token: FLOPs of a training step per token.
    num_runs: number of runs that train as one vmapped batch.
  """

  def __init__(self, path: pathlib.Path, flops_per_token: int, num_runs: int = 1):
    (path / _FOLDER).mkdir(exist_ok=True)
    self._path = path / _FOLDER / f"{time.time_ns()}-{os.getpid()}.json"
    self._num_runs = num_runs
    self._flops = flops_per_token
    self._started, self._joules, self._tokens = time.monotonic(), joules(), 0
    self._written = self._started

  def add(self, tokens: int) -> None:
    """Counts tokens that each of the runs was trained on; writes to disk at most every 5 s."""
    self._tokens += tokens * self._num_runs
    if time.monotonic() - self._written > _WRITE_SECONDS:
      self.write()

  def write(self) -> None:
    """Writes the cost of this process so far to its file."""
    self._written = time.monotonic()
    now = joules()
    write_json_atomic(self._path, {
        "device_seconds": (self._written - self._started) * jax.device_count(),
        "flops": float(self._tokens * self._flops), "tokens": self._tokens,
        "joules": None if now is None or self._joules is None else now - self._joules})

  def close(self) -> None:
    self.write()


def total(path: pathlib.Path) -> dict:
  """Returns the cost of a run, summed over all processes that worked on it.

  Args:
    path: the run folder.

  Returns:
    "device_seconds" (wall-clock seconds times devices, evaluation and compilation included),
    "flops" and "tokens" of training, and "joules", None if a process could not measure them.
  """
  return add_up([json.loads(file.read_text()) for file in sorted((path / _FOLDER).glob("*.json"))])


def add_up(costs: list[dict]) -> dict:
  """Returns the sum of several costs by key; None where one of them is None."""
  return {key: None if any(cost[key] is None for cost in costs) else
          sum(cost[key] for cost in costs) for key in _KEYS}
