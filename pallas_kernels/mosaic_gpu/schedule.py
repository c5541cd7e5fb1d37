"""Which rows each tile of a grouped product computes, known only when it runs.

Shape letters:  R rows  G groups  T tiles  F fields of a tile
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.hopper import ALIGNMENT


class Tiles(NamedTuple):
  """Tiles of rows, each of one group, in the order of their rows.

  Attributes:
    fields_TF: int32; of each tile its group, the row it begins at, a multiple of 8, and the first
      and the end of the rows that are its own. Rows of no group are tiles of a group behind the
      last.
    count_1: int32, how many there are; what `fields_TF` holds after them owns no rows.
  """

  fields_TF: jax.Array
  count_1: jax.Array


class Tile(NamedTuple):
  """One tile as a kernel reads it; scalars."""

  group: jax.Array
  start: jax.Array
  first: jax.Array
  end: jax.Array


def most_tiles(num_rows: int, num_groups: int, tile: int) -> int:
  """Enough tiles however rows fall into groups: all but one group may end within a tile."""
  return -(-num_rows // tile) + num_groups


def starts_and_ends(sizes_G: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """The first row of each group and the row behind its last, both int32 [G]."""
  ends_G = jnp.minimum(jnp.cumsum(sizes_G.astype(jnp.int32)), num_rows)
  return jnp.pad(ends_G, (1, 0))[:-1], ends_G


def row_tiles(sizes_G: jax.Array, num_rows: int, tile: int) -> Tiles:
  """Cuts every group into tiles, each group anew, so that only its first and last are cut short.

  Args:
    sizes_G: int32, rows per group; their sum is at most `num_rows`.
    num_rows: in all; a multiple of 8, and at least one tile.
    tile: its rows, a multiple of 8.

  Returns:
    T is `most_tiles(num_rows, G, tile)`; together they own every row exactly once, and none
    reaches past the last row.
  """
  starts_G, ends_G = starts_and_ends(sizes_G, num_rows)
  starts_H = jnp.append(starts_G, ends_G[-1])  # H: the groups and what is left
  ends_H = jnp.append(ends_G, num_rows)
  begins_H = starts_H // ALIGNMENT * ALIGNMENT
  counts_H = jnp.where(ends_H > starts_H, -(-(ends_H - begins_H) // tile), 0)
  behind_H = jnp.cumsum(counts_H)
  index_T = jnp.arange(most_tiles(num_rows, len(sizes_G), tile), dtype=jnp.int32)
  group_T = jnp.minimum((behind_H <= index_T[:, None]).sum(1, dtype=jnp.int32), len(sizes_G))
  begin_T = begins_H[group_T] + (index_T - (behind_H - counts_H)[group_T]) * tile
  first_T = jnp.minimum(jnp.maximum(begin_T, starts_H[group_T]), num_rows)
  end_T = jnp.minimum(begin_T + tile, ends_H[group_T])
  start_T = jnp.minimum(begin_T, num_rows - tile)
  return Tiles(jnp.stack([group_T, start_T, first_T, end_T], 1), behind_H[-1:])


def read(fields_TF: jax.Ref, index: jax.Array) -> Tile:
  """One tile, inside a kernel."""
  return Tile(*(fields_TF[index, field] for field in range(len(Tile._fields))))
