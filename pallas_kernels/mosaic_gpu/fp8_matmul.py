"""FP8 matrix product on Hopper, built from `fp8_kernel`.

A result of many tiles is dealt to multiprocessors tile by tile. One of few tiles is summed in parts
by several multiprocessors each, and for few rows its transpose is computed.

Shape letters:  M, N rows of the operands  K contracted width  P parts of a tile
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import fp8_kernel, schedule
from pallas_kernels.mosaic_gpu.fp8_kernel import Refs, Tile
from pallas_kernels.mosaic_gpu.fp8_tiling import (
    Tiling,
    dense_tiling,
    unsupported_columns,
    unsupported_formats,
)
from pallas_kernels.mosaic_gpu.hopper import pad_columns
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """Returns lhs @ rhs.T; see `pallas_kernels.fp8_matmul`.

  Args:
    lhs_MK: float8_e4m3fn values with 1x128 scales.
    rhs_NK: float8_e4m3fn values with 128x128 or 1x128 scales.
    dtype: dtype of the result, bfloat16 or float32.
    tiling: how the product is cut; None takes that of `fp8_tiling.dense_tiling`, or the exception
      that the table of tilings has for this shape.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, without a GPU.

  Returns:
    [M, N].
  """
  vectors = rhs_NK.tile == (1, BLOCK)
  operation = f"fp8_matmul {'1x128' if vectors else '128x128'}"
  shape = lhs_MK.shape[0], *rhs_NK.shape
  tiling = tiling or tuned(dense_tiling(dtype, vectors, *shape), operation, dtype, *shape)
  if tiling.swapped:
    return _product(rhs_NK, lhs_MK, dtype, tiling, interpret).T
  return _product(lhs_MK, rhs_NK, dtype, tiling, interpret)


def _product(lhs_MK, rhs_NK, dtype, tiling: Tiling, interpret) -> jax.Array:
  """Returns lhs @ rhs.T, of which one operand at least has 1x128 scales: [M, N]."""
  (m, k), n = lhs_MK.shape, rhs_NK.shape[0]
  grid = (pl.cdiv(m, tiling.block_m * tiling.cluster_m),
          pl.cdiv(n, tiling.block_n * tiling.cluster))
  blocks = pl.cdiv(k, BLOCK)

  def body(refs: Refs):
    def locate(place, first_k, num_k, store_sums):
      mi, ni = place
      row, column = fp8_kernel.first_row(mi, tiling), fp8_kernel.first_column(ni, tiling)
      end = m if m % (tiling.block_m * tiling.cluster_m) else None
      return Tile(row, column, end, first_k, num_k, None, refs.rhs_NK, refs.rhs_scales,
                  functools.partial(store_sums, row, column))

    def store_tile(row, column, sums):
      fp8_kernel.store(refs, refs.out, row, column, tiling, sums)

    def each_tile(visit, carry):
      # L2 rasterisation: along M within a band of `swizzle` columns of tiles, back along the next
      # band, so that the tiles in flight on all multiprocessors share rows of both operands.
      return schedule.deal(math.prod(grid), programs, lambda index, carry: visit(locate(
          plgpu.planar_snake(index, grid, 1, tiling.swizzle), 0, blocks, store_tile), carry), carry)

    def each_part(visit, carry):
      # A tile has fewer parts than another one may have: its last part stores zeros for the others.
      def store_part(part, row, column, sums):
        fp8_kernel.store(refs, refs.out.at[part.index], row, column, tiling, sums)
        last = part.first + part.count == blocks
        pl.loop(part.index + 1, jnp.where(last, most_parts, 0))(lambda index: fp8_kernel.store(
            refs, refs.out.at[index], row, column, tiling, fp8_kernel.no_sums(refs, tiling)))

      return schedule.share(math.prod(grid), blocks, programs, lambda part, carry: visit(locate(
          reversed(divmod(part.tile, grid[0])), part.first, part.count,
          functools.partial(store_part, part)), carry), carry)

    fp8_kernel.multiply_tiles(refs, each_part if tiling.shared else each_tile, tiling)

  vectors = tuple(x.tile == (1, BLOCK) for x in (lhs_MK, rhs_NK))
  operands = (pad_columns(lhs_MK.values_MK), pad_columns(rhs_NK.values_MK), lhs_MK.scales,
              rhs_NK.scales)
  call = functools.partial(fp8_kernel.launch, "fp8_matmul", body, operands, tiling=tiling,
                           interpret=interpret, vectors=vectors)
  if not tiling.shared:
    programs = fp8_kernel.num_programs(tiling, math.prod(grid))
    return call(out=jax.ShapeDtypeStruct((m, n), dtype), programs=programs)
  programs = fp8_kernel.num_programs(tiling, math.prod(grid) * blocks)
  most_parts = schedule.most_parts(math.prod(grid), blocks, programs)
  columns = -(-n // 4) * 4  # for rows of a multiple of 16 bytes
  parts_PMN = call(out=jax.ShapeDtypeStruct((most_parts, m, columns), jnp.float32),
                   programs=programs)
  # Without the added columns first, so that XLA sums and transposes in one kernel; it would move a
  # slice of the sum behind the transposition, and copy.
  return parts_PMN[..., :n].sum(0).astype(dtype)


def unsupported_reason(lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype) -> str | None:
  """Returns why `run` cannot multiply these operands, or None if it can."""
  if 0 in lhs_MK.shape:
    return f"needs an lhs that is not empty, and its shape is {lhs_MK.shape}"
  return (unsupported_formats(lhs_MK, rhs_NK, dtype)
          or unsupported_columns(rhs_NK.shape[0], dtype))


KERNEL = implementations.Kernel(run, unsupported_reason)
