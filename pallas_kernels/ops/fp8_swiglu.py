"""A SwiGLU feed-forward layer with its six products in FP8 (arXiv:2412.19437, section 3.3).

Shape letters:  M rows (tokens)  D model width  F hidden units
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import implementations
from pallas_kernels.ops.fp8_linear import (
    V3,
    as_operand,
    fp8_linear,
    gradients,
    kept_operand,
    product,
    transposed_operand,
    weight_gradient,
    weight_operands,
)
from pallas_kernels.ops.quantize import swiglu, swiglu_quantize
from pallas_kernels.ops.swiglu_backward import backward_operands
from pallas_kernels.quantized import BLOCK
from pallas_kernels.recipe import Recipe
from pallas_kernels.weight import Weight, split_weight


class _Static(NamedTuple):
  recipe: Recipe
  implementation: str | None


def fp8_swiglu(
    x_MD: jax.Array, w_gate_up_D2F: jax.Array | Weight, w_down_FD: jax.Array | Weight,
    recipe: Recipe = V3, *, implementation: str | None = None) -> jax.Array:
  """Returns swiglu(x @ w_gate_up) @ w_down, with all products in FP8 as the recipe says.

  Up to rounding, it equals two `fp8_linear` with SwiGLU between them, but quantises SwiGLU's output
  where it is computed. SwiGLU's inputs are kept unquantised for the backward pass, which recomputes
  its output from them.

  Args:
    x_MD: bfloat16 or float32.
    w_gate_up_D2F: master weights of the gate and up projections, [D, 2, F].
    w_down_FD: master weight of the down projection. A `Weight` that was quantised ahead for this
      recipe is not quantised again; this holds for both weights.
    recipe: how the operands of the products are quantised, and what is kept.
    implementation: which implementation of quantisation and products to run; see `pallas_kernels`.

  Returns:
    [M, D] in x's dtype. Gradients have the dtypes of their arguments.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  width, d_model = w_down_FD.shape
  if x_MD.ndim != 2 or x_MD.shape[1] != d_model or w_gate_up_D2F.shape != (d_model, 2, width):
    raise ValueError(
        "fp8_swiglu takes x [M, D], w_gate_up [D, 2, F] and w_down [F, D], not "
        f"{x_MD.shape}, {w_gate_up_D2F.shape} and {w_down_FD.shape}")
  w_gate_up = w_gate_up_D2F.reshape(d_model, 2 * width)
  backend = implementation or implementations.local_backend()
  if backend == "mosaic_gpu" and (d_model % BLOCK or width % BLOCK):
    # `fp8_linear` pads such widths, but padding would mix gate and up.
    linear = functools.partial(fp8_linear, recipe=recipe, implementation=implementation)
    gate_up = checkpoint_name(linear(x_MD, w_gate_up), "ffn_gate_up")
    recomputed = jax.checkpoint(swiglu, prevent_cse=False)
    return linear(recomputed(gate_up.reshape(len(x_MD), 2, width)), w_down_FD)
  (w_gate_up, gate_up), (w_down, down) = split_weight(w_gate_up), split_weight(w_down_FD)
  return _swiglu(_Static(recipe, implementation), x_MD, w_gate_up, w_down, (gate_up, down))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(static: _Static, x_MD, w_gate_up, w_down, quantized):
  return _swiglu_forward(static, x_MD, w_gate_up, w_down, quantized)[0]


def _swiglu_forward(static: _Static, x_MD, w_gate_up, w_down, quantized):
  recipe, implementation = static
  options = {"dtype": x_MD.dtype, "implementation": implementation}
  operand = functools.partial(as_operand, x_MD, **options)
  form = recipe.forward and recipe.forward.activation
  w_gate_up_t, dgrad_w_gate_up = weight_operands(w_gate_up, quantized[0], recipe, **options)
  w_down_t, dgrad_w_down = weight_operands(w_down, quantized[1], recipe, **options)

  x = operand(form)
  gate_up = checkpoint_name(product(x, w_gate_up_t, **options), "ffn_gate_up")
  split = gate_up.reshape(len(gate_up), 2, -1)
  if form and form.tile == "1x128":
    hidden = swiglu_quantize(split, format=form.format, power_of_two=form.power_of_two,
                             implementation=implementation)
  else:
    hidden = as_operand(swiglu(split), form, **options)
  # Residuals are arrays, so empty ones pass the master weights' dtypes to the backward pass.
  empty = jnp.zeros(0, w_gate_up.dtype), jnp.zeros(0, w_down.dtype)
  return product(hidden, w_down_t, **options), (
      kept_operand(x, recipe.kept, recipe, operand), gate_up, dgrad_w_gate_up, dgrad_w_down, empty)


def _swiglu_backward(static: _Static, residuals, dy_MD):
  recipe, implementation = static
  x, gate_up, w_gate_up, w_down, (empty_gate_up, empty_down) = residuals
  options = {"dtype": dy_MD.dtype, "implementation": implementation}
  gradient_options = {"recipe": recipe, "implementation": implementation}
  dy, dy_t = gradients(dy_MD, recipe, implementation)
  back = backward_operands(
      gate_up, jnp.ones(len(gate_up)), product(dy, w_down, **options), recipe, implementation)
  x_t = transposed_operand(x, recipe.weight_gradient and recipe.weight_gradient.activation,
                           **options)
  return (product(back.dgate_up, w_gate_up, **options),
          weight_gradient(x_t, back.dgate_up_t, dtype=empty_gate_up.dtype, **gradient_options),
          weight_gradient(back.hidden_t, dy_t, dtype=empty_down.dtype, **gradient_options), None)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
