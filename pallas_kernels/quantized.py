"""Low-precision arrays with one scale per tile (arXiv:2412.19437, section 3.3.2).

Hardware contracts FP8 over the last axis of both operands, so the contracted axis always comes
last: an activation that a weight gradient contracts over tokens is quantised transposed.

Shape letters:  M rows  K columns  m, k tiles along them
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128  # V3's tile width, and its interval of promotion along K


class Format(NamedTuple):
  """A low-precision floating-point format.

  Attributes:
    dtype: dtype in which values are stored. No array library has E5M6, so its values are stored in
      float16, which represents them all.
    largest: largest finite value.
    mantissa_bits: stored mantissa bits of a normal number.
    smallest_exponent: exponent of the smallest normal number, 2**smallest_exponent.
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
  """A quantised array: each element is its value times the scale of its tile.

  Where tiles are one row high, products read the scales of neighbouring rows for one block of K at
  a time. So that those lie together, scales are then stored transposed, [..., k, M'], where M' is M
  rounded up to a multiple of 128; the entries past M are finite and mean nothing.

  Attributes:
    values_MK: [..., M, K], in the format's dtype.
    scales: float32, one for each tile, as they are stored: [..., k, M'] if tiles are one row high,
      otherwise [..., m, k], where m is ceil(M / tile[0]) and k is ceil(K / tile[1]).
    tile: rows and columns of the tiles that share a scale; the last tile along an axis may be
      smaller.
  """

  values_MK: jax.Array
  scales: jax.Array
  tile: tuple[int, int] = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, values_MK: jax.Array, scales_mk: jax.Array, tile: tuple[int, int]) -> "Quantized":
    """Returns a quantised array with these scales, [..., m, k]; see the attributes."""
    return cls(values_MK, whole_blocks(scales_mk.mT) if tile[0] == 1 else scales_mk, tile)

  @property
  def scales_mk(self) -> jax.Array:
    """The scales as [..., m, k]."""
    return self.scales.mT[..., :self.shape[-2], :] if self.tile[0] == 1 else self.scales

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values_MK.shape

  @property
  def mT(self) -> "Quantized":
    """The transpose over the last two axes; values, scales and tile are exchanged, not rounded."""
    return Quantized.of(self.values_MK.mT, self.scales_mk.mT, self.tile[::-1])


def whole_blocks(scales_kM: jax.Array) -> jax.Array:
  """Appends ones to the last axis, up to a multiple of 128."""
  padding = [(0, 0)] * (scales_kM.ndim - 1) + [(0, -scales_kM.shape[-1] % BLOCK)]
  return jnp.pad(scales_kM, padding, constant_values=1) if padding[-1][1] else scales_kM


def num_tiles(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, int]:
  """Returns the number of tiles along each of the last two axes."""
  return math.ceil(shape[-2] / tile[0]), math.ceil(shape[-1] / tile[1])


def dequantize(x: Quantized, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Returns values times scales, [..., M, K], multiplied in float32 and cast to `dtype`."""
  rows, columns = x.shape[-2:]
  scales = jnp.repeat(x.scales_mk, x.tile[0], -2)[..., :rows, :]
  scales = jnp.repeat(scales, x.tile[1], -1)[..., :columns]
  return (x.values_MK.astype(jnp.float32) * scales).astype(dtype)


def round_to(x: jax.Array, name: str) -> jax.Array:
  """Rounds to the format called `name`: to nearest, ties to even, saturating at its largest value.

  Args:
    x: float32, of any shape.
    name: a key of `FORMATS`.

  Returns:
    The rounded values, in the format's dtype.
  """
  form = FORMATS[name]
  x = jnp.clip(x, -form.largest, form.largest)
  return cast_to(x, form)


def cast_to(x: jax.Array, form: Format) -> jax.Array:
  """Rounds to nearest, ties to even, without saturating; returns the format's dtype.

  Uses only operations that Pallas kernels support, too.

  Args:
    x: float32, with no magnitude above the format's largest value.
    form: the format to round to.
  """
  return (x if form.dtype.itemsize == 1 else _round_bits(x, form)).astype(form.dtype)


def _round_bits(x: jax.Array, form: Format) -> jax.Array:
  """Rounds float32 to nearest, ties to even, for a format that no array library has."""
  dropped = 23 - form.mantissa_bits  # bits of float32's mantissa that the format lacks
  bits = lax.bitcast_convert_type(x, jnp.int32)
  odd = lax.shift_right_logical(bits, jnp.int32(dropped)) & 1
  bits = (bits + (2 ** (dropped - 1) - 1) + odd) & -(2**dropped)
  steps = 2.0 ** (form.mantissa_bits - form.smallest_exponent)  # spacings of denormals in 1.0
  denormal = lax.round(x * steps, lax.RoundingMethod.TO_NEAREST_EVEN) * (1 / steps)
  # The comparison is False for NaN: rounding NaN's bits could carry into the sign.
  return jnp.where(jnp.abs(x) >= 2.0**form.smallest_exponent,
                   lax.bitcast_convert_type(bits, jnp.float32), denormal)


def error(of: np.ndarray | jax.Array, exact: np.ndarray | jax.Array) -> float:
  """Returns the relative error of an array: norm of the difference over the norm of `exact`.

  Args:
    of: the approximate array.
    exact: the array that it approximates, of the same shape.

  Returns:
    The quotient of the two Frobenius norms, computed in float64.
  """
  of, exact = np.asarray(of, np.float64), np.asarray(exact, np.float64)
  return float(np.linalg.norm(of - exact) / np.linalg.norm(exact))
