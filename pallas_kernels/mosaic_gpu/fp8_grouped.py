"""Grouped FP8 matrix product on Hopper, for groups of any size; built from `fp8_kernel`.

Each tile belongs to one group. A group's last tile may also cover rows of the next one, which it
computes and does not store: 64 rows that belong to the tile are stored whole, and fewer in runs of
1, 2, 4, ... rows.

Shape letters:  R rows  G groups  K contracted width  N result width  k blocks of K  T tiles
                F fields of a tile
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu import fp8_kernel, fp8_tiling, schedule
from pallas_kernels.mosaic_gpu.fp8_kernel import Refs, Sums, Tile
from pallas_kernels.mosaic_gpu.fp8_tiling import Tiling, num_programs
from pallas_kernels.mosaic_gpu.hopper import (
    ROWS,
    as_plain_rows,
    owned,
    pad_columns,
    store_runs,
)
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.quantized import BLOCK, Quantized

# Most columns that are stored at a time where a tile owns some of its rows only: a 128-byte row of
# bfloat16.
_PIECE = 64


def run(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """Multiplies each group of rows by that group's matrix; see `pallas_kernels.fp8_grouped_matmul`.

  Args:
    lhs_RK: float8_e4m3fn values with 1x128 scales, the rows of group 0 first.
    rhs_GNK: float8_e4m3fn values with 128x128 scales.
    sizes_G: int32, rows per group.
    dtype: dtype of the result, bfloat16 or float32.
    tiling, interpret: see `fp8_matmul.run`.

  Returns:
    [R, N].
  """
  (rows, k), (groups, n, _) = lhs_RK.shape, rhs_GNK.shape
  tiling = tiling or tuned(
      fp8_tiling.grouped_tiling(dtype, n), "fp8_grouped_matmul", dtype, groups, k, n)
  num_columns = pl.cdiv(n, tiling.block_n * tiling.cluster)

  programs = num_programs(
      tiling, schedule.most_tiles(rows, groups, tiling.block_m) * num_columns)

  def body(fields_TF, count_1, refs: Refs):
    def locate(index):
      # The number of tiles depends on the sizes, so it is read when the kernel runs. Rows of no
      # group are tiles of group G, and zeros.
      ti, ni = plgpu.planar_snake(index, (count_1[0], num_columns), 1, tiling.swizzle)
      tile, column = schedule.read(fields_TF, ti), fp8_kernel.first_column(ni, tiling)
      return Tile(tile.start, column, tile.end, 0, pl.cdiv(k, BLOCK), tile.group < groups,
                  refs.rhs_NK.at[tile.group], refs.rhs_scales.at[tile.group],
                  functools.partial(_store_owned, refs, tile, column, tiling))

    def each_tile(visit, carry):
      return schedule.deal(count_1[0] * num_columns, programs,
                           lambda index, carry: visit(locate(index), carry), carry,
                           schedule.resonates(programs, min(num_columns, tiling.swizzle)))

    fp8_kernel.multiply_tiles(refs, each_tile, tiling)

  operands = (pad_columns(lhs_RK.values_MK), pad_columns(rhs_GNK.values_MK),
              lhs_RK.scales, rhs_GNK.scales)
  return fp8_kernel.launch(
      "fp8_grouped_matmul", body, operands, out=jax.ShapeDtypeStruct((rows, n), dtype),
      tiling=tiling, programs=programs, interpret=interpret, vectors=(True, False), any_row=True,
      before=schedule.row_tiles(sizes_G, rows, tiling.block_m))


def unsupported_reason(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *, dtype: jnp.dtype) -> str | None:
  """Returns why `run` cannot multiply these operands, or None if it can."""
  if rhs_GNK.shape[1] == 0 or rhs_GNK.shape[1] % _PIECE:
    return f"needs N to be a multiple of {_PIECE}, and it is {rhs_GNK.shape[1]}"
  if 0 in lhs_RK.shape or len(sizes_G) == 0:
    return f"needs rows and groups, and lhs has shape {lhs_RK.shape} in {len(sizes_G)} groups"
  return fp8_tiling.unsupported_formats(lhs_RK, rhs_GNK, dtype)


def _store_owned(refs: Refs, tile: schedule.Tile, column, tiling: Tiling, sums: Sums) -> None:
  """Stores those rows of this warpgroup's part that the tile owns, wave by wave."""
  def store(row, chunks):
    count = owned(tile.end, row)
    pl.when(count == ROWS)(lambda: fp8_kernel.store_wave(refs, refs.out, row, column, chunks))
    pl.when((count > 0) & (count < ROWS))(
        lambda: _store_some(refs, row, count, column, chunks))

  for wave, chunks in enumerate(sums):
    store(tile.start + tiling.row(wave), chunks)


def _store_some(refs: Refs, row, count, column, chunks) -> None:
  """Stores the first `count` of the 64 rows in `chunks`, at `row` and `column`."""
  wg = lax.axis_index("wg")
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for piece, value in enumerate(fp8_kernel.pieces(refs, chunks)):
    # Not swizzled, so that a run may begin at any row.
    staged = as_plain_rows(refs.out_smem, wg, piece, interpreted=refs.interpreted)
    compat.store(staged, value)
  plgpu.commit_smem()
  _, num_pieces, _, width = refs.out_smem.shape

  def store_piece(piece):
    store_runs(as_plain_rows(refs.out_smem, wg, piece, interpreted=refs.interpreted), count,
               refs.out, row, pl.ds(column + piece * width, width))

  for piece in range(num_pieces):
    # A copy of a single row is not clipped at the row's end, and would overwrite the next row. The
    # swizzled copies of whole tiles are clipped.
    pl.when(column + piece * width < refs.out.shape[1])(functools.partial(store_piece, piece))


KERNEL = implementations.Kernel(run, unsupported_reason)
