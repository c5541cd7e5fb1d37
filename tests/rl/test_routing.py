"""Which experts read a token when it was sampled can be kept, compared and used again."""

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
def seen(variables):
  """A rollout with its routing, laid out to be learned from."""
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


def logprobs(variables, seen, experts=None):
  logp, router = forward(
      model.Transformer(CFG), variables, seen.tokens, seen.token_mask, TEMPERATURE, experts)
  return np.where(seen.mask, logp, 0), router["moe_layers"].experts_BTK


def test_what_was_kept_is_what_the_trainers_routers_choose(variables, seen):
  logp, experts_LSTK = logprobs(variables, seen)
  kept_LSTK = np.moveaxis(seen.experts, 2, 0)
  np.testing.assert_array_equal(
      np.asarray(experts_LSTK)[:, seen.token_mask], kept_LSTK[:, seen.token_mask])
  np.testing.assert_allclose(logp, seen.logp_sampler, atol=1e-4)


def test_replaying_the_routers_own_choice_changes_nothing_and_another_does(variables, seen):
  own, _ = logprobs(variables, seen)
  replayed, used = logprobs(variables, seen, seen.experts)
  np.testing.assert_allclose(replayed, own, atol=1e-5)
  other, used = logprobs(variables, seen, (seen.experts + 1) % CFG.moe.num_experts)
  assert np.abs(other - own).max() > 0.1
  np.testing.assert_array_equal(used, np.moveaxis((seen.experts + 1) % CFG.moe.num_experts, 2, 0))


def test_replay_keeps_the_sampled_routing_when_the_bias_has_moved(variables, seen):
  moved = {**variables, "router": jax.tree.map(
      lambda bias: bias + 5.0 * np.arange(bias.shape[-1]) / bias.shape[-1], variables["router"])}
  free, _ = logprobs(moved, seen)
  replayed, _ = logprobs(moved, seen, seen.experts)
  assert np.abs(free - seen.logp_sampler).max() > 0.1
  np.testing.assert_allclose(replayed, seen.logp_sampler, atol=1e-4)


def test_agreement_is_whole_before_the_first_step(variables, seen):
  def agreement(seen):
    cfg = RLConfig(
        sampling=SamplingConfig(num_prompts=3, num_generations=4, temperature=TEMPERATURE),
        objective=ObjectiveConfig(routing="observed"), optimizer=small.OPTIMIZER)
    hyper = {"learning_rate": np.full(1, 1e-3, np.float32), "spec": cfg.objective.spec(20),
             "value_learning_rate": np.full(1, 1e-3, np.float32), "temperature": TEMPERATURE,
             "gae_lambda": 1.0}
    update = make_update(CFG, cfg)
    metrics = update(init_rl_state(variables, cfg), seen, hyper, jax.random.key(0))[1]
    return float(metrics["routing_agreement"])

  assert agreement(seen) == 1.0
  assert agreement(seen.replace(experts=(seen.experts + 1) % CFG.moe.num_experts)) < 0.9
