"""Grouped matrix products on a TPU by megablox, JAX's own kernels, whose groups end at any row.

megablox requires a whole number of tiles of rows and leaves rows past the last group undefined.
Here the rows are padded, and those past the last group are set to zero.

Shape letters:  R rows  G groups  K contracted width  N result width
                T rows of a tile
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels.implementations import Kernel
from pallas_kernels.mosaic_tpu.tiles import KINDS, ROWS, pad, unsupported_rows, whole
from pallas_kernels.ops.grouped_matmul import differentiable
from pallas_kernels.quantized import BLOCK


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Upper bounds of the tile sizes of a product.

  Attributes:
    rows: rows of a tile, a multiple of 32.
    depth: elements of a tile along K, a multiple of 128.
    columns: elements of a tile along N, a multiple of 128.

  Raises:
    ValueError: if a size is not such a multiple.
  """

  rows: int = 512
  depth: int = 1024
  columns: int = 1024

  def __post_init__(self):
    if self.rows % ROWS or self.depth % BLOCK or self.columns % BLOCK:
      raise ValueError("Tiling's rows must be a multiple of 32, its depth and columns multiples of "
                       f"128, but they are {self.rows}, {self.depth} and {self.columns}")

  def fit(self, rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Returns rows, depth and columns of tiles that are no larger than the product."""
    return (min(self.rows, whole(rows, ROWS)), min(self.depth, whole(depth, BLOCK)),
            min(self.columns, whole(columns, BLOCK)))


def run(
    lhs_RK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array, *, transpose_rhs: bool = False,
    precision: lax.PrecisionLike = None, tiling: Tiling | None = None, interpret: Any = False,
) -> jax.Array:
  """See `pallas_kernels.grouped_matmul`; gradients are computed by megablox, too.

  Args:
    precision: has no effect; see `pallas_kernels.ops.grouped_matmul.differentiable`.
    tiling: upper bounds of the tile sizes; None for the defaults.
    interpret: True or `pltpu.InterpretParams` to run the kernel on a CPU.
  """
  return _differentiable(lhs_RK, rhs_GKN, sizes_G, transpose_rhs=transpose_rhs,
                         precision=precision, tiling=tiling, interpret=interpret)


def run_weight_gradient(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *, dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None, interpret: Any = False) -> jax.Array:
  """See `pallas_kernels.grouped_weight_gradient`.

  Args:
    tiling, interpret: see `run`.
  """
  # VMEM also holds a float32 accumulator for a tile of the result, which therefore has half as many
  # columns.
  tiling = tiling or Tiling(columns=512)
  tile = tiling.fit(len(lhs_RK), lhs_RK.shape[1], rhs_RN.shape[1])
  lhs, rhs = (pad(x, tile[0], 1) for x in (lhs_RK, rhs_RN))
  # tgmm transposes lhs back, so the transposition costs nothing once compiled.
  return tgmm(lhs.T, rhs, sizes_G, preferred_element_type=dtype or lhs_RK.dtype, tiling=tile,
              interpret=interpret)


def unsupported_reason(
    lhs_RK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array, *, transpose_rhs: bool = False,
    precision: lax.PrecisionLike = None) -> str | None:
  """Why `run` does not support these operands, or None if it does."""
  del transpose_rhs, precision
  return _unsupported_operands(lhs_RK, rhs_GKN, sizes_G, None)


def unsupported_weight_gradient(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *,
    dtype: jnp.dtype | None = None) -> str | None:
  """Why `run_weight_gradient` does not support these operands or this dtype, or None if it does."""
  return _unsupported_operands(lhs_RK, rhs_RN, sizes_G, dtype)


def _unsupported_operands(lhs, rhs, sizes_G, dtype) -> str | None:
  """Why megablox does not support these operands or the result's dtype, or None if it does."""
  if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16 or sizes_G.dtype != jnp.int32:
    return f"needs bfloat16 and int32 sizes, not {lhs.dtype}, {rhs.dtype} and {sizes_G.dtype}"
  if dtype is not None and dtype not in KINDS:
    return f"returns bfloat16 or float32, not {jnp.dtype(dtype)}"
  if 0 in (*lhs.shape, *rhs.shape, *sizes_G.shape):
    return f"needs non-empty operands, not {lhs.shape}, {rhs.shape} and {sizes_G.shape}"
  return unsupported_rows(len(lhs), Tiling().rows)


def _multiply(lhs_RK, rhs_GKN, sizes_G, *, transpose_rhs, tiling, interpret):
  rows, columns = len(lhs_RK), rhs_GKN.shape[1 if transpose_rhs else 2]
  tile = (tiling or Tiling()).fit(rows, lhs_RK.shape[1], columns)
  out_RN = gmm(
      pad(lhs_RK, tile[0], 1), rhs_GKN, sizes_G, preferred_element_type=lhs_RK.dtype, tiling=tile,
      transpose_rhs=transpose_rhs, interpret=interpret)
  return _zero_rows_from(out_RN, sizes_G.sum(), tile[0])[:rows]


def _zero_rows_from(x_RN, end, tile):
  """Sets the rows from `end` on to zero, in tiles of `tile` rows.

  Tiles before `end` are not touched: reading and writing the whole array would cost memory traffic.
  """
  def zero(i, x_RN):
    rows_TN = lax.dynamic_slice_in_dim(x_RN, i * tile, tile)
    row_T1 = i * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    return lax.dynamic_update_slice_in_dim(x_RN, jnp.where(row_T1 < end, rows_TN, 0), i * tile, 0)

  return lax.fori_loop(end // tile, len(x_RN) // tile, zero, x_RN)


_differentiable = differentiable(_multiply, run_weight_gradient)
KERNEL = Kernel(run, unsupported_reason)
WEIGHT_GRADIENT_KERNEL = Kernel(run_weight_gradient, unsupported_weight_gradient)
