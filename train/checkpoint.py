"""Checkpoints of a training run: written in the background, committed atomically, verified on read.

A checkpoint is a folder `step_00000123` with Orbax's files in `arrays/` and a `manifest.json` that
lists the size and the hash of every file. It is written under a temporary name and renamed last, so
that a process killed at any moment leaves the earlier checkpoints intact. A single process saves,
from any number of devices.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from train.run_folder import fsync, write_text_atomic

_UNFINISHED = "tmp."  # prefix of folders that are not checkpoints and may be deleted at any time
_SHOWN = 5  # how many differing leaves an error message lists
# Orbax logs the traceback of a failed write from its own threads. That would only repeat the
# failure, which is raised as a CheckpointError.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname))
# On a full disk, the writes of all arrays fail, and asyncio would log every error but the first.
logging.getLogger("asyncio").addFilter(
    lambda record: not all(part in record.getMessage() for part in ("never retrieved", "orbax")))


def _ignore_closed_loops(hook: Callable[[Any], Any] = sys.unraisablehook) -> None:
  """Keeps TensorStore from printing a traceback for each write that ends after a failed save.

  It notifies the event loop of that save, which Orbax has closed by then.
  """
  def filtered(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  sys.unraisablehook = filtered


_ignore_closed_loops()


class CheckpointError(OSError):
  """A checkpoint could not be written, or none can be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found.

  Attributes:
    step: the step at which the checkpoint was saved.
    arrays: the saved pytree, with the structure, shapes, dtypes and shardings asked for.
    extra: the dict given to `save`, after a round trip through JSON.
    damaged: a message for each newer checkpoint that was skipped because it is damaged.
  """

  step: int
  arrays: Any
  extra: dict
  damaged: list[str]


def _named(tree: Any) -> dict[str, Any]:
  """Returns the leaves by dotted path, all that a checkpoint records of the tree's structure."""
  named = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if name in named:
      raise ValueError(f"two leaves are both called {name!r}: keys must not contain dots")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
      raise ValueError(f"leaf {name!r} is a {leaf.dtype}: save its jax.random.key_data")
    named[name] = leaf
  return named


