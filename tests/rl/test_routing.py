"""The experts that a token was routed to in sampling can be recorded, compared and replayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from rl.config import ObjectiveConfig, RLConfig, SamplingConfig
from rl.rollout import pad_prompts, rollout, sequence_keys
from rl.step import experience, init_rl_state, make_update, sequence_logprobs
from tests.rl import small
from tests.train import small as train_small

CFG = dataclasses.replace(train_small.MOE, mtp=None, max_seq_len=32)
COUNT, TEMPERATURE, STOP = 12, 0.7, 5


@pytest.fixture(scope="module")
def variables():
  return tiny.variables(CFG)


@pytest.fixture(scope="module")
def sampled(variables):
  """Returns a rollout with its routing, as an Experience."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, CFG.vocab_size, rng.integers(1, 7)) for _ in range(COUNT)]
  keys = sequence_keys(0, 3, jnp.arange(COUNT), jnp.zeros(COUNT, jnp.int32))
  out = jax.device_get(rollout(
      model.Transformer(CFG), variables, pad_prompts(prompts, 6, keys), max_new_tokens=20,
      stop_token=STOP, slots=4, record_experts=True, temperature=TEMPERATURE))
  return experience(
      prompts, out.tokens_SN, out.lengths_S, out.logprobs_SN, np.tile([1.0, -1.0], COUNT // 2),
      np.ones(COUNT, bool), experts_STLK=out.experts_STLK)


forward = jax.jit(sequence_logprobs, static_argnums=0)


def logprobs(variables, sampled, experts=None):
  logp, router = forward(
      model.Transformer(CFG), variables, sampled.tokens, sampled.token_mask, TEMPERATURE, experts)
  return np.where(sampled.mask, logp, 0), router["moe_layers"].experts_BTK


def test_recorded_experts_are_those_that_the_trainers_routers_choose(variables, sampled):
  logp, experts_LSTK = logprobs(variables, sampled)
  recorded_LSTK = np.moveaxis(sampled.experts, 2, 0)
  np.testing.assert_array_equal(
      np.asarray(experts_LSTK)[:, sampled.token_mask], recorded_LSTK[:, sampled.token_mask])
  np.testing.assert_allclose(logp, sampled.logp_sampler, atol=1e-4)


def test_replaying_the_routers_choice_changes_nothing_but_another_choice_does(variables, sampled):
  own, _ = logprobs(variables, sampled)
  replayed, used = logprobs(variables, sampled, sampled.experts)
  np.testing.assert_allclose(replayed, own, atol=1e-5)
  other, used = logprobs(variables, sampled, (sampled.experts + 1) % CFG.moe.num_experts)
  assert np.abs(other - own).max() > 0.1
  np.testing.assert_array_equal(
      used, np.moveaxis((sampled.experts + 1) % CFG.moe.num_experts, 2, 0))


def test_replay_keeps_the_sampled_routing_after_the_bias_has_moved(variables, sampled):
  moved = {**variables, "router": jax.tree.map(
      lambda bias: bias + 5.0 * np.arange(bias.shape[-1]) / bias.shape[-1], variables["router"])}
  free, _ = logprobs(moved, sampled)
  replayed, _ = logprobs(moved, sampled, sampled.experts)
  assert np.abs(free - sampled.logp_sampler).max() > 0.1
  np.testing.assert_allclose(replayed, sampled.logp_sampler, atol=1e-4)


def test_routing_agreement_is_complete_before_the_first_step(variables, sampled):
  def agreement(sampled):
    cfg = RLConfig(
        sampling=SamplingConfig(num_prompts=3, num_generations=4, temperature=TEMPERATURE),
        objective=ObjectiveConfig(routing="observed"), optimizer=small.OPTIMIZER)
    hyper = {"learning_rate": np.full(1, 1e-3, np.float32), "spec": cfg.objective.spec(20),
             "value_learning_rate": np.full(1, 1e-3, np.float32), "temperature": TEMPERATURE,
             "gae_lambda": 1.0}
    update = make_update(CFG, cfg)
    metrics = update(init_rl_state(variables, cfg), sampled, hyper, jax.random.key(0))[1]
    return float(metrics["routing_agreement"])

  assert agreement(sampled) == 1.0
  assert agreement(sampled.replace(experts=(sampled.experts + 1) % CFG.moe.num_experts)) < 0.9
