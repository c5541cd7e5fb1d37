"""Chunked token log-probabilities equal those of the full logits, which never exist in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model

KEYS = jax.random.split(jax.random.key(0), 3)
FP32 = model.NUMERICS["fp32"]


def inputs(batch, length, d_model, vocab):
  return (jax.random.normal(KEYS[0], (batch, length, d_model)),
          jax.random.normal(KEYS[1], (d_model, vocab)),
          jax.random.randint(KEYS[2], (batch, length), 0, vocab))


def from_all_logits(hidden, head, targets, temperature=1.0):
  logp = jax.nn.log_softmax(jnp.matmul(hidden, head, precision="highest") / temperature)
  return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 11, 64])
def test_values_and_gradients_do_not_depend_on_the_chunk_size(chunk_size):
  hidden, head, targets = inputs(2, 11, 6, 19)
  weights = jnp.arange(22.0).reshape(2, 11)
  chunked = lambda h, w: (weights * model.token_logprobs(
      h, w, targets, numerics=FP32, chunk_size=chunk_size, temperature=0.7)).sum()
  whole = lambda h, w: (weights * from_all_logits(h, w, targets, 0.7)).sum()
  ours = jax.value_and_grad(chunked, (0, 1))(hidden, head)
  reference = jax.value_and_grad(whole, (0, 1))(hidden, head)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4),
               ours, reference)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 11, 64])
def test_entropies_and_their_gradients_are_those_of_the_full_logits(chunk_size):
  hidden, head, targets = inputs(2, 11, 6, 19)
  weights = jnp.arange(44.0).reshape(2, 2, 11)

  def of_all_logits(h, w):
    logp = jax.nn.log_softmax(jnp.matmul(h, w, precision="highest") / 0.7)
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return (weights * jnp.stack([from_all_logits(h, w, targets, 0.7), entropy])).sum()

  chunked = lambda h, w: (weights * jnp.stack(model.logprobs_and_entropy(
      h, w, targets, numerics=FP32, chunk_size=chunk_size, temperature=0.7))).sum()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4),
               jax.value_and_grad(chunked, (0, 1))(hidden, head),
               jax.value_and_grad(of_all_logits, (0, 1))(hidden, head))


def test_the_entropy_of_a_certain_token_is_zero_with_a_finite_gradient():
  entropy = lambda h: model.logprobs_and_entropy(
      h, jnp.eye(4), jnp.zeros((1, 1), jnp.int32), numerics=FP32)[1].sum()
  certain, uniform = jnp.array([[[1e6, 0, 0, 0]]]), jnp.zeros((1, 1, 4))
  assert entropy(certain) == 0 and jnp.isfinite(jax.grad(entropy)(certain)).all()
  np.testing.assert_allclose(entropy(uniform), np.log(4), rtol=1e-6)


@pytest.mark.cpu
def test_the_full_logits_are_never_materialised_forward_or_backward():
  batch, length, vocab, chunk = 2, 1024, 8192, 64
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                        jax.eval_shape(lambda: inputs(batch, length, 16, vocab)))
  chunked = lambda h, w, t: model.token_logprobs(h, w, t, numerics=FP32, chunk_size=chunk).sum()
  summed = lambda h, w, t: model.logprob_sum(
      h, w, t, jnp.ones(t.shape), numerics=FP32, chunk_size=chunk)
  entropies = lambda h, w, t: sum(x.sum() for x in model.logprobs_and_entropy(
      h, w, t, numerics=FP32, chunk_size=chunk))
  whole = lambda h, w, t: from_all_logits(h, w, t).sum()
  temporary_bytes = lambda f: jax.jit(jax.grad(f, (0, 1))).lower(
      *shapes).compile().memory_analysis().temp_size_in_bytes
  all_logits = 4 * batch * length * vocab
  assert temporary_bytes(whole) >= all_logits
  assert temporary_bytes(chunked) < 5 * all_logits * chunk // length
  assert temporary_bytes(summed) < 5 * all_logits * chunk // length
  assert temporary_bytes(entropies) < 5 * all_logits * chunk // length


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
def test_a_weighted_sum_and_all_its_gradients_equal_those_of_the_full_logits(chunk_size):
  hidden, head, targets = inputs(2, 11, 6, 19)
  weights = jnp.arange(22.0).reshape(2, 11)
  ours = lambda h, w, g: 0.3 * model.logprob_sum(h, w, targets, g, numerics=FP32,
                                                 chunk_size=chunk_size)
  whole = lambda h, w, g: 0.3 * (g * from_all_logits(h, w, targets)).sum()
  operands = (hidden, head, weights)
  np.testing.assert_allclose(ours(*operands), whole(*operands), rtol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4),
               jax.value_and_grad(ours, (0, 1, 2))(*operands),
               jax.value_and_grad(whole, (0, 1, 2))(*operands))


def test_a_chunk_longer_than_the_sequence_costs_no_more_and_masked_tokens_may_be_infinite():
  hidden, head, weights = jnp.ones((2, 11, 8)), jnp.ones((8, 16)), jnp.ones((2, 11))
  targets = jnp.zeros((2, 11), jnp.int32)
  run = lambda size: jax.jit(jax.grad(functools.partial(
      model.logprob_sum, numerics=model.NUMERICS["fp32"], chunk_size=size)))
  flops = lambda size: run(size).lower(hidden, head, targets, weights).compile().cost_analysis()[
      "flops"]
  assert flops(64) == flops(11)
  loss = model.logprob_sum(hidden.at[0, 3].set(jnp.inf), head, targets, weights.at[0, 3].set(0),
                           numerics=model.NUMERICS["fp32"])
  assert jnp.isfinite(loss)


def test_the_sum_is_differentiable_in_a_shard_map():
  hidden, head, targets = inputs(2, 11, 6, 19)
  summed = lambda h, w, t, g: model.logprob_sum(h, w, t, g, numerics=FP32)
  by_device = lambda h, w, t, g: jax.lax.psum(
      summed(h, jax.lax.pcast(w, "data", to="varying"), t, g), "data")
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  data, replicated = jax.P("data"), jax.P()
  sharded = jax.shard_map(by_device, mesh=mesh, in_specs=(data, replicated, data, data),
                          out_specs=replicated)
  operands = hidden, head, targets, jnp.ones((2, 11))
  for a, b in zip(*(jax.grad(f, (0, 1))(*operands) for f in (sharded, summed)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_logits_are_computed_once_for_the_sum_and_its_gradients():
  hidden, head, targets = inputs(1, 8, 6, 19)
  summed = lambda h, w: model.logprob_sum(
      h, w, targets, jnp.ones((1, 8)), numerics=FP32, chunk_size=4)
  by_token = lambda h, w: model.token_logprobs(h, w, targets, numerics=FP32, chunk_size=4).sum()
  products = lambda f: str(jax.make_jaxpr(jax.grad(f, (0, 1)))(hidden, head)).count("dot_general[")
  assert products(summed) == products(by_token) - 1


@pytest.mark.parametrize("tied", [False, True])
def test_token_logprobs_use_the_models_own_head(tied):
  cfg = dataclasses.replace(tiny.GQA, tie_embeddings=tied)
  tokens_BT, transformer = tiny.tokens(cfg), model.Transformer(cfg)
  out = tiny.apply(cfg)(tiny.variables(cfg), tokens_BT)
  ours = transformer.apply(
      tiny.variables(cfg), out.hidden_BTD, tokens_BT, method="token_logprobs")
  want = jnp.take_along_axis(jax.nn.log_softmax(out.logits_BTV), tokens_BT[..., None], -1)
  np.testing.assert_allclose(ours, want[..., 0], rtol=1e-5)
