"""Checkpoints of a training run: written in the background, committed whole, verified when read.

A checkpoint is a folder `step_00000123`: what Orbax wrote, in `arrays/`, and a `manifest.json` with
the size and the hash of each file. It is built under another name and renamed last, so that a
process killed at any moment leaves the earlier checkpoints as they were. One process saves, from
any number of devices.
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
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from train.run_folder import fsync, write_text_atomic

_UNFINISHED = "tmp."  # prefix of what does not count and may be deleted at any time
_SHOWN = 5  # differing leaves that an error names

# Orbax logs the traceback of a failed write from its own threads; it is raised as CheckpointError.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname))


class CheckpointError(OSError):
  """A checkpoint could not be written, or none can be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found.

  Attributes:
    step: the step it was saved at.
    arrays: of the structure, shapes, dtypes and shardings asked for.
    extra: as given to `save`, after a trip through JSON.
    damaged: a message for each newer checkpoint that was passed over.
  """

  step: int
  arrays: Any
  extra: dict
  damaged: list[str]


def _named(tree: Any) -> dict[str, Any]:
  """The leaves by their dotted path, which is what a checkpoint knows of the tree's structure."""
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
  """Without the arrays of no elements, which Orbax refuses and which have nothing to store."""
  return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _name(step: int) -> str:
  return f"step_{step:08d}"


def _steps(folder: pathlib.Path) -> list[int]:
  """Of everything that is named like a checkpoint, whether or not it is intact; ascending."""
  matches = (re.fullmatch(r"step_(\d{8,})", path.name) for path in folder.glob("step_*"))
  return sorted(int(match[1]) for match in matches if match)


def _hash(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "blake2b").hexdigest()


def _render(body: dict) -> str:
  """A manifest's text, which vouches for itself: it is intact if it renders to what it was."""
  digest = hashlib.blake2b(json.dumps(body, sort_keys=True).encode()).hexdigest()
  return json.dumps({"body": body, "blake2b": digest}, indent=1, sort_keys=True) + "\n"


def _manifest(checkpoint: pathlib.Path) -> dict:
  """The manifest's body.

  Raises:
    ValueError: saying what is wrong with it, if it is not intact.
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
  """`_manifest` of a checkpoint whose every file is as it was written.

  Raises:
    ValueError: naming the first that is not.
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


def _check_same_tree(checkpoint: pathlib.Path, there: dict[str, str], here: dict[str, str]):
  differing = [
      f"  {name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} now"
      for name in there | here if there.get(name) != here.get(name)]
  if differing:
    more = len(differing) - _SHOWN
    raise ValueError(
        f"{checkpoint} is of another model or optimizer:\n" + "\n".join(differing[:_SHOWN])
        + (f"\n  and {more} more\n" if more > 0 else "\n")
        + "Use the configuration that it was saved with, or another folder.")


def _read_arrays(checkpoint: pathlib.Path, leaves: dict[str, Any]) -> dict[str, jax.Array]:
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
      for name, leaf in leaves.items()}
  # Made empty, then overwritten by what is stored.
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
  """What went wrong, in a line; TensorStore's many have the system's own reason at their end."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"


def read_newest(folder: str | os.PathLike, abstract: Any) -> Restored | None:
  """The newest intact checkpoint of a folder, which is left as it is; None if it has none.

  Args:
    folder: of a `Checkpoints`, maybe another process'.
    abstract: a pytree of `jax.ShapeDtypeStruct` as was saved, with the shardings wanted; the first
      device where there are none.

  Raises:
    ValueError: if it holds another tree, naming the first leaves that differ.
    CheckpointError: if every checkpoint is damaged, saying how.
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
    return Restored(manifest["step"], jax.tree.unflatten(jax.tree.structure(abstract), ordered),
                    manifest["extra"], damaged)
  if damaged:
    raise CheckpointError(
        f"every checkpoint in {folder} is damaged:\n  " + "\n  ".join(damaged)
        + "\nBring one back from a copy, or delete them to begin anew.")
  return None


class Checkpoints:
  """The checkpoints of a folder; one process at a time may have it (see `RunFolder`).

  Args:
    folder: made if need be; what killed saves left in it is deleted.
    keep: how many of the newest stay.

  Raises:
    CheckpointError: if the folder cannot be made or cleaned up.
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
    """Saves in the background, once the save before is done and the arrays are on the host.

    Args:
      step: not yet saved.
      arrays: a pytree of jax.Array, which may be donated as soon as this returns.
      extra: what else a resumed run needs, as JSON.

    Raises:
      CheckpointError: if the save before failed (then this one is not begun), or this one at once.
      ValueError: if the step is there already.
    """
    self.wait()
    if (self.folder / _name(step)).exists():
      raise ValueError(f"{self.folder} has a checkpoint of step {step} already")
    leaves = _named(arrays)
    body = {"step": step, "extra": json.loads(json.dumps(extra)), "leaves": _described(leaves)}
    unfinished = self.folder / f"{_UNFINISHED}{_name(step)}"
    try:
      # A failed save's last writes may have outlived its clean-up.
      shutil.rmtree(unfinished, ignore_errors=True)
      (unfinished / "arrays").mkdir(parents=True)
      # Orbax has copied every array to the host when this is done; only writing is left. In the
      # thread, since the caller's may have an event loop of its own (a notebook's has).
      writes = self._thread.submit(asyncio.run, self._handler.async_save(
          epath.Path(unfinished / "arrays"), args=ocp.args.StandardSave(_stored(leaves)))).result()
    except Exception as error:
      raise self._failure(step, unfinished, error) from error
    self._saving = self._thread.submit(self._finish, unfinished, body, writes or [])

  def restore(self, abstract: Any) -> Restored | None:
    """`read_newest`, which see; damaged checkpoints newer than it are renamed `step_*.damaged`."""
    self.wait()
    restored = read_newest(self.folder, abstract)
    if restored is not None:
      for step in _steps(self.folder):
        if step > restored.step:
          self._set_aside(step)
    return restored

  def steps(self) -> list[int]:
    """Those committed, ascending; their manifests are intact, their other files not looked at."""
    return [step for step in _steps(self.folder) if self._is_committed(step)]

  def wait(self) -> None:
    """Returns when nothing is being saved.

    Raises:
      CheckpointError: once, if the last save failed.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self) -> None:
    """`wait`, then end the background thread."""
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
    """Nothing that a manifest vouches for may still be on its way to the disk."""
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
      # Renamed first: a half deleted checkpoint must not look like a damaged one.
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
        f"are untouched; {newest}. Make room or mend the folder, then resume the run.")
