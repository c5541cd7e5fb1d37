"""Transposed operands: products contract the last axis, so weight gradients need tokens there.

Shape letters:  M rows  K columns
"""

import jax

from pallas_kernels import implementations
from pallas_kernels.ops.quantize import SMALLEST_AMAX, check, quantize
from pallas_kernels.quantized import Quantized, dequantize

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.requantize")}


def quantize_transposed(
    x_MK: jax.Array | Quantized, tile: str = "1x128", *, format: str = "e4m3",
    power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX,
    implementation: str | None = None) -> Quantized:
  """Quantises the transpose of an array, in one pass over memory.

  An array that is quantised already, such as an operand kept for the backward pass, is requantised:
  dequantised, transposed and quantised with tiles along its other axis. V3 describes these steps,
  and asks for hardware that does them (arXiv:2412.19437, section 3.5.2).

  Args:
    x_MK: float32 or bfloat16, finite, or quantised.
    tile: the elements of the transpose that share a scale; see `quantize` for the names.
    format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    The quantised transpose, [K, M].

  Raises:
    ValueError: if the tile or the format is unknown, if x has another dtype or fewer than two axes,
      or if the named implementation cannot run here.
  """
  check(x_MK, format)
  return implementations.run(
      "quantize_transposed", implementation, _xla, _KERNELS, x_MK, tile=tile, format=format,
      power_of_two=power_of_two, smallest_amax=smallest_amax)


def _xla(x_MK: jax.Array | Quantized, tile: str, **options) -> Quantized:
  x_MK = dequantize(x_MK) if isinstance(x_MK, Quantized) else x_MK
  return quantize(x_MK.mT, tile, implementation="xla", **options)
