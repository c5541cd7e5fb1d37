"""What a run of a study is: the interface between comparing arms and training them."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Task:
  """One run.

  Attributes:
    arm: the treatment.
    learning_rate: of this run; None for that of the arm's own settings.
    seed: of everything random.
  """

  arm: str
  learning_rate: float | None
  seed: int

  @property
  def name(self) -> str:
    rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
    return f"{self.arm}{rate}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Score:
  """What a learning rate is chosen by.

  Attributes:
    metric: its name.
    sign: +1 if larger is better, -1 if smaller is.
  """

  metric: str
  sign: int


class Runs(Protocol):
  """The runs of a study at one scale.

  Attributes:
    score: what learning rates are chosen by.
    named: what `settings.apply` is given to read plain words.
  """

  score: ClassVar[Score]
  named: ClassVar[Mapping[str, Any]]

  def __init__(self, base: Any, configs: Mapping[str, Any], overridden: Collection[str],
               folder: pathlib.Path):
    """Makes the runs.

    Args:
      base: the scale's config with the user's settings.
      configs: of every arm.
      overridden: dotted names that the user has set.
      folder: the study's, for what its runs share.
    """

  def identity(self) -> dict[str, Any]:
    """What `config.json` is to hold besides the study, its arms and the user's settings."""

  def prepare(self) -> None:
    """Reads what all runs share, before the first of them."""

  def program(self, task: Task) -> Hashable:
    """Equal for tasks that can train together."""

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    """Runs tasks of one program, or resumes what the folder holds of them.

    Returns:
      By task, plain data that JSON can hold: "metrics" by name, and what `report_parts` needs. None
      if it was stopped, saved, before the end.

    Raises:
      TrainingError: if training fails in a way that the arm's settings cause.
    """

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Parts of `results.json` that the report shows, from every arm's compared runs, by seed."""


def remaining_seconds(max_seconds: float | None, began: float) -> float | None:
  """What remains of a time limit, if there is one; never 0, as callees want a limit above it.

  Args:
    max_seconds: the limit, or None.
    began: when it started, by `time.monotonic`.
  """
  return max_seconds and max(1e-3, max_seconds - (time.monotonic() - began))


def binned_curve(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any],
                 most: int = 60) -> list[list[float]]:
  """A curve [step, value] of at most `most` points: means over as many bins of successive steps.

  Args:
    rows: each with its "step".
    value: of a row; rows where it is None are left out.
    most: points.
  """
  known = [(row["step"], value(row)) for row in rows if value(row) is not None]
  parts = np.array_split(np.array(known, float), min(len(known), most)) if known else []
  return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts]
