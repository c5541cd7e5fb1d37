"""Gradient of every group's matrix from FP8 operands on a TPU; see `fp8_matmul`.

Groups begin at multiples of 128 rows, so each block of 128 rows belongs to one group. Each tile of
a group's result is visited once for every block of the group, or once for an empty group, to write
zeros.

Shape letters:  S rows including padding, with every group at a multiple of 128  G groups
                K, N rows and columns of a group's matrix
                R, C rows and columns of a tile of the result  P the 128 rows of a block  V visits
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
    tiling: upper bounds of the tile sizes; its depth has no effect, as each step fetches 128 rows.
    native, interpret: see `pallas_kernels.mosaic_tpu.fp8_matmul.run`.
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
  """Why `run` does not support these operands or this dtype, or None if it does."""
  if 0 in (*lhs_KS.shape, *rhs_NS.shape, *sizes_G.shape) or lhs_KS.shape[1] % BLOCK:
    return ("needs non-empty operands with a multiple of 128 rows, and the shapes are "
            f"{lhs_KS.shape}, {rhs_NS.shape} and {sizes_G.shape}")
  return fp8_matmul.unsupported_formats(lhs_KS, rhs_NS, dtype)


def _visits(sizes_G: jax.Array, blocks: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Lists the visits: one for each block of 128 rows of a group, and one for each empty group.

  Args:
    sizes_G: rows per group, without padding.
    blocks: blocks of 128 rows in all.

  Returns:
    The group of each visit, its block, and 1 if it has a block or 0 for an empty group, all int32;
    and the number of visits, to which the lists are padded at the end.
  """
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
