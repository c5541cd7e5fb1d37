"""What the kernels share: Hopper's sizes, its shared memory, and storing a few of a tile's rows.

Shape letters:  R rows  N columns  M, C rows and columns of a piece in shared memory
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132  # of an H100 or H200; on fewer a kernel is right, but some programs wait
WARPGROUPS = 2  # that multiply, beside one that fetches; a third would leave each few registers
ROWS = 64  # of a warpgroup's matrix instruction
# Mosaic lays swizzled blocks out in 8 rows, and copies rows wrongly, and silently so, where a
# block does not begin at a multiple of them.
ALIGNMENT = 8
SWIZZLE = 128  # bytes, the widest


def swizzle(itemsize: int, width: int = SWIZZLE) -> tuple[object, object]:
  """How rows of `width` bytes lie in shared memory, so that lanes of a column share no bank."""
  return plgpu.TilingTransform((ALIGNMENT, width // itemsize)), plgpu.SwizzleTransform(width)


def aligned(rows: int, least: int = 0) -> int:
  """As many rows or a few more: a multiple of 8, or `least`, which is one."""
  return max(-(-rows // ALIGNMENT) * ALIGNMENT, least)


def pad_rows(x_RN: jax.Array, least: int = 0) -> jax.Array:
  """Adds rows of zeros, up to as many as `aligned` says."""
  return jnp.pad(x_RN, ((0, aligned(len(x_RN), least) - len(x_RN)), (0, 0)))


def store_runs(piece_MC: jax.Ref, first, count, out_RN: jax.Ref, row, columns) -> None:
  """Stores `count` rows of a piece, those from `first`, in runs of 1, 2, 4, ... rows.

  Args:
    piece_MC: in shared memory, not swizzled; 64 rows.
    first, count: of the piece's rows.
    out_RN: in global memory.
    row: where the piece's first row would go.
    columns: where its columns go.
  """
  for bit in range(ROWS.bit_length()):
    done = first + (count >> (bit + 1) << (bit + 1))  # behind the longer runs
    pl.when((count >> bit) & 1 == 1)(functools.partial(
        plgpu.copy_smem_to_gmem, piece_MC.at[pl.ds(done, 1 << bit)],
        out_RN.at[pl.ds(row + done, 1 << bit), columns], commit_group=False))
  plgpu.commit_smem_to_gmem_group()


def owned(first, end, row) -> tuple[jax.Array, jax.Array]:
  """Of the 64 rows at `row`, the first that is in first..end, counted from it, and how many are."""
  start = jnp.clip(first - row, 0, ROWS)
  return start, jnp.clip(end - row, 0, ROWS) - start
