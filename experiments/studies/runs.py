"""The interface between the runner of a study and the code that trains its runs."""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Task:
  """One run of a study.

  Attributes:
    arm: name of the arm.
    learning_rate: learning rate of the run; None for that of the arm's own settings.
    seed: seed of everything that is random.
  """

  arm: str
  learning_rate: float | None
  seed: int

  @property
  def name(self) -> str:
    """The run's name, which is also that of its folder."""
    rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
    return f"{self.arm}{rate}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Score:
  """The metric by which a sweep chooses the learning rate.

  Attributes:
    metric: name of the metric.
    sign: +1 if larger values are better, -1 if smaller ones are.
  """

  metric: str
  sign: int


class Runs(Protocol):
  """Trains and measures the runs of a study at one scale.

  Attributes:
    score: the metric by which learning rates are chosen.
    named: argument `named` of `settings.apply`, for values that are plain words.
    learning_rate: dotted name of the setting that a sweep replaces.
    nudge: the setting with which a run starts one rounding of its weights away.
    measuring: modules and functions that compute the metrics; runs that were measured by others do
      not tell what today's would.
    packages: folders of the code that determines how a run is trained.
    ignored: dotted names of settings that the runs replace or ignore, each with the reason and what
      to do instead.
  """

  score: ClassVar[Score]
  named: ClassVar[Mapping[str, Any]]
  learning_rate: ClassVar[str]
  nudge: ClassVar[str]
  measuring: ClassVar[tuple[Any, ...]]
  packages: ClassVar[tuple[str, ...]]
  ignored: ClassVar[Mapping[str, str]]

  def __init__(self, base: Any, configs: Mapping[str, Any], overridden: Collection[str],
               folder: pathlib.Path):
    """Prepares for runs, without loading or training anything.

    Args:
      base: the scale's config with the user's settings.
      configs: config of every arm that may run, by name.
      overridden: dotted names that the user has set.
      folder: the study's folder, for what its runs share.
    """

  def identity(self) -> dict[str, Any]:
    """Returns further entries of `config.json`, besides the study, its arms and user settings."""

  @property
  def cache_folder(self) -> pathlib.Path:
    """The user's cache folder, in which finished runs are stored for other studies."""

  def identifies(self, task: Task) -> dict[str, Any] | None:
    """Returns JSON data that is equal for equal runs, whichever study they belong to.

    It has all that determines a run's result besides code, versions and hardware; None if that
    cannot be known, or if the run leaves more than its result.
    """

  def prepare(self) -> None:
    """Loads what all runs share; called once before the first run."""

  def program(self, task: Task) -> Hashable:
    """Returns a key that is equal for runs that can train as one vmapped batch."""

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    """Trains runs that share one program, or resumes them from their folder.

    Args:
      tasks: the runs; more than one train as a vmapped batch.
      folder: the folder of these runs.
      max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.

    Returns:
      For each run, JSON data: "metrics" by name, and what `report_parts` needs. None if the runs
      were stopped, and saved, before their end.

    Raises:
      TrainingError: if training fails because of the arm's settings.
    """

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns entries of `results.json` that the report shows.

    Args:
      runs: by arm, what `train` returned for its compared runs, in the order of their seeds.
    """


def group_folder(out: pathlib.Path, tasks: Sequence[Task], kept: bool) -> pathlib.Path:
  """Returns the folder of a run, or of several that train as one vmapped batch.

  Args:
    out: the study's folder.
    tasks: the runs.
    kept: whether the folders of the study's runs, which then train alone, are kept for users.
  """
  if kept:
    return out / tasks[0].name
  if len(tasks) == 1:
    return out / "runs" / tasks[0].name
  digest = hashlib.sha256("\n".join(task.name for task in tasks).encode()).hexdigest()[:8]
  return out / "runs" / f"vmapped-{digest}"


def group_name(tasks: Sequence[Task]) -> str:
  """Returns the name of a run, or of the first of several and how many others there are."""
  return tasks[0].name + (f"-and-{len(tasks) - 1}-more" if len(tasks) > 1 else "")


def remaining_seconds(max_seconds: float | None, began: float) -> float | None:
  """Returns what remains of a time limit, at least a millisecond, as callees take 0 for no limit.

  Args:
    max_seconds: the limit in seconds; None for no limit.
    began: when it started, by `time.monotonic`.
  """
  return max_seconds and max(1e-3, max_seconds - (time.monotonic() - began))


def binned_curve(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any],
                 most: int = 60) -> list[list[float]]:
  """Returns a curve of [step, value], averaged over bins of consecutive rows.

  Args:
    rows: rows of a run, each with its "step".
    value: returns the value of a row; rows for which it returns None are left out.
    most: largest number of points.
  """
  known = [(row["step"], value(row)) for row in rows if value(row) is not None]
  parts = np.array_split(np.array(known, float), min(len(known), most)) if known else []
  return [[int(part[-1, 0]), float(part[:, 1].mean())] for part in parts]
