"""A linear layer whose three products are in FP8 (arXiv:2412.19437, section 3.3).

An operand is a `Quantized`, or a plain array for a product that is not in FP8 under the recipe.

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

# The gradient of a mean over tokens shrinks with their number: with V3's floor for activations all
# of it would round to zero. With a floor much below this the kernels' division would not be exact.
SMALLEST_GRADIENT_AMAX = 2.0**-64

V3 = Recipe()


class _Static(NamedTuple):
  recipe: Recipe
  kept: Operand | None
  implementation: str | None


def fp8_linear(
    x_MK: jax.Array, w_KN: jax.Array | Weight, recipe: Recipe = V3, *,
    after_attention: bool = False, implementation: str | None = None) -> jax.Array:
  """Returns x @ w, with its forward product and both gradients in FP8 as the recipe says.

  Where the recipe quantises the weight alike for the forward product and for the input gradient, it
  is quantised once, and the transposed copy has the same values. In V3's recipe the quantised input
  is kept for the weight gradient, which requantises it with tiles along the tokens.

  Args:
    x_MK: bfloat16 or float32.
    w_KN: the master weight; a `Weight` that was quantised ahead for this recipe is not quantised
      again.
    recipe: how the operands of the three products are quantised, and what is kept.
    after_attention: whether x is attention's output, which is kept as the recipe's
      `kept_after_attention` says (section 3.3.3).
    implementation: which implementation of quantisation and products to run; see `pallas_kernels`.

  Returns:
    [M, N] in x's dtype. The gradients have the dtypes of x and of the master weight. They are
    rounded once, from float32 accumulators, that of the weight as `Recipe.gradients` says.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
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
  """Pads K and N with zeros to multiples of 128, which changes no sum and no scale.

  The Hopper kernels for products support other widths, too, but those for quantisation do not.
  """
  k, n = (-size % BLOCK for size in w_KN.shape)
  pad = lambda x, rows, columns: jnp.pad(x, ((0, rows), (0, columns)))

  def operand(w: Quantized | None, rows: int, columns: int) -> Quantized | None:
    if w is None:
      return None
    w = with_tiles(w, (BLOCK, BLOCK))
    return Quantized(pad(w.values_MK, rows, columns), w.scales, w.tile)

  w_NK, dgrad_w_KN = quantized
  return (pad(x_MK, 0, k), pad(w_KN, k, n),
          WeightOperands(operand(w_NK, n, k), operand(dgrad_w_KN, k, n)))


def as_operand(
    x: jax.Array, form: Operand | None, dtype: jnp.dtype, *, smallest_amax: float = SMALLEST_AMAX,
    implementation: str | None = None) -> Quantized | jax.Array:
  """Returns `x` quantised as `form` says, or cast to `dtype` if `form` is None."""
  if form is None:
    return x.astype(dtype)
  return quantize(x, form.tile, format=form.format, power_of_two=form.power_of_two,
                  smallest_amax=smallest_amax, implementation=implementation)


