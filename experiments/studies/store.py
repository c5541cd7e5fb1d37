"""Finished runs of studies: those of one folder, and those of all studies on this machine.

The runs of all studies are in the user's cache folder, under the hash of everything that determines
a run: its configuration and data, the code that trains and measures, versions, compiler flags and
hardware. Studies share the runs that they have in common, and a study whose folder was lost trains
nothing again.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.reports import provenance
from experiments.studies.judging import rules
from experiments.studies.runs import Runs, Task
from train.run_folder import read_run_json, write_json_atomic

_RUN_FIELDS = {"arm", "learning_rate", "seed", "status", "cost", "metrics"}


class Parts:
  """The finished runs of a study's folder, in one small file for each command that added some.

  Args:
    folder: the folder of these files, which is made if it does not exist.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    folder.mkdir(exist_ok=True)
    self._known: dict[tuple[str, int], dict] = {}  # contents, by path and time of change

  def read(self) -> list[dict]:
    """Returns the contents of all files, in the order of their names.

    Raises:
      ValueError: if one is damaged; the message names the file.
    """
    return list(map(self._read, sorted(self.folder.glob("*.json"))))

  def runs(self) -> dict[Task, dict]:
    """Returns all recorded runs, including those that failed."""
    return {Task(run["arm"], run["learning_rate"], run["seed"]): run
            for part in self.read() for run in part["runs"]}

  def write(self, name: str, part: Mapping[str, Any]) -> None:
    """Writes a file: "provenance", "measured_by" and "runs"."""
    write_json_atomic(self.folder / f"{name}.json", part)

  def _read(self, path: pathlib.Path) -> dict:
    key = str(path), path.stat().st_mtime_ns
    if key not in self._known:
      self._known[key] = _read_part(path)
    return self._known[key]


def _read_part(path: pathlib.Path) -> dict:
  try:
    part = read_run_json(path, provenance=dict, runs=list)
    for run in part["runs"]:
      if not (isinstance(run, dict) and isinstance(run.get("metrics"), dict)
              and run.keys() >= _RUN_FIELDS):
        raise ValueError(f"a run in {path} should be an object with "
                         + ", ".join(sorted(_RUN_FIELDS)))
  except ValueError as error:
    raise ValueError(f"{error}. This file holds finished runs: restore it from a copy, or delete "
                     "it, and its runs train again") from error
  return part


class RunStore:
  """The finished runs of all studies on this machine.

  Args:
    runs: trains the runs of a study; `Runs.identifies` says which of them can be stored.
    vmapped: whether they train as vmapped batches, whose results are rounded otherwise.
  """

  def __init__(self, runs: Runs, *, vmapped: bool):
    self._runs, self._vmapped = runs, vmapped

  def find(self, task: Task) -> dict | None:
    """Returns a part with the one run that equals `task`; None if no study has trained it."""
    path = self._path(task)
    if path is None or not path.exists():
      return None
    try:
      part = _read_part(path)
    except ValueError:  # it is trained again, and then replaced
      return None
    return part | {"runs": [run | dataclasses.asdict(task) for run in part["runs"]]}

  def keep(self, task: Task, part: Mapping[str, Any]) -> None:
    """Stores a part that has one run, that of `task`."""
    path = self._path(task)
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json_atomic(path, {"of": self._identity(task), **part})

  def _path(self, task: Task) -> pathlib.Path | None:
    identity = self._identity(task)
    if identity is None:
      return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return self._runs.cache_folder / "runs" / f"{digest}.json"

  def _identity(self, task: Task) -> dict[str, Any] | None:
    found = self._runs.identifies(task)
    if found is None:
      return None
    kind = type(self._runs)
    return {"kind": kind.__qualname__, "run": found, "vmapped": self._vmapped,
            "code": _code_hash(tuple(kind.packages)),
            "measured_by": rules.syntax_hash(kind.measuring), **_environment()}


@functools.cache
def _environment() -> dict[str, Any]:
  """Returns versions, compiler flags and hardware."""
  where = provenance.describe()
  names = ["versions", "xla_flags", "device"]
  if jax.default_backend() == "cpu":  # whose number of cores determines how sums are divided
    names += ["cpu", "cores"]
  return {name: where[name] for name in names}


@functools.cache
def _code_hash(packages: Sequence[str]) -> str:
  root = pathlib.Path(__file__).parents[2]
  return rules.files_hash(
      root, (path for package in packages for path in sorted((root / package).rglob("*"))))
