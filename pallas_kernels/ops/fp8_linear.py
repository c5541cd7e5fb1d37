"""A linear layer whose three products are in FP8 (arXiv:2412.19437, section 3.3).

An operand is a `Quantized`, or an array for a product that the recipe leaves as it is.

Shape letters:  M rows (tokens)  K input width  N output width  m, k tiles
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import implementations
from pallas_kernels.ops.fp8_matmul import fp8_matmul
from pallas_kernels.ops.quantize import SMALLEST_AMAX, quantize, quantize_both
from pallas_kernels.ops.requantize import quantize_transposed
from pallas_kernels.quantized import BLOCK, Quantized, dequantize, num_tiles
from pallas_kernels.recipe import Operand, Recipe
from pallas_kernels.weight import Weight, WeightOperands, quantize_weight, split_weight

# The gradient of a mean over tokens is as small as tokens are many: V3's floor for activations
# would round all of it to zero. By much less the kernels cannot divide exactly.
SMALLEST_GRADIENT_AMAX = 2.0**-64

V3 = Recipe()


class _Static(NamedTuple):
  recipe: Recipe
  kept: Operand | None
  implementation: str | None


def fp8_linear(
    x_MK: jax.Array, w_KN: jax.Array | Weight, recipe: Recipe = V3, *,
    after_attention: bool = False, implementation: str | None = None) -> jax.Array:
  """x @ w; forward, input gradient and weight gradient with the operands that the recipe names.

  Weights are quantised once: their gradient's product reads them transposed. What is kept for the
  weight gradient is the input as quantised, which is tiled anew along the tokens.

  Args:
    x_MK: bfloat16 or float32.
    w_KN: the master weight; if it has been quantised for this recipe before, it is not again.
    recipe: see there.
    after_attention: whether x is attention's output, which is kept in more bits (section 3.3.3).
    implementation: see `pallas_kernels`; of quantisation and products.

  Returns:
    [M, N] in x's format. The input's gradient has x's format and the weight's its own, float32
    accumulators rounded once.

  Raises:
    ValueError: on shapes that do not fit, or an implementation that cannot do it here.
  """
  if x_MK.ndim != 2 or w_KN.ndim != 2 or x_MK.shape[1] != w_KN.shape[0]:
    raise ValueError(
        f"fp8_linear takes x [M, K] and w [K, N], not {x_MK.shape} and {w_KN.shape}")
  kept = recipe.kept_after_attention if after_attention else recipe.kept
  static, (w_KN, quantized) = _Static(recipe, kept, implementation), split_weight(w_KN)
  width = w_KN.shape[1]
  if (implementation or implementations.local_backend()) == "mosaic_gpu":
    x_MK, w_KN, quantized = _whole_blocks(x_MK, w_KN, quantized)
  return _linear(static, x_MK, w_KN, quantized)[:, :width]


def _whole_blocks(x_MK, w_KN, quantized: WeightOperands):
  """Operands with zeros up to widths in multiples of 128: no sum or scale changes.

  Hopper's products take other widths, too, but what quantises for them does not.
  """
  k, n = (-size % BLOCK for size in w_KN.shape)
  pad = lambda x, rows, columns: jnp.pad(x, ((0, rows), (0, columns)))

  def operand(of: Quantized | None, rows: int, columns: int) -> Quantized | None:
    if of is None:
      return None
    of = with_tiles(of, (BLOCK, BLOCK))
    return Quantized(pad(of.values_MK, rows, columns), of.scales_mk, of.tile)

  of_forward, of_gradient = quantized
  return (pad(x_MK, 0, k), pad(w_KN, k, n),
          WeightOperands(operand(of_forward, n, k), operand(of_gradient, k, n)))


def as_operand(
    x: jax.Array, form: Operand | None, dtype: jnp.dtype, *, smallest_amax: float = SMALLEST_AMAX,
    implementation: str | None = None) -> Quantized | jax.Array:
  """`x` quantised as `form` says; None: in `dtype`."""
  if form is None:
    return x.astype(dtype)
  return quantize(x, form.tile, format=form.format, power_of_two=form.power_of_two,
                  smallest_amax=smallest_amax, implementation=implementation)


def as_array(x: Quantized | jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """What an operand stands for."""
  return dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype)


def with_tiles(x: Quantized, tile: tuple[int, int]) -> Quantized:
  """The same numbers, a scale given to each of the smaller tiles that its own consists of.

  Products take tiles of few sizes; with this they take any that those divide.
  """
  if x.tile == tile:
    return x
  rows, columns = (jnp.arange(count) * new // old
                   for count, new, old in zip(num_tiles(x.shape, tile), tile, x.tile, strict=True))
  return Quantized(x.values_MK, x.scales_mk[..., rows[:, None], columns], tile)


def precision_of(dtype: jnp.dtype) -> lax.Precision | None:
  """Float32 means float32: accelerators would otherwise multiply in TF32 or bfloat16."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _product(lhs_MK, rhs_NK, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  if isinstance(lhs_MK, jax.Array):
    return jnp.einsum("mk,nk->mn", lhs_MK, rhs_NK, precision=precision_of(lhs_MK.dtype),
                      preferred_element_type=jnp.float32).astype(dtype)
  if rhs_NK.tile != (1, BLOCK):
    rhs_NK = with_tiles(rhs_NK, (BLOCK, BLOCK))
  return fp8_matmul(with_tiles(lhs_MK, (1, BLOCK)), rhs_NK, dtype=dtype,
                    implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: _Static, x_MK, w_KN, quantized: WeightOperands):
  return _linear_forward(static, x_MK, w_KN, quantized)[0]


