"""FP8 matrix product on a TPU, scaled and accumulated in float32 after every 128 elements of K.

TPUs before tpu7x cannot multiply FP8. On those the values are converted to bfloat16 in registers,
which represents them exactly: memory traffic and result are the same as with FP8 arithmetic.

Shape letters:  M, N rows of the operands  K contracted width  k blocks of 128 along K
                R, C rows and columns of a tile of the result  P the part of K that one step fetches
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations, targets
from pallas_kernels.mosaic_tpu.tiles import KINDS, ROWS, divisor, pad, whole
from pallas_kernels.quantized import BLOCK, Quantized

_FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Upper bounds of the tile sizes of the product.

  Attributes:
    rows: rows of a tile of the result, a multiple of 32.
    columns: columns of a tile of the result, a multiple of 128.
    depth: elements along K that are fetched at a time, a multiple of 128.

  Raises:
    ValueError: if a size is not such a multiple.
  """

  rows: int = 512
  columns: int = 512
  depth: int = 1024

  def __post_init__(self):
    if self.rows % ROWS or self.columns % BLOCK or self.depth % BLOCK:
      raise ValueError("Tiling's rows must be a multiple of 32, its columns and depth multiples of "
                       f"128, but they are {self.rows}, {self.columns} and {self.depth}")

  def fit(self, rows: int, columns: int, depth: int) -> "Tiling":
    """Returns a tiling no larger than the product, with a depth that divides the product's."""
    return Tiling(min(self.rows, whole(rows, ROWS)), min(self.columns, whole(columns, BLOCK)),
                  divisor(depth, self.depth))


