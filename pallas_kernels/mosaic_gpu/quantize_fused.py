"""Quantisation on Hopper fused with SwiGLU, and of a matrix and its transpose in one pass.

Thread blocks work as in `quantize`.

Shape letters:  M rows  K columns  F hidden units  S rows of a step
"""

import dataclasses
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
  Tiling,
  of_rows,
  row_layout,
  sigmoid,
  steps,
  swizzled,
  this_block,
  unsupported_any,
)
from pallas_kernels.mosaic_gpu.requantize import write_transposed
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized


def run_swiglu(gate_up_M2F: jax.Array, **options: Any) -> Quantized:
  """Quantises SwiGLU's output; see `pallas_kernels.swiglu_quantize`.

  Args:
    gate_up_M2F: [..., M, 2, F].
    **options: those of `pallas_kernels.swiglu_quantize`, and `quantize.run`'s tiling and interpret.
  """
  return _run_swiglu(gate_up_M2F, with_inputs=False, name="swiglu_quantize", **options)[0]


def run_swiglu_with_inputs(gate_up_M2F: jax.Array, **options: Any) -> tuple[Quantized, Quantized]:
  """Quantises SwiGLU's output and inputs; see `pallas_kernels.swiglu_quantize_with_inputs`.

  The arguments are those of `run_swiglu`.
  """
  return _run_swiglu(
      gate_up_M2F, with_inputs=True, name="swiglu_quantize_with_inputs", **options)


