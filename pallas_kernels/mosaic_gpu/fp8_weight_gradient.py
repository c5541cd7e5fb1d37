"""Gradients of a grouped product's matrices on Hopper in FP8; see `fp8_matmul`.

Every group begins at a multiple of 128 rows, so a block that is promoted never straddles groups.

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
from pallas_kernels.mosaic_gpu import fp8_matmul
from pallas_kernels.mosaic_gpu.fp8_matmul import Refs, Tile, Tiling
from pallas_kernels.mosaic_gpu.hopper import k_major
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.ops.fp8_grouped import aligned_sizes, aligned_starts
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """See `pallas_kernels.fp8_grouped_weight_gradient`.

  Args:
    lhs_KS, rhs_NS, sizes_G, dtype: as there.
    tiling, interpret: see `fp8_matmul.run`.

  Returns:
    [G, K, N].
  """
  (k, _), n, groups = lhs_KS.shape, rhs_NS.shape[0], len(sizes_G)
  tiling = tiling or tuned(fp8_matmul.default_tiling(dtype, vectors=True),
                           "fp8_grouped_weight_gradient", dtype, groups, k, n)
  columns = tiling.block_n * tiling.cluster
  grid = (pl.cdiv(k, tiling.block_m), pl.cdiv(n, columns))

  def body(first_G, num_G, refs: Refs):
    def locate(index):
      group = lax.div(index, math.prod(grid))
      mi, ni = plgpu.planar_snake(lax.rem(index, math.prod(grid)), grid, 1, tiling.swizzle)
      row, column = mi * tiling.block_m, fp8_matmul.first_column(ni, tiling)
      return Tile(row, column, first_G[group], num_G[group], refs.rhs_NK, refs.rhs_scales,
                  functools.partial(fp8_matmul.store, refs, refs.out.at[group], row, column,
                                    tiling))

    fp8_matmul.multiply_tiles(refs, groups * math.prod(grid), locate, tiling)

  sizes_G = sizes_G.astype(jnp.int32)
  return fp8_matmul.launch(
      "fp8_grouped_weight_gradient", body,
      (lhs_KS.values_MK, rhs_NS.values_MK, k_major(lhs_KS.scales_mk, tiling.block_m),
       k_major(rhs_NS.scales_mk, columns)),
      jax.ShapeDtypeStruct((groups, k, n), dtype), tiling, groups * math.prod(grid), interpret,
      vectors=True, before=(aligned_starts(sizes_G) // BLOCK, aligned_sizes(sizes_G) // BLOCK))


def unsupported_reason(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype) -> str | None:
  """Why `run` cannot multiply these, or None."""
  for name, size in (("K", lhs_KS.shape[0]), ("N", rhs_NS.shape[0]), ("S", lhs_KS.shape[1])):
    if reason := fp8_matmul.unsupported_size(name, size):
      return reason
  if len(sizes_G) == 0:
    return "needs groups, and there are none"
  return fp8_matmul.unsupported_formats(lhs_KS, rhs_NS, dtype)


KERNEL = implementations.Kernel(run, unsupported_reason)
