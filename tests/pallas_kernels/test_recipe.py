"""Recipes say what they cannot be."""

import pytest

from pallas_kernels import RECIPES, Recipe
from pallas_kernels.recipe import Forward, InputGradient, Operand, WeightGradient


def test_recipes_are_found_by_name():
  assert Recipe.parse("v3") == Recipe()
  assert len(set(RECIPES.values())) == len(RECIPES)
  with pytest.raises(ValueError, match="there is no recipe 'v4'; there are: v3, per_tensor"):
    Recipe.parse("v4")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Operand("e3m4"), "Operand.format='e3m4' must be one of e4m3, e5m2, e5m6"),
    (lambda: Operand(tile="64x64"), "Operand.tile='64x64' must be one of 1x128, 128x128"),
    (lambda: Forward(weight=Operand()), "Forward.weight.tile='1x128' must be one of 128x128"),
    (lambda: InputGradient(weight=Operand(tile="row")), "InputGradient.weight.tile='row'"),
])
def test_what_no_product_can_read_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_what_is_sent_to_experts_has_scales_of_powers_of_two():
  whole = Operand(power_of_two=True)
  assert Recipe().dispatched == Recipe(
      Forward(activation=whole), InputGradient(gradient=whole), WeightGradient(whole, whole))
  assert Recipe(None, None, None).dispatched == Recipe(None, None, None)
  kept = Recipe(dispatch_power_of_two=False)
  assert kept.dispatched == kept
