"""Weights in the compute format give the same results, to the last bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.weights import cast_weights


@pytest.mark.parametrize("cfg", [
    dataclasses.replace(tiny.V3, num_layers=2), tiny.GQA, tiny.MQA])
def test_results_are_the_same_to_the_last_bit(cfg):
  cfg = dataclasses.replace(cfg, numerics=model.NUMERICS["bf16"])
  net, variables, tokens = model.Transformer(cfg), tiny.variables(cfg), tiny.tokens(cfg, 2, 7)
  apply = jax.jit(lambda variables: net.apply(variables, tokens))
  made = cast_weights(cfg, variables)
  want, found = apply(variables), apply(made)
  np.testing.assert_array_equal(found.logits_BTV, want.logits_BTV)
  jax.tree.map(np.testing.assert_array_equal, found.mtp_logits, want.mtp_logits)
  sizes = [sum(x.nbytes for x in jax.tree.leaves(each)) for each in (variables, made)]
  assert sizes[1] < 0.6 * sizes[0]
  again = cast_weights(cfg, made)
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (made, again)), strict=True))


def test_routers_norms_and_weights_with_an_fp8_recipe_stay_as_they_are():
  cfg = dataclasses.replace(tiny.V3, num_layers=2, numerics=model.NUMERICS["bf16"])
  made = cast_weights(cfg, tiny.variables(cfg))
  kept = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(made)
          if x.dtype == jnp.float32}
  assert kept == {"scale", "centroids", "bias"}
  fp8 = dataclasses.replace(cfg, numerics=model.NUMERICS["fp8"])
  variables = tiny.variables(fp8)
  same = jax.tree.map(lambda a, b: a is b, cast_weights(fp8, variables), variables)
  assert all(jax.tree.leaves(same))


def test_variables_in_the_boxes_of_flax_are_taken_out_of_them():
  cfg = dataclasses.replace(tiny.V3, num_layers=2, numerics=model.NUMERICS["bf16"])
  boxed = model.Transformer(cfg).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  found = model.generate(model.Transformer(cfg), boxed, jnp.ones((1, 2), jnp.int32),
                         jnp.array([2]), max_new_tokens=2, temperature=0)
  assert found.tokens_BN.shape == (1, 2)
