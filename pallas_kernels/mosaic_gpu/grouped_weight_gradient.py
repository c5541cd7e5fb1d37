"""Gradient of each group's matrix on Hopper in bfloat16: a product that contracts a group's rows.

The kernel has the structure of `grouped_matmul`. The last block of a group's rows may also hold
rows of the next group, which the consumer warpgroups set to zero in shared memory before they
multiply. The time that a tile takes grows with the rows of its group. So the largest groups
come first, and tiles are dealt to programs in serpentine order, from the first program to the last
and back from the last to the first, so that all programs finish at about the same time.

Shape letters:  R rows  G groups  K, N widths of lhs and rhs  F fields of a group  S stages
                W consumer warpgroups  P pieces in flight  M, C rows and columns of a piece
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.implementations import Kernel
from pallas_kernels.mosaic_gpu import schedule
from pallas_kernels.mosaic_gpu.grouped_matmul import (
    BLOCK_K,
    WIDTHS,
    Ring,
    Tiling,
    launch,
    piece_type,
    ring_types,
    store_whole,
    why_not,
)
from pallas_kernels.mosaic_gpu.hopper import ALIGNMENT, MULTIPROCESSORS, WARPGROUPS, row_groups
from pallas_kernels.mosaic_gpu.tilings import tuned

BLOCK_R = 64  # rows contracted at a time, and those of Layout.WGMMA, with which rows are zeroed


def unsupported_reason(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *,
    dtype: jnp.dtype | None = None) -> str | None:
  """Returns why this kernel cannot multiply these, or None if it can; see `Kernel`."""
  if dtype not in (None, jnp.bfloat16, jnp.float32):
    return f"returns bfloat16 or float32, not {jnp.dtype(dtype)}"
  return why_not(lhs_RK, rhs_RN, sizes_G, lhs_RK.shape[1], rhs_RN.shape[1])


def gradient_tiling(rows: int, columns: int) -> Tiling:
  """Returns the tiling for gradients of [K, N], fitted to 11 shapes drawn at random.

  Smaller tiles, whose blocks are filled by smaller copies, were half as fast. What a tile has past
  the last row or column is wasted.
  """
  wasted = lambda tiling: (pl.cdiv(rows, tiling.rows) * tiling.rows
                           * pl.cdiv(columns, tiling.columns) * tiling.columns)
  return min((Tiling(128, 256, swizzle=1), Tiling(256, 128, swizzle=1)), key=wasted)


def run(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *, dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None, programs: int | None = None,
    interpret: object = None) -> jax.Array:
  """Returns each group's lhs.T @ rhs; see `pallas_kernels.grouped_weight_gradient`.

  Args:
    lhs_RK, rhs_RN: bfloat16, the rows of group 0 first.
    sizes_G: int32, rows per group.
    dtype: dtype of the result, bfloat16 or float32; None means bfloat16.
    tiling: how each gradient is cut; None takes `gradient_tiling`, or the exception that the table
      of tilings has for this shape.
    programs: number of thread blocks among which tiles are divided; None means one for each
      multiprocessor of an H200.
    interpret: see `grouped_matmul.run`.

  Returns:
    [G, K, N].
  """
  shape = (len(sizes_G), lhs_RK.shape[1], rhs_RN.shape[1])
  out = jax.ShapeDtypeStruct(shape, dtype or jnp.bfloat16)
  tiling = tiling or tuned(
      gradient_tiling(*shape[1:]), "grouped_weight_gradient", out.dtype, *shape)
  if tiling.columns % WIDTHS:
    raise ValueError(f"tiles of a gradient need a multiple of {WIDTHS} columns, and they have "
                     f"{tiling.columns}")
  return _call(_groups(sizes_G, len(lhs_RK)), lhs_RK, rhs_RN, out, tiling,
               programs or MULTIPROCESSORS, interpret)


KERNEL = Kernel(run, unsupported_reason)


def _groups(sizes_G: jax.Array, num_rows: int) -> jax.Array:
  """Returns [G, F]: each group's index, first row and end, the groups with most rows first."""
  starts_G, ends_G = schedule.starts_and_ends(sizes_G, num_rows)
  rows_G, index_G = ends_G - starts_G, jnp.arange(len(sizes_G), dtype=jnp.int32)
  # A group's place is the number of groups before it. There are few groups, so that counting them
  # is faster than a sort on a GPU.
  before_GG = (rows_G > rows_G[:, None]) | (
      (rows_G == rows_G[:, None]) & (index_G < index_G[:, None]))
  place_G = before_GG.sum(1, dtype=jnp.int32)
  fields_GF = jnp.stack([index_G, starts_G, ends_G], 1)
  return jnp.where((place_G == index_G[:, None])[..., None], fields_GF, 0).sum(1)


