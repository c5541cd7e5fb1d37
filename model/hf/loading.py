"""Loading Hugging Face folders of DeepSeek-V3, DeepSeek-V2, Llama, Qwen2 and Qwen3.

Everything about a folder that can be checked without reading weights is checked first, and all
problems are reported together. Then every tensor goes straight to its place, one slice of a file at
a time: slices are dequantised and transposed on the device, and written into preallocated (stacked,
sharded) arrays, which are updated in place.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.config import ModelConfig
from model.hf import config as hf_config
from model.hf import files as hf_files
from model.hf import layout as hf_layout
from model.hf.config import FP8_BLOCK
from model.hf.reader import CheckpointError
from model.variables import abstract_variables, shardings

# The size, in float32, of the slices in which tensors are read, and the size up to which
# `_Target` treats an array as small.
_CHUNK_BYTES = 16 << 20
_SCALE = "_scale_inv"
_FORMATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def load(
    path, *, dtype=None, mesh: jax.sharding.Mesh | None = None, rules: Any = None,
) -> tuple[ModelConfig, dict]:
  """Loads a folder of `config.json` and safetensors in float32, bfloat16, float16 or V3's FP8.

  The peak of host memory is the size of the arrays plus tens of megabytes.

  Args:
    path: the folder.
    dtype: format of the parameters, and of products in the returned config; None keeps the folder's
      format (bfloat16 if that is FP8). The balancing bias is float32 in any case.
    mesh: devices that the arrays are sharded over; None puts them on the default device.
    rules: maps logical axes to axes of the mesh; see `model.shardings`.

  Returns:
    The architecture, and its variables, a tree like that of `model.init`.

  Raises:
    CheckpointError: if anything is wrong with the folder; it lists all problems. It is raised
      before anything large is allocated, except for values that are not finite or too large, and
      for copies that differ, which only show when weights are read.
  """
  folder = pathlib.Path(path)
  cfg, layout, stored, is_fp8 = _check(folder)
  main = stored["model.embed_tokens.weight"].dtype
  name = jnp.dtype(dtype).name if dtype is not None else _FORMATS[main]
  if dtype is None and is_fp8:
    name = "bfloat16"
  cfg = hf_config.with_dtype(cfg, name)

  problems: list[str] = []
  target = _Target(cfg, mesh, rules)
  for tensor in layout.tensors:
    _read_tensor(tensor, stored, target, problems)
  for copy, original in layout.copies.items():
    if copy in stored and not _same(stored[copy], stored[original]):
      problems.append(f"{copy} differs from {original}, of which it should be a copy")
  if problems:
    raise CheckpointError(folder, problems)
  return cfg, target.variables()


def _check(folder: pathlib.Path):
  """Checks what headers and JSON can show, and raises CheckpointError if anything is wrong.

  Returns:
    The architecture, its layout, the stored tensors by name, and whether matrices may be in FP8.
  """
  problems: list[str] = []
  if not os.path.isdir(folder):
    raise CheckpointError(folder, ["it is not a folder"])
  config = hf_files.read_json(folder / "config.json", problems)
  stored = hf_files.find_tensors(folder, problems)
  stored = {name: tensor for name, tensor in stored.items() if not _IGNORED.search(name)}
  cfg = hf_config.parse(config, problems) if config is not None else None
  is_fp8 = config is not None and hf_config.is_fp8(config, problems)
  layout = None
  if cfg is not None and stored:
    declared, cfg = cfg.mtp, _without_absent_mtp(cfg, stored)
    if hf_layout.num_tensors(cfg) > 2 * len(stored) + 1000:
      problems.append(f"config.json describes about {hf_layout.num_tensors(cfg)} tensors, "
                      f"but the folder contains {len(stored)}")
    else:
      layout = hf_layout.layout(cfg)
      _compare(layout, stored, is_fp8, problems)
  if problems:
    raise CheckpointError(folder, list(dict.fromkeys(problems)))
  if declared and not cfg.mtp:
    logging.getLogger(__name__).warning(
        "%s declares MTP modules but has no weights for them: they are left out", folder)
  return cfg, layout, stored, is_fp8


def _without_absent_mtp(cfg: ModelConfig, stored: dict) -> ModelConfig:
  """Returns the config without MTP if the folder has no weights for it.

  In folders that transformers writes, config.json declares an MTP layer that is not there.
  """
  prefix = re.compile(rf"model\.layers\.({cfg.num_layers}|{cfg.num_layers + 1})\.")
  absent = cfg.mtp and not any(prefix.match(name) for name in stored)
  return dataclasses.replace(cfg, mtp=None) if absent else cfg


def _compare(layout, stored, is_fp8: bool, problems: list[str]) -> None:
  """Appends a problem for every tensor that is missing, unknown, or of a wrong shape or type."""
  expected = {tensor.name: tensor for tensor in layout.tensors}
  scales = {name + _SCALE for name, tensor in expected.items() if tensor.quantizable}
  originals = {copy: expected[original] for copy, original in layout.copies.items()}
  problems.extend(f"{name} is missing" for name in expected if name not in stored)
  # Any tensor may be in float32; the others must have one 16-bit format in common.
  halves = collections.Counter(found.dtype for found in stored.values()
                               if found.dtype in ("BF16", "F16"))
  usual = {"F32"} | {dtype for dtype, _ in halves.most_common(1)}
  for name, found in stored.items():
    tensor = expected.get(name) or originals.get(name)
    if tensor is None:
      if not (is_fp8 and name in scales):
        problems.append(f"{name} is not part of this architecture")
      continue
    if found.shape != tensor.shape:
      problems.append(f"{name} has shape {list(found.shape)}; by config.json it should be "
                      f"{list(tensor.shape)}")
    if found.dtype == "F8_E4M3" and is_fp8 and tensor.quantizable:
      _compare_scale(name, tensor, stored, problems)
    elif found.dtype not in usual:
      allowed = usual | ({"F8_E4M3"} if is_fp8 and tensor.quantizable else set())
      problems.append(f"{name} has type {found.dtype}; it should be "
                      + " or ".join(sorted(allowed)))
    elif name + _SCALE in stored:
      problems.append(f"{name} has type {found.dtype}, but the folder contains scales for it")


def _compare_scale(name, tensor, stored, problems) -> None:
  blocks = tuple(-(-size // FP8_BLOCK) for size in tensor.shape)
  scale = stored.get(name + _SCALE)
  if scale is None:
    problems.append(f"{name}{_SCALE} is missing")
  elif scale.dtype != "F32" or scale.shape != blocks:
    problems.append(f"{name}{_SCALE} is {scale.dtype} {list(scale.shape)}; it should be F32 "
                    f"{list(blocks)}")


# Reading the weights.


class _Target:
  """The variables that are being filled.

  A small array is assembled on the host, and moved to its devices when it is complete. For a large
  one every device has its part from the beginning, and updates it in place. That needs a compiled
  step for every type of tensor, which would not pay off for small arrays.
  """

  def __init__(self, cfg: ModelConfig, mesh, rules):
    abstract = abstract_variables(cfg)
    self.shapes, self.tree = jax.tree.flatten(abstract)
    paths = jax.tree_util.tree_flatten_with_path(abstract)[0]
    self.number = {tuple(key.key for key in path): i for i, (path, _) in enumerate(paths)}
    self.shardings = _shardings(cfg, self.shapes, mesh, rules)
    self.indices = [sharding.addressable_devices_indices_map(shape.shape)
                    for sharding, shape in zip(self.shardings, self.shapes, strict=True)]
    small = lambda shape: shape.size * shape.dtype.itemsize <= _CHUNK_BYTES
    self.staged = {number: np.zeros(shape.shape, shape.dtype)
                   for number, shape in enumerate(self.shapes) if small(shape)}
    self.pieces = {
        number: {device: jnp.zeros(_extent(index, shape.shape), shape.dtype, device=device)
                 for device, index in self.indices[number].items()}
        for number, shape in enumerate(self.shapes) if not small(shape)}

  def write(self, piece: hf_layout.Piece, values: np.ndarray, scales: np.ndarray | None) -> None:
    """Writes values to the place of a piece.

    Args:
      piece: the piece, or the part of it that `_run` returns for some rows of its view.
      values: those rows of the stored tensor, in the shape of the view.
      scales: float32, for values in FP8: a row of block scales for each row of the stored matrix.
    """
    number = self.number[piece.path]
    shape = self.shapes[number].shape
    if number in self.staged:
      whole = self.staged[number]
      whole[piece.index()] = _to_block(
          np, values, scales, whole.dtype, whole.ndim, piece.axes, piece.take)
      return
    for device, index in self.indices[number].items():
      cut = _intersect(piece, index, shape)
      if cut is None:
        continue
      start, take = cut
      self.pieces[number][device] = _place(
          self.pieces[number][device], values, scales, np.array(start, np.int32),
          axes=piece.axes, take=take)

  def limit(self, path: tuple[str, ...]) -> float:
    """Returns the largest finite value in the format of the array at `path`."""
    return float(jnp.finfo(self.shapes[self.number[path]].dtype).max)

  def variables(self) -> dict:
    """Returns the tree of variables, once they have been filled."""
    arrays = []
    for number, (shape, sharding) in enumerate(zip(self.shapes, self.shardings, strict=True)):
      if number in self.staged:
        arrays.append(jax.make_array_from_callback(
            shape.shape, sharding, self.staged[number].__getitem__))
      else:
        pieces = [self.pieces[number][device] for device in self.indices[number]]
        arrays.append(
            jax.make_array_from_single_device_arrays(shape.shape, sharding, pieces))
    return jax.tree.unflatten(self.tree, arrays)


def _shardings(cfg, shapes, mesh, rules) -> list[jax.sharding.Sharding]:
  if mesh is not None:
    return jax.tree.leaves(shardings(cfg, mesh, rules))
  device = jax.config.jax_default_device or jax.local_devices()[0]
  return [jax.sharding.SingleDeviceSharding(device)] * len(shapes)


def _extent(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _intersect(piece: hf_layout.Piece, index: tuple[slice, ...], shape: tuple[int, ...]):
  """Intersects a piece with the part of an array that a device has.

  Returns:
    The index in the device's part at which the piece begins, and the ranges of its view that belong
    there; None if the two do not overlap.
  """
  lengths, begins, take = piece.block_shape(), [], list(piece.take)
  view_axis = {axis: i for i, axis in enumerate(piece.axes)}
  for axis, (at, length, part, size) in enumerate(
      zip(piece.start, lengths, index, shape, strict=True)):
    low, high, _ = part.indices(size)
    first, last = max(at, low), min(at + length, high)
    if first >= last:
      return None
    begins.append(first - low)
    if axis in view_axis:
      begin = take[view_axis[axis]][0]
      take[view_axis[axis]] = (begin + first - at, begin + last - at)
  return begins, tuple(take)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("axes", "take"))
def _place(array, values, scales, start, *, axes, take):
  block = _to_block(jnp, values, scales, array.dtype, array.ndim, axes, take)
  return lax.dynamic_update_slice(array, block, tuple(start))


def _to_block(xnp, values, scales, dtype, rank: int, axes, take):
  """Turns a piece's view into a block of our array: dequantises, cuts, casts and transposes it.

  `xnp` is numpy or jax.numpy; see `hf_layout.Piece` and `_Target.write` for the other arguments.
  """
  if scales is not None:
    scales = xnp.repeat(scales, FP8_BLOCK, axis=1)
    flat = values.reshape(scales.shape[0], -1).astype(np.float32)
    values = (flat * scales[:, :flat.shape[1]]).reshape(values.shape)
  values = values[tuple(slice(*part) for part in take)].astype(dtype)
  order = sorted(range(len(axes)), key=lambda i: axes[i])
  shape = [1] * rank
  for axis, size in zip(axes, values.shape, strict=True):
    shape[axis] = size
  return values.transpose(order).reshape(shape)


def _read_tensor(tensor, stored, target: _Target, problems: list[str]) -> None:
  """Reads one stored tensor a slice at a time, and writes its parts to their places."""
  source, scale = stored[tensor.name], stored.get(tensor.name + _SCALE)
  scales, limit = None, target.limit(tensor.pieces[0].path)
  if scale is not None:
    scales = scale.read(0, hf_files.num_elements(scale)).reshape(scale.shape)
    most = limit / hf_files.largest("F8_E4M3")
    if not ((scales > 0) & (scales <= most)).all():
      problems.append(
          f"{tensor.name}{_SCALE} has values that are not above 0, or not at most {most:.3g}")
      return
  view = tensor.pieces[0].view
  unit = math.prod(view[1:])
  step = max(1, _CHUNK_BYTES // (unit * 4))
  for first in range(0, view[0], step):
    count = min(step, view[0] - first)
    values = source.read(first * unit, count * unit)
    if not hf_files.all_finite(values, source.dtype):
      problems.append(f"{tensor.name} has values that are not finite")
      return
    if limit < hf_files.largest(source.dtype) and np.abs(values).max() > limit:
      problems.append(
          f"{tensor.name} has values beyond {limit:.3g}, the largest of the requested format")
      return
    row_scales = None if scales is None else _row_scales(scales, tensor.shape, first * unit,
                                                         count * unit)
    for piece in tensor.pieces:
      run = _run(piece, first, count)
      if run is not None:
        target.write(run, values.reshape(count, *view[1:]), row_scales)


def _row_scales(scales, shape, first: int, count: int) -> np.ndarray:
  """Returns the block scales of the matrix rows that contain these elements, a row for each row."""
  rows = np.arange(first // shape[1], (first + count) // shape[1])
  return scales[rows // FP8_BLOCK]


def _run(piece: hf_layout.Piece, first: int, count: int) -> hf_layout.Piece | None:
  """Returns the part of a piece that is in `count` rows of its view, or None if there is none.

  Its `take` counts from the first of these rows, `first`.
  """
  (low, high), *rest = piece.take
  begin, end = max(low, first), min(high, first + count)
  if begin >= end:
    return None
  start = list(piece.start)
  start[piece.axes[0]] += begin - low
  return dataclasses.replace(
      piece, start=tuple(start), take=((begin - first, end - first), *rest))


def _same(a: hf_files.Stored, b: hf_files.Stored) -> bool:
  """Whether two tensors of the same shape are equal to the bit."""
  total = hf_files.num_elements(a)
  step = _CHUNK_BYTES // 4
  return a.dtype == b.dtype and all(
      a.read(first, min(step, total - first)).tobytes()
      == b.read(first, min(step, total - first)).tobytes() for first in range(0, total, step))


# Writing.
