"""Weights quantised ahead of their products: once per update, for all products until the next.

Shape letters:  K input width  N output width
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.ops.quantize import quantize, quantize_both
from pallas_kernels.quantized import Quantized
from pallas_kernels.recipe import Operand, Recipe


class WeightOperands(NamedTuple):
  """A weight as the operands of its products, each with the contracted axis last.

  Attributes:
    forward_NK: operand of the forward product, [..., N, K]; None if that product is not in FP8.
    input_gradient_KN: operand of the input gradient, [..., K, N]; None if that product is not in
      FP8.
  """

  forward_NK: Quantized | None = None
  input_gradient_KN: Quantized | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A master weight together with the quantised operands that products read in its place.

  Gradients are those of the master weight.

  Attributes:
    master: the master weight, of any shape that becomes [..., K, N] when axes are merged.
    operands: the quantised operands, as returned by `quantize_weight`.
  """

  master: jax.Array
  operands: WeightOperands

  @property
  def shape(self) -> tuple[int, ...]:
    return self.master.shape

  @property
  def ndim(self) -> int:
    return self.master.ndim

  def reshape(self, *shape: int) -> "Weight":
    """Returns the weight with its master reshaped; the operands keep their shapes."""
    return Weight(self.master.reshape(*shape), self.operands)

  def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the master in `dtype`, for a product that is not in FP8."""
    return self.master.astype(dtype)


def quantize_weight(
    w_KN: jax.Array, recipe: Recipe, *, implementation: str | None = None) -> WeightOperands:
  """Quantises a weight for the products that a recipe computes in FP8.

  The weight is quantised only once where both products use the same format and tile.

  Args:
    w_KN: [..., K, N], float32 or bfloat16; the whole matrix rather than a shard of it, as tiles are
      those of the whole matrix.
    recipe: names the format and the tile of the weight for each product.
    implementation: implementation of the quantisation; see `pallas_kernels`.

  Returns:
    The weight's operands, in FP8 or None.

  Raises:
    ValueError: if w has another dtype or too few axes, or the named implementation cannot run here.
  """
  w_KN = jax.lax.stop_gradient(w_KN)  # gradients belong to the master

  def operand(form: Operand | None, run=quantize):
    return form and run(w_KN, form.tile, format=form.format, power_of_two=form.power_of_two,
                        implementation=implementation)

  forward, gradient = (product and product.weight
                       for product in (recipe.forward, recipe.input_gradient))
  if forward and forward == gradient:
    return WeightOperands(*reversed(operand(forward, quantize_both)))
  forward_KN = operand(forward)
  return WeightOperands(forward_KN and forward_KN.mT, operand(gradient))


def split_weight(w: jax.Array | Weight) -> tuple[jax.Array, WeightOperands]:
  """Returns the master weight and its operands, which are all None for a plain array."""
  return (w.master, w.operands) if isinstance(w, Weight) else (w, WeightOperands())
