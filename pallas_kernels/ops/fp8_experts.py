"""Sending tokens to experts whose SwiGLU's six products are in FP8 (arXiv:2412.19437, section 3.3).

Shape letters:  N tokens  K experts per token  E experts  D model width  F expert width
                S rows with every expert at a multiple of 128; R, K, N widths of a product
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ops.expert_rows import ExpertRows
from pallas_kernels.ops.fp8_grouped import (
  aligned_sizes,
  fp8_grouped_matmul,
  fp8_grouped_weight_gradient,
)
from pallas_kernels.ops.fp8_linear import (
  SMALLEST_GRADIENT_AMAX,
  V3,
  as_array,
  as_operand,
  gradients,
  kept_operand,
  precision_of,
  transposed_operand,
  weight_operands,
  with_tiles,
)
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.ops.quantize import swiglu_quantize, swiglu_quantize_with_inputs
from pallas_kernels.ops.swiglu_backward import SwigluBackward, swiglu_backward_quantize
from pallas_kernels.ops.swiglu_gated import swiglu_gated, swiglu_gated_backward
from pallas_kernels.quantized import BLOCK, Quantized
from pallas_kernels.recipe import Operand, Recipe
from pallas_kernels.weight import Weight, split_weight


class _Static(NamedTuple):
  recipe: Recipe
  implementation: str | None


def fp8_experts(
    x_ND: jax.Array, gates_NK: jax.Array, w_gate_up_ED2F: jax.Array | Weight,
    w_down_EFD: jax.Array | Weight, rows: ExpertRows, recipe: Recipe = V3, *,
    implementation: str | None = None) -> jax.Array:
  """Each token's sum over its experts of down(swiglu(gate and up) * gate).

  What is sent to experts, inputs and gradients, is quantised first if it can be a row at a time.
  The inputs of SwiGLU are kept for the backward pass as the recipe says, its output is computed
  again there (section 3.3.3). In a recipe's tiles of a whole matrix several experts share a scale
  where their weights have each their own.

  Args:
    x_ND: bfloat16 or float32.
    gates_NK: float32.
    w_gate_up_ED2F: master weights, [E, D, 2, F].
    w_down_EFD: master weights; if quantised for this recipe before, they are not again.
    rows: the layout of assignments, of `layout_expert_rows`.
    recipe: see there.
    implementation: see `pallas_kernels`; of quantisation and products.

  Returns:
    [N, D] in x's format, summed in float32. Gradients have the format of what they are of, float32
    accumulators rounded once.

  Raises:
    ValueError: on shapes that do not fit, or an implementation that cannot do it here.
  """
  num_experts, d_ff, d_model = w_down_EFD.shape
  if (w_gate_up_ED2F.shape != (num_experts, d_model, 2, d_ff)
      or rows.sizes_E.shape != (num_experts,) or x_ND.shape != (len(gates_NK), d_model)
      or gates_NK.shape != rows.place_NK.shape):
    raise ValueError(
        "fp8_experts takes x [N, D], gates [N, K], weights [E, D, 2, F] and [E, F, D] and "
        f"rows of [N, K] to [E], not {x_ND.shape}, {gates_NK.shape}, {w_gate_up_ED2F.shape}, "
        f"{w_down_EFD.shape}, {rows.place_NK.shape} and {rows.sizes_E.shape}")
  w_gate_up, gate_up = split_weight(w_gate_up_ED2F.reshape(num_experts, d_model, 2 * d_ff))
  w_down, down = split_weight(w_down_EFD)
  return _experts(_Static(recipe, implementation), x_ND, gates_NK, w_gate_up, w_down, rows,
                  (gate_up, down))


def _send(x_ND, rows: ExpertRows, form: Operand | None, operand) -> Quantized | jax.Array:
  """Tokens' rows, one for each expert, as an operand."""
  token_S = rows.assignment_S // rows.place_NK.shape[1]
  take = functools.partial(gather_rows, index=token_S)
  if form and form.tile in ("1x128", "row"):  # which no two rows share
    return jax.tree.map(take, operand(x_ND, form))
  return operand(take(x_ND), form)


def _sum_rows(y_SD: jax.Array, rows: ExpertRows) -> jax.Array:
  """Sums what a token's experts gave."""
  return gather_rows(y_SD, rows.place_NK).sum(1, dtype=jnp.float32).astype(y_SD.dtype)


def _gates(gates_NK: jax.Array, rows: ExpertRows) -> jax.Array:
  """Of rows, [S]; nobody's is 0."""
  return gather_rows(gates_NK.reshape(-1), rows.assignment_S).astype(jnp.float32)


def _hidden_and_kept(gate_up, gates_S, form: Operand | None, kept: Operand | None, operand,
                     implementation: str | None):
  """Gated hidden units for the down projection, and SwiGLU's inputs for the backward pass.

  A gate multiplies a whole row, so it may as well multiply the row's scales.
  """
  if form is None or form.tile != "1x128" or form.power_of_two:
    hidden_SF = swiglu_gated(gate_up, gates_S).astype(gate_up.dtype)
    return operand(hidden_SF, form), operand(gate_up, kept)
  split, options = gate_up.reshape(len(gate_up), 2, -1), {"implementation": implementation}
  if kept == form and split.shape[-1] % BLOCK == 0:  # else tiles would cross from gate to up
    hidden, inputs = swiglu_quantize_with_inputs(split, format=form.format, **options)
    kept_gate_up = jax.tree.map(lambda x: x.reshape(len(gate_up), -1), inputs)
  else:
    hidden = swiglu_quantize(split, format=form.format, **options)
    kept_gate_up = operand(gate_up, kept)
  return Quantized(hidden.values_MK, hidden.scales_mk * gates_S[:, None], hidden.tile), kept_gate_up


