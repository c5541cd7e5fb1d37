"""Helpers that the TPU kernels share, to divide axes into blocks and to pad arrays to whole tiles.

Shape letters:  M rows  K columns
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized import BLOCK

ROWS = 32  # rows of FP8 in a vector register; blocks have a multiple of that many rows
SUBLANES = 8  # rows of float32 in a vector register
KINDS = (jnp.bfloat16, jnp.float32)  # dtypes in which products return their results

# megablox counts the visits of each tile of rows in a histogram, whose bin edges it computes in
# float32. With more tiles than this they are too coarse.
_MOST_TILES = 4096


def whole(size: int, unit: int) -> int:
  """Returns `size` rounded up to a multiple of `unit`."""
  return -(-size // unit) * unit


def divisor(size: int, most: int) -> int:
  """Returns the largest multiple of 128 that divides `size` and is at most `most`.

  Args:
    size: a multiple of 128.
    most: upper bound; 128 is returned if it is less than that.
  """
  return max(part for part in range(BLOCK, max(most, BLOCK) + 1, BLOCK) if size % part == 0)


def unsupported_rows(rows: int, tile: int) -> str | None:
  """Why megablox cannot list the visits of this many rows in tiles of `tile`, or None if it can."""
  if rows > _MOST_TILES * tile:
    return f"supports at most {_MOST_TILES * tile} rows, and there are {rows}"
  return None


def pad(x_MK: jax.Array, rows: int, columns: int) -> jax.Array:
  """Pads the last two axes at their ends with zeros, to multiples of `rows` and `columns`."""
  m, k = x_MK.shape[-2:]
  ends = [(0, whole(m, rows) - m), (0, whole(k, columns) - k)]
  return jnp.pad(x_MK, [(0, 0)] * (x_MK.ndim - 2) + ends) if any(map(any, ends)) else x_MK
