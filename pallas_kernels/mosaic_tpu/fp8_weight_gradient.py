"""Gradient of every group's matrix from FP8 rows on a TPU; see `fp8_matmul`.

Groups begin at multiples of 128 rows, so each block of 128 is of one group. An empty group is
visited too, to write zeros.

Shape letters:  S rows with every group at a multiple of 128  G groups  K, N widths
                R, C rows and columns of a tile  P 128 of S  V visits
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_tpu import fp8_matmul
from pallas_kernels.mosaic_tpu.fp8_matmul import Tiling
from pallas_kernels.mosaic_tpu.tiles import SUBLANES
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, native: bool | None = None, interpret: Any = False) -> jax.Array:
  """See `pallas_kernels.fp8_grouped_weight_gradient`.

  Args:
    tiling: how the product is cut; 128 rows are fetched at a time, whatever its depth.
    native, interpret: see `fp8_matmul.run`.
  """
  (k, rows), n, groups = lhs_KS.shape, rhs_NS.shape[0], len(sizes_G)
  tiling = (tiling or Tiling()).fit(k, n, BLOCK)
  native = fp8_matmul.has_fp8() if native is None else native

  def body(groups_V, blocks_V, full_V, lhs_RP, rhs_CP, lhs_scales_RP, rhs_scales_PC, out_RC,
           sums_RC):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group, block = groups_V[visit], blocks_V[visit]

    @pl.when((visit == 0) | (group != groups_V[jnp.maximum(visit - 1, 0)]))
    def _():
      sums_RC[...] = jnp.zeros_like(sums_RC)

    @pl.when(full_V[visit] == 1)
    def _():
      products_RC = fp8_matmul.multiply(lhs_RP[...], rhs_CP[...], native)
      scales_1C = rhs_scales_PC[pl.ds(lax.rem(block, SUBLANES), 1), :]
      scales_R1 = fp8_matmul.column(lhs_scales_RP, lax.rem(block, BLOCK))
      sums_RC[...] += products_RC * scales_1C * scales_R1

    @pl.when((visit == last) | (group != groups_V[jnp.minimum(visit + 1, last)]))
    def _():
      out_RC[...] = sums_RC[...].astype(out_RC.dtype)

  visits, count = _visits(sizes_G, rows // BLOCK)
  return pl.pallas_call(
      body, grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(pl.cdiv(k, tiling.rows), pl.cdiv(n, tiling.columns), count),
          in_specs=[
              pl.BlockSpec((tiling.rows, BLOCK), lambda i, j, v, g, b, f: (i, b[v])),
              pl.BlockSpec((tiling.columns, BLOCK), lambda i, j, v, g, b, f: (j, b[v])),
              pl.BlockSpec((tiling.rows, BLOCK),
                           lambda i, j, v, g, b, f: (i, lax.div(b[v], BLOCK))),
              pl.BlockSpec((SUBLANES, tiling.columns),
                           lambda i, j, v, g, b, f: (lax.div(b[v], SUBLANES), j))],
          out_specs=pl.BlockSpec(
              (None, tiling.rows, tiling.columns), lambda i, j, v, g, b, f: (g[v], i, j)),
          scratch_shapes=[pltpu.VMEM((tiling.rows, tiling.columns), jnp.float32)]),
      out_shape=jax.ShapeDtypeStruct((groups, k, n), dtype),
      cost_estimate=fp8_matmul.cost(k, n, rows, weights=n * rows, dtype=dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")),
      interpret=interpret)(*visits, lhs_KS.values_MK, rhs_NS.values_MK, lhs_KS.scales_mk,
                           fp8_matmul.column_scales(rhs_NS))


def unsupported_reason(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype) -> str | None:
  """Why `run` cannot multiply these, or None if it can."""
  if 0 in (*lhs_KS.shape, *rhs_NS.shape, *sizes_G.shape) or lhs_KS.shape[1] % BLOCK:
    return ("needs numbers, and rows in multiples of 128, and the shapes are "
            f"{lhs_KS.shape}, {rhs_NS.shape} and {sizes_G.shape}")
  return fp8_matmul.unsupported_formats(lhs_KS, rhs_NS, dtype)


def _visits(sizes_G: jax.Array, blocks: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Each visit's group, its block of 128 rows, and whether the group has any; how many they are."""
  counts_G = -(-sizes_G // BLOCK)
  visits_G = jnp.maximum(counts_G, 1)
  most = blocks + len(sizes_G)
  groups_V = jnp.repeat(jnp.arange(len(sizes_G), dtype=jnp.int32), visits_G,
                        total_repeat_length=most)
  within_V = jnp.arange(most) - (jnp.cumsum(visits_G) - visits_G)[groups_V]
  blocks_V = (jnp.cumsum(counts_G) - counts_G)[groups_V] + within_V
  full_V = within_V < counts_G[groups_V]
  return ((groups_V, jnp.clip(blocks_V, 0, blocks - 1).astype(jnp.int32), full_V.astype(jnp.int32)),
          visits_G.sum().astype(jnp.int32))


KERNEL = implementations.Kernel(run, unsupported_reason)
