"""What FP8 training rounds, and how: data, so that every study of it is a configuration."""

import dataclasses
from typing import Literal

from pallas_kernels.quantized import FORMATS

_TILES = ("1x128", "128x128", "row", "tensor")
_WEIGHT_TILES = ("128x128", "tensor")


@dataclasses.dataclass(frozen=True)
class Operand:
  """How a matrix, whose last axis is contracted, is quantised; see `pallas_kernels.quantize`.

  Attributes:
    format: of its values.
    tile: the elements that share a scale: 128 of a row, a block, a row, or the whole matrix.
    power_of_two: whether scales are powers of two.
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
  """The forward product, y = x w.

  Attributes:
    activation: x, by rows.
    weight: w.
  """

  activation: Operand = Operand()
  weight: Operand = _WEIGHT

  def __post_init__(self):
    _check_weight(self)


@dataclasses.dataclass(frozen=True)
class InputGradient:
  """The backward product of the input, dx = dy w.T.

  Attributes:
    gradient: dy, by rows.
    weight: w, transposed.
  """

  gradient: Operand = Operand()
  weight: Operand = _WEIGHT

  def __post_init__(self):
    _check_weight(self)


@dataclasses.dataclass(frozen=True)
class WeightGradient:
  """The backward product of the weight, dw = x.T dy, which contracts over tokens.

  Attributes:
    activation: x, transposed.
    gradient: dy, transposed.
  """

  activation: Operand = Operand()
  gradient: Operand = Operand()


def _check_weight(product: Forward | InputGradient) -> None:
  if product.weight.tile not in _WEIGHT_TILES:
    raise ValueError(
        f"{type(product).__name__}.weight.tile={product.weight.tile!r} must be one of "
        f"{', '.join(_WEIGHT_TILES)}: the same scales have to serve the transposed weight")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The operands of a linear layer's three products, and what is kept for the backward ones.

  Defaults are V3's (arXiv:2412.19437, section 3.3).

  Attributes:
    forward: the forward product; None if it is not in FP8.
    input_gradient: the backward product of the input; None if it is not in FP8.
    weight_gradient: the backward product of the weight; None if it is not in FP8.
    kept: how the input is kept for the weight gradient; None keeps what the forward product read.
      Where the weight gradient is not in FP8, the input is kept unquantised.
    kept_after_attention: the same for the layer after attention.
    kept_swiglu: how the inputs of the routed experts' SwiGLU are kept, from which its output is
      recomputed; None keeps them unquantised.
    dispatch_power_of_two: what is dispatched to experts, inputs and gradients, has scales that are
      powers of two (V3 section 3.3.3). Requantising it for the weight gradient then loses nothing,
      and the gradient, too, is requantised from what was dispatched.
  """

  forward: Forward | None = Forward()
  input_gradient: InputGradient | None = InputGradient()
  weight_gradient: WeightGradient | None = WeightGradient()
  kept: Operand | None = None
  kept_after_attention: Operand | None = Operand("e5m6", power_of_two=True)
  kept_swiglu: Operand | None = Operand()
  dispatch_power_of_two: bool = True

  @classmethod
  def parse(cls, text: str) -> "Recipe":
    """A recipe by its name in RECIPES.

    Raises:
      ValueError: if there is none.
    """
    if text not in RECIPES:
      raise ValueError(f"there is no recipe {text!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[text]

  @property
  def dispatched(self) -> "Recipe":
    """This recipe for inputs and gradients that have been sent to experts."""
    if not self.dispatch_power_of_two:
      return self
    whole = lambda operand: dataclasses.replace(operand, power_of_two=True)
    change = lambda product, *names: product and dataclasses.replace(
        product, **{name: whole(getattr(product, name)) for name in names})
    return dataclasses.replace(
        self, forward=change(self.forward, "activation"),
        input_gradient=change(self.input_gradient, "gradient"),
        weight_gradient=change(self.weight_gradient, "activation", "gradient"))


def _all(operand: Operand, weight: Operand = _WEIGHT) -> Recipe:
  return Recipe(
      Forward(operand, weight), InputGradient(operand, weight), WeightGradient(operand, operand),
      kept_after_attention=dataclasses.replace(operand, format="e5m6", power_of_two=True),
      kept_swiglu=operand)


def _gradients(gradient: Operand) -> Recipe:
  return Recipe(
      input_gradient=InputGradient(gradient), weight_gradient=WeightGradient(gradient=gradient))


RECIPES = {
    # E4M3 everywhere, with scales for each tile: what V3 was trained with.
    "v3": Recipe(),
    # One scale for each matrix: what it was a departure from.
    "per_tensor": _all(Operand(tile="tensor"), Operand(tile="tensor")),
    # Hybrid formats: more range and a bit less of mantissa for gradients.
    "e5m2_gradients": _gradients(Operand(format="e5m2")),
    # Gradients in blocks as weights are, so that transposing needs no new tiles (V3 appendix B.2).
    "block_gradients": _gradients(Operand(tile="128x128")),
}
