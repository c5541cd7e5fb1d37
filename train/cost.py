"""What a run cost, kept on disk while it runs, so that the work of killed processes counts too."""

import json
import os
import pathlib
import time

import jax

from train.hardware import joules
from train.run_folder import write_json_atomic

_FOLDER = "cost"  # of one JSON file a process
_WRITE_SECONDS = 5.0
_KEYS = ("device_seconds", "flops", "tokens", "joules")


class CostMeter:
  """Counts this process' part of the cost in a file of its own; `total` adds up all files.

  Args:
    path: the run's folder.
    flops_per_token: of training.
    num_runs: runs that train as a vmapped batch.
  """

  def __init__(self, path: pathlib.Path, flops_per_token: int, num_runs: int = 1):
    (path / _FOLDER).mkdir(exist_ok=True)
    self._path = path / _FOLDER / f"{time.time_ns()}-{os.getpid()}.json"
    self._num_runs = num_runs
    self._flops = flops_per_token
    self._started, self._joules, self._tokens = time.monotonic(), joules(), 0
    self._written = self._started

  def add(self, tokens: int) -> None:
    """Counts tokens that every run trained on; now and then writes the count to disk."""
    self._tokens += tokens * self._num_runs
    if time.monotonic() - self._written > _WRITE_SECONDS:
      self.write()

  def write(self) -> None:
    self._written = time.monotonic()
    now = joules()
    write_json_atomic(self._path, {
        "device_seconds": (self._written - self._started) * jax.device_count(),
        "flops": float(self._tokens * self._flops), "tokens": self._tokens,
        "joules": None if now is None or self._joules is None else now - self._joules})

  def close(self) -> None:
    self.write()


def total(path: pathlib.Path) -> dict:
  """Of all processes that worked on the run in a folder; joules are None if one could not tell.

  Device-seconds, evaluation and compiling included; FLOPs and tokens of training; joules.
  """
  return add_up([json.loads(file.read_text()) for file in sorted((path / _FOLDER).glob("*.json"))])


def add_up(costs: list[dict]) -> dict:
  """The sum of costs; None where one of them is."""
  return {key: None if any(cost[key] is None for cost in costs) else
          sum(cost[key] for cost in costs) for key in _KEYS}
