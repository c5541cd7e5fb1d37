"""One update: a pure function, the same however sequences are split, padded or ordered.

Shape letters:  S sequences  T tokens
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from pallas_kernels import WeightOperands
from rl.advantages import group_advantages
from rl.config import ObjectiveConfig, RLConfig, SamplingConfig
from rl.step import (
  Experience,
  abstract_rl_state,
  experience,
  init_rl_state,
  make_update,
  refresh,
  sequence_logprobs,
)
from tests.train import small as train_small

pytestmark = pytest.mark.usefixtures("quick_compiles")

DENSE = dataclasses.replace(train_small.DENSE, mtp=None)
MOE = dataclasses.replace(train_small.MOE, mtp=None)
SEQUENCES, NEW, PAD = 8, 6, 8
TEMPERATURE = 0.7
# Gradients are sums of some hundred products of float32, in an order that the split decides.
ROUNDING = 2e-5
# No gradient is clipped, so that moments are gradients.
OPTIMIZER = dataclasses.replace(train_small.OPTIMIZER, max_grad_norm=1e9, weight_decay=0.0)


def config(**objective) -> RLConfig:
  return RLConfig(
      sampling=SamplingConfig(num_prompts=2, num_generations=4, max_completion_length=16),
      objective=ObjectiveConfig(**{"name": "grpo"} | objective), optimizer=OPTIMIZER)


@functools.cache
def rollout_of(seed=0):
  """Ragged prompts and completions, without log-probabilities."""
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(1, DENSE.vocab_size, 1 + i // 4) for i in range(SEQUENCES)]
  return prompts, rng.integers(0, DENSE.vocab_size, (SEQUENCES, NEW)), np.resize(
      (6, 1, 4, 2, 5), SEQUENCES)


@jax.jit
def logprobs(variables, tokens, token_mask, temperature):
  return sequence_logprobs(model.Transformer(DENSE), variables, tokens, token_mask, temperature)[0]


@functools.cache
def advantages() -> np.ndarray:
  return group_advantages([1, 0, 0, 1, 2, 1, 0, 0], np.arange(SEQUENCES) // 4).values


def seen(advantage_S=None, learned_S=None, multiple=PAD, temperature=TEMPERATURE) -> Experience:
  """What the initial policy sampled, as its sampler would have told it."""
  prompts, tokens_SN, lengths_S = rollout_of()
  learned_S = np.ones(SEQUENCES, bool) if learned_S is None else learned_S
  lay = lambda logp_SN: experience(
      prompts, tokens_SN, lengths_S, logp_SN, advantages() if advantage_S is None else advantage_S,
      learned_S, multiple=multiple)
  made = lay(np.zeros((SEQUENCES, NEW)))
  logp_ST = np.asarray(logprobs(
      tiny.variables(DENSE), made.tokens, made.token_mask, temperature))
  return dataclasses.replace(made, logp_sampler=np.where(made.mask, logp_ST, 0))


def hyper(cfg_, rates, temperature=TEMPERATURE, **spec):
  return {"learning_rate": np.float32(rates), "value_learning_rate": np.float32(rates),
          "spec": cfg_.objective.spec(NEW).replace(**spec),
          "temperature": np.float32(temperature), "gae_lambda": np.float32(1)}


def update(given: Experience, state=None, *, cfg_=None, rates=None, temperature=TEMPERATURE,
           key=0, **spec):
  """One update of the dense model; the state given stays as it is."""
  cfg_ = cfg_ or config()
  state = init_rl_state(tiny.variables(DENSE), cfg_) if state is None else state
  rates = np.full(cfg_.objective.updates, 1e-2) if rates is None else rates
  return make_update(DENSE, cfg_)(
      jax.tree.map(jnp.copy, state), given, hyper(cfg_, rates, temperature, **spec),
      jax.random.key(key))


def start(cfg_=None):
  return init_rl_state(tiny.variables(DENSE), cfg_ or config())


def moved(state) -> float:
  return train_small.apart(state.train.params, tiny.variables(DENSE)["params"])


def test_experience_masks_the_completion_and_its_stop_token_even_where_that_is_the_padding():
  stop = 0
  made = experience(
      [np.array([5, 6, 7]), np.array([8]), np.array([9])],
      np.array([[1, stop, 99, 99], [2, 3, 4, 99], [1, 2, 3, 4]]), np.array([2, 3, 4]),
      np.array([[-1, -2, 9, 9], [-3, -4, -5, 9], [-6, -7, -8, -9.]]), np.array([1, -1, 2]),
      np.array([True, True, False]), multiple=6)
  np.testing.assert_array_equal(made.tokens, [
      [5, 6, 7, 1, stop, 0, 0], [8, 2, 3, 4, 0, 0, 0], [9, 1, 2, 3, 4, 0, 0]])
  np.testing.assert_array_equal(made.token_mask, [
      [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(made.mask, [
      [0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(made.logp_sampler[:2], [
      [0, 0, -1, -2, 0, 0], [-3, -4, -5, 0, 0, 0]])
  np.testing.assert_array_equal(made.advantage, np.float32([1, -1, 2]))


def test_the_same_state_and_experience_give_the_same_bits():
  once, metrics = update(seen())
  again, metrics_again = update(seen())
  train_small.assert_same_bits(once, again)
  train_small.assert_same_bits(metrics, metrics_again)
  assert moved(once) > 1e-3


@pytest.mark.parametrize("change", ["micro-batches", "padding", "order"])
def test_an_update_does_not_depend_on(change):
  given, cfg_ = seen(), config()
  if change == "micro-batches":  # by twos: 7, 6, 11 and 5 tokens
    cfg_ = config(micro_batch_size=2)
  elif change == "padding":
    given = seen(multiple=2 * PAD)
  else:
    order = np.random.default_rng(0).permutation(SEQUENCES)
    given = jax.tree.map(lambda x: x[order], given)
  assert seen().tokens.shape[1] == PAD + 1
  state, metrics = update(given, cfg_=cfg_)
  want, want_metrics = update(seen())
  assert train_small.apart(state.train.moments, want.train.moments) < ROUNDING
  assert train_small.apart(state.train.params, want.train.params) < ROUNDING
  assert metrics.keys() == want_metrics.keys()
  for name in metrics:  # absolute: the loss is 0 but for rounding
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=ROUNDING, atol=1e-6)


def test_the_first_loss_is_zero_and_its_gradient_is_not():
  _, metrics = update(seen())
  assert abs(metrics["loss"]) < 1e-6 and metrics["grad_norm"] > 0.1
  np.testing.assert_allclose(metrics["ratio/mean"], 1, rtol=1e-6)
  assert metrics["kl"] == 0 == metrics["approx_kl"]
  assert metrics["sampling_gap"] < 1e-6


def test_on_policy_no_token_is_clipped_and_epsilon_does_nothing():
  narrow, metrics = update(seen(), epsilon=np.float32(1e-3))
  wide, _ = update(seen(), epsilon=np.float32(10))
  assert metrics["clip_ratio/region"] == 0
  train_small.assert_same_bits(narrow, wide)


def test_the_gradient_is_that_of_the_mean_log_probability_at_the_sampling_temperature():
  given = seen()

  def loss(params, temperature):
    logp_ST = logprobs({"params": params}, given.tokens, given.token_mask, temperature)
    mean_S = jnp.where(given.mask, logp_ST, 0).sum(1) / given.mask.sum(1)
    return -(given.advantage * mean_S).mean()

  gradient = jax.jit(jax.grad(loss))
  state, _ = update(given)
  of_first_step = jax.tree.map(lambda mu: mu / (1 - OPTIMIZER.beta1), state.train.moments.mu)
  params = tiny.variables(DENSE)["params"]
  assert train_small.apart(of_first_step, gradient(params, TEMPERATURE)) < ROUNDING
  assert train_small.apart(of_first_step, gradient(params, 1.0)) > 0.1


def test_both_sides_of_the_ratio_have_the_temperature():
  several = config(minibatches=2, inner_epochs=2)
  _, metrics = update(seen(), cfg_=several, rates=np.zeros(4))
  np.testing.assert_allclose(metrics["ratio/mean_square"], 1, rtol=1e-6)
  assert metrics["sampling_gap"] < 1e-6
  _, metrics = update(seen(), cfg_=several, rates=np.zeros(4), temperature=1.0)
  np.testing.assert_allclose(metrics["ratio/mean_square"], 1, rtol=1e-6)
  assert metrics["sampling_gap"] > 0.05  # told, when trainer and sampler disagree


def test_equal_rewards_change_no_parameter():
  given = seen(group_advantages([0.1 + 0.2, 0.3] * 4, np.arange(SEQUENCES) // 4).values)
  state, metrics = update(given, beta=0.0)
  train_small.assert_same_bits(state.train.params, start().train.params)
  assert metrics["grad_norm"] == 0 and state.train.step == 1


def test_nothing_to_learn_changes_no_parameter():
  state, metrics = update(seen(learned_S=np.zeros(SEQUENCES, bool)))
  train_small.assert_same_bits(state.train.params, start().train.params)
  assert metrics["loss"] == 0 and metrics["skipped"] == 0


def test_masked_sequences_count_neither_above_nor_below_the_line():
  half = np.arange(SEQUENCES) < 4
  masked, _ = update(seen(learned_S=half))
  twice = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), seen())
  want, _ = update(twice)  # a mean does not change if everything is there twice
  assert train_small.apart(masked.train.moments, want.train.moments) < ROUNDING


def test_several_steps_see_every_sequence_once_an_epoch():
  several = config(minibatches=2, inner_epochs=2)
  given = seen(np.float32(2.0 ** np.arange(SEQUENCES)))
  state, metrics = update(given, cfg_=several, rates=np.zeros(4))
  _, want = update(given, rates=np.zeros(1))
  assert state.train.step == 4
  # Of 8 powers of two, no other 8 have the same sum.
  np.testing.assert_allclose(metrics["policy_loss"], want["policy_loss"], rtol=1e-5)
  one, _ = update(given, cfg_=several, rates=[1e-2, 0, 0, 0])
  other, _ = update(given, cfg_=several, rates=[1e-2, 0, 0, 0], key=1)
  assert train_small.apart(one.train.params, other.train.params) > 1e-3


def test_later_steps_compare_with_the_policy_that_sampled_as_the_trainer_sees_it():
  several = config(minibatches=2, inner_epochs=2)
  given = seen()
  state, metrics = update(given, cfg_=several)
  assert metrics["approx_kl"] > 1e-5 and metrics["kl"] > 1e-5
  lied = dataclasses.replace(given, logp_sampler=given.logp_sampler - 1)
  same, told = update(lied, cfg_=several)
  train_small.assert_same_bits(same, state)
  np.testing.assert_allclose(told["sampling_gap"], metrics["sampling_gap"] + 1, atol=1e-5)


def test_favoured_completions_become_likelier():
  given = seen(np.float32([1, -1] * 4))
  state = start()
  for _ in range(10):
    state, _ = update(given, state, beta=0.0)
  after_ST = logprobs(state.train.variables, given.tokens, given.token_mask, TEMPERATURE)
  gain_S = np.where(given.mask, after_ST - given.logp_sampler, 0).sum(1)
  assert (gain_S[::2] > 0.1).all() and (gain_S[1::2] < -0.1).all()


def test_what_is_not_finite_is_skipped():
  state, metrics = update(seen(np.float32([np.nan] + [1] * 7)))
  assert metrics["skipped"] == 1 == state.train.skipped
  train_small.assert_same_bits(state.train.params, start().train.params)


def test_the_reference_is_kept_until_it_is_refreshed():
  state, _ = update(seen())
  train_small.assert_same_bits(state.reference, start().reference)
  refreshed = refresh(state)
  train_small.assert_same_bits(refreshed.reference, state.train.variables)
  after, metrics = update(seen(), refreshed)
  train_small.assert_same_bits(after.reference, state.train.variables)
  assert metrics["kl"] < 1e-9
  # Donates the state: the reference must have arrays of its own.
  make_update(DENSE, config())(refreshed, seen(), hyper(config(), [1e-2]), jax.random.key(0))
  assert start(config(name="dapo")).reference is None


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_balancing_bias_is_frozen_unless_a_rate_is_given(rate):
  cfg_ = config(name="dapo", **({"bias_rate": rate, "sequence_balance": 0.5} if rate else {}))
  state = init_rl_state(tiny.variables(MOE), cfg_)
  before = jax.tree.map(jnp.copy, state)
  after, metrics = make_update(MOE, cfg_)(
      state, seen(), hyper(cfg_, [1e-2]), jax.random.key(0))
  assert train_small.apart(after.train.params, before.train.params) > 1e-3
  step = jax.tree.leaves(jax.tree.map(
      lambda a, b: np.abs(np.asarray(a - b)), after.train.router, before.train.router))[0]
  np.testing.assert_allclose(step[step > 0], rate, rtol=1e-4)
  assert (step > 0).any() == bool(rate)
  np.testing.assert_allclose(
      metrics["loss_total"], metrics["loss_policy"]
      + (0.5 if rate else 0) * metrics["loss_sequence_balance"], rtol=1e-5)


def test_weights_are_quantised_once_a_step_and_once_for_each_look_before_the_first():
  cfg = dataclasses.replace(
      model.get_config("nano"), num_layers=1, num_dense_layers=0, mtp=None,
      numerics=model.NUMERICS["fp8"])
  rl = config(minibatches=2, micro_batch_size=2)  # with several steps, the policy before them looks
  variables = model.abstract_variables(cfg)
  given = experience(*rollout_of(), np.zeros((SEQUENCES, NEW)), advantages(),
                     np.ones(SEQUENCES, bool), multiple=PAD)
  jaxpr = jax.make_jaxpr(make_update(cfg, rl))(
      abstract_rl_state(variables, rl), given, hyper(rl, np.full(2, 1e-2)), jax.random.key(0)).jaxpr
  weights = len(jax.tree.leaves(
      jax.eval_shape(functools.partial(model.quantize_weights, cfg), variables["params"]),
      is_leaf=lambda x: isinstance(x, WeightOperands)))
  looks = 2 if rl.objective.spec(NEW).kl_in != "none" else 1  # the reference's is the other
  assert train_small.fp8_blocks(jaxpr) == {0: looks * weights, 1: weights}
