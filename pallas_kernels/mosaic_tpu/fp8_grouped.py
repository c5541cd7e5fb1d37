"""Grouped FP8 matrix product on a TPU for groups of any size; see `fp8_matmul`.

A tile of rows is visited once for every group that has rows in it, and each visit writes the rows
of its group. The list of visits comes from megablox, JAX's grouped matrix products for TPUs, which
do not support FP8 themselves. Rows past the last group form one more group, whose result is zero.

Shape letters:  R rows  G groups  K contracted width  N result width  k blocks of 128 along K
                V visits  T, C rows and columns of a tile of the result
                P the part of K that one step fetches
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from pallas_kernels import implementations
from pallas_kernels.mosaic_tpu import fp8_matmul
from pallas_kernels.mosaic_tpu.fp8_matmul import Tiling
from pallas_kernels.mosaic_tpu.tiles import pad, unsupported_rows, whole
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, native: bool | None = None, interpret: Any = False) -> jax.Array:
  """See `pallas_kernels.fp8_grouped_matmul`.

  Args:
    tiling, native, interpret: see `pallas_kernels.mosaic_tpu.fp8_matmul.run`.
  """
  (rows, _), (groups, n, _) = lhs_RK.shape, rhs_GNK.shape
  lhs, rhs = (pad(x.values_MK, 1, BLOCK) for x in (lhs_RK, rhs_GNK))
  depth = lhs.shape[1]
  tiling = (tiling or Tiling()).fit(rows, n, depth)
  native = fp8_matmul.has_fp8() if native is None else native

  def body(starts_G, groups_V, tiles_V, lhs_TP, rhs_CP, lhs_scales_Tk, rhs_scales_kC, out_TC,
           sums_TC):
    visit, step = pl.program_id(1), pl.program_id(2)
    group = groups_V[visit]

    @pl.when(group < groups)
    def _():
      fp8_matmul.add_part(lhs_TP, rhs_CP, lhs_scales_Tk, rhs_scales_kC, sums_TC, step, native)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
      row_TC = tiles_V[visit] * tiling.rows + lax.broadcasted_iota(jnp.int32, out_TC.shape, 0)
      own_TC = (starts_G[group] <= row_TC) & (row_TC < starts_G[group + 1])
      new_TC = jnp.where(group < groups, sums_TC[...], 0)
      out_TC[...] = jnp.where(own_TC, new_TC, out_TC[...].astype(jnp.float32)).astype(out_TC.dtype)

  # The group of the rows past the last group has no matrix; what its visits fetch is not used.
  matrix = lambda groups_V, v: jnp.minimum(groups_V[v], groups - 1)
  visits, count = _visits(sizes_G, whole(rows, tiling.rows), tiling.rows)
  return pl.pallas_call(
      body, grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(pl.cdiv(n, tiling.columns), count, depth // tiling.depth),
          in_specs=[
              pl.BlockSpec((tiling.rows, tiling.depth), lambda j, v, p, s, g, t: (t[v], p)),
              pl.BlockSpec((None, tiling.columns, tiling.depth),
                           lambda j, v, p, s, g, t: (matrix(g, v), j, p)),
              pl.BlockSpec((tiling.rows, depth // BLOCK), lambda j, v, p, s, g, t: (t[v], 0)),
              pl.BlockSpec((None, depth // BLOCK, tiling.columns),
                           lambda j, v, p, s, g, t: (matrix(g, v), 0, j))],
          out_specs=pl.BlockSpec(
              (tiling.rows, tiling.columns), lambda j, v, p, s, g, t: (t[v], j)),
          scratch_shapes=[pltpu.VMEM((tiling.rows, tiling.columns), jnp.float32)]),
      out_shape=jax.ShapeDtypeStruct((rows, n), dtype),
      cost_estimate=fp8_matmul.cost(rows, n, depth, weights=rhs.size, dtype=dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary")),
      interpret=interpret)(*visits, lhs, rhs, lhs_RK.scales_mk, fp8_matmul.column_scales(rhs_GNK))


def unsupported_reason(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype) -> str | None:
  """Why `run` does not support these operands or this dtype, or None if it does."""
  if 0 in (*lhs_RK.shape, *rhs_GNK.shape):
    return f"needs non-empty operands, and the shapes are {lhs_RK.shape} and {rhs_GNK.shape}"
  return (unsupported_rows(lhs_RK.shape[0], Tiling().rows)
          or fp8_matmul.unsupported_formats(lhs_RK, rhs_GNK, dtype))


def _visits(sizes_G: jax.Array, rows: int, tile: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Lists the visits of tiles of rows.

  Args:
    sizes_G: rows per group.
    rows: number of rows, a multiple of `tile`.
    tile: rows of a tile.

  Returns:
    The first row of each group, with `rows` as the last entry, the group of each visit and the tile
    of each visit; and the number of visits.
  """
  sizes = jnp.append(sizes_G, rows - sizes_G.sum()).astype(jnp.int32)
  return make_group_metadata(
      group_sizes=sizes, m=rows, tm=tile, start_group=jnp.int32(0), num_nonzero_groups=len(sizes),
      visit_empty_groups=False)


KERNEL = implementations.Kernel(run, unsupported_reason)