def _described(leaves: dict[str, Any]) -> dict[str, str]:
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _stored(leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns the leaves that have elements: Orbax refuses empty arrays, which have no content."""
  return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _name(step: int) -> str:
  return f"step_{step:08d}"


def _steps(folder: pathlib.Path) -> list[int]:
  """Returns, ascending, the steps of all folders named like a checkpoint, intact or not."""
  matches = (re.fullmatch(r"step_(\d{8,})", path.name) for path in folder.glob("step_*"))
  return sorted(int(match[1]) for match in matches if match)


def _hash(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "blake2b").hexdigest()


def _render(body: dict) -> str:
  """Returns a manifest's text with a hash of its body: intact if rendering it reproduces it."""
  digest = hashlib.blake2b(json.dumps(body, sort_keys=True).encode()).hexdigest()
  return json.dumps({"body": body, "blake2b": digest}, indent=1, sort_keys=True) + "\n"


def _manifest(checkpoint: pathlib.Path) -> dict:
  """Returns the body of a checkpoint's manifest.

  Raises:
    ValueError: if the manifest is not intact; the message says what is wrong with it.
  """
  path = checkpoint / "manifest.json"
  try:
    text = path.read_text(encoding="utf-8")
    body = json.loads(text)["body"]
    intact = text == _render(body)
  except OSError as error:
    raise ValueError(f"manifest.json cannot be read ({error.strerror})") from error
  except (ValueError, TypeError, KeyError):
    intact = False
  if not intact:
    raise ValueError("manifest.json is damaged")
  return body


def _verified_manifest(checkpoint: pathlib.Path) -> dict:
  """Returns the body of a checkpoint's manifest after checking every file against it.

  Raises:
    ValueError: if a file is not as it was written; the message names the first one.
  """
  manifest = _manifest(checkpoint)
  for name, expected in manifest["files"].items():
    try:
      size = (checkpoint / name).stat().st_size
      if size != expected["size"]:
        raise ValueError(f"{name} has {size} bytes instead of {expected['size']}")
      if _hash(checkpoint / name) != expected["blake2b"]:
        raise ValueError(f"{name} has been altered: its hash is not the manifest's")
    except OSError as error:
      raise ValueError(f"{name} cannot be read ({error.strerror})") from error
  return manifest


def _check_same_tree(checkpoint: pathlib.Path, stored: dict[str, str], asked: dict[str, str]):
  differing = [
      f"  {name}: {stored.get(name, 'absent')} in the checkpoint, {asked.get(name, 'absent')} now"
      for name in stored | asked if stored.get(name) != asked.get(name)]
  if differing:
    more = len(differing) - _SHOWN
    raise ValueError(
        f"{checkpoint} was saved with another model or optimizer:\n" + "\n".join(differing[:_SHOWN])
        + (f"\n  and {more} more\n" if more > 0 else "\n")
        + "Use the configuration that it was saved with, or another folder.")


def _read_arrays(checkpoint: pathlib.Path, leaves: dict[str, Any]) -> dict[str, jax.Array]:
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
      for name, leaf in leaves.items()}
  # Arrays without elements are not stored, so they are created here.
  arrays = {name: jax.numpy.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            for name, leaf in leaves.items() if not leaf.size}
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    try:
      return arrays | handler.restore(
          epath.Path((checkpoint / "arrays").absolute()),
          args=ocp.args.StandardRestore(_stored(leaves)))
    except Exception as error:
      raise CheckpointError(
          f"{checkpoint} is intact, but Orbax cannot read it: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
  """Returns the cause of an error in one line.

  TensorStore's messages have many lines; the operating system's error code is near their end.
  """
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"


def read_newest(folder: str | os.PathLike, abstract: Any) -> Restored | None:
  """Returns the newest intact checkpoint of a folder, or None if there is no checkpoint at all.

  The folder is not changed. Newer checkpoints that are damaged are named on stderr.

  Args:
    folder: the folder of a `Checkpoints`, which another process may be using.
    abstract: a pytree of `jax.ShapeDtypeStruct` with the saved structure, shapes and dtypes, and
      the shardings wanted; leaves without a sharding go to the first device.

  Raises:
    ValueError: if the checkpoint holds another tree; the message names the first differing leaves.
    CheckpointError: if every checkpoint is damaged; the message says how.
  """
  folder, leaves = pathlib.Path(folder), _named(abstract)
  damaged = []
  for step in reversed(_steps(folder)):
    checkpoint = folder / _name(step)
    try:
      manifest = _verified_manifest(checkpoint)
    except ValueError as error:
      damaged.append(f"{checkpoint}: {error}")
      continue
    _check_same_tree(checkpoint, manifest["leaves"], _described(leaves))
    arrays = _read_arrays(checkpoint, leaves)
    ordered = [arrays[name] for name in leaves]
    for message in damaged:
      print(f"skipped a damaged checkpoint: {message}; step {step} is used instead",
            file=sys.stderr, flush=True)
    return Restored(manifest["step"], jax.tree.unflatten(jax.tree.structure(abstract), ordered),
                    manifest["extra"], damaged)
  if damaged:
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged:\n  " + "\n  ".join(damaged)
        + "\nRestore one from a copy, or delete them to start over.")
  return None


