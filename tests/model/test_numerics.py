"""Numerics policies: the intended products are in FP8, and no others."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.experts import EXPERTS
from pallas_kernels import Recipe, fp8_linear

FP8 = model.NUMERICS["fp8"]


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("spec", "x", "w"), [
    ("btd,dgf->btgf", (2, 5, 6), (6, 2, 7)), ("bthv,hvd->btd", (2, 5, 3, 4), (3, 4, 7)),
    ("btf,fd->btd", (2, 5, 6), (6, 7))])
def test_linear_is_einsum_or_with_a_recipe_an_fp8_layer_on_flattened_axes(spec, x, w):
  x, w = normal(x), normal(w, 1)
  bf16 = model.NUMERICS["bf16"]
  plain, ours = bf16.linear(spec, x, w), FP8.linear(spec, x, w)
  np.testing.assert_array_equal(plain, bf16.einsum(spec, x, w))
  width = math.prod(x.shape[2:])
  flat = fp8_linear(x.reshape(-1, width).astype(jnp.bfloat16), w.reshape(width, -1))
  np.testing.assert_array_equal(ours, flat.reshape(plain.shape))
  assert ours.dtype == jnp.bfloat16 and (ours != plain).any()


def fp8_weights(jaxpr, num_tokens: int, times: int = 1) -> collections.Counter:
  """Counts the weights that enter layers which round to FP8, by their number of elements."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "custom_vjp_call":
      if "f8_e4m3fn" in str(eqn.params["call_jaxpr"]):
        found.update({operand.aval.size: times for operand in eqn.invars[1:]
                      if operand.aval.ndim > 1 and operand.aval.shape[0] != num_tokens})
      continue
    times_inside = times * eqn.params.get("length", 1)
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += fp8_weights(inner, num_tokens, times_inside)
  return found


@pytest.mark.cpu
@pytest.mark.parametrize("name", tiny.ALL)
def test_every_matrix_but_embedding_head_and_gate_is_multiplied_in_fp8(name):
  cfg = dataclasses.replace(tiny.ALL[name], numerics=FP8)
  net = model.Transformer(cfg, mla_form="expanded")
  tokens_BT = tiny.tokens(cfg, length=17)  # 34 in all: no weight has as many rows
  jaxpr = jax.make_jaxpr(net.apply)(model.abstract_variables(cfg), tokens_BT)
  want = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_variables(cfg)["params"]):
    keys = [key.key for key in path]
    if keys[-1].startswith("w_"):
      layers = leaf.shape[0] if keys[0] in ("dense_layers", "moe_layers") else 1
      want[leaf.size // layers] += layers
  assert fp8_weights(jaxpr.jaxpr, tokens_BT.size) == want
  assert sum(want.values())


def test_absorbed_weights_are_not_multiplied_in_fp8():
  cfg = dataclasses.replace(tiny.PLAIN_MLA, numerics=FP8)
  tokens_BT = tiny.tokens(cfg, length=17)
  count = lambda form: sum(fp8_weights(jax.make_jaxpr(model.Transformer(cfg, mla_form=form).apply)(
      model.abstract_variables(cfg), tokens_BT).jaxpr, tokens_BT.size).values())
  assert count("expanded") - count("absorbed") == 2 * cfg.num_layers  # W^UK and W^UV


@pytest.mark.parametrize("implementation", ["dense", "slots"])
def test_implementations_of_experts_without_fp8_refuse_it(implementation):
  with pytest.raises(ValueError, match=f"experts='{implementation}' does not support FP8"):
    EXPERTS[implementation](None, None, None, None, FP8)


def test_policies_are_looked_up_by_name_and_validated():
  assert model.Numerics.parse("fp8") == FP8
  with pytest.raises(ValueError, match="no numerics policy 'int8'; there are: fp32, bf16, fp8"):
    model.Numerics.parse("int8")
  with pytest.raises(ValueError, match="compute='float16' cannot be used with a recipe"):
    model.Numerics(compute="float16", recipe=Recipe())
