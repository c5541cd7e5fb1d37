"""The routed experts' SwiGLU with its six products in FP8 (arXiv:2412.19437, section 3.3).

Shape letters:  R rows, those of expert 0 first  E experts  D model width  F expert width
                S rows with every expert at a multiple of 128  K, N widths of a product
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.fp8_grouped import (
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    quantize_groups,
)
from pallas_kernels.fp8_linear import (
    SMALLEST_GRADIENT_AMAX,
    V3,
    as_array,
    as_operand,
    kept_operand,
    precision_of,
    weight_operands,
    with_tiles,
)
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.quantize import SMALLEST_AMAX, swiglu, swiglu_quantize
from pallas_kernels.quantized import BLOCK, Quantized
from pallas_kernels.recipe import Operand, Recipe, WeightGradient
from pallas_kernels.weight import Weight, split_weight


class _Static(NamedTuple):
  recipe: Recipe
  implementation: str | None


def fp8_experts(
    x_RD: jax.Array, gates_R: jax.Array, w_gate_up_ED2F: jax.Array | Weight,
    w_down_EFD: jax.Array | Weight, sizes_E: jax.Array, recipe: Recipe = V3, *,
    implementation: str | None = None) -> jax.Array:
  """Each row's own expert, times the row's gate: down(swiglu(gate and up) * gate).

  The inputs of SwiGLU are kept for the backward pass as the recipe says, its output is computed
  again there (section 3.3.3). In a recipe's tiles of 128 rows or of a whole matrix, rows of several
  experts share a scale where experts' weights have each their own.

  Args:
    x_RD: bfloat16 or float32.
    gates_R: float32.
    w_gate_up_ED2F: master weights, [E, D, 2, F].
    w_down_EFD: master weights; if quantised for this recipe before, they are not again.
    sizes_E: int32, rows per expert; they may be empty or uneven, and rows past their sum give zero.
    recipe: see there.
    implementation: see `pallas_kernels`; of quantisation and products.

  Returns:
    [R, D] in x's format. Gradients have the format of what they are of, float32 accumulators
    rounded once.

  Raises:
    ValueError: on shapes that do not fit, or an implementation that cannot do it here.
  """
  num_experts, d_ff, d_model = w_down_EFD.shape
  if (w_gate_up_ED2F.shape != (num_experts, d_model, 2, d_ff) or sizes_E.shape != (num_experts,)
      or x_RD.shape != (*gates_R.shape, d_model)):
    raise ValueError(
        "fp8_experts takes x [R, D], gates [R], weights [E, D, 2, F] and [E, F, D] and sizes [E], "
        f"not {x_RD.shape}, {gates_R.shape}, {w_gate_up_ED2F.shape}, {w_down_EFD.shape} and "
        f"{sizes_E.shape}")
  w_gate_up, gate_up = split_weight(w_gate_up_ED2F.reshape(num_experts, d_model, 2 * d_ff))
  w_down, down = split_weight(w_down_EFD)
  return _experts(_Static(recipe, implementation), x_RD, gates_R, w_gate_up, w_down, sizes_E,
                  (gate_up, down))


def _hidden_operand(gate_up, gates_R, form: Operand | None, operand, implementation: str | None):
  """Gated hidden units for the down projection.

  A gate multiplies a whole row, so it may as well multiply the row's scales.
  """
  if form is None or form.tile != "1x128" or form.power_of_two:
    return operand(_hidden(gate_up, gates_R).astype(gate_up.dtype), form)
  hidden = swiglu_quantize(gate_up.reshape(len(gate_up), 2, -1), format=form.format,
                           implementation=implementation)
  gates_R = gates_R.astype(jnp.float32)
  return Quantized(hidden.values_MK, hidden.scales_mk * gates_R[:, None], hidden.tile)


def _hidden(gate_up: jax.Array, gates_R: jax.Array) -> jax.Array:
  """Gated hidden units in float32: [R, 2 F] and [R] to [R, F]."""
  split = gate_up.astype(jnp.float32).reshape(len(gate_up), 2, -1)
  return swiglu(split) * gates_R[:, None].astype(jnp.float32)


def _product(lhs_RK, rhs_ENK, sizes_E, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  """Each row with its expert's matrix, transposed."""
  if isinstance(lhs_RK, jax.Array):
    return grouped_matmul(lhs_RK, rhs_ENK.mT, sizes_E, precision=precision_of(lhs_RK.dtype),
                          implementation=implementation)
  return fp8_grouped_matmul(
      with_tiles(lhs_RK, (1, BLOCK)), with_tiles(rhs_ENK, (BLOCK, BLOCK)), sizes_E, dtype=dtype,
      implementation=implementation)


