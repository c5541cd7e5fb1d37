"""Weights quantised ahead equal those that the products would quantise themselves."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import model
from pallas_kernels import RECIPES, dequantize, quantize

FP8 = model.NUMERICS["fp8"]
SMALL = dataclasses.replace(tiny.V3, num_layers=1, num_dense_layers=0, mtp=None, numerics=FP8)


def gradients(cfg, ahead):
  variables, tokens = tiny.variables(cfg), tiny.tokens(cfg)

  @jax.jit
  def loss_and_gradients(params):
    more = model.quantize_weights(cfg, params) if ahead else {}
    loss = lambda p: model.Transformer(cfg).apply(
        {**variables, "params": p, **more}, tokens).logits_BTV.var()
    return jax.value_and_grad(loss)(params)

  return loss_and_gradients(variables["params"])


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_losses_and_gradients_equal_those_of_weights_quantised_where_they_are_used(name):
  cfg = dataclasses.replace(tiny.ALL[name], num_layers=2, mtp=None, numerics=FP8)
  jax.tree.map(np.testing.assert_array_equal, gradients(cfg, True), gradients(cfg, False))


@pytest.mark.parametrize("recipe", [
    RECIPES["v3"], RECIPES["per_tensor"], dataclasses.replace(FP8.recipe, forward=None)])
def test_every_matrix_is_quantised_in_the_format_of_its_products(recipe):
  cfg = dataclasses.replace(SMALL, numerics=dataclasses.replace(FP8, recipe=recipe))
  params = tiny.variables(cfg)["params"]
  quantized = model.quantize_weights(cfg, params)["quantized"]["moe_layers"]
  form = recipe.input_gradient.weight
  for part, name, shape in (("attention", "w_o", (1, 24, 24)), ("ffn", "w_down", (1, 8, 9, 24)),
                            ("ffn", "w_gate_up", (1, 8, 24, 18))):
    master = params["moe_layers"][part][name].reshape(shape)
    operands = quantized[part][name]
    want = dequantize(quantize(master, form.tile, format=form.format))
    np.testing.assert_array_equal(dequantize(operands.input_gradient_KN), want)
    assert (operands.forward_NK is None) == (recipe.forward is None)
    if recipe.forward:
      np.testing.assert_array_equal(dequantize(operands.forward_NK), want.mT)
  assert quantized["attention_norm"]["scale"] is None


def test_without_a_recipe_nothing_is_quantised():
  assert model.quantize_weights(tiny.V3, tiny.variables(tiny.V3)["params"]) == {}
