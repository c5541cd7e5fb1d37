"""Routed experts with the six products of their SwiGLU in FP8 (arXiv:2412.19437, section 3.3).

Shape letters:  N tokens  K experts per token  E experts  D model width  F expert width
                S rows including padding, with every expert at a multiple of 128
                in `_product` and `_weight_gradient`: K input width  N output width
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
  as_operand,
  kept_operand,
  precision_of,
  transposed_operand,
  weight_operands,
  with_tiles,
)
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.ops.quantize import swiglu_quantize, swiglu_quantize_with_inputs
from pallas_kernels.ops.swiglu_backward import backward_operands
from pallas_kernels.ops.swiglu_gated import swiglu_gated
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
  """Returns the sum over each token's experts of down(swiglu(gate, up) * router gate).

  Inputs and gradients are quantised before they are dispatched to experts if the recipe's tile lies
  within one row. SwiGLU's inputs are kept for the backward pass as the recipe says, which
  recomputes its output from them (section 3.3.3). Under a recipe with one scale per matrix the rows
  of all experts share one scale, whereas every expert's weight has its own.

  Args:
    x_ND: the tokens, bfloat16 or float32.
    gates_NK: float32, the router's gates, by which the hidden units are multiplied.
    w_gate_up_ED2F: master weights of the gate and up projections, [E, D, 2, F].
    w_down_EFD: master weights of the down projections. A `Weight` that was quantised ahead for this
      recipe is not quantised again; this holds for both weights.
    rows: the rows of the experts, as `layout_expert_rows` lays them out.
    recipe: how the operands of the products are quantised, and what is kept.
    implementation: which implementation of quantisation and products to run; see `pallas_kernels`.

  Returns:
    [N, D] in x's dtype, summed over experts in float32. Gradients have the dtypes of their
    arguments and are rounded once, from float32 accumulators.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  num_experts, d_ff, d_model = w_down_EFD.shape
  if (w_gate_up_ED2F.shape != (num_experts, d_model, 2, d_ff)
      or rows.sizes_E.shape != (num_experts,) or x_ND.shape != (len(gates_NK), d_model)
      or gates_NK.shape != rows.place_NK.shape):
    raise ValueError(
        "fp8_experts takes x [N, D], gates [N, K], weights [E, D, 2, F] and [E, F, D] and "
        f"rows with place_NK [N, K] and sizes_E [E], not {x_ND.shape}, {gates_NK.shape}, "
        f"{w_gate_up_ED2F.shape}, {w_down_EFD.shape}, {rows.place_NK.shape} and "
        f"{rows.sizes_E.shape}")
  w_gate_up, gate_up = split_weight(w_gate_up_ED2F.reshape(num_experts, d_model, 2 * d_ff))
  w_down, down = split_weight(w_down_EFD)
  return _experts(_Static(recipe, implementation), x_ND, gates_NK, w_gate_up, w_down, rows,
                  (gate_up, down))


def _send(x_ND, rows: ExpertRows, form: Operand | None, operand) -> Quantized | jax.Array:
  """Dispatches tokens to their experts' rows and returns the rows as an operand, [S, D].

  Args:
    x_ND: the tokens, or their gradients.
    rows: the layout of the rows.
    form: how the operand is quantised; None leaves it unquantised.
    operand: function that returns an array as an operand of a given form.
  """
  token_S = rows.assignment_S // rows.place_NK.shape[1]
  take = functools.partial(gather_rows, index=token_S)
  if form and form.tile in ("1x128", "row"):  # no two rows share a scale: send the fewer bits
    x = operand(x_ND, form)
    return Quantized.of(take(x.values_MK), take(x.scales_mk, implementation="xla"), x.tile)
  return operand(take(x_ND), form)


def _sum_rows(y_SD: jax.Array, rows: ExpertRows) -> jax.Array:
  """Sums the output rows of each token's experts in float32: [S, D] to [N, D]."""
  return gather_rows(y_SD, rows.place_NK).sum(1, dtype=jnp.float32).astype(y_SD.dtype)


def _gates(gates_NK: jax.Array, rows: ExpertRows) -> jax.Array:
  """Returns the gate of each row, float32 [S]; 0 for padding rows."""
  return gather_rows(gates_NK.reshape(-1), rows.assignment_S).astype(jnp.float32)


def _hidden_and_kept(gate_up, gates_S, form: Operand | None, kept: Operand | None, operand,
                     implementation: str | None):
  """Returns the gated hidden units as an operand, and SwiGLU's inputs for the backward pass.

  With tiles of 1x128 the gates, which multiply whole rows, are multiplied into the rows' scales,
  unless scales have to be powers of two.

  Args:
    gate_up: output of the gate and up projection, [S, 2 F].
    gates_S: the gate of each row.
    form: how the hidden units are quantised for the down projection; None for unquantised.
    kept: how SwiGLU's inputs are kept; None for unquantised.
    operand: function that returns an array as an operand of a given form.
    implementation: which implementation of the quantisation to run.
  """
  if form is None or form.tile != "1x128" or form.power_of_two:
    hidden_SF = swiglu_gated(gate_up, gates_S).astype(gate_up.dtype)
    return operand(hidden_SF, form), operand(gate_up, kept)
  split, options = gate_up.reshape(len(gate_up), 2, -1), {"implementation": implementation}
  if kept == form and split.shape[-1] % BLOCK == 0:  # else a tile would hold gate and up
    hidden, kept_gate_up = swiglu_quantize_with_inputs(split, format=form.format, **options)
  else:
    hidden = swiglu_quantize(split, format=form.format, **options)
    kept_gate_up = operand(gate_up, kept)
  scaled_mk = hidden.scales_mk * gates_S[:, None]
  return Quantized.of(hidden.values_MK, scaled_mk, hidden.tile), kept_gate_up


