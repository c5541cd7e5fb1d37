"""Gradient of each group's matrix on Hopper: a product over rows, as many as the group has.

Built as the product in `grouped_matmul` is. The block of rows at either end of a group may hold
rows of its neighbours; the two warpgroups that multiply zero them in shared memory first. Groups
of many rows come first, and programs take tiles in turn there and back, so that all end together.

Shape letters:  R rows  G groups  K, N widths of lhs and rhs  F fields of a group  S stages
                W multiplying warpgroups  P pieces under way  M, C rows and columns of a piece
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

BLOCK_R = 64  # contracted at once, and what one layout of registers spans


def unsupported_reason(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *,
    dtype: jnp.dtype | None = None) -> str | None:
  """Why this kernel cannot multiply these; see `Kernel`."""
  if dtype not in (None, jnp.bfloat16, jnp.float32):
    return f"gives bfloat16 or float32, not {jnp.dtype(dtype)}"
  return why_not(lhs_RK, rhs_RN, sizes_G, lhs_RK.shape[1], rhs_RN.shape[1])


def run(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *, dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None, programs: int | None = None) -> jax.Array:
  """Each group's lhs.T @ rhs; see `pallas_kernels.grouped_weight_gradient`.

  Args:
    lhs_RK, rhs_RN: bfloat16.
    sizes_G: int32, rows per group.
    dtype: of the result, bfloat16 or float32; None is bfloat16.
    tiling: of each gradient; None is the one measured best, or `default_tiling`.
    programs: that share the tiles; None is one on each multiprocessor of an H200.

  Returns:
    [G, K, N].
  """
  shape = (len(sizes_G), lhs_RK.shape[1], rhs_RN.shape[1])
  out = jax.ShapeDtypeStruct(shape, dtype or jnp.bfloat16)
  tiling = tiling or tuned(default_tiling(shape[2]), "grouped_weight_gradient", out.dtype, *shape)
  if shape[1] % tiling.rows or shape[2] % tiling.columns or tiling.columns % WIDTHS:
    raise ValueError(f"tiles of a gradient of {shape[1]} x {shape[2]} must divide it, with a "
                     f"multiple of 128 columns, and they are {tiling.rows} x {tiling.columns}")
  rows = len(lhs_RK)
  lhs_RK, rhs_RN = (pad_rows(x, BLOCK_R) for x in (lhs_RK, rhs_RN))
  return _call(_groups(sizes_G, rows), lhs_RK, rhs_RN, out, tiling, programs or MULTIPROCESSORS)


KERNEL = Kernel(run, unsupported_reason)


def _groups(sizes_G: jax.Array, num_rows: int) -> jax.Array:
  """The number of each group, its first row and its end, those of most rows first: [G, F]."""
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
    """Calls visit(group, tile, blocks, blocks before) for this program's tiles; all blocks."""
    def turn(index, before):
      place = jnp.where(index % 2 == 0, program, programs - 1 - program)
      group, tile = divmod(index * programs + place, grid[0] * grid[1])
      row, column = plgpu.planar_snake(tile, grid, 1, tiling.swizzle)
      group = [groups_GF[group, field] for field in range(3)]
      blocks = _num_blocks(*group[1:])
      visit(group, row * tiling.rows, column * tiling.columns, blocks, before)
      return before + blocks

    # Of the last turn there may be less than all programs need.
    turns, left = divmod(num_tiles, programs)
    place = program if turns % 2 == 0 else programs - 1 - program
    return lax.fori_loop(0, turns + (place < left).astype(jnp.int32), turn, jnp.int32(0))

  def fetch(group, row, column, blocks, before):
    def source(index):
      rows = pl.ds(jnp.minimum(_begin(group[1]) + index * BLOCK_R, last_start), BLOCK_R)
      return (lhs_RK.at[rows, pl.ds(row, tiling.rows)],
              rhs_RN.at[rows, pl.ds(column, tiling.columns)])
    ring.fetch(blocks, before, source)

  def multiply(group, row, column, blocks, before):
    number, start, end = group
    rows = tiling.rows // WARPGROUPS

    def operands(index, slot):
      at = _begin(start) + index * BLOCK_R

      @pl.when((at < start) | (at + BLOCK_R > end))
      def _():
        fetched = jnp.minimum(at, last_start)
        own = jnp.maximum(at, start) - fetched, jnp.minimum(at + BLOCK_R, end) - fetched
        _zero_others(lhs_SRK.at[slot], wg, *own)
        _zero_others(rhs_SRN.at[slot], wg, *own)
        plgpu.commit_smem()
        plgpu.barrier_arrive(zeroed)
        plgpu.barrier_wait(zeroed)

      return lhs_SRK.at[slot, :, pl.ds(wg * rows, rows)].T, rhs_SRN.at[slot]

    result = ring.multiply(blocks, before, (rows, tiling.columns), operands)
    store_whole(result, row + wg * rows, column, out_GKN.at[number], whole_WPMC.at[wg])

  ring.work(each_tile, fetch, multiply)


def _begin(start):
  """Where the first block of a group's rows begins."""
  return start & -ALIGNMENT


def _num_blocks(start, end):
  """Blocks that hold the rows from `start` to `end`."""
  return jnp.where(end > start, (end - _begin(start) + BLOCK_R - 1) // BLOCK_R, 0)


def _zero_others(block_RC, wg, first, end) -> None:
  """Zeroes all rows but those from `first` to `end` in a warpgroup's share of the columns."""
  share = block_RC.shape[1] // WARPGROUPS
  for at in range(0, share, BLOCK_K):
    columns = block_RC.at[:, pl.ds(wg * share + at, BLOCK_K)]
    row = plgpu.broadcasted_iota(
        jnp.int32, (BLOCK_R, BLOCK_K), 0, layout=plgpu.Layout.WGMMA)
    value = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
    columns[...] = jnp.where((first <= row) & (row < end), value, jnp.zeros_like(value))