def run(
    lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype, tiling: Tiling | None = None,
    native: bool | None = None, interpret: Any = False) -> jax.Array:
  """See `pallas_kernels.fp8_matmul`.

  Args:
    tiling: upper bounds of the tile sizes; None for the defaults.
    native: whether to multiply in FP8 rather than bfloat16; None does so if this TPU can.
    interpret: True or `pltpu.InterpretParams` to run the kernel on a CPU.
  """
  (m, _), n = lhs_MK.shape, rhs_NK.shape[0]
  lhs, rhs = (pad(x.values_MK, 1, BLOCK) for x in (lhs_MK, rhs_NK))
  depth = lhs.shape[1]
  tiling = (tiling or Tiling()).fit(m, n, depth)
  native = has_fp8() if native is None else native

  def body(lhs_RP, rhs_CP, lhs_scales_Rk, rhs_scales_kC, out_RC, sums_RC):
    step = pl.program_id(2)
    add_part(lhs_RP, rhs_CP, lhs_scales_Rk, rhs_scales_kC, sums_RC, step, native)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
      out_RC[...] = sums_RC[...].astype(out_RC.dtype)

  return pl.pallas_call(
      body, grid=(pl.cdiv(m, tiling.rows), pl.cdiv(n, tiling.columns), depth // tiling.depth),
      in_specs=[
          pl.BlockSpec((tiling.rows, tiling.depth), lambda i, j, p: (i, p)),
          pl.BlockSpec((tiling.columns, tiling.depth), lambda i, j, p: (j, p)),
          pl.BlockSpec((tiling.rows, depth // BLOCK), lambda i, j, p: (i, 0)),
          pl.BlockSpec((depth // BLOCK, tiling.columns), lambda i, j, p: (0, j))],
      out_specs=pl.BlockSpec((tiling.rows, tiling.columns), lambda i, j, p: (i, j)),
      out_shape=jax.ShapeDtypeStruct((m, n), dtype),
      scratch_shapes=[pltpu.VMEM((tiling.rows, tiling.columns), jnp.float32)],
      cost_estimate=cost(m, n, depth, weights=n * depth, dtype=dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")),
      interpret=interpret)(lhs, rhs, lhs_MK.scales_mk, column_scales(rhs_NK))


def unsupported_reason(lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype) -> str | None:
  """Why `run` does not support these operands or this dtype, or None if it does."""
  if 0 in (*lhs_MK.shape, *rhs_NK.shape):
    return f"needs non-empty operands, and the shapes are {lhs_MK.shape} and {rhs_NK.shape}"
  return unsupported_formats(lhs_MK, rhs_NK, dtype)


def unsupported_formats(lhs: Quantized, rhs: Quantized, dtype: jnp.dtype) -> str | None:
  """Why kernels do not support the operands' formats or the result's dtype, or None if they do."""
  formats = lhs.values_MK.dtype, rhs.values_MK.dtype
  if not set(formats) <= set(map(jnp.dtype, _FP8)):
    return f"needs operands in float8, not {formats[0]} and {formats[1]}"
  if dtype not in KINDS:
    return f"returns bfloat16 or float32, not {jnp.dtype(dtype)}"
  return None


def has_fp8() -> bool:
  """Whether the TPU that the program is traced for multiplies FP8 in hardware."""
  return "TPU7" in targets.target().kind


def add_part(
    lhs_RP: jax.Ref, rhs_CP: jax.Ref, lhs_scales_Rk: jax.Ref, rhs_scales_kC: jax.Ref,
    sums_RC: jax.Ref, step: jax.Array, native: bool) -> None:
  """Adds the scaled products of a part of K to the sums; the first step sets them to zero before.

  Args:
    lhs_RP: FP8 values of lhs.
    rhs_CP: FP8 values of rhs.
    lhs_scales_Rk: scales of the rows of lhs, for all of K.
    rhs_scales_kC: scales of the rows of rhs, for all of K, transposed.
    sums_RC: float32 accumulator.
    step: index of the part of K.
    native: see `run`.
  """
  @pl.when(step == 0)
  def _():
    sums_RC[...] = jnp.zeros_like(sums_RC)

  blocks = lhs_RP.shape[1] // BLOCK
  for block in range(blocks):
    part, k = pl.ds(block * BLOCK, BLOCK), step * blocks + block
    products_RC = multiply(lhs_RP[:, part], rhs_CP[:, part], native)
    sums_RC[...] += products_RC * rhs_scales_kC[pl.ds(k, 1), :] * column(lhs_scales_Rk, k)


def multiply(lhs_RP: jax.Array, rhs_CP: jax.Array, native: bool) -> jax.Array:
  """Returns lhs @ rhs.T in float32, multiplied in FP8 if `native`, otherwise in bfloat16."""
  if not native:
    lhs_RP, rhs_CP = (x.astype(jnp.bfloat16) for x in (lhs_RP, rhs_CP))
  return lax.dot_general(
      lhs_RP, rhs_CP, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def column(scales_Rk: jax.Ref, k: jax.Array) -> jax.Array:
  """Returns column k, [R, 1], where k is known only at run time."""
  selected_Rk = lax.broadcasted_iota(jnp.int32, scales_Rk.shape, 1) == k
  return jnp.where(selected_Rk, scales_Rk[...], 0).sum(1, keepdims=True)


def column_scales(rhs_NK: Quantized) -> jax.Array:
  """Returns the scales of every row of rhs as a column: [..., k, N].

  Scales of tiles with several rows are repeated for each of the rows.
  """
  scales_kN = jnp.repeat(rhs_NK.scales_mk.mT, rhs_NK.tile[0], -1)
  return scales_kN[..., :rhs_NK.shape[-2]]


def cost(m: int, n: int, k: int, *, weights: int, dtype: jnp.dtype) -> pl.CostEstimate:
  """Estimates the cost of a product of [m, k] and [k, n] that reads `weights` elements of rhs."""
  return pl.CostEstimate(
      flops=2 * m * n * k, transcendentals=0,
      bytes_accessed=m * k + weights + m * n * jnp.dtype(dtype).itemsize)


KERNEL = implementations.Kernel(run, unsupported_reason)