class Checkpoints:
  """The checkpoints in a folder, which one process at a time may use (see `RunFolder`).

  Args:
    folder: where the checkpoints are; created if it does not exist. Leftovers of saves that were
      killed are deleted.
    keep: how many of the newest checkpoints are kept, at least 1.

  Raises:
    CheckpointError: if the folder cannot be created or cleaned up.
    ValueError: if `keep` is below 1.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int):
    if keep < 1:
      raise ValueError(f"keep={keep} must be at least 1")
    self.folder, self.keep = pathlib.Path(folder).absolute(), keep
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      for leftover in self.folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    except OSError as error:
      raise CheckpointError(f"{self.folder} cannot be used: {_reason(error)}") from error
    self._handler = ocp.StandardCheckpointHandler()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving: concurrent.futures.Future | None = None

  def save(self, step: int, arrays: Any, extra: dict) -> None:
    """Saves in the background; returns once the previous save is done and the host has the arrays.

    Args:
      step: the step to save, of which there is no checkpoint yet.
      arrays: a pytree of jax.Array, which may be donated as soon as this returns.
      extra: anything else that a resumed run needs, as JSON data.

    Raises:
      CheckpointError: if the previous save failed (this one is then not started), or if this one
        fails while the arrays are copied to the host.
      ValueError: if the step has a checkpoint already, or if `arrays` holds typed random keys or
        dict keys with dots that make two names equal.
    """
    self.wait()
    if (self.folder / _name(step)).exists():
      raise ValueError(f"{self.folder} has a checkpoint of step {step} already")
    leaves = _named(arrays)
    body = {"step": step, "extra": json.loads(json.dumps(extra)), "leaves": _described(leaves)}
    unfinished = self.folder / f"{_UNFINISHED}{_name(step)}"
    try:
      # Writes of a failed save may still have created files after its clean-up.
      shutil.rmtree(unfinished, ignore_errors=True)
      (unfinished / "arrays").mkdir(parents=True)
      # When this returns, Orbax has copied every array to the host and only writing is left. It
      # runs in the background thread, because the caller's thread may already have an event loop
      # (a notebook's has).
      writes = self._thread.submit(asyncio.run, self._handler.async_save(
          epath.Path(unfinished / "arrays"), args=ocp.args.StandardSave(_stored(leaves)))).result()
    except Exception as error:
      raise self._failure(step, unfinished, error) from error
    self._saving = self._thread.submit(self._finish, unfinished, body, writes or [])

  def restore(self, abstract: Any) -> Restored | None:
    """Returns `read_newest` of the folder, and renames newer, damaged ones `step_*.damaged`."""
    self.wait()
    restored = read_newest(self.folder, abstract)
    if restored is not None:
      for step in _steps(self.folder):
        if step > restored.step:
          self._set_aside(step)
    return restored

  def steps(self) -> list[int]:
    """Returns the committed steps, ascending. Manifests are verified, the other files are not."""
    return [step for step in _steps(self.folder) if self._is_committed(step)]

  def check(self) -> None:
    """Raises CheckpointError if the last save has failed; does not wait for it."""
    if self._saving is not None and self._saving.done():
      self.wait()

  def wait(self) -> None:
    """Blocks until no save is in progress.

    Raises:
      CheckpointError: if the last save failed; raised once only.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self) -> None:
    """Waits for a save in progress, then ends the background thread.

    Raises:
      CheckpointError: if that save failed.
    """
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._handler.close()

  def _finish(self, unfinished: pathlib.Path, body: dict, writes: Sequence[Any]) -> None:
    step = body["step"]
    try:
      for write in writes:
        write.result()
      self._handler.finalize(epath.Path(unfinished / "arrays"))
      self._commit(unfinished, body)
    except Exception as error:
      raise self._failure(step, unfinished, error) from error
    try:
      self._delete_oldest()
    except OSError as error:
      raise CheckpointError(f"step {step} is saved in {self.folder}, but an older checkpoint could "
                            f"not be deleted: {_reason(error)}") from error

  def _commit(self, unfinished: pathlib.Path, body: dict) -> None:
    """Flushes all files to the disk, then writes the manifest, then renames the folder.

    The manifest comes after the flush, because nothing that it lists may still be unwritten.
    """
    files = {}
    for path in sorted(unfinished.rglob("*")):
      fsync(path)
      if path.is_file():
        files[str(path.relative_to(unfinished))] = {
            "size": path.stat().st_size, "blake2b": _hash(path)}
    write_text_atomic(unfinished / "manifest.json", _render(body | {"files": files}))
    unfinished.rename(self.folder / _name(body["step"]))
    fsync(self.folder)

  def _delete_oldest(self) -> None:
    for step in self.steps()[:-self.keep]:
      # Renamed first, so that a half-deleted checkpoint is not taken for a damaged one.
      doomed = self.folder / f"{_UNFINISHED}old_{_name(step)}"
      (self.folder / _name(step)).rename(doomed)
      shutil.rmtree(doomed)

  def _set_aside(self, step: int) -> None:
    aside = self.folder / f"{_name(step)}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    (self.folder / _name(step)).rename(aside)

  def _is_committed(self, step: int) -> bool:
    try:
      _manifest(self.folder / _name(step))
    except ValueError:
      return False
    return True

  def _failure(self, step: int, unfinished: pathlib.Path, error: Exception) -> CheckpointError:
    shutil.rmtree(unfinished, ignore_errors=True)
    steps = self.steps()
    newest = f"the newest good one is step {steps[-1]}" if steps else "there is none yet"
    return CheckpointError(
        f"step {step} could not be saved in {self.folder} ({_reason(error)}). Earlier checkpoints "
        f"are untouched; {newest}. Free space or repair the folder, then resume the run.")
