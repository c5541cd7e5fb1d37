"""Gradients of a grouped product's matrices on Hopper in FP8; built from `fp8_kernel`.

The product contracts over a group's rows. Every group begins at a multiple of 128 rows, so the 128
rows between two promotions never belong to two groups.

Shape letters:  S rows with every group at a multiple of 128  G groups  K, N widths
                s blocks of 128 rows
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import fp8_kernel, fp8_tiling, schedule
from pallas_kernels.mosaic_gpu.fp8_kernel import Refs, Tile
from pallas_kernels.mosaic_gpu.fp8_tiling import Tiling, num_programs
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.ops.fp8_grouped import aligned_sizes, aligned_starts
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """Returns each group's lhs @ rhs.T; see `pallas_kernels.fp8_grouped_weight_gradient`.

  Args:
    lhs_KS, rhs_NS: float8_e4m3fn values with 1x128 scales; zeros between groups and after the last.
    sizes_G: int32, rows per group.
    dtype: dtype of the result, bfloat16 or float32.
    tiling, interpret: see `fp8_matmul.run`.

  Returns:
    [G, K, N].
  """
  (k, _), n, groups = lhs_KS.shape, rhs_NS.shape[0], len(sizes_G)
  tiling = tiling or tuned(fp8_tiling.gradient_tiling(dtype, groups, k, n),
                           "fp8_grouped_weight_gradient", dtype, groups, k, n)
  columns = tiling.block_n * tiling.cluster
  grid = (pl.cdiv(k, tiling.block_m), pl.cdiv(n, columns))
  programs = num_programs(tiling, groups * math.prod(grid))

  def body(first_G, num_G, refs: Refs):
    def locate(index):
      # All tiles of a group come before those of the next. An empty group has no block to sum, and
      # stores zeros.
      group = lax.div(index, math.prod(grid))
      mi, ni = plgpu.planar_snake(lax.rem(index, math.prod(grid)), grid, 1, tiling.swizzle)
      row, column = mi * tiling.block_m, fp8_kernel.first_column(ni, tiling)
      end = k if k % tiling.block_m else None
      return Tile(row, column, end, first_G[group], num_G[group], None, refs.rhs_NK,
                  refs.rhs_scales,
                  functools.partial(fp8_kernel.store, refs, refs.out.at[group], row, column,
                                    tiling))

    def each_tile(visit, carry):
      return schedule.deal(groups * math.prod(grid), programs,
                           lambda index, carry: visit(locate(index), carry), carry)

    fp8_kernel.multiply_tiles(refs, each_tile, tiling)

  sizes_G = sizes_G.astype(jnp.int32)
  return fp8_kernel.launch(
      "fp8_grouped_weight_gradient", body,
      (lhs_KS.values_MK, rhs_NS.values_MK, lhs_KS.scales, rhs_NS.scales),
      out=jax.ShapeDtypeStruct((groups, k, n), dtype), tiling=tiling, programs=programs,
      interpret=interpret, vectors=(True, True),
      before=(aligned_starts(sizes_G) // BLOCK, aligned_sizes(sizes_G) // BLOCK))


def unsupported_reason(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype) -> str | None:
  """Returns why `run` cannot multiply these operands, or None if it can."""
  if lhs_KS.shape[0] == 0:
    return "needs K to be positive, and it is 0"
  if lhs_KS.shape[1] == 0 or lhs_KS.shape[1] % BLOCK:
    return f"needs S to be a multiple of {BLOCK}, and it is {lhs_KS.shape[1]}"
  if len(sizes_G) == 0:
    return "needs at least one group, and there are none"
  return (fp8_tiling.unsupported_formats(lhs_KS, rhs_NS, dtype)
          or fp8_tiling.unsupported_columns(rhs_NS.shape[0], dtype))


KERNEL = implementations.Kernel(run, unsupported_reason)