def _call(groups_GF, lhs_RK, rhs_RN, out, tiling: Tiling, programs: int, interpret):
  kernel = functools.partial(_kernel, tiling=tiling, programs=programs)
  return launch(
      "grouped_weight_gradient", kernel, (groups_GF, lhs_RK, rhs_RN), out, programs, [
          *ring_types(tiling, (BLOCK_R, tiling.rows), (BLOCK_R, tiling.columns),
                      copies=2 * BLOCK_R // ALIGNMENT),
          piece_type(out.dtype, tiling.pieces), plgpu.Barrier(num_arrivals=WARPGROUPS)],
      interpret)


def _kernel(
    groups_GF, lhs_RK, rhs_RN, out_GKN, lhs_SRK, rhs_SRN, full_S, free_S, staged_WPMC, zeroed, *,
    tiling: Tiling, programs: int, interpreted: bool):
  ring = Ring(lhs_SRK, rhs_SRN, full_S, free_S, interpreted)
  num_groups, num_k, num_n = out_GKN.shape
  grid = pl.cdiv(num_k, tiling.rows), pl.cdiv(num_n, tiling.columns)
  num_tiles = num_groups * grid[0] * grid[1]
  program, wg = lax.axis_index("sm"), lax.axis_index("wg")

  def each_tile(visit):
    """Calls visit(group, row, column, number of blocks, blocks before) for this program's tiles.

    Returns the number of blocks of all of them.
    """
    def turn(index, before):
      # Serpentine order: every second turn deals the tiles to programs from the last to the first.
      place = jnp.where(index % 2 == 0, program, programs - 1 - program)
      group, tile = divmod(index * programs + place, grid[0] * grid[1])
      row, column = plgpu.planar_snake(tile, grid, 1, tiling.swizzle)
      group = [groups_GF[group, field] for field in range(3)]
      blocks = pl.cdiv(group[2] - group[1], BLOCK_R)
      visit(group, row * tiling.rows, column * tiling.columns, blocks, before)
      return before + blocks

    # The last turn may have fewer tiles than there are programs.
    turns, left = divmod(num_tiles, programs)
    place = program if turns % 2 == 0 else programs - 1 - program
    return lax.fori_loop(0, turns + (place < left).astype(jnp.int32), turn, jnp.int32(0))

  def fetch(group, row, column, blocks, before):
    def copies(index, slot):
      # Groups begin at any row, and blocks are wider than a row of the swizzle.
      for operand, blocks, columns in ((lhs_RK, lhs_SRK, pl.ds(row, tiling.rows)),
                                       (rhs_RN, rhs_SRN, pl.ds(column, tiling.columns))):
        for at, place in enumerate(row_groups(blocks, slot, interpreted)):
          first = group[1] + index * BLOCK_R + at * ALIGNMENT
          yield operand.at[pl.ds(first, ALIGNMENT), columns], place
    ring.fetch(blocks, before, copies)

  def multiply(group, row, column, blocks, before):
    group_index, start, end = group
    rows = tiling.rows // WARPGROUPS

    def operands(index, slot):
      left = end - start - index * BLOCK_R

      @pl.when(left < BLOCK_R)
      def _():
        # Each consumer warpgroup zeroes half of the columns of both operands, and they wait for
        # each other, as each multiplies all of rhs. `commit_smem` makes the zeros visible to wgmma.
        _zero_rows(lhs_SRK.at[slot], wg, left)
        _zero_rows(rhs_SRN.at[slot], wg, left)
        plgpu.commit_smem()
        plgpu.barrier_arrive(zeroed)
        plgpu.barrier_wait(zeroed)

      # Nothing is transposed: wgmma reads bfloat16 in either order, unlike FP8.
      return lhs_SRK.at[slot, :, pl.ds(wg * rows, rows)].T, rhs_SRN.at[slot]

    result = ring.multiply(blocks, before, (rows, tiling.columns), operands)
    store_whole(result, row + wg * rows, column, out_GKN.at[group_index], staged_WPMC,
                  interpreted)

  ring.work(each_tile, fetch, multiply)


def _zero_rows(block_RC, wg, first) -> None:
  """Zeroes the rows from `first` on, in this warpgroup's half of the columns."""
  width = block_RC.shape[1] // WARPGROUPS
  for at in range(0, width, BLOCK_K):
    columns = block_RC.at[:, pl.ds(wg * width + at, BLOCK_K)]
    row = plgpu.broadcasted_iota(
        jnp.int32, (BLOCK_R, BLOCK_K), 0, layout=plgpu.Layout.WGMMA)
    value = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
    columns[...] = jnp.where(row < first, value, jnp.zeros_like(value))
