"""SwiGLU's backward pass, from its inputs to what the products on both sides of it contract.

Shape letters:  M rows  F hidden units
"""

from typing import NamedTuple

import jax

from pallas_kernels import implementations
from pallas_kernels.ops.fp8_linear import SMALLEST_GRADIENT_AMAX, as_array
from pallas_kernels.ops.quantize import SMALLEST_AMAX, check, quantize
from pallas_kernels.ops.requantize import quantize_transposed
from pallas_kernels.ops.swiglu_gated import swiglu_gated_backward
from pallas_kernels.quantized import Quantized

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.swiglu_backward")}


class SwigluBackward(NamedTuple):
  """What a backward pass needs of swiglu(gate and up) * gates; scales are 1x128.

  Attributes:
    dgate_up: gradient of gate and up, for the input gradient: [M, 2 F].
    dgate_up_t: the same transposed, for their weight gradient: [2 F, M].
    hidden_t: the output, computed again and transposed, for the next weight gradient: [F, M].
    dgates_M: gradient of the gates, float32.
  """

  dgate_up: Quantized
  dgate_up_t: Quantized
  hidden_t: Quantized
  dgates_M: jax.Array


def swiglu_backward_quantize(
    gate_up_M2F: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, *,
    format: str = "e4m3", power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX,
    smallest_gradient_amax: float = SMALLEST_GRADIENT_AMAX, implementation: str | None = None,
) -> SwigluBackward:
  """Hidden units swiglu(gate and up) * gates and their gradients, in one pass over memory.

  All is computed in float32; hidden units and gradients are rounded to dhidden's format before
  they are quantised, as if they had been written in between. V3 computes SwiGLU's output again in
  its backward pass (arXiv:2412.19437, section 3.3.3).

  Args:
    gate_up_M2F: inputs of SwiGLU, finite: float32 or bfloat16, [M, 2, F] or [M, 2 F], or quantised,
      [M, 2 F].
    gates_M: what each row of its output is multiplied by.
    dhidden_MF: gradient of the hidden units, float32 or bfloat16.
    format, power_of_two: of all values and scales; see `quantize`.
    smallest_amax: what the largest magnitude of a tile of hidden units is at least taken to be.
    smallest_gradient_amax: the same for gradients.
    implementation: see `pallas_kernels`.

  Raises:
    ValueError: on what it does not know, or an implementation that cannot do it here.
  """
  check(gate_up_M2F, format)
  check(dhidden_MF, format)
  rows, width = dhidden_MF.shape[0], dhidden_MF.shape[-1]
  if (dhidden_MF.shape != (rows, width) or gates_M.shape != (rows,)
      or gate_up_M2F.shape not in ((rows, 2, width), (rows, 2 * width))):
    raise ValueError(
        "swiglu_backward_quantize takes gate and up [M, 2, F], gates [M] and dhidden [M, F], not "
        f"{gate_up_M2F.shape}, {gates_M.shape} and {dhidden_MF.shape}")
  if not isinstance(gate_up_M2F, Quantized):
    gate_up_M2F = gate_up_M2F.reshape(rows, 2 * width)
  results = implementations.run(
      "swiglu_backward_quantize", implementation, _xla, _KERNELS, gate_up_M2F, gates_M, dhidden_MF,
      format=format, power_of_two=power_of_two, smallest_amax=smallest_amax,
      smallest_gradient_amax=smallest_gradient_amax)
  return SwigluBackward(*results)


def _xla(gate_up, gates_M, dhidden_MF, *, smallest_amax, smallest_gradient_amax, **options):
  dgate_up, hidden_MF, dgates_M = swiglu_gated_backward(
      as_array(gate_up), gates_M, dhidden_MF, implementation="xla")
  of_gradient, of_hidden = (
      options | {"smallest_amax": smallest, "implementation": "xla"}
      for smallest in (smallest_gradient_amax, smallest_amax))
  return (quantize(dgate_up, **of_gradient), quantize_transposed(dgate_up, **of_gradient),
          quantize_transposed(hidden_MF, **of_hidden), dgates_M)
