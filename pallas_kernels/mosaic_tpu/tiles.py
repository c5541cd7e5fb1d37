"""What the kernels share: how axes are cut into blocks, and numbers padded to whole tiles.

Shape letters:  M rows  K columns
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized import BLOCK

ROWS = 32  # of FP8 in a register: blocks of rows are multiples of it
SUBLANES = 8  # rows of float32 in a register
KINDS = (jnp.bfloat16, jnp.float32)

# Of more, megablox computes the bins in which it counts tiles' visits too coarsely in float32.
_MOST_TILES = 4096


def whole(size: int, unit: int) -> int:
  """The next multiple of `unit`."""
  return -(-size // unit) * unit


def divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size`, itself one, and is at most `most`."""
  return max(part for part in range(BLOCK, max(most, BLOCK) + 1, BLOCK) if size % part == 0)


def unsupported_rows(rows: int, tile: int) -> str | None:
  """Why megablox cannot list the visits of so many rows' tiles, or None if it can."""
  if rows > _MOST_TILES * tile:
    return f"needs at most {_MOST_TILES * tile} rows, and there are {rows}"
  return None


def pad(x_MK: jax.Array, rows: int, columns: int) -> jax.Array:
  """Zeros behind the last two axes, up to multiples of these."""
  m, k = x_MK.shape[-2:]
  ends = [(0, whole(m, rows) - m), (0, whole(k, columns) - k)]
  return jnp.pad(x_MK, [(0, 0)] * (x_MK.ndim - 2) + ends) if any(map(any, ends)) else x_MK