def _weight_gradient(x_RK, dy_RN, sizes_E, product: WeightGradient | None, dtype: jnp.dtype,
                     static: _Static) -> jax.Array:
  """Each expert's x.T dy, of float32 or of the layer's format: [E, K, N]."""
  if product is None:
    return grouped_weight_gradient(as_array(x_RK, dy_RN.dtype), dy_RN, sizes_E, dtype=dtype,
                                   implementation=static.implementation)

  def groups(x, form, smallest_amax):
    if isinstance(x, Quantized):
      x = with_tiles(x, (1, BLOCK))
    x = quantize_groups(x, sizes_E, form.tile, format=form.format,
                        power_of_two=form.power_of_two, smallest_amax=smallest_amax,
                        implementation=static.implementation)
    return with_tiles(x, (1, BLOCK))

  return fp8_grouped_weight_gradient(
      groups(x_RK, product.activation, SMALLEST_AMAX),
      groups(dy_RN, product.gradient, SMALLEST_GRADIENT_AMAX), sizes_E, dtype=dtype,
      implementation=static.implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(static: _Static, x_RD, gates_R, w_gate_up, w_down, sizes_E, quantized):
  return _experts_forward(static, x_RD, gates_R, w_gate_up, w_down, sizes_E, quantized)[0]


def _experts_forward(static: _Static, x_RD, gates_R, w_gate_up, w_down, sizes_E, quantized):
  recipe, dtype = static.recipe, x_RD.dtype
  operand = functools.partial(as_operand, dtype=dtype, implementation=static.implementation)
  product = functools.partial(
      _product, sizes_E=sizes_E, dtype=dtype, implementation=static.implementation)
  activation = lambda recipe: recipe.forward and recipe.forward.activation
  of_gate_up, gate_up_of_gradient = weight_operands(w_gate_up, quantized[0], recipe, operand)
  of_down, down_of_gradient = weight_operands(w_down, quantized[1], recipe, operand)

  x = operand(x_RD, activation(recipe.dispatched))
  gate_up = product(x, of_gate_up)
  kept_gate_up = checkpoint_name(operand(gate_up, recipe.kept_swiglu), "ffn_gate_up")
  hidden = _hidden_operand(gate_up, gates_R, activation(recipe), operand, static.implementation)
  kept_x = kept_operand(x_RD, x, recipe.kept, recipe, operand)
  # Empty arrays say what formats the weights have.
  formats = jnp.zeros(0, w_gate_up.dtype), jnp.zeros(0, w_down.dtype)
  return product(hidden, of_down), (
      kept_x, gates_R, kept_gate_up, gate_up_of_gradient, down_of_gradient, sizes_E, formats)


def _experts_backward(static: _Static, residuals, dy_RD):
  recipe, dtype = static.recipe, dy_RD.dtype
  x, gates_R, gate_up, w_gate_up, w_down, sizes_E, (of_gate_up, of_down) = residuals
  gradient = functools.partial(
      as_operand, dtype=dtype, smallest_amax=SMALLEST_GRADIENT_AMAX,
      implementation=static.implementation)
  product = functools.partial(
      _product, sizes_E=sizes_E, dtype=dtype, implementation=static.implementation)
  weight_gradient = functools.partial(_weight_gradient, sizes_E=sizes_E, static=static)
  form = lambda recipe: recipe.input_gradient and recipe.input_gradient.gradient

  hidden, hidden_vjp = jax.vjp(_hidden, as_array(gate_up), gates_R)
  # Rounded to the layer's format before it is to FP8's, which matters less than what it saves.
  dw_down = weight_gradient(
      hidden.astype(dtype), dy_RD, product=recipe.weight_gradient, dtype=of_down.dtype)
  dhidden = product(gradient(dy_RD, form(recipe.dispatched)), w_down)
  dgate_up, dgates_R = hidden_vjp(dhidden.astype(jnp.float32))
  dgate_up = dgate_up.astype(dtype)
  dw_gate_up = weight_gradient(
      x, dgate_up, product=recipe.dispatched.weight_gradient, dtype=of_gate_up.dtype)
  dx_RD = product(gradient(dgate_up, form(recipe)), w_gate_up)
  return dx_RD, dgates_R, dw_gate_up, dw_down, None, None


_experts.defvjp(_experts_forward, _experts_backward)