def _run_swiglu(
    gate_up_M2F: jax.Array, *, format: str, power_of_two: bool, smallest_amax: float,
    with_inputs: bool, name: str, tiling: Tiling | None = None,
    interpret: Any = None) -> tuple[Quantized, ...]:
  tiling = tiling or Tiling()
  *batch, _, width = gate_up_M2F.shape
  dtype, layout = gate_up_M2F.dtype, row_layout(gate_up_M2F.dtype)
  num_rows = math.prod(batch)
  gate_up = pad_rows(gate_up_M2F.reshape(num_rows, 2 * width))
  # Scales are stored for a multiple of 128 rows.
  grid = (pl.cdiv(num_rows, BLOCK) * BLOCK // tiling.rows, width // BLOCK)
  quantizer = Quantizer(format, power_of_two, smallest_amax, interpret is not None)
  halves = (0, 1) if with_inputs else ()

  def kernel(gate_up, *refs):
    *outs, gate_smem, up_smem, values_smem, loaded = refs
    i, j = this_block(grid)
    rows = pl.ds(i * tiling.rows, tiling.rows)
    for half, smem in enumerate((gate_smem, up_smem)):
      columns = pl.ds(half * width + j * BLOCK, BLOCK)
      plgpu.copy_gmem_to_smem(gate_up.at[rows, columns], smem, loaded)
    plgpu.barrier_wait(loaded)
    # Hidden units go to the first result, gate and up to the two halves of the second.
    places = ((outs[:2], j), *((outs[2:], half * grid[1] + j) for half in halves))
    for first, piece in steps(tiling.rows, tiling.step):
      gate_SF, up_SF = (plgpu.load(smem.at[piece], layout=layout)
                        .astype(jnp.float32) for smem in (gate_smem, up_smem))
      numbers = gate_SF * sigmoid(gate_SF) * up_SF, gate_SF, up_SF
      for at, (((_, scales), column), x_SF) in enumerate(zip(places, numbers, strict=False)):
        scale_S = quantizer.row_values(x_SF, values_smem.at[at, piece], layout)
        compat.store(scales.at[column, pl.ds(i * tiling.rows + first, tiling.step)], scale_S)
    plgpu.commit_smem()
    for at, ((values, _), column) in enumerate(places):
      plgpu.copy_smem_to_gmem(values_smem.at[at], values.at[rows, pl.ds(column * BLOCK, BLOCK)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  small, smem = FORMATS[format].dtype, swizzled(tiling.rows, dtype)
  widths = (width, 2 * width) if with_inputs else (width,)
  outs = plgpu.kernel(
      kernel,
      out_type=tuple(
          array for columns in widths for array in (
              jax.ShapeDtypeStruct((len(gate_up), columns), small),
              jax.ShapeDtypeStruct((columns // BLOCK, grid[0] * tiling.rows), jnp.float32))),
      grid=(math.prod(grid),), grid_names=("block",),
      scratch_types=(
          smem, smem,
          plgpu.SMEM((1 + len(halves), tiling.rows, BLOCK), small, transforms=swizzle(1)),
          plgpu.Barrier(num_arrivals=2)),
      compiler_params=COMPILER_PARAMS, interpret=interpret, kernel_name=name,
  )(gate_up)
  return tuple(of_rows(values[:num_rows], scales, (*batch, -1))
               for values, scales in zip(outs[::2], outs[1::2], strict=True))


def run_both(
    x_MK: jax.Array, tile: tuple[int, int], *, format: str, power_of_two: bool,
    smallest_amax: float, tiling: Tiling | None = None,
    interpret: Any = None) -> tuple[Quantized, Quantized]:
  """Quantises a matrix and its transpose; see `pallas_kernels.quantize_both`.

  Args:
    x_MK: [..., M, K], float32 or bfloat16, finite.
    tile: rows and columns that share a scale, of the matrix and of its transpose: 1x128 or 128x128.
    format, power_of_two, smallest_amax: see `pallas_kernels.quantize`.
    tiling, interpret: see `quantize.run`.
  """
  tiling = dataclasses.replace(tiling or Tiling(), rows=BLOCK)
  (*batch, rows, columns), small = x_MK.shape, FORMATS[format].dtype
  x = pad_rows(x_MK.reshape(-1, columns))
  per_matrix = pl.cdiv(rows, BLOCK)
  grid = (per_matrix * math.prod(batch), columns // BLOCK)
  quantizer = Quantizer(format, power_of_two, smallest_amax, interpret is not None)

  blocks = tile[0] == BLOCK  # one scale of a 128x128 block then serves both orientations

  def kernel(x, values, scales, values_t, *refs):
    scales_t, x_smem, values_smem, values_t_smem, scales_t_smem, loaded = refs
    i, j = this_block(grid)
    place = (pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK))
    matrix, block_row = lax.div(i, per_matrix), lax.rem(i, per_matrix)
    # The transposes lie below one another, each padded to a multiple of 128 columns.
    place_t = pl.ds(matrix * columns + j * BLOCK, BLOCK), pl.ds(block_row * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(x.at[place], x_smem, loaded)
    plgpu.barrier_wait(loaded)
    if blocks:
      column_scales = scales[i, j] = quantizer.block(x_smem, values_smem, tiling.step)
      scales_t[matrix * grid[1] + j, block_row] = column_scales
    else:
      quantizer.rows(x_smem, values_smem, tiling.step, lambda first, scale_S: compat.store(
          scales.at[j, pl.ds(i * BLOCK + first, tiling.step)], scale_S))
    plgpu.commit_smem()
    # This copy runs while the transpose is computed.
    plgpu.copy_smem_to_gmem(values_smem, values.at[place])
    if not blocks:
      scale_K = quantizer.column_scales(x_smem, scales_t_smem, tiling.step)
      compat.store(scales_t.at[i, place[1]], scale_K)
      column_scales = scales_t_smem
    write_transposed(quantizer, x_smem, (), column_scales, values_t_smem)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_t_smem, values_t.at[place_t])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  count = math.prod(batch)
  scales_shapes = (grid, (count * grid[1], per_matrix)) if blocks else (
      (grid[1], grid[0] * BLOCK), (grid[0], columns))
  scales_type, scales_t_type = (jax.ShapeDtypeStruct(x, jnp.float32) for x in scales_shapes)
  values, scales, values_t, scales_t = plgpu.kernel(
      kernel,
      out_type=(
          jax.ShapeDtypeStruct(x.shape, small), scales_type,
          jax.ShapeDtypeStruct((count * columns, per_matrix * BLOCK), small), scales_t_type),
      grid=(math.prod(grid),), grid_names=("block",),
      scratch_types=(
          swizzled(BLOCK, x_MK.dtype), swizzled(BLOCK, small), swizzled(BLOCK, small),
          plgpu.SMEM((BLOCK,), jnp.float32), plgpu.Barrier()),
      compiler_params=COMPILER_PARAMS, interpret=interpret, kernel_name="quantize_both",
  )(x)
  values = values[:count * rows].reshape(x_MK.shape)
  values_t = values_t.reshape(*batch, columns, -1)[..., :rows]
  if blocks:
    scales, scales_t = (x.reshape(*batch, -1, x.shape[1]) for x in (scales, scales_t))
  return Quantized(values, scales, tile), Quantized(values_t, scales_t, tile)


def unsupported_both(x_MK: jax.Array, tile: tuple[int, int], **options) -> str | None:
  """Returns why `run_both` cannot take these arguments, or None if it can."""
  if tile not in ((1, BLOCK), (BLOCK, BLOCK)):
    return f"needs tiles of 1x128 or 128x128, and they are {tile[0]}x{tile[1]}"
  if x_MK.ndim != 2 and (tile[0] == 1 or x_MK.shape[-2] % BLOCK):
    return ("needs a single matrix, or tiles of 128x128 and M to be a multiple of 128, and the "
            f"shape is {x_MK.shape}")
  return unsupported_any(x_MK, **options)


SWIGLU_KERNEL = implementations.Kernel(run_swiglu, unsupported_any)
WITH_INPUTS_KERNEL = implementations.Kernel(run_swiglu_with_inputs, unsupported_any)
BOTH_KERNEL = implementations.Kernel(run_both, unsupported_both)
