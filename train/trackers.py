"""Experiment trackers to which a run's metrics are sent besides its own files.

TensorBoard's event files are written by default. Weights & Biases and MLflow are optional packages,
which read their own environment variables: WANDB_PROJECT, WANDB_MODE (such as "offline"),
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others.
"""

import importlib
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Protocol

from absl import logging

from model.checks import did_you_mean, require
from train.run_folder import Events, leaves, read_json_object, write_json_atomic

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # trackers that need a package of an extra
TRACKERS = ("tensorboard", *PACKAGES)
_IDS = "trackers.json"  # the trackers' own identities of a run, in its folder
_PROJECT = "deepseek-jax"
_NOT_MLFLOW = re.compile(r"[^\w\-. /]")  # characters that MLflow allows in no name
_LONGEST_PARAM = 500  # characters of a parameter's value in MLflow


class Tracker(Protocol):
  """A writer of rows of metrics."""

  def append(self, row: dict) -> None:
    """Adds the numbers of a row at its "step"."""

  def close(self) -> None:
    """Writes out what is buffered, and ends the run."""


def check_names(names: Sequence[str], setting: str) -> None:
  """Raises ValueError for names that are not of `TRACKERS`, or are given twice.

  Args:
    names: the trackers.
    setting: name of the setting that holds them, for the message.
  """
  for name in names:
    require(name in TRACKERS, f"{setting}: there is no tracker {name!r}"
            f"{did_you_mean(name, TRACKERS)} The trackers are: {', '.join(TRACKERS)}")
  require(len(set(names)) == len(names), f"{setting}={','.join(names)}: name each tracker once")


def check_installed(names: Sequence[str]) -> None:
  """Raises ValueError, saying what to install, if the package of a tracker cannot be imported."""
  for name in names:
    if name in PACKAGES:
      _package(name)


def _package(name: str) -> ModuleType:
  try:
    return importlib.import_module(PACKAGES[name])
  except ImportError as error:
    raise ValueError(
        f"log_to={name} needs the package {PACKAGES[name]}, which cannot be imported ({error}): "
        f"pip install 'deepseek-jax[{name}]', or take {name} out of log_to") from error


class Trackers:
  """Sends rows of metrics to several trackers.

  A tracker that fails, such as one whose server cannot be reached, is given up with a warning: the
  run goes on, and its own files have all metrics.

  Args:
    names: the trackers, of `TRACKERS`.
    folder: the run's folder. Its name is the name of the run.
    rows: the rows of the run so far.
    config: the run's configuration as plain data, which trackers record.

  Raises:
    ValueError: if the package of a tracker is not installed.
  """

  def __init__(self, names: Sequence[str], folder: pathlib.Path, rows: Iterable[dict],
               config: dict):
    check_installed(names)
    self._open: dict[str, Tracker] = {}
    if "tensorboard" in names:
      self._open["tensorboard"] = Events(folder / "events", rows)
    for name, make in (("wandb", _WandB), ("mlflow", _MLflow)):
      if name in names:
        self._attempt(name, lambda name=name, make=make: self._open.update(
            {name: make(_package(name), folder, config)}))

  def append(self, row: dict) -> None:
    """Adds a row's numbers at its "step"."""
    for name, tracker in list(self._open.items()):
      self._attempt(name, lambda tracker=tracker: tracker.append(row))

  def close(self) -> None:
    """Writes out what is buffered, and ends the run in every tracker."""
    for name, tracker in list(self._open.items()):
      self._attempt(name, tracker.close)

  def _attempt(self, name: str, action: Callable[[], None]) -> None:
    if name == "tensorboard":  # its files are the run's own: an error is a full disk
      action()
      return
    try:
      action()
    except Exception as error:
      self._open.pop(name, None)
      logging.warning("log_to=%s failed and is given up for the rest of this run: %s: %s", name,
                      type(error).__name__, error)


def _numbers(row: dict) -> dict[str, float]:
  """Returns the numbers of a row by name, without its "step" and "time"."""
  values = {name: value.item() if getattr(value, "shape", None) == () else value
            for name, value in row.items()}
  return {name: value for name, value in values.items()
          if name not in ("step", "time") and isinstance(value, int | float)}


def _identity(folder: pathlib.Path, name: str, new: Callable[[], str]) -> str:
  """Returns the run's identity in a tracker, so that a resumed run continues it.

  Args:
    folder: the run's folder.
    name: the tracker's name.
    new: makes the identity of a new run.
  """
  path = folder / _IDS
  known = read_json_object(path) if path.exists() else {}
  if name not in known:
    known = write_json_atomic(path, {**known, name: new()})
  return known[name]


class _WandB:
  """A run of Weights & Biases. Rows of steps that it already has are ignored by it."""

  def __init__(self, wandb: ModuleType, folder: pathlib.Path, config: dict):
    self._run = wandb.init(
        dir=str(folder), id=_identity(folder, "wandb", lambda: uuid.uuid4().hex), resume="allow",
        name=folder.name, config=config, project=os.environ.get("WANDB_PROJECT") or _PROJECT)

  def append(self, row: dict) -> None:
    self._run.log(_numbers(row), step=row["step"])

  def close(self) -> None:
    self._run.finish()


class _MLflow:
  """A run of MLflow, which keeps all values of a step that a resumed run takes again."""

  def __init__(self, mlflow: ModuleType, folder: pathlib.Path, config: dict):
    self._mlflow = mlflow
    known = folder / _IDS
    run = read_json_object(known).get("mlflow") if known.exists() else None
    started = mlflow.start_run(run_id=run, run_name=None if run else folder.name)
    _identity(folder, "mlflow", lambda: started.info.run_id)
    if run is None:
      params = {_NOT_MLFLOW.sub("_", name): str(value)[:_LONGEST_PARAM]
                for name, value in leaves(config)}
      mlflow.log_params(params)

  def append(self, row: dict) -> None:
    self._mlflow.log_metrics({_NOT_MLFLOW.sub("_", name): value
                              for name, value in _numbers(row).items()}, step=row["step"])

  def close(self) -> None:
    self._mlflow.end_run()
