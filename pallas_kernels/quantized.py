"""Arrays in few bits with a scale for each tile (arXiv:2412.19437, section 3.3.2).

Hardware multiplies FP8 along the last axis of both operands, so whatever is contracted comes last:
an activation that a weight gradient contracts over tokens is quantised transposed.

Shape letters:  M rows  K columns  m, k tiles of them
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128  # V3's tile width, and the interval of promotion


class Format(NamedTuple):
  """A format of small floating-point numbers.

  Attributes:
    dtype: that values are kept in; for E5M6, which no array library has, one that holds them all.
    largest: finite value.
    mantissa_bits, smallest_exponent: of normal numbers.
  """

  dtype: jnp.dtype
  largest: float
  mantissa_bits: int
  smallest_exponent: int


FORMATS = {
    "e4m3": Format(jnp.dtype(jnp.float8_e4m3fn), 448.0, 3, -6),
    "e5m2": Format(jnp.dtype(jnp.float8_e5m2), 57344.0, 2, -14),
    "e5m6": Format(jnp.dtype(jnp.float16), 65024.0, 6, -14),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """`values` times the scale of their tile.

  Attributes:
    values_MK: [..., M, K], in the format's dtype.
    scales_mk: float32 [..., ceil(M / tile[0]), ceil(K / tile[1])].
    tile: rows and columns that share a scale; the last tiles may be smaller.
  """

  values_MK: jax.Array
  scales_mk: jax.Array
  tile: tuple[int, int] = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values_MK.shape

  @property
  def mT(self) -> "Quantized":
    """The last two axes exchanged, of values, scales and tile: nothing is rounded."""
    return Quantized(self.values_MK.mT, self.scales_mk.mT, self.tile[::-1])


def num_tiles(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, int]:
  """Tiles of the last two axes."""
  return math.ceil(shape[-2] / tile[0]), math.ceil(shape[-1] / tile[1])


def dequantize(x: Quantized, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """The numbers that stand for: values times scales, multiplied in float32."""
  rows, columns = x.shape[-2:]
  scales = jnp.repeat(x.scales_mk, x.tile[0], -2)[..., :rows, :]
  scales = jnp.repeat(scales, x.tile[1], -1)[..., :columns]
  return (x.values_MK.astype(jnp.float32) * scales).astype(dtype)


def round_to(x: jax.Array, name: str) -> jax.Array:
  """Rounds to nearest, ties to even, and saturates; of the format's dtype."""
  form = FORMATS[name]
  x = jnp.clip(x, -form.largest, form.largest)
  return cast_to(x, form)


def cast_to(x: jax.Array, form: Format) -> jax.Array:
  """Rounds what is not beyond the format's largest, in operations that kernels have, too."""
  return (x if form.dtype.itemsize == 1 else _round_bits(x, form)).astype(form.dtype)


def _round_bits(x: jax.Array, form: Format) -> jax.Array:
  """Float32 rounded to nearest, ties to even, to what a format holds that no array library has."""
  dropped = 23 - form.mantissa_bits  # of float32's mantissa
  bits = lax.bitcast_convert_type(x, jnp.int32)
  odd = lax.shift_right_logical(bits, jnp.int32(dropped)) & 1
  bits = (bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)
  steps = 2.0 ** (form.mantissa_bits - form.smallest_exponent)  # of denormals, in 1
  denormal = lax.round(x * steps, lax.RoundingMethod.TO_NEAREST_EVEN) * (1 / steps)
  # False for NaN, whose bits could be carried beyond NaN.
  return jnp.where(jnp.abs(x) >= 2.0**form.smallest_exponent,
                   lax.bitcast_convert_type(bits, jnp.float32), denormal)


def error(of: np.ndarray | jax.Array, exact: np.ndarray | jax.Array) -> float:
  """Relative Frobenius norm of the difference, in float64."""
  of, exact = np.asarray(of, np.float64), np.asarray(exact, np.float64)
  return float(np.linalg.norm(of - exact) / np.linalg.norm(exact))