def _linear_forward(static: _Static, x_MK, w_KN, quantized: WeightOperands):
  recipe = static.recipe
  options = {"dtype": x_MK.dtype, "implementation": static.implementation}
  operand = functools.partial(as_operand, x_MK, **options)
  x = operand(recipe.forward and recipe.forward.activation)
  w_NK, of_gradient = weight_operands(w_KN, quantized, recipe, **options)
  y_MN = _product(x, w_NK, **options)
  # An empty array says what format the weight has.
  return y_MN, (kept_operand(x, static.kept, recipe, operand), of_gradient,
                jnp.zeros(0, w_KN.dtype))


def weight_operands(
    w_KN, quantized: WeightOperands, recipe: Recipe, dtype: jnp.dtype, implementation: str | None):
  """The weight for the forward product, transposed, and for the input gradient.

  Quantised now where nothing was ahead; in `dtype` for a product that is not in FP8.
  """
  if all(operand is None for operand in quantized):
    quantized = quantize_weight(w_KN, recipe, implementation=implementation)
  w_NK, w = quantized
  return (w_KN.astype(dtype).mT if w_NK is None else w_NK,
          w_KN.astype(dtype) if w is None else w)


def kept_operand(x: Quantized | jax.Array, form: Operand | None, recipe: Recipe, operand):
  """What the weight gradient is given of an input that the forward product read as `x`.

  Where that is something else, `operand` makes it of a form.
  """
  return x if recipe.weight_gradient and not form else operand(recipe.weight_gradient and form)


def _linear_backward(static: _Static, residuals, dy_MN):
  recipe, implementation = static.recipe, static.implementation
  kept, w_KN, of_weight = residuals
  dtype = dy_MN.dtype
  dy, dy_NM = gradients(dy_MN, recipe, implementation)
  x_KM = transposed_operand(kept, recipe.weight_gradient and recipe.weight_gradient.activation,
                            dtype, implementation=implementation)
  return (_product(dy, w_KN, dtype, implementation),
          _product(x_KM, dy_NM, of_weight.dtype, implementation), None)


def transposed_operand(
    x: Quantized | jax.Array, form: Operand | None, dtype: jnp.dtype, *,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None):
  """The transpose of what `x` stands for, quantised as `form` says; None: in `dtype`."""
  if form is None:
    return as_array(x, dtype).T
  return quantize_transposed(
      x, form.tile, format=form.format, power_of_two=form.power_of_two,
      smallest_amax=smallest_amax, implementation=implementation)


def gradients(dy_MN, recipe: Recipe, implementation: str | None):
  """The output's gradient as the input's wants it, and transposed, as the weight's does."""
  of_input = recipe.input_gradient and recipe.input_gradient.gradient
  of_weight = recipe.weight_gradient and recipe.weight_gradient.gradient
  options = {"smallest_amax": SMALLEST_GRADIENT_AMAX, "implementation": implementation}
  if of_input and of_input == of_weight and of_input.tile == "1x128":
    return quantize_both(
        dy_MN, format=of_input.format, power_of_two=of_input.power_of_two, **options)
  return (as_operand(dy_MN, of_input, dy_MN.dtype, **options),
          transposed_operand(dy_MN, of_weight, dy_MN.dtype, **options))


_linear.defvjp(_linear_forward, _linear_backward)
