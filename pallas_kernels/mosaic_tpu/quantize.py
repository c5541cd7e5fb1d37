"""Quantisation on a TPU: memory-bound, so every number is read once and written once.

Shape letters:  M rows  K columns  m, k tiles along them  R rows of a block  C columns of a tile
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_tpu.tiles import ROWS, SUBLANES, pad, whole
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized

# Bytes of VMEM that the kernel may use. A core has 64 MiB or more, of which the compiler gives a
# kernel only 16 MiB by default; V3's widest weights need more.
_MEMORY = 48 << 20


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Size of the blocks of whole rows into which the array is divided.

  Attributes:
    numbers: approximate number of elements of a block. A block has a multiple of 32 rows, or
      exactly 128 rows for tiles of 128x128.

  Raises:
    ValueError: if `numbers` is not positive.
  """

  numbers: int = 1 << 19

  def __post_init__(self):
    if self.numbers < 1:
      raise ValueError(f"Tiling's numbers must be positive, but they are {self.numbers}")


def run(
    x_MK: jax.Array, tile: tuple[int, int], *, format: str, power_of_two: bool,
    smallest_amax: float, tiling: Tiling | None = None, interpret: Any = False) -> Quantized:
  """See `pallas_kernels.quantize`.

  Args:
    tiling: size of the blocks; None for the default.
    interpret: True or `pltpu.InterpretParams` to run the kernel on a CPU.
  """
  tiling = tiling or Tiling()
  padded = pad(x_MK, tile[0], BLOCK)
  rows, columns = math.prod(padded.shape[:-1]), padded.shape[-1]
  block = BLOCK
  if tile[0] == 1:
    block = min(max(tiling.numbers // columns // ROWS, 1) * ROWS, whole(rows, ROWS))
  scale_rows = block if tile[0] == 1 else SUBLANES
  steps = pl.cdiv(rows, block)
  scaling = functools.partial(
      _scale, format=format, power_of_two=power_of_two, smallest_amax=smallest_amax)
  at = lambda shape: pl.BlockSpec(shape, lambda i: (i, 0))
  values, scales = pl.pallas_call(
      functools.partial(_quantize, tile=tile, scaling=scaling),
      grid=(steps,), in_specs=[at((block, columns))],
      out_specs=[at((block, columns)), at((scale_rows, columns // BLOCK))],
      out_shape=[jax.ShapeDtypeStruct((rows, columns), FORMATS[format].dtype),
                 jax.ShapeDtypeStruct((rows if tile[0] == 1 else steps * SUBLANES,
                                       columns // BLOCK), jnp.float32)],
      cost_estimate=pl.CostEstimate(
          flops=4 * rows * columns, transcendentals=0,
          bytes_accessed=rows * columns * (x_MK.dtype.itemsize + 1)),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",), vmem_limit_bytes=_MEMORY),
      interpret=interpret)(padded.reshape(rows, columns))
  if tile[0] > 1:  # each block wrote its scales to 8 equal rows, the fewest that a block can have
    scales = scales[::SUBLANES]
  values = values.reshape(padded.shape)[..., :x_MK.shape[-2], :x_MK.shape[-1]]
  return Quantized.of(values, scales.reshape(*x_MK.shape[:-2], -1, columns // BLOCK), tile)


def unsupported_reason(
    x_MK: jax.Array, tile: tuple[int, int], *, format: str, power_of_two: bool,
    smallest_amax: float) -> str | None:
  """Why `run` does not support this array, tile or format, or None if it does."""
  del power_of_two, smallest_amax
  if tile not in ((1, BLOCK), (BLOCK, BLOCK)):
    return f"needs tiles of 1x128 or 128x128, not {tile[0]}x{tile[1]}"
  if FORMATS[format].dtype.itemsize > 1:
    return f"does not support {format}"
  if x_MK.size == 0:
    return f"needs a non-empty array, and the shape is {x_MK.shape}"
  least = (ROWS if tile[0] == 1 else BLOCK) * 2 * (x_MK.dtype.itemsize + 1)  # bytes per column
  if x_MK.shape[-1] * least > _MEMORY * 3 // 4:
    return (f"keeps whole rows in VMEM, of at most {_MEMORY * 3 // 4 // least} numbers for this "
            f"dtype and tile, and these have {x_MK.shape[-1]}")
  return None


def _quantize(x_RK, values_RK, scales, *, tile, scaling):
  """The kernel: quantises a block of whole rows, 128 columns at a time."""
  largest = FORMATS["e4m3" if values_RK.dtype == jnp.float8_e4m3fn else "e5m2"].largest
  for k in range(x_RK.shape[1] // BLOCK):
    part = pl.ds(k * BLOCK, BLOCK)
    x_RC = x_RK[:, part].astype(jnp.float32)
    axes = 1 if tile[0] == 1 else (0, 1)
    scale = scaling(jnp.abs(x_RC).max(axes, keepdims=True))
    values_RC = jnp.clip(x_RC / scale, -largest, largest)
    values_RK[:, part] = values_RC.astype(values_RK.dtype)
    scales[:, pl.ds(k, 1)] = jnp.broadcast_to(scale, (scales.shape[0], 1))


def _scale(amax, *, format, power_of_two, smallest_amax):
  """Computes `scales_of` of `pallas_kernels.ops.quantize` with functions that Mosaic supports."""
  scale = jnp.maximum(amax, smallest_amax) / FORMATS[format].largest
  if not power_of_two:
    return scale
  bits = lax.bitcast_convert_type(scale, jnp.int32)
  bits = (bits + 0x7FFFFF) & 0x7F800000  # carries into the exponent unless the mantissa is 0
  return lax.bitcast_convert_type(bits, jnp.float32)


KERNEL = implementations.Kernel(run, unsupported_reason)
