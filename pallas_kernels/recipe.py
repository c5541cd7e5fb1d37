"""Recipes of FP8 training: which operands are quantised, and how.

Recipes are data, so that every FP8 study is a configuration (arXiv:2412.19437, section 3.3).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.quantized import FORMATS

_TILES = ("1x128", "128x128", "row", "tensor")
_WEIGHT_TILES = ("128x128", "tensor")


@dataclasses.dataclass(frozen=True)
class Operand:
  """How an operand of a matrix product is quantised; see `pallas_kernels.quantize`.

  The operand is laid out with its contracted axis last.

  Attributes:
    format: floating-point format of the values.
    tile: the elements that share a scale: 128 consecutive elements of a row, a block of 128x128, a
      whole row, or the whole matrix.
    power_of_two: whether scales are rounded up to powers of two.

  Raises:
    ValueError: if the format or the tile is unknown.
  """

  format: Literal["e4m3", "e5m2", "e5m6"] = "e4m3"
  tile: Literal["1x128", "128x128", "row", "tensor"] = "1x128"
  power_of_two: bool = False

  def __post_init__(self):
    for name, known in (("format", tuple(FORMATS)), ("tile", _TILES)):
      if getattr(self, name) not in known:
        raise ValueError(
            f"Operand.{name}={getattr(self, name)!r} must be one of {', '.join(known)}")


_WEIGHT = Operand(tile="128x128")


@dataclasses.dataclass(frozen=True)
class Forward:
  """Operands of the forward product, y = x w (Fprop).

  Attributes:
    activation: how x is quantised; its rows are tokens.
    weight: how w is quantised.

  Raises:
    ValueError: if the weight's tile is neither "128x128" nor "tensor".
  """

  activation: Operand = Operand()
  weight: Operand = _WEIGHT

  def __post_init__(self):
    _check_weight(self)


@dataclasses.dataclass(frozen=True)
class InputGradient:
  """Operands of the input gradient, dx = dy w.T (Dgrad).

  Attributes:
    gradient: how the output gradient dy is quantised; its rows are tokens.
    weight: how w.T is quantised.

  Raises:
    ValueError: if the weight's tile is neither "128x128" nor "tensor".
  """

  gradient: Operand = Operand()
  weight: Operand = _WEIGHT

  def __post_init__(self):
    _check_weight(self)


@dataclasses.dataclass(frozen=True)
class WeightGradient:
  """Operands of the weight gradient, dw = x.T dy (Wgrad), which contracts over tokens.

  Attributes:
    activation: how x.T is quantised: tiles of 1x128 hold 128 tokens of one channel.
    gradient: how dy.T is quantised: tiles of 1x128 hold 128 tokens of one channel.
  """

  activation: Operand = Operand()
  gradient: Operand = Operand()


def _check_weight(product: Forward | InputGradient) -> None:
  """Raises ValueError if the tiles of a weight cannot be transposed with it."""
  if product.weight.tile not in _WEIGHT_TILES:
    raise ValueError(
        f"{type(product).__name__}.weight.tile={product.weight.tile!r} must be one of "
        f"{', '.join(_WEIGHT_TILES)}: its scales must also fit the transposed weight")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The operands of a linear layer's three products, and what is kept for the backward pass.

  The defaults are V3's (arXiv:2412.19437, section 3.3).

  Attributes:
    forward: operands of the forward product; None if it is not in FP8.
    input_gradient: operands of the input gradient; None if it is not in FP8.
    weight_gradient: operands of the weight gradient; None if it is not in FP8.
    kept: how the input of a layer is kept for its weight gradient; None keeps the operand of the
      forward product. Where the weight gradient is not in FP8, the input is kept unquantised.
    kept_after_attention: how the input of the linear layer after attention is kept for its weight
      gradient, with the meaning of `kept`; V3 uses E5M6 there (section 3.3.3).
    kept_swiglu: how the inputs of the routed experts' SwiGLU are kept for the backward pass, which
      recomputes its output from them (V3 section 3.3.3); None keeps them unquantised.
    dispatch_power_of_two: whether the inputs and gradients that are dispatched to experts have
      scales that are powers of two (V3 section 3.3.3). Requantising them for the weight gradient
      then loses nothing, so the gradient's operand, too, is requantised from the dispatched array.
    gradients: format to which the gradients of weights are rounded when their product is stored.
      V3 keeps them in float32 (section 3.3.3); bfloat16 halves the bytes that the product writes
      and the optimizer reads. Gradients of weights in bfloat16 are in bfloat16 anyway.
  """

  forward: Forward | None = Forward()
  input_gradient: InputGradient | None = InputGradient()
  weight_gradient: WeightGradient | None = WeightGradient()
  kept: Operand | None = None
  kept_after_attention: Operand | None = Operand("e5m6", power_of_two=True)
  kept_swiglu: Operand | None = Operand()
  dispatch_power_of_two: bool = True
  gradients: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    if self.gradients not in ("float32", "bfloat16"):
      raise ValueError(f"Recipe.gradients={self.gradients!r} must be float32 or bfloat16")

  def gradient_dtype(self, master: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which the product that gives a weight's gradient is stored.

    Args:
      master: dtype of the weight, and of its gradient in the end.
    """
    return jnp.dtype(master if self.gradients == "float32" else self.gradients)

  @classmethod
  def parse(cls, text: str) -> "Recipe":
    """Returns the recipe called `text` in `RECIPES`.

    Raises:
      ValueError: if there is no recipe of that name.
    """
    if text not in RECIPES:
      raise ValueError(f"there is no recipe {text!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[text]

  @property
  def dispatched(self) -> "Recipe":
    """This recipe as it applies to inputs and gradients that are dispatched to experts."""
    if not self.dispatch_power_of_two:
      return self
    with_power_of_two = lambda operand: dataclasses.replace(operand, power_of_two=True)
    change = lambda product, *names: product and dataclasses.replace(
        product, **{name: with_power_of_two(getattr(product, name)) for name in names})
    return dataclasses.replace(
        self, forward=change(self.forward, "activation"),
        input_gradient=change(self.input_gradient, "gradient"),
        weight_gradient=change(self.weight_gradient, "activation", "gradient"))


def _all(operand: Operand, weight: Operand = _WEIGHT) -> Recipe:
  """Returns a recipe that quantises all activations and gradients as `operand` says."""
  return Recipe(
      Forward(operand, weight), InputGradient(operand, weight), WeightGradient(operand, operand),
      kept_after_attention=dataclasses.replace(operand, format="e5m6", power_of_two=True),
      kept_swiglu=operand)


def _gradients(gradient: Operand) -> Recipe:
  """Returns V3's recipe with output gradients quantised as `gradient` says."""
  return Recipe(
      input_gradient=InputGradient(gradient), weight_gradient=WeightGradient(gradient=gradient))


RECIPES = {
    # E4M3 for every operand, with one scale per tile: the recipe that V3 was trained with.
    "v3": Recipe(),
    # One scale per matrix: the common practice that V3's recipe departs from.
    "per_tensor": _all(Operand(tile="tensor"), Operand(tile="tensor")),
    # Hybrid formats: gradients have more range and one bit less of mantissa.
    "e5m2_gradients": _gradients(Operand(format="e5m2")),
    # Gradients in blocks of 128x128 as weights are, so that their transposes need no
    # requantisation. V3 reports that a 16B model trained so diverges (appendix B.2).
    "block_gradients": _gradients(Operand(tile="128x128")),
}
