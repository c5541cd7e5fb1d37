"""Tiles of rows for a grouped product, whose group sizes are known only when it runs.

Shape letters:  R rows  G groups  T tiles  F fields of a tile
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