def _product(lhs_SK, rhs_ENK, sizes_E, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  """Multiplies each row with the transpose of its expert's matrix: [S, K] to [S, N]."""
  sizes_E = aligned_sizes(sizes_E)  # padding rows may count as their expert's: they are zeros
  if isinstance(lhs_SK, jax.Array):
    return grouped_matmul(lhs_SK, rhs_ENK.mT, sizes_E, precision=precision_of(lhs_SK.dtype),
                          implementation=implementation)
  return fp8_grouped_matmul(
      with_tiles(lhs_SK, (1, BLOCK)), with_tiles(rhs_ENK, (BLOCK, BLOCK)), sizes_E, dtype=dtype,
      implementation=implementation)


def _weight_gradient(
    x_KS, dy_NS, sizes_E, recipe: Recipe, dtype: jnp.dtype, implementation: str | None):
  """Returns each expert's x @ dy.T, [E, K, N], for operands that are transposed."""
  if isinstance(x_KS, jax.Array):
    return grouped_weight_gradient(x_KS.T, dy_NS.T, aligned_sizes(sizes_E), dtype=dtype,
                                   implementation=implementation)
  return fp8_grouped_weight_gradient(
      with_tiles(x_KS, (1, BLOCK)), with_tiles(dy_NS, (1, BLOCK)), sizes_E,
      dtype=recipe.gradient_dtype(dtype), implementation=implementation).astype(dtype)


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
  w_gate_up_t, dgrad_w_gate_up = weight_operands(w_gate_up, quantized[0], recipe, **options)
  w_down_t, dgrad_w_down = weight_operands(w_down, quantized[1], recipe, **options)

  x = send(activation(recipe.dispatched))
  gate_up = product(x, w_gate_up_t)
  hidden, kept_gate_up = _hidden_and_kept(
      gate_up, _gates(gates_NK, rows), activation(recipe), recipe.kept_swiglu, operand,
      static.implementation)
  kept_gate_up = checkpoint_name(kept_gate_up, "ffn_gate_up")
  # Residuals are arrays, so empty ones pass the master weights' dtypes to the backward pass.
  empty = jnp.zeros(0, w_gate_up.dtype), jnp.zeros(0, w_down.dtype)
  return _sum_rows(product(hidden, w_down_t), rows), (
      kept_operand(x, recipe.kept, recipe, send), gates_NK, kept_gate_up, dgrad_w_gate_up,
      dgrad_w_down, rows, empty)


def _experts_backward(static: _Static, residuals, dy_ND):
  recipe, dtype = static.recipe, dy_ND.dtype
  x, gates_NK, gate_up, w_gate_up, w_down, rows, (empty_gate_up, empty_down) = residuals
  options = {"dtype": dtype, "implementation": static.implementation}
  gradient = functools.partial(as_operand, smallest_amax=SMALLEST_GRADIENT_AMAX, **options)
  transposed = functools.partial(transposed_operand, **options)
  product = functools.partial(_product, sizes_E=rows.sizes_E, **options)
  weight_gradient = functools.partial(
      _weight_gradient, sizes_E=rows.sizes_E, recipe=recipe, implementation=static.implementation)
  dy_form = recipe.dispatched.input_gradient and recipe.dispatched.input_gradient.gradient
  wgrad = recipe.dispatched.weight_gradient

  dy = _send(dy_ND, rows, dy_form, gradient)
  # With scales that are powers of two requantising loses nothing, so nothing more is dispatched.
  requantised = wgrad and recipe.dispatch_power_of_two and dy_form == wgrad.gradient
  sent = dy if requantised else _send(dy_ND, rows, None, gradient)
  back = backward_operands(gate_up, _gates(gates_NK, rows), product(dy, w_down), recipe,
                           static.implementation)
  dw_down = weight_gradient(
      back.hidden_t,
      transposed(sent, wgrad and wgrad.gradient, smallest_amax=SMALLEST_GRADIENT_AMAX),
      dtype=empty_down.dtype)
  dw_gate_up = weight_gradient(
      transposed(x, wgrad and wgrad.activation), back.dgate_up_t, dtype=empty_gate_up.dtype)
  dx_ND = _sum_rows(product(back.dgate_up, w_gate_up), rows)
  return dx_ND, gather_rows(back.dgates_M, rows.place_NK), dw_gate_up, dw_down, None, None


_experts.defvjp(_experts_forward, _experts_backward)
