"""SwiGLU's backward pass, fused with quantising its results for the products on both sides of it.

"Gate and up" are SwiGLU's two inputs; "gates" are the router's values, one per row.

Shape letters:  M rows  F hidden units
"""

from typing import NamedTuple

import jax

from pallas_kernels import implementations
from pallas_kernels.ops.fp8_linear import (
    SMALLEST_GRADIENT_AMAX,
    as_array,
    gradients,
    transposed_operand,
)
from pallas_kernels.ops.quantize import SMALLEST_AMAX, check, quantize
from pallas_kernels.ops.requantize import quantize_transposed
from pallas_kernels.ops.swiglu_gated import swiglu_gated_backward
from pallas_kernels.quantized import Quantized
from pallas_kernels.recipe import Recipe

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.swiglu_backward")}


class SwigluBackward(NamedTuple):
  """Results of the backward pass of swiglu(gate, up) * gates, quantised with tiles of 1x128.

  Attributes:
    dgate_up: gradient of gate and up, [M, 2 F], for the input gradient of the gate and up
      projection.
    dgate_up_t: its transpose, [2 F, M], for the weight gradient of the gate and up projection.
    hidden_t: transpose of the recomputed output, [F, M], for the weight gradient of the down
      projection.
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
  """Recomputes swiglu(gate, up) * gates, differentiates and quantises, in one pass over memory.

  Everything is computed in float32; hidden units and gradients are rounded to dhidden's dtype
  before they are quantised, as if they had been stored in between. V3, too, recomputes SwiGLU's
  output in the backward pass (arXiv:2412.19437, section 3.3.3).

  Args:
    gate_up_M2F: SwiGLU's inputs, gate first, finite: float32 or bfloat16, [M, 2, F] or [M, 2 F], or
      quantised, [M, 2 F].
    gates_M: the router's gate of each row, by which the hidden units are multiplied.
    dhidden_MF: gradient of the gated hidden units, float32 or bfloat16.
    format, power_of_two: format and scales of all quantised results; see `quantize`.
    smallest_amax: lower bound for the largest magnitude of a tile of hidden units when its scale is
      computed.
    smallest_gradient_amax: lower bound for the largest magnitude of a tile of the gradient.
    implementation: which implementation to run; see `pallas_kernels`.

  Raises:
    ValueError: if the format is unknown, if an array has another dtype or shape, or if the named
      implementation cannot run here.
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
  gradient_options, hidden_options = (
      options | {"smallest_amax": smallest, "implementation": "xla"}
      for smallest in (smallest_gradient_amax, smallest_amax))
  return (quantize(dgate_up, **gradient_options),
          quantize_transposed(dgate_up, **gradient_options),
          quantize_transposed(hidden_MF, **hidden_options), dgates_M)


def backward_operands(
    gate_up: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, recipe: Recipe,
    implementation: str | None) -> SwigluBackward:
  """Runs SwiGLU's backward pass and returns its results as a recipe's operands of the products.

  Args:
    gate_up: SwiGLU's inputs as kept by the forward pass, [M, 2 F].
    gates_M: the gate of each row.
    dhidden_MF: gradient of the gated hidden units.
    recipe: how the operands of the products are quantised.
    implementation: which implementation of the quantisation to run.
  """
  product = recipe.weight_gradient
  forms = {recipe.input_gradient and recipe.input_gradient.gradient,
           product and product.gradient, product and product.activation}
  (form, *others) = forms
  if form and not others and form.tile == "1x128":
    return swiglu_backward_quantize(gate_up, gates_M, dhidden_MF, format=form.format,
                                    power_of_two=form.power_of_two, implementation=implementation)
  # The results are rounded to the layer's dtype before they are quantised; that extra
  # rounding matters less than what it saves.
  dgate_up, hidden_MF, dgates_M = swiglu_gated_backward(as_array(gate_up), gates_M, dhidden_MF)
  return SwigluBackward(
      *gradients(dgate_up, recipe, implementation),
      transposed_operand(hidden_MF, product and product.activation, dhidden_MF.dtype,
                         implementation=implementation), dgates_M)
