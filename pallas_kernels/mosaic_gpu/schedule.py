"""Which tiles a program computes, and the tiles of rows of a grouped product.

Programs are persistent: each computes tile after tile. The group sizes of a grouped product are
known only when it runs, so its tiles are computed on the device.

Shape letters:  R rows  G groups  T tiles  F fields of a tile
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
  """Tiles of rows, each of one group, in the order of their rows.

  Attributes:
    fields_TF: int32, the fields of `Tile`. Rows past the last group's are in tiles of group G.
    count_1: int32, the number of tiles; the entries of `fields_TF` after those own no rows.
  """

  fields_TF: jax.Array
  count_1: jax.Array


class Tile(NamedTuple):
  """One tile, as a kernel reads it from `Tiles`: int32 scalars.

  Attributes:
    group: the group that the tile computes.
    start: the tile's first row.
    end: the group's last row plus one. Rows of the tile from there on belong to other tiles.
  """

  group: jax.Array
  start: jax.Array
  end: jax.Array


def most_tiles(num_rows: int, num_groups: int, tile: int) -> int:
  """Returns a number of tiles that suffices for any group sizes.

  Of the groups and the rows past them, all but one may end within a tile.
  """
  return -(-num_rows // tile) + num_groups


def starts_and_ends(sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """Returns the first row of each group, and its last row plus one, both int32 [G]."""
  ends_G = jnp.minimum(_running_sum(sizes_G.astype(jnp.int32)), num_rows)
  return jnp.pad(ends_G, (1, 0))[:-1], ends_G


def row_tiles(sizes_G: jax.Array, num_rows: int, tile: int) -> Tiles:
  """Cuts every group into tiles, of which only the last may own less than all rows.

  Args:
    sizes_G: int32, rows per group; their sum is at most `num_rows`.
    num_rows: number of rows.
    tile: rows of a tile.

  Returns:
    Tiles that own every row exactly once. T is `most_tiles(num_rows, G, tile)`.
  """
  starts_G, ends_G = starts_and_ends(sizes_G, num_rows)
  # H: the groups, and one more that has the rows past them.
  starts_H = jnp.append(starts_G, ends_G[-1])
  ends_H = jnp.append(ends_G, num_rows)
  counts_H = -(-(ends_H - starts_H) // tile)
  tile_ends_H = _running_sum(counts_H)
  # The fields of tile 0 of each group, and by how much those of the next group differ. A tile's own
  # are those of the first group plus all differences up to its group: a sum, and so one kernel,
  # where looking them up by the tile's group would take several.
  begin_H = starts_H - (tile_ends_H - counts_H) * tile
  fields_HF = jnp.stack([jnp.arange(len(ends_H), dtype=jnp.int32), begin_H, ends_H], 1)
  steps_HF = jnp.pad(jnp.diff(fields_HF, axis=0), ((0, 1), (0, 0)))
  index_T = jnp.arange(most_tiles(num_rows, len(sizes_G), tile), dtype=jnp.int32)
  passed_TH = tile_ends_H <= index_T[:, None]
  fields_TF = fields_HF[0] + jnp.where(passed_TH[..., None], steps_HF, 0).sum(1)
  return Tiles(fields_TF + index_T[:, None] * jnp.asarray([0, tile, 0], jnp.int32),
               tile_ends_H[-1:])


def _running_sum(x_G: jax.Array) -> jax.Array:
  """Returns the sums up to each element, of which there are few: faster than a scan on a GPU."""
  index_G = jnp.arange(len(x_G))
  return jnp.where(index_G <= index_G[:, None], x_G, 0).sum(1, dtype=jnp.int32)


def read(fields_TF: jax.Ref, index: jax.Array) -> Tile:
  """Returns one tile, read inside a kernel."""
  return Tile(*(fields_TF[index, field] for field in range(len(Tile._fields))))


def deal[Carry](
    num_tiles: int | jax.Array, programs: int, visit: Callable[[jax.Array, Carry], Carry],
    carry: Carry, rotate: bool = False) -> Carry:
  """Calls carry = visit(index, carry) for the tiles of this program, inside a kernel.

  Every turn deals the next tiles, one to each program.

  Args:
    num_tiles: number of tiles of all programs.
    programs: number of programs, along the axis "sm".
    visit: takes the index of a tile and the carry.
    carry: initial value.
    rotate: whether every turn begins at another program. Without it, the tiles of a program lie at
      equal distances; see `resonates`.

  Returns:
    The last carry.
  """
  # Multiples of the golden ratio are spread evenly, so those of a number close to it are too.
  step = round(programs * (math.sqrt(5) - 1) / 2) if rotate else 0
  while rotate and math.gcd(step, programs) > 1:
    step += 1
  place = lambda turn: lax.rem(lax.axis_index("sm") + turn * step, programs)
  turns, left = divmod(num_tiles, programs)
  return lax.fori_loop(
      0, turns + (place(turns) < left).astype(jnp.int32),
      lambda turn, carry: visit(turn * programs + place(turn), carry), carry)


def resonates(programs: int, columns: int) -> bool:
  """Returns whether a program's tiles may all be of the same kind, if it takes every `programs`-th.

  With `columns` tiles in a row that divide the number of programs, a program's tiles are a whole
  number of rows apart. Where groups have equally many rows, the tiles at their ends, which take
  less time, are at equal distances too, and a program has all or none of them. Programs then drift
  apart and no longer share operands in L2: 160 groups of 410 rows took a tenth longer on an H200.
  """
  return programs % columns == 0


class Share(NamedTuple):
  """The part of a tile's contracted axis that a program sums: int32 scalars.

  Attributes:
    tile: index of the tile.
    first, count: first block of the contracted axis, and number of blocks.
    index: which part of the tile it is, counted from 0.
  """

  tile: jax.Array
  first: jax.Array
  count: jax.Array
  index: jax.Array


def share[Carry](
    num_tiles: int, blocks: int, programs: int,
    visit: Callable[[Share, Carry], Carry], carry: Carry) -> Carry:
  """Calls carry = visit(share, carry) for the shares of this program, inside a kernel.

  The blocks of all tiles, one tile after another, are divided among the programs into runs of equal
  length: every program has the same work, and most tiles are summed by several programs (Osama et
  al., "Stream-K", arXiv:2301.03598).

  Args:
    num_tiles: number of tiles.
    blocks: number of blocks of the contracted axis.
    programs: number of programs, along the axis "sm", at most one for each block; any after those
      have no share.
    visit: takes a share and the carry.
    carry: initial value.

  Returns:
    The last carry.
  """
  total, program = num_tiles * blocks, lax.axis_index("sm")
  begin, end = (lax.div((program + i) * total, programs) for i in range(2))

  def turn(tile, carry):
    first = jnp.maximum(begin, tile * blocks)
    count = jnp.minimum(end, (tile + 1) * blocks) - first
    # The program that has the tile's first block is the largest p with p * total // programs at
    # most that block.
    first_program = lax.div((tile * blocks + 1) * programs - 1, total)
    return visit(Share(tile, first - tile * blocks, count, program - first_program), carry)

  last = jnp.minimum(lax.div(end - 1, blocks), num_tiles - 1)
  return lax.fori_loop(lax.div(begin, blocks), last + 1, turn, carry)


_MOST_MORE = 8  # blocks


def sharers(num_tiles: int, blocks: int, programs: int) -> int:
  """Returns how many of the programs should share the blocks of all tiles; see `share`.

  With equally many programs for each tile, a program sums and writes a part of one tile only, and
  all tiles have equally many parts. On an H200 that gained 1 to 5 us of 10 to 30, and 0.2 to 1 of 5
  to 7 with 64 rows or less, although the programs that are left over idle and the others sum more
  blocks each. With 11 blocks more it was the faster way once, and the slower one once.

  Args:
    num_tiles, blocks: see `share`.
    programs: the most that there may be.
  """
  each = programs // num_tiles
  if each < 2 or -(-blocks // each) > -(-num_tiles * blocks // programs) + _MOST_MORE:
    return programs
  return each * num_tiles


def most_parts(num_tiles: int, blocks: int, programs: int) -> int:
  """Returns the largest number of parts into which `share` divides a tile."""
  program = lambda block: ((block + 1) * programs - 1) // (num_tiles * blocks)
  return max(program((tile + 1) * blocks - 1) - program(tile * blocks) + 1
             for tile in range(num_tiles))
