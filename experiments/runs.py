"""What a run of a study is: the seam between comparing arms and training them."""

import dataclasses
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Task:
  """One run."""

  arm: str
  learning_rate: float
  seed: int

  @property
  def name(self) -> str:
    return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Score:
  """What a learning rate is chosen by.

  Attributes:
    metric: its name.
    sign: +1 if more is better, -1 if less is.
  """

  metric: str
  sign: int


class Runs(Protocol):
  """The runs of a study at one scale.

  Attributes:
    score: see there.
    named: what `settings.apply` is given to read plain words.
  """

  score: ClassVar[Score]
  named: ClassVar[Mapping[str, Any]]

  def __init__(self, base: Any, configs: Mapping[str, Any], told: Collection[str]):
    """For a scale's config as the user has set it, every arm's, and the names he has set."""

  def identity(self) -> dict[str, Any]:
    """What `config.json` is to hold besides the study, its arms and the user's settings."""

  def prepare(self) -> None:
    """Reads what all runs share, before the first of them."""

  def program(self, task: Task) -> Hashable:
    """Equal for tasks that can train together."""

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    """Runs tasks of one program, or goes on with what the folder holds of them.

    Returns:
      By task, plain data that JSON can hold: "metrics" by name, and what `drawn` needs. None if
      it was stopped, saved, before the end.

    Raises:
      TrainingError: if training fails in a way that its settings are to blame for.
    """

  def drawn(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Parts of `results.json` that the report draws, from every arm's compared runs, by seed."""


def left(max_seconds: float | None, began: float) -> float | None:
  """What is left of a limit, if there is one, for something that takes a limit above 0.

  Args:
    max_seconds: the limit, or None.
    began: when it did, by `time.monotonic`.
  """
  return max_seconds and max(1e-3, max_seconds - (time.monotonic() - began))


def stretches(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any],
              most: int = 60) -> list[list[float]]:
  """A curve [step, value] of at most so many points, means over as many stretches of steps."""
  known = [(row["step"], value(row)) for row in rows if value(row) is not None]
  parts = np.array_split(np.array(known, float), min(len(known), most)) if known else []
  return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts]