def _hidden_backward(
    gate_up, gates_S, dhidden_SF, recipe: Recipe, implementation: str | None) -> SwigluBackward:
  """SwiGLU's backward pass, its results as the operands of products."""
  product = recipe.weight_gradient
  forms = {recipe.input_gradient and recipe.input_gradient.gradient,
           product and product.gradient, product and product.activation}
  (form, *others) = forms
  if form and not others and form.tile == "1x128":
    return swiglu_backward_quantize(gate_up, gates_S, dhidden_SF, format=form.format,
                                    power_of_two=form.power_of_two, implementation=implementation)
  # Rounded to the layer's format before they are to FP8's, which matters less than what it saves.
  dgate_up, hidden_SF, dgates_S = swiglu_gated_backward(as_array(gate_up), gates_S, dhidden_SF)
  return SwigluBackward(
      *gradients(dgate_up, recipe, implementation),
      transposed_operand(hidden_SF, product and product.activation, dhidden_SF.dtype,
                         implementation=implementation), dgates_S)


def _product(lhs_SK, rhs_ENK, sizes_E, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  """Each row with its expert's matrix, transposed."""
  sizes_E = aligned_sizes(sizes_E)  # nobody's rows between experts are zeros anyway
  if isinstance(lhs_SK, jax.Array):
    return grouped_matmul(lhs_SK, rhs_ENK.mT, sizes_E, precision=precision_of(lhs_SK.dtype),
                          implementation=implementation)
  return fp8_grouped_matmul(
      with_tiles(lhs_SK, (1, BLOCK)), with_tiles(rhs_ENK, (BLOCK, BLOCK)), sizes_E, dtype=dtype,
      implementation=implementation)


def _weight_gradient(x_KS, dy_NS, sizes_E, dtype: jnp.dtype, implementation: str | None):
  """Each expert's x dy.T, of transposed operands: [E, K, N]."""
  if isinstance(x_KS, jax.Array):
    return grouped_weight_gradient(x_KS.T, dy_NS.T, aligned_sizes(sizes_E), dtype=dtype,
                                   implementation=implementation)
  return fp8_grouped_weight_gradient(
      with_tiles(x_KS, (1, BLOCK)), with_tiles(dy_NS, (1, BLOCK)), sizes_E, dtype=dtype,
      implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(static: _Static, x_ND, gates_NK, w_gate_up, w_down, rows, quantized):
  return _experts_forward(static, x_ND, gates_NK, w_gate_up, w_down, rows, quantized)[0]


def _experts_forward(static: _Static, x_ND, gates_NK, w_gate_up, w_down, rows, quantized):
  recipe, dtype = static.recipe, x_ND.dtype
  options = {"dtype": dtype, "implementation": static.implementation}
  operand = functools.partial(as_operand, **options)
  send = functools.partial(_send, x_ND, rows, operand=operand)
  product = functools.partial(_product, sizes_E=rows.sizes_E, **options)
  activation = lambda recipe: recipe.forward and recipe.forward.activation
  of_gate_up, gate_up_of_gradient = weight_operands(w_gate_up, quantized[0], recipe, **options)
  of_down, down_of_gradient = weight_operands(w_down, quantized[1], recipe, **options)

  x = send(activation(recipe.dispatched))
  gate_up = product(x, of_gate_up)
  hidden, kept_gate_up = _hidden_and_kept(
      gate_up, _gates(gates_NK, rows), activation(recipe), recipe.kept_swiglu, operand,
      static.implementation)
  kept_gate_up = checkpoint_name(kept_gate_up, "ffn_gate_up")
  # Empty arrays say what formats the weights have.
  formats = jnp.zeros(0, w_gate_up.dtype), jnp.zeros(0, w_down.dtype)
  return _sum_rows(product(hidden, of_down), rows), (
      kept_operand(x, recipe.kept, recipe, send), gates_NK, kept_gate_up, gate_up_of_gradient,
      down_of_gradient, rows, formats)


def _experts_backward(static: _Static, residuals, dy_ND):
  recipe, dtype = static.recipe, dy_ND.dtype
  x, gates_NK, gate_up, w_gate_up, w_down, rows, (of_gate_up, of_down) = residuals
  options = {"dtype": dtype, "implementation": static.implementation}
  gradient = functools.partial(as_operand, smallest_amax=SMALLEST_GRADIENT_AMAX, **options)
  transposed = functools.partial(transposed_operand, **options)
  product = functools.partial(_product, sizes_E=rows.sizes_E, **options)
  weight_gradient = functools.partial(
      _weight_gradient, sizes_E=rows.sizes_E, implementation=static.implementation)
  of_input = recipe.dispatched.input_gradient and recipe.dispatched.input_gradient.gradient
  of_weight = recipe.dispatched.weight_gradient

  dy = _send(dy_ND, rows, of_input, gradient)
  again = of_weight and recipe.dispatch_power_of_two and of_input == of_weight.gradient
  sent = dy if again else _send(dy_ND, rows, None, gradient)
  back = _hidden_backward(gate_up, _gates(gates_NK, rows), product(dy, w_down), recipe,
                          static.implementation)
  dw_down = weight_gradient(
      back.hidden_t,
      transposed(sent, of_weight and of_weight.gradient, smallest_amax=SMALLEST_GRADIENT_AMAX),
      dtype=of_down.dtype)
  dw_gate_up = weight_gradient(
      transposed(x, of_weight and of_weight.activation), back.dgate_up_t, dtype=of_gate_up.dtype)
  dx_ND = _sum_rows(product(back.dgate_up, w_gate_up), rows)
  return dx_ND, gather_rows(back.dgates_M, rows.place_NK), dw_gate_up, dw_down, None, None


_experts.defvjp(_experts_forward, _experts_backward)
