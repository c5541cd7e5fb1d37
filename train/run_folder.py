"""The folder of a run: exclusive access, its configuration, metrics and TensorBoard events."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import tensorboardX


def fsync(path: pathlib.Path) -> None:
  """Waits until a file's bytes, or a folder's entries, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
  """Writes a file such that a reader sees all of it or none, even if the writer is killed."""
  path = pathlib.Path(path)
  unfinished = path.with_name(f"{path.name}.tmp")
  with open(unfinished, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  unfinished.replace(path)
  fsync(path.parent)


def _strict(value: Any, replace: Callable[[float], Any]) -> Any:
  """Returns `value` with lists for arrays and tuples, and with non-finite floats replaced.

  JSON has no representation of these.
  """
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, dict):
    return {key: _strict(child, replace) for key, child in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(child, replace) for child in value]
  return replace(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_data(obj: Any) -> Any:
  """Returns an object as `write_json_atomic` writes it."""
  return _strict(obj, lambda number: None)


def write_json_atomic(path: str | os.PathLike, obj: Any) -> Any:
  """Writes an object as indented JSON by `write_text_atomic`, with null for NaN and infinities.

  Returns:
    The object as it was written.
  """
  strict = json_data(obj)
  write_text_atomic(path, json.dumps(strict, indent=2, allow_nan=False) + "\n")
  return strict


def read_json_object(path: str | os.PathLike) -> dict:
  """Returns the JSON object in a file.

  Raises:
    ValueError: if the file cannot be read, or holds anything else. The message names it.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} should hold a JSON object, and holds a {type(value).__name__}")
  return value


def read_run_json(path: str | os.PathLike, **fields: type) -> dict:
  """Returns the JSON object in a file of a run's folder, which must have certain fields.

  Args:
    path: the file.
    **fields: the type of every field that is needed.

  Raises:
    ValueError: if the file cannot be read, or lacks a field of that type. The message names it.
  """
  value = read_json_object(path)
  for name, kind in fields.items():
    if not isinstance(value.get(name), kind):
      found = f"a {type(value[name]).__name__}" if name in value else "absent"
      raise ValueError(f"{path} is damaged or belongs to something else: {name!r} should be a "
                       f"{kind.__name__}, and is {found}. Restore the file from a copy, or use "
                       "another folder")
  return value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted name and value of every scalar of nested dicts and lists.

  Empty dicts and lists count as scalars.
  """
  if isinstance(value, dict | list | tuple) and value:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
      yield from leaves(child, f"{name}.{key}" if name else str(key))
  else:
    yield name, value


# What a run's folder may hold before its first checkpoint.
_BEFORE_CHECKPOINT = {
    "lock", "config.json", "tokenizer.json", "huggingface", "mtp_modules", "documents.jsonl",
    "checkpoints", "metrics.jsonl", "evaluations.jsonl", "completions.jsonl", "events", "cost",
    "profile", "trackers.json", "wandb"}

# Any of these shows that a folder holds a run, a study or results.
_MARKS = {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl", "results.json", "parts",
          "runs"}


def _is_preparation(path: pathlib.Path) -> bool:
  """Whether a run's folder may hold an entry, which may be a folder, before any training."""
  if path.is_dir() and not path.is_symlink():
    return path.name in _BEFORE_CHECKPOINT - {"checkpoints"} or (
        not path.name.startswith("step_") and all(map(_is_preparation, path.iterdir())))
  return path.name in _BEFORE_CHECKPOINT and not (
      path.name == "metrics.jsonl" and path.stat().st_size)


class RunFolder:
  """A run's folder, created if it does not exist, and locked for other processes.

  It stays locked until `close` or the end of this process. A run that is refused before it has
  trained anything leaves nothing: `close` then removes what has been written to a folder that held
  no run before.

  Attributes:
    path: the folder.

  Raises:
    ValueError: if the folder cannot be created, written to or locked, or is in use by another
      process.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    try:
      if self.path.exists() and not self.path.is_dir():
        raise ValueError(f"the run's folder {self.path} is a file: give another --out")
      self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
      self.path.mkdir(parents=True, exist_ok=True)
      self._before = set(os.listdir(self.path))
      self._lock = self._open_lock()
    except OSError as error:
      raise ValueError(f"the run's folder {self.path} cannot be made or written to "
                       f"({error.strerror}): change its permissions, or give another --out"
                       ) from error

  def _open_lock(self) -> TextIO:
    while True:
      lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115
      # Otherwise worker processes that outlive a killed run would keep its folder locked.
      os.register_at_fork(after_in_child=lock.close)
      try:
        self._acquire(lock)
        # The process that held the lock before may have deleted the file since it was opened.
        with contextlib.suppress(FileNotFoundError):
          if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / "lock")):
            return lock
      except BaseException:
        lock.close()
        raise
      lock.close()

  def _acquire(self, lock: TextIO) -> None:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      lock.seek(0)
      raise ValueError(
          f"the run's folder {self.path} is in use by process {lock.read().strip() or '?'}: "
          "wait for it or stop it, or give another --out") from error
    except OSError as error:
      raise ValueError(f"the run's folder {self.path} cannot be locked ({error.strerror}): give an "
                       "--out on a file system with locks") from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()

  def close(self) -> None:
    """Unlocks the folder, so that other processes can use it.

    If nothing has been trained, a folder that held no run before is left as it was: what has been
    written to it is removed, and so is the folder itself if it was made for this object.
    """
    if not self._lock.closed:
      with contextlib.suppress(OSError):
        self._remove_preparations()
    self._lock.close()

  def _remove_preparations(self) -> None:
    new = set(os.listdir(self.path)) - self._before
    claimed = not self._before & _MARKS and all(
        _is_preparation(self.path / name) for name in new)
    if new != {"lock"} and not claimed:
      return
    for name in sorted(new, key="lock".__eq__):  # the lock last
      path = self.path / name
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink()
    for folder in self._created:
      folder.rmdir()

  def check_config(
      self, as_dict: dict, upgrade: Callable[[dict], dict] = lambda stored: stored) -> None:
    """Writes `config.json` if there is none; otherwise requires the configuration to be the same.

    A run that was refused or stopped before its first checkpoint does not claim the folder: its
    `config.json` is replaced.

    Args:
      as_dict: everything that determines the run's results, as JSON data.
      upgrade: translates the content of a `config.json` that an earlier version wrote.

    Raises:
      ValueError: if a field differs from the folder's; the message names every such field, unless
        the folder holds something of another kind, such as a study. Also if `config.json` is not
        JSON.
    """
    path = self.path / "config.json"
    if not path.exists():
      write_json_atomic(path, as_dict)
      return
    try:
      content = upgrade(read_json_object(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f"{path} is damaged ({error}): give another --out") from error
    if _kind(content) != _kind(as_dict):
      raise ValueError(f"{self.path} holds {_kind(content)}, where this command would write "
                       f"{_kind(as_dict)}: give another --out")
    stored = dict(leaves(content))
    asked = dict(leaves(json.loads(json.dumps(as_dict))))  # as it would be read back
    differing = [
        f"  {name}: {_shown(stored, name)} in the folder, {_shown(asked, name)} now"
        for name in stored | asked
        if name not in stored or name not in asked or stored[name] != asked[name]]
    if differing and {"config", "rl"} & content.keys() and not self.has_begun():
      write_json_atomic(path, as_dict)
    elif differing:
      raise ValueError(
          f"{self.path} holds a run with another configuration:\n" + "\n".join(differing)
          + "\nGive another --out for a new run, or the old values to resume this one.")

  def has_begun(self) -> bool:
    """Whether the folder holds a checkpoint, or anything that a run only writes after one."""
    return (bool(set(os.listdir(self.path)) - _BEFORE_CHECKPOINT)
            or any(self.path.glob("checkpoints/step_*")))


def _kind(content: dict[str, Any]) -> str:
  """Returns in words what a `config.json` belongs to, which its top-level keys tell."""
  if "study" in content:
    return f"the study {content['study']}"
  if "results_of" in content:
    return f"the results of {content['results_of']}"
  for key, kind in _KINDS.items():
    if key in content:
      return kind
  return "something unknown"


def _shown(fields: dict[str, Any], name: str) -> str:
  return json.dumps(fields[name]) if name in fields else "absent"


_KINDS = {"requested": "a stage of a pipeline, such as a base for RL", "rl": "a run of RL",
          "config": "a training run", "model_type": "a model in Hugging Face's format"}
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _decoded(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _decoded(child) for key, child in value.items()}
  if isinstance(value, list):
    return [_decoded(child) for child in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class MetricsFile:
  """A file of metrics with one JSON object per line, a row; every row has an integer "step".

  Floats are read back bit-exactly. NaN and infinities, for which JSON has no numbers, are written
  as "nan", "inf" and "-inf". The file is not created or changed before the first call of `append`
  or `truncate_after`.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = None

  def append(self, row: dict) -> None:
    """Appends a row, which is not lost if the process is killed afterwards."""
    if self._file is None:
      self._drop_torn_line()
      self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
    self._file.write(json.dumps(_strict(row, str), allow_nan=False) + "\n")
    self._file.flush()

  def read(self) -> list[dict]:
    """Returns all rows except an incomplete last one; no rows if there is no file.

    Raises:
      ValueError: if another line is not a row; the message gives its number.
    """
    return [row for row, _ in self._rows()]

  def truncate_after(self, step: int) -> None:
    """Drops the rows past a step, and an incomplete last line."""
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
          raise ValueError("not a complete row")
      except ValueError as error:
        if number == len(lines):
          return
        raise ValueError(f"line {number} of {self.path} is not a row of metrics: {line[:80]!r}. "
                         "Delete that line, or give another --out") from error
      yield row, line

  def _drop_torn_line(self) -> None:
    """Removes a last line that a killed process left unfinished, so that no row is added to it."""
    if self.path.exists():
      with open(self.path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class Events:
  """Writes the rows of a `MetricsFile` as TensorBoard events.

  Event files cannot be truncated at a step, so those of earlier processes are deleted and their
  rows are written again.

  Args:
    folder: folder of the event files, created if it does not exist.
    rows: the rows of the run so far, as they were kept in its `MetricsFile`.
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
    """Writes out events that are still buffered, and closes the file."""
    self._writer.close()
