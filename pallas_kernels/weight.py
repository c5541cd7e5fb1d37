"""Weights quantised ahead of their products: once for all that is computed before they change.

Shape letters:  K input width  N output width
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.ops.quantize import quantize, quantize_both
from pallas_kernels.quantized import Quantized
from pallas_kernels.recipe import Operand, Recipe


class WeightOperands(NamedTuple):
  """What products read of a weight, each with what it contracts last; None: what is not in FP8."""

  forward_NK: Quantized | None = None
  input_gradient_KN: Quantized | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A master weight, which gradients are of, and what products read in its place.

  Attributes:
    master: of any shape that is [..., K, N] when its axes are joined.
    operands: see `quantize_weight`.
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
    """The master's axes joined or split otherwise."""
    return Weight(self.master.reshape(*shape), self.operands)

  def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The master in a format, for a product that is not in FP8."""
    return self.master.astype(dtype)


def quantize_weight(
    w_KN: jax.Array, recipe: Recipe, *, implementation: str | None = None) -> WeightOperands:
  """What the products with a weight read under a recipe.

  Args:
    w_KN: [..., K, N], float32 or bfloat16, not a part of it: scales are of the whole matrix' tiles.
    recipe: see there.
    implementation: see `pallas_kernels`.

  Raises:
    ValueError: on what `quantize` does not know, or an implementation that cannot do it here.
  """
  w_KN = jax.lax.stop_gradient(w_KN)  # gradients are the master's

  def operand(form: Operand | None, run=quantize):
    return form and run(w_KN, form.tile, format=form.format, power_of_two=form.power_of_two,
                        implementation=implementation)

  forward, gradient = (product and product.weight
                       for product in (recipe.forward, recipe.input_gradient))
  if forward and forward == gradient:
    return WeightOperands(*reversed(operand(forward, quantize_both)))
  of_forward = operand(forward)
  return WeightOperands(of_forward and of_forward.mT, operand(gradient))


def split_weight(w: jax.Array | Weight) -> tuple[jax.Array, WeightOperands]:
  """The master, and what was quantised of it before."""
  return (w.master, w.operands) if isinstance(w, Weight) else (w, WeightOperands())
