"""Quantisation of a transpose on Hopper, in one pass over memory.

The matrix may be quantised with 1x128 scales, and is then requantised, or not quantised at all. A
thread block takes 128 rows and 128 columns, and otherwise works as in `quantize`.

Shape letters:  M rows  K columns  S rows of a step
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu.hopper import pad_rows, swizzle
from pallas_kernels.mosaic_gpu.quantize import (
  COMPILER_PARAMS,
  Quantizer,
  column_layout,
  steps,
  swizzled,
  this_block,
  unsupported_any,
)
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized

STEP = 32  # rows of 128 elements in registers at a time while the largest magnitude is sought


def run(
    x_MK: jax.Array | Quantized, tile: str, *, format: str, power_of_two: bool,
    smallest_amax: float, interpret: Any = None) -> Quantized:
  """Quantises the transpose of a matrix; see `pallas_kernels.quantize_transposed`.

  Args:
    x_MK: float32 or bfloat16, or quantised with 1x128 scales.
    tile: "1x128".
    format, power_of_two, smallest_amax: see `pallas_kernels.quantize`.
    interpret: see `quantize.run`.
  """
  del tile  # `unsupported_reason` refuses all but one
  values_MK, scales = x_MK, ()
  if isinstance(x_MK, Quantized):
    values_MK, scales = x_MK.values_MK, (x_MK.scales,)
  (rows, columns), small = values_MK.shape, FORMATS[format].dtype
  x = pad_rows(values_MK)
  grid = (pl.cdiv(rows, BLOCK), columns // BLOCK)
  quantizer = Quantizer(format, power_of_two, smallest_amax, interpret is not None)

  def kernel(x, *refs):
    *row_scales, values_t, scales_t, x_smem, values_smem, scales_smem, loaded = refs
    i, j = this_block(grid)
    place = (pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK))
    plgpu.copy_gmem_to_smem(x.at[place], x_smem, loaded)
    plgpu.barrier_wait(loaded)
    row_scales = [scales.at[j, place[0]] for scales in row_scales]
    scale_K = quantizer.scale(_largest(x_smem, row_scales))
    compat.store(scales_smem, scale_K)
    compat.store(scales_t.at[i, place[1]], scale_K)
    plgpu.commit_smem()
    write_transposed(quantizer, x_smem, row_scales, scales_smem, values_smem)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values_t.at[place[::-1]])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  values_t, scales_t = plgpu.kernel(
      kernel,
      out_type=(jax.ShapeDtypeStruct((columns, grid[0] * BLOCK), small),
                jax.ShapeDtypeStruct((grid[0], columns), jnp.float32)),
      grid=(math.prod(grid),), grid_names=("block",),
      scratch_types=(
          plgpu.SMEM((BLOCK, BLOCK), x.dtype, transforms=_narrow(x.dtype)),
          swizzled(BLOCK, small), plgpu.SMEM((BLOCK,), jnp.float32), plgpu.Barrier()),
      compiler_params=COMPILER_PARAMS, interpret=interpret, kernel_name="requantize",
  )(x, *scales)
  return Quantized(values_t[:, :rows], scales_t, (1, BLOCK))


def unsupported_reason(x_MK: jax.Array | Quantized, tile: str, **options) -> str | None:
  """Returns why `run` cannot take these arguments, or None if it can."""
  given = x_MK.tile if isinstance(x_MK, Quantized) else None
  if tile != "1x128" or given not in (None, (1, BLOCK)):
    source = f", requantised from {given[0]}x{given[1]}" if given else ""
    return f"needs tiles of 1x128, and they are {tile}{source}"
  if len(x_MK.shape) != 2:
    return f"needs a single matrix, and the shape is {x_MK.shape}"
  values_MK = x_MK.values_MK if isinstance(x_MK, Quantized) else x_MK
  return unsupported_any(values_MK, **options)


def _width(dtype) -> int:
  """Returns the number of columns that are transposed in registers at a time: 32 or 64."""
  return min(64, 128 // dtype.itemsize)


def _narrow(dtype):
  """Returns the transforms of swizzled shared memory that can be sliced every `_width` columns."""
  return swizzle(dtype.itemsize, _width(dtype) * dtype.itemsize)


def _dequantized(x_MK: jax.Array, row_scales, layout) -> jax.Array:
  """Returns some rows in float32, multiplied by their scales if there are any."""
  x_MK = x_MK.astype(jnp.float32)
  for scales in row_scales:
    scale_M = plgpu.load(scales, layout=layout.reduce(1), optimized=False)
    x_MK *= plgpu.layout_cast(lax.broadcast_in_dim(scale_M, x_MK.shape, (0,)), layout)
  return x_MK


def _largest(x_smem, row_scales) -> jax.Array:
  """Returns the largest magnitude in every column: [K]."""
  layout, largest_SK = column_layout(x_smem.dtype), None
  for _, piece in steps(BLOCK, STEP):
    x_SK = plgpu.load(x_smem.at[piece], layout=layout, optimized=False)
    x_SK = jnp.abs(_dequantized(x_SK, [scales.at[piece] for scales in row_scales], layout))
    largest_SK = x_SK if largest_SK is None else jnp.maximum(largest_SK, x_SK)
  return largest_SK.max(0)


def write_transposed(
    quantizer: Quantizer, x_smem, row_scales, column_scales, values_smem) -> None:
  """Quantises a block of 128 x 128 by columns and writes its transpose.

  Lanes exchange elements so that 2 x 2 squares are transposed between them: the conversion of
  Layout.WGMMA to WGMMA_TRANSPOSED.

  Args:
    quantizer: divides by the scales.
    x_smem: the block, in shared memory.
    row_scales: a list with the scale of each row if the block is quantised; otherwise empty.
    column_scales: a scale for each column, in shared memory, or one scalar for all.
    values_smem: shared memory for the transpose.
  """
  transposed, width = plgpu.Layout.WGMMA_TRANSPOSED, _width(x_smem.dtype)
  for first in range(0, BLOCK, width):
    columns = pl.ds(first, width)
    scale, axes = column_scales, ()
    if column_scales.ndim:
      scale, axes = plgpu.load(
          column_scales.at[columns], layout=transposed.reduce(0), optimized=False), (1,)
    x_MK = plgpu.load(x_smem.at[:, columns], layout=plgpu.Layout.WGMMA,
                      optimized=x_smem.dtype.itemsize > 1)
    if x_MK.dtype.itemsize == 1:
      x_MK = x_MK.astype(jnp.float16)  # exact for FP8, and lanes exchange 16-bit elements
    x_MK = _dequantized(plgpu.layout_cast(x_MK, transposed), row_scales, transposed)
    values_smem.at[columns].T[...] = quantizer.values(x_MK, scale, axes, transposed)


KERNEL = implementations.Kernel(run, unsupported_reason)
