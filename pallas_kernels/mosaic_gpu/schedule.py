"""Tiles of rows for a grouped product, whose group sizes are known only when it runs.

Shape letters:  R rows  G groups  T tiles  F fields of a tile
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.hopper import ALIGNMENT


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
    start: row at which the tile begins, a multiple of 8.
    first, end: range of rows that the tile owns, and may store; those of its rows that are outside
      belong to other tiles.
  """

  group: jax.Array
  start: jax.Array
  first: jax.Array
  end: jax.Array


def most_tiles(num_rows: int, num_groups: int, tile: int) -> int:
  """Returns a number of tiles that suffices for any group sizes.

  Of the groups and the rows past them, all but one may end within a tile.
  """
  return -(-num_rows // tile) + num_groups


def starts_and_ends(sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """Returns the first row of each group, and its last row plus one, both int32 [G]."""
  ends_G = jnp.minimum(jnp.cumsum(sizes_G.astype(jnp.int32)), num_rows)
  return jnp.pad(ends_G, (1, 0))[:-1], ends_G


def row_tiles(sizes_G: jax.Array, num_rows: int, tile: int) -> Tiles:
  """Cuts every group into tiles, of which only the first and the last may own less than all rows.

  Args:
    sizes_G: int32, rows per group; their sum is at most `num_rows`.
    num_rows: number of rows, a multiple of 8 and at least `tile`.
    tile: rows of a tile, a multiple of 8.

  Returns:
    Tiles that own every row exactly once; none reaches past the last row. T is
    `most_tiles(num_rows, G, tile)`.
  """
  starts_G, ends_G = starts_and_ends(sizes_G, num_rows)
  # H: the groups, and one more that has the rows past them.
  starts_H = jnp.append(starts_G, ends_G[-1])
  ends_H = jnp.append(ends_G, num_rows)
  # Copies must begin at a multiple of 8 rows, so a group's first tile may begin before the group.
  begins_H = starts_H // ALIGNMENT * ALIGNMENT
  counts_H = jnp.where(ends_H > starts_H, -(-(ends_H - begins_H) // tile), 0)
  tile_ends_H = jnp.cumsum(counts_H)
  index_T = jnp.arange(most_tiles(num_rows, len(sizes_G), tile), dtype=jnp.int32)
  group_T = jnp.minimum((tile_ends_H <= index_T[:, None]).sum(1, dtype=jnp.int32), len(sizes_G))
  begin_T = begins_H[group_T] + (index_T - (tile_ends_H - counts_H)[group_T]) * tile
  first_T = jnp.minimum(jnp.maximum(begin_T, starts_H[group_T]), num_rows)
  end_T = jnp.minimum(begin_T + tile, ends_H[group_T])
  # The last tiles move up to stay within the rows; what they own stays the same.
  start_T = jnp.minimum(begin_T, num_rows - tile)
  return Tiles(jnp.stack([group_T, start_T, first_T, end_T], 1), tile_ends_H[-1:])


def read(fields_TF: jax.Ref, index: jax.Array) -> Tile:
  """Returns one tile, read inside a kernel."""
  return Tile(*(fields_TF[index, field] for field in range(len(Tile._fields))))
