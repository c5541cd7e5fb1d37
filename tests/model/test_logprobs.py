"""Chunked token log-probabilities equal those of the full logits, which never exist in memory."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.logprobs import _even_chunk, _logsumexp, _logsumexp_in_one_pass, _sum_and_gradients

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


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_logits_are_computed_once_for_the_sum_and_its_gradients(platform):
  hidden, head, targets = inputs(1, 8, 6, 19)
  summed = lambda h, w: model.logprob_sum(
      h, w, targets, jnp.ones((1, 8)), numerics=FP32, chunk_size=4)
  by_token = lambda h, w: model.token_logprobs(h, w, targets, numerics=FP32, chunk_size=4).sum()
  products = lambda f: jax.jit(jax.grad(f, (0, 1))).trace(hidden, head).lower(
      lowering_platforms=(platform,)).as_text().count("dot_general")
  assert products(summed) == 3 and products(by_token) == 4


@pytest.mark.parametrize("logsumexp", [_logsumexp, _logsumexp_in_one_pass])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap])
def test_a_log_sum_exp_is_that_of_float64_for_large_and_for_masked_logits(logsumexp, transform):
  rng = np.random.default_rng(0)
  logits = 5 * rng.standard_normal((8, 3, 1000)).astype(np.float32)
  logits[1] += 1e4
  logits[2] -= 1e4
  logits[3] = logits[3, :, :1]  # all equal
  logits[4, :, 1:] = -np.inf  # all masked but one
  logits[5, :, rng.permutation(1000)[:900]] = -np.inf
  logits[6] = np.sort(logits[6])  # every logit is the largest so far
  logits[7] *= 1e37  # differences overflow
  wide = logits.astype(np.float64)
  largest = wide.max(-1)
  want = largest + np.log(np.exp(wide - largest[..., None]).sum(-1))
  # Each of the V additions rounds, at worst in the same direction.
  np.testing.assert_allclose(transform(logsumexp)(logits), want, rtol=2e-7, atol=1000 * 2.0**-24)
  masked, infinite = np.full((1, 9), -np.inf, np.float32), np.zeros((1, 9), np.float32)
  infinite[0, [2, 5]] = np.inf
  assert transform(logsumexp)(masked) == -np.inf and transform(logsumexp)(infinite) == np.inf
  assert np.isnan(transform(logsumexp)(np.where(np.isinf(infinite), np.nan, 0))).all()


def masked_inputs():
  """Returns inputs whose logits are large, and -inf for some tokens, none of them a target."""
  hidden, head, targets = inputs(2, 12, 6, 19)
  hidden = hidden.at[..., 0].set(2)
  head = head.at[0].set(40).at[0, 10:].set(-3e38)  # doubled, it overflows to -inf
  return hidden, head, targets % 10


def wide_sum(hidden, head, targets, weights):
  """Returns the weighted sum and its gradients by hidden states, head and weights, in float64."""
  hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
  with np.errstate(over="ignore"):
    logits = (hidden @ head).astype(np.float32).astype(np.float64)
  logits -= logits.max(-1, keepdims=True)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  is_target = np.arange(head.shape[-1]) == np.asarray(targets)[..., None]
  dlogits = weights[..., None] * (is_target - np.exp(logp))
  chosen = np.where(is_target, logp, 0).sum(-1)
  return (weights * chosen).sum(), (
      dlogits @ head.T, np.einsum("btd,btv->dv", hidden, dlogits), chosen)


@pytest.mark.parametrize("logsumexp", [_logsumexp, _logsumexp_in_one_pass])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12])
def test_the_sum_is_that_of_float64_for_large_and_for_masked_logits(chunk_size, logsumexp):
  hidden, head, targets = masked_inputs()
  weights = jnp.arange(24.0).reshape(2, 12)
  ours = jax.jit(functools.partial(_sum_and_gradients, FP32, chunk_size, logsumexp))(
      hidden, head, targets, weights)
  want = wide_sum(hidden, head, targets, weights)
  assert np.isinf(hidden @ head).any() and np.abs(hidden[..., 1:] @ head[1:]).max() < 40
  # Logits of about 80, and their log-sum-exp, are rounded by up to 2^-18 each, and probabilities by
  # as much; gradients are multiplied by weights of up to 23 and heads of 40.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2 * 920 * 2.0**-18),
               ours, want)


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_the_heads_gradient_is_not_rounded_to_the_compute_format(chunk_size):
  hidden, head, targets = inputs(2, 64, 16, 40)
  weights = jax.random.uniform(KEYS[0], (2, 64))
  head, bf16 = 0.3 * head.astype(jnp.bfloat16), model.NUMERICS["bf16"]
  hidden = hidden.astype(jnp.bfloat16)
  # Of exact logits only the gradients' operands are rounded, so this is what should be summed.
  dlogits = jax.grad(lambda logits: (weights * jnp.take_along_axis(
      jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]).sum())(
          jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32))
  want = np.einsum("btd,btv->dv", np.asarray(hidden, np.float64),
                   np.asarray(dlogits.astype(jnp.bfloat16), np.float64))
  ours = jax.grad(lambda w: model.logprob_sum(
      hidden, w, targets, weights, numerics=bf16, chunk_size=chunk_size))(
          head.astype(jnp.float32))
  error = lambda x: np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
  # A few of the operands are rounded differently, by 2^-8, since logits are, by 2^-24.
  assert error(ours) < 2.0**-12 < error(want.astype(jnp.bfloat16))


def test_default_chunks_have_at_most_a_gibibyte_of_logits_and_are_equally_large_if_possible():
  sizes = {(8, 2048, 32768): 1024, (8, 2048, 33280): 512, (1, 2048, 32768): 2048,
           (8, 2047, 32768): 1024, (8, 2049, 32768): 683, (64, 4096, 129280): 32,
           (2, 12, 19): 12, (2**20, 3, 2**20): 1}
  assert {shape: _even_chunk(*shape) for shape in sizes} == sizes
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
  rules = [("batch", "data"), ("length", None)]
  with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules):
    assert _even_chunk(8, 2048, 32768) == 2048  # on each device 2 rows
    assert _even_chunk(32, 2048, 32768) == 1024


@pytest.mark.parametrize(("platform", "size"), [("cpu", 512), ("cuda", 1024), ("tpu", 1024)])
def test_chunks_depend_on_what_the_program_is_compiled_for(platform, size):
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((8, 2048, 16), jnp.bfloat16), ((16, 32768), jnp.float32), ((8, 2048), jnp.int32),
      ((8, 2048), jnp.float32))]
  lowered = lambda **options: jax.jit(jax.grad(functools.partial(
      model.logprob_sum, numerics=model.NUMERICS["bf16"], **options), (0, 1))).trace(
          *shapes).lower(lowering_platforms=(platform,)).as_text()
  logits = lambda text: {int(t) for t in re.findall(r"tensor<8x(\d+)x32768xf32>", text)}
  assert logits(lowered()) == {size}
  assert logits(lowered(chunk_size=256)) == {256}


@pytest.mark.parametrize("tied", [False, True])
def test_token_logprobs_use_the_models_own_head(tied):
  cfg = dataclasses.replace(tiny.GQA, tie_embeddings=tied)
  tokens_BT, transformer = tiny.tokens(cfg), model.Transformer(cfg)
  out = tiny.apply(cfg)(tiny.variables(cfg), tokens_BT)
  ours = transformer.apply(
      tiny.variables(cfg), out.hidden_BTD, tokens_BT, method="token_logprobs")
  want = jnp.take_along_axis(jax.nn.log_softmax(out.logits_BTV), tokens_BT[..., None], -1)
  np.testing.assert_allclose(ours, want[..., 0], rtol=1e-5)
