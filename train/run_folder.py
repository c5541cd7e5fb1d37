"""A run's folder: who may write to it, its configuration, metrics and TensorBoard events."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorboardX


def fsync(path: pathlib.Path) -> None:
  """Waits until a file's bytes, or a folder's entries, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
  """Writes a file such that a reader, whenever the writer is killed, sees all of it or none."""
  path = pathlib.Path(path)
  unfinished = path.with_name(f"{path.name}.tmp")
  with open(unfinished, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  unfinished.replace(path)
  fsync(path.parent)


def _strict(value: Any, replace: Callable[[float], Any]) -> Any:
  """`value` with lists for arrays and tuples, and numbers replaced that JSON does not have."""
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, dict):
    return {key: _strict(child, replace) for key, child in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(child, replace) for child in value]
  return replace(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json_atomic(path: str | os.PathLike, obj: Any) -> Any:
  """`write_text_atomic` of an object as indented JSON, with null for NaN and infinities.

  Returns:
    The object as it was written.
  """
  strict = _strict(obj, lambda number: None)
  write_text_atomic(path, json.dumps(strict, indent=2, allow_nan=False) + "\n")
  return strict


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Every scalar of nested dicts and lists, by its dotted name; empty ones count as scalars."""
  if isinstance(value, dict | list | tuple) and value:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
      yield from leaves(child, f"{name}.{key}" if name else str(key))
  else:
    yield name, value


class RunFolder:
  """A run's folder, made if need be and locked for as long as this process lives.

  Attributes:
    path: the folder.

  Raises:
    ValueError: if it cannot be made or written to, or another process holds it.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(f"the run's folder {self.path} is a file: give another --out")
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
      raise ValueError(f"the run's folder {self.path} cannot be made or written to "
                       f"({error.strerror}): give another --out, or its permission") from error
    # Else workers that outlive a killed run would keep its folder locked.
    os.register_at_fork(after_in_child=self._lock.close)
    try:
      self._acquire()
    except BaseException:
      self._lock.close()
      raise

  def _acquire(self) -> None:
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._lock.seek(0)
      raise ValueError(
          f"the run's folder {self.path} is in use by process {self._lock.read().strip() or '?'}: "
          "wait for it or stop it, or give another --out") from error
    except OSError as error:
      raise ValueError(f"the run's folder {self.path} cannot be locked ({error.strerror}): give an "
                       "--out on a file system with locks") from error
    self._lock.truncate(0)
    self._lock.write(f"{os.getpid()}\n")
    self._lock.flush()

  def close(self) -> None:
    """Lets others have the folder."""
    self._lock.close()

  def check_config(
      self, as_dict: dict, upgrade: Callable[[dict], dict] = lambda stored: stored) -> None:
    """Writes `config.json` the first time, and from then on requires the same.

    Args:
      as_dict: what decides the run's numbers, as JSON.
      upgrade: translates what an earlier version wrote.

    Raises:
      ValueError: naming every field that differs from the folder's, or if that is not JSON.
    """
    path = self.path / "config.json"
    if not path.exists():
      write_json_atomic(path, as_dict)
      return
    try:
      there = dict(leaves(upgrade(json.loads(path.read_text(encoding="utf-8")))))
    except ValueError as error:
      raise ValueError(f"{path} is damaged ({error}): give another --out") from error
    here = dict(leaves(json.loads(json.dumps(as_dict))))  # as it would be read back
    differing = [
        f"  {name}: {_shown(there, name)} in the folder, {_shown(here, name)} now"
        for name in there | here
        if name not in there or name not in here or there[name] != here[name]]
    if differing:
      raise ValueError(
          f"{self.path} holds a run of another configuration:\n" + "\n".join(differing)
          + "\nGive another --out for a new run, or the old values to resume this one.")


def _shown(fields: dict[str, Any], name: str) -> str:
  return json.dumps(fields[name]) if name in fields else "absent"


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _decoded(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _decoded(child) for key, child in value.items()}
  if isinstance(value, list):
    return [_decoded(child) for child in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class MetricsFile:
  """Rows of metrics, one JSON object a line; each has an integer "step".

  Floats come back bit-exact; those that are not finite are written as "nan", "inf" and "-inf",
  which JSON has no numbers for. The file is first touched by `append` or `truncate_after`.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = None

  def append(self, row: dict) -> None:
    """Writes a row out; killing the process afterwards does not lose it."""
    if self._file is None:
      self._drop_torn_line()
      self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
    self._file.write(json.dumps(_strict(row, str), allow_nan=False) + "\n")
    self._file.flush()

  def read(self) -> list[dict]:
    """All rows but a torn last one; none if there is no file.

    Raises:
      ValueError: if another line is not a JSON object, naming it.
    """
    return [row for row, _ in self._rows()]

  def truncate_after(self, step: int) -> None:
    """Drops the rows past a step, and a torn last line."""
    self.close()
    if self.path.exists():
      kept = [line for row, line in self._rows() if row["step"] <= step]
      write_text_atomic(self.path, "".join(kept))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def _rows(self) -> Iterator[tuple[dict, str]]:
    if not self.path.exists():
      return
    lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
      try:
        row = _decoded(json.loads(line))
        if not (isinstance(row, dict) and "step" in row and line.endswith("\n")):
          raise ValueError("not a whole row")
      except ValueError as error:
        if number == len(lines):
          return
        raise ValueError(f"line {number} of {self.path} is no row of metrics but {line[:80]!r}: "
                         "delete that line, or give another --out") from error
      yield row, line

  def _drop_torn_line(self) -> None:
    """What is appended must not continue the line that a killed process left unfinished."""
    if self.path.exists():
      with open(self.path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class Events:
  """TensorBoard's view of the rows of a `MetricsFile`.

  Event files cannot be cut at a step, so those of earlier processes are deleted and written anew.

  Args:
    folder: where the event files are; made if need be.
    rows: the kept rows of the run so far.
  """

  def __init__(self, folder: str | os.PathLike, rows: Iterable[dict] = ()):
    for old in pathlib.Path(folder).glob("events.out.tfevents.*"):
      with contextlib.suppress(FileNotFoundError):
        old.unlink()
    self._writer = tensorboardX.SummaryWriter(str(folder), flush_secs=10)
    for row in rows:
      self.append(row)

  def append(self, row: dict) -> None:
    """Adds a row's numbers at its "step", and at its "time" (Unix seconds) if it has one."""
    for name, value in row.items():
      value = value.item() if getattr(value, "shape", None) == () else value
      if name not in ("step", "time") and isinstance(value, int | float):
        self._writer.add_scalar(name, value, row["step"], walltime=row.get("time"))

  def close(self) -> None:
    """Writes out what is still held back."""
    self._writer.close()
