"""Gradient of each group's matrix on Hopper in bfloat16: a product that contracts a group's rows.

The kernel has the structure of `grouped_matmul`. The first and last block of a group's rows may
also hold rows of its neighbours, which the consumer warpgroups set to zero in shared memory before
they multiply. The time that a tile takes grows with the rows of its group. So the largest groups
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
    default_tiling,
    launch,
    piece_type,
    ring_types,
    store_whole,
    why_not,
)
from pallas_kernels.mosaic_gpu.hopper import ALIGNMENT, MULTIPROCESSORS, WARPGROUPS, pad_rows
from pallas_kernels.mosaic_gpu.tilings import tuned

BLOCK_R = 64  # rows contracted at a time, and those of Layout.WGMMA, with which rows are zeroed


def unsupported_reason(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *,
    dtype: jnp.dtype | None = None) -> str | None:
  """Returns why this kernel cannot multiply these, or None if it can; see `Kernel`."""
  if dtype not in (None, jnp.bfloat16, jnp.float32):
    return f"returns bfloat16 or float32, not {jnp.dtype(dtype)}"
  return why_not(lhs_RK, rhs_RN, sizes_G, lhs_RK.shape[1], rhs_RN.shape[1])


def run(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *, dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None, programs: int | None = None) -> jax.Array:
  """Returns each group's lhs.T @ rhs; see `pallas_kernels.grouped_weight_gradient`.

  Args:
    lhs_RK, rhs_RN: bfloat16, the rows of group 0 first.
    sizes_G: int32, rows per group.
    dtype: dtype of the result, bfloat16 or float32; None means bfloat16.
    tiling: how each gradient is cut; None takes the tiling that was measured fastest for this
      shape, or else `default_tiling`.
    programs: number of thread blocks among which tiles are divided; None means one for each
      multiprocessor of an H200.

  Returns:
    [G, K, N].
  """
  shape = (len(sizes_G), lhs_RK.shape[1], rhs_RN.shape[1])
  out = jax.ShapeDtypeStruct(shape, dtype or jnp.bfloat16)
  tiling = tiling or tuned(default_tiling(shape[2]), "grouped_weight_gradient", out.dtype, *shape)
  if shape[1] % tiling.rows or shape[2] % tiling.columns or tiling.columns % WIDTHS:
    raise ValueError(f"tiles of a gradient of {shape[1]} x {shape[2]} must divide it and have a "
                     f"multiple of 128 columns, and they are {tiling.rows} x {tiling.columns}")
  rows = len(lhs_RK)
  lhs_RK, rhs_RN = (pad_rows(x, BLOCK_R) for x in (lhs_RK, rhs_RN))
  return _call(_groups(sizes_G, rows), lhs_RK, rhs_RN, out, tiling, programs or MULTIPROCESSORS)


KERNEL = Kernel(run, unsupported_reason)


def _groups(sizes_G: jax.Array, num_rows: int) -> jax.Array:
  """Returns [G, F]: each group's index, first row and end, the groups with most rows first."""
  starts_G, ends_G = schedule.starts_and_ends(sizes_G, num_rows)
  order_G = jnp.argsort(starts_G - ends_G).astype(jnp.int32)
  return jnp.stack([order_G, starts_G[order_G], ends_G[order_G]], 1)


def _call(groups_GF, lhs_RK, rhs_RN, out, tiling: Tiling, programs: int):
  kernel = functools.partial(_kernel, tiling=tiling, programs=programs)
  return launch(
      "grouped_weight_gradient", kernel, (groups_GF, lhs_RK, rhs_RN), out, programs, [
          *ring_types(tiling, (BLOCK_R, tiling.rows), (BLOCK_R, tiling.columns)),
          piece_type(out.dtype, tiling.pieces(0)), plgpu.Barrier(num_arrivals=WARPGROUPS)])


def _kernel(
    groups_GF, lhs_RK, rhs_RN, out_GKN, lhs_SRK, rhs_SRN, full_S, free_S, whole_WPMC, zeroed, *,
    tiling: Tiling, programs: int):
  ring = Ring(lhs_SRK, rhs_SRN, full_S, free_S)
  num_groups, num_k, num_n = out_GKN.shape
  grid = num_k // tiling.rows, num_n // tiling.columns
  num_tiles = num_groups * grid[0] * grid[1]
  last_start = lhs_RK.shape[0] - BLOCK_R
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
      blocks = _num_blocks(*group[1:])
      visit(group, row * tiling.rows, column * tiling.columns, blocks, before)
      return before + blocks

    # The last turn may have fewer tiles than there are programs.
    turns, left = divmod(num_tiles, programs)
    place = program if turns % 2 == 0 else programs - 1 - program
    return lax.fori_loop(0, turns + (place < left).astype(jnp.int32), turn, jnp.int32(0))

  def fetch(group, row, column, blocks, before):
    def source(index):
      # A block that would reach past the last row begins earlier, and `multiply` allows for that.
      rows = pl.ds(jnp.minimum(_begin(group[1]) + index * BLOCK_R, last_start), BLOCK_R)
      return (lhs_RK.at[rows, pl.ds(row, tiling.rows)],
              rhs_RN.at[rows, pl.ds(column, tiling.columns)])
    ring.fetch(blocks, before, source)

  def multiply(group, row, column, blocks, before):
    group_index, start, end = group
    rows = tiling.rows // WARPGROUPS

    def operands(index, slot):
      at = _begin(start) + index * BLOCK_R

      @pl.when((at < start) | (at + BLOCK_R > end))
      def _():
        # Each consumer warpgroup zeroes half of the columns of both operands, and they wait for
        # each other, as each multiplies all of rhs. `commit_smem` makes the zeros visible to wgmma.
        fetched = jnp.minimum(at, last_start)
        own = jnp.maximum(at, start) - fetched, jnp.minimum(at + BLOCK_R, end) - fetched
        _zero_other_rows(lhs_SRK.at[slot], wg, *own)
        _zero_other_rows(rhs_SRN.at[slot], wg, *own)
        plgpu.commit_smem()
        plgpu.barrier_arrive(zeroed)
        plgpu.barrier_wait(zeroed)

      # Nothing is transposed: wgmma reads bfloat16 in either order, unlike FP8.
      return lhs_SRK.at[slot, :, pl.ds(wg * rows, rows)].T, rhs_SRN.at[slot]

    result = ring.multiply(blocks, before, (rows, tiling.columns), operands)
    store_whole(result, row + wg * rows, column, out_GKN.at[group_index], whole_WPMC.at[wg])

  ring.work(each_tile, fetch, multiply)


def _begin(start):
  """Returns the row at which a group's first block begins: `start` rounded down to 8 rows."""
  return start & -ALIGNMENT


def _num_blocks(start, end):
  """Returns the number of blocks that cover the rows from `start` to `end`."""
  return jnp.where(end > start, (end - _begin(start) + BLOCK_R - 1) // BLOCK_R, 0)


def _zero_other_rows(block_RC, wg, first, end) -> None:
  """Zeroes all rows but those from `first` to `end`, in this warpgroup's half of the columns."""
  width = block_RC.shape[1] // WARPGROUPS
  for at in range(0, width, BLOCK_K):
    columns = block_RC.at[:, pl.ds(wg * width + at, BLOCK_K)]
    row = plgpu.broadcasted_iota(
        jnp.int32, (BLOCK_R, BLOCK_K), 0, layout=plgpu.Layout.WGMMA)
    value = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
    columns[...] = jnp.where((first <= row) & (row < end), value, jnp.zeros_like(value))
