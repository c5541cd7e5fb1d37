"""Recipes are looked up by name, validated, and adapted for tokens sent to experts."""

import pytest

from pallas_kernels import RECIPES, Recipe
from pallas_kernels.recipe import Forward, InputGradient, Operand, WeightGradient


def test_recipes_are_looked_up_by_name():
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
def test_operands_that_no_matrix_product_supports_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_tokens_dispatched_to_experts_have_power_of_two_scales():
  pow2 = Operand(power_of_two=True)
  assert Recipe().dispatched == Recipe(
      Forward(activation=pow2), InputGradient(gradient=pow2), WeightGradient(pow2, pow2))
  assert Recipe(None, None, None).dispatched == Recipe(None, None, None)
  unchanged = Recipe(dispatch_power_of_two=False)
  assert unchanged.dispatched == unchanged