def as_array(x: Quantized | jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Returns an operand as a plain array in `dtype`, dequantised if necessary."""
  return dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype)


def with_tiles(x: Quantized, tile: tuple[int, int]) -> Quantized:
  """Returns the same array with smaller tiles, to each of which its old tile's scale is copied.

  The products support few tile sizes. With this they accept every operand whose tiles can be split
  into tiles of those sizes.

  Args:
    x: a quantised array.
    tile: rows and columns of the new tiles, each of which must lie within one of x's tiles.
  """
  if x.tile == tile:
    return x
  rows, columns = (jnp.arange(count) * new // old
                   for count, new, old in zip(num_tiles(x.shape, tile), tile, x.tile, strict=True))
  return Quantized.of(x.values_MK, x.scales_mk[..., rows[:, None], columns], tile)


def precision_of(dtype: jnp.dtype) -> lax.Precision | None:
  """Returns the precision for a product: float32 operands are multiplied in full float32.

  Accelerators would by default multiply them in TF32 or bfloat16.
  """
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(lhs_MK, rhs_NK, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  """Returns lhs @ rhs.T in `dtype`, of two quantised operands or of two plain arrays."""
  if isinstance(lhs_MK, jax.Array):
    return jnp.einsum("mk,nk->mn", lhs_MK, rhs_NK, precision=precision_of(lhs_MK.dtype),
                      preferred_element_type=jnp.float32).astype(dtype)
  if rhs_NK.tile != (1, BLOCK):
    rhs_NK = with_tiles(rhs_NK, (BLOCK, BLOCK))
  return fp8_matmul(with_tiles(lhs_MK, (1, BLOCK)), rhs_NK, dtype=dtype,
                    implementation=implementation)


def weight_gradient(
    x_KM, dy_NM, recipe: Recipe, dtype: jnp.dtype, implementation: str | None) -> jax.Array:
  """Returns x @ dy.T for operands that are transposed, rounded as the recipe says: [K, N]."""
  rounded = recipe.gradient_dtype(dtype)
  return product(x_KM, dy_NM, rounded, implementation).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: _Static, x_MK, w_KN, quantized: WeightOperands):
  return _linear_forward(static, x_MK, w_KN, quantized)[0]


def _linear_forward(static: _Static, x_MK, w_KN, quantized: WeightOperands):
  recipe = static.recipe
  options = {"dtype": x_MK.dtype, "implementation": static.implementation}
  operand = functools.partial(as_operand, x_MK, **options)
  x = operand(recipe.forward and recipe.forward.activation)
  w_NK, dgrad_w_KN = weight_operands(w_KN, quantized, recipe, **options)
  y_MN = product(x, w_NK, **options)
  # Residuals are arrays, so an empty one passes the master weight's dtype to the backward pass.
  return y_MN, (kept_operand(x, static.kept, recipe, operand), dgrad_w_KN,
                jnp.zeros(0, w_KN.dtype))


def weight_operands(
    w_KN, quantized: WeightOperands, recipe: Recipe, dtype: jnp.dtype, implementation: str | None):
  """Returns a weight's operands for the forward product and for the input gradient.

  Args:
    w_KN: the master weight, [..., K, N].
    quantized: its operands if it was quantised ahead; if all are None, it is quantised here.
    recipe: says how the weight is quantised for either product.
    dtype: dtype of the operand of a product that is not in FP8.
    implementation: which implementation of the quantisation to run.

  Returns:
    The operands [..., N, K] and [..., K, N].
  """
  if all(operand is None for operand in quantized):
    quantized = quantize_weight(w_KN, recipe, implementation=implementation)
  w_NK, w = quantized
  return (w_KN.astype(dtype).mT if w_NK is None else w_NK,
          w_KN.astype(dtype) if w is None else w)


def kept_operand(x: Quantized | jax.Array, form: Operand | None, recipe: Recipe, operand):
  """Returns a layer's input in the form in which it is kept for the weight gradient.

  Args:
    x: the input as operand of the forward product.
    form: how the input is to be kept; None keeps x itself.
    recipe: if its weight gradient is not in FP8, the input is kept unquantised.
    operand: function that returns the input in a given form, unquantised for None.
  """
  return x if recipe.weight_gradient and not form else operand(recipe.weight_gradient and form)


def _linear_backward(static: _Static, residuals, dy_MN):
  recipe, implementation = static.recipe, static.implementation
  kept, w_KN, empty = residuals
  dtype = dy_MN.dtype
  dy, dy_NM = gradients(dy_MN, recipe, implementation)
  x_KM = transposed_operand(kept, recipe.weight_gradient and recipe.weight_gradient.activation,
                            dtype, implementation=implementation)
  return (product(dy, w_KN, dtype, implementation),
          weight_gradient(x_KM, dy_NM, recipe, empty.dtype, implementation), None)


def transposed_operand(
    x: Quantized | jax.Array, form: Operand | None, dtype: jnp.dtype, *,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None):
  """Returns `x` transposed, requantised as `form` says or in `dtype` if `form` is None."""
  if form is None:
    return as_array(x, dtype).T
  return quantize_transposed(
      x, form.tile, format=form.format, power_of_two=form.power_of_two,
      smallest_amax=smallest_amax, implementation=implementation)


def gradients(dy_MN, recipe: Recipe, implementation: str | None):
  """Returns the output's gradient as the operands of both backward products.

  Returns:
    The operand of the input gradient, [M, N], and that of the weight gradient, [N, M].
  """
  input_form = recipe.input_gradient and recipe.input_gradient.gradient
  weight_form = recipe.weight_gradient and recipe.weight_gradient.gradient
  options = {"smallest_amax": SMALLEST_GRADIENT_AMAX, "implementation": implementation}
  if input_form and input_form == weight_form and input_form.tile == "1x128":
    return quantize_both(
        dy_MN, format=input_form.format, power_of_two=input_form.power_of_two, **options)
  return (as_operand(dy_MN, input_form, dy_MN.dtype, **options),
          transposed_operand(dy_MN, weight_form, dy_MN.dtype, **options))


_linear.defvjp(_linear_forward, _linear_backward)
