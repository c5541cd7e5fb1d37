"""Transposing operands: products contract what comes last, so weight gradients want tokens last.

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
  """Quantises the transpose, in one pass over memory.

  What an operand kept for the backward pass stands for is tiled anew so (arXiv:2412.19437, section
  3.5.2, which wishes for hardware that does it).

  Args:
    x_MK: float32 or bfloat16, or quantised.
    tile, format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    [K, M].

  Raises:
    ValueError: on what it does not know, or an implementation that cannot do it here.
  """
  check(x_MK, format)
  return implementations.run(
      "quantize_transposed", implementation, _xla, _KERNELS, x_MK, tile=tile, format=format,
      power_of_two=power_of_two, smallest_amax=smallest_amax)


def _xla(x_MK: jax.Array | Quantized, tile: str, **options) -> Quantized:
  x_MK = dequantize(x_MK) if isinstance(x_MK, Quantized) else x_MK
  return quantize(x_MK.mT, tile, implementation="xla", **options)
