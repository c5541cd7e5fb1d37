"""One update is a pure function, independent of how sequences are split, padded or ordered.

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

DENSE = dataclasses.replace(train_small.DENSE, mtp=None)
MOE = dataclasses.replace(train_small.MOE, mtp=None)
SEQUENCES, NEW, PAD = 8, 6, 8
TEMPERATURE = 0.7
# Gradients sum a few hundred float32 products, in an order that depends on the micro-batches.
ROUNDING = 2e-5
# No gradient is clipped, so that first moments are proportional to gradients.
OPTIMIZER = dataclasses.replace(train_small.OPTIMIZER, max_grad_norm=1e9, weight_decay=0.0)


def config(**objective) -> RLConfig:
  return RLConfig(
      sampling=SamplingConfig(num_prompts=2, num_generations=4, max_completion_length=16),
      objective=ObjectiveConfig(**{"name": "grpo"} | objective), optimizer=OPTIMIZER)


@functools.cache
def random_rollout(seed=0):
  """Returns ragged prompts, completions and their lengths, without log-probabilities."""
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


def sampled(advantage_S=None, learned_S=None, multiple=PAD, temperature=TEMPERATURE) -> Experience:
  """Returns random completions with the log-probabilities that the initial policy gives them."""
  prompts, tokens_SN, lengths_S = random_rollout()
  learned_S = np.ones(SEQUENCES, bool) if learned_S is None else learned_S
  lay_out = lambda logp_SN: experience(
      prompts, tokens_SN, lengths_S, logp_SN, advantages() if advantage_S is None else advantage_S,
      learned_S, multiple=multiple)
  made = lay_out(np.zeros((SEQUENCES, NEW)))
  logp_ST = np.asarray(logprobs(
      tiny.variables(DENSE), made.tokens, made.token_mask, temperature))
  return dataclasses.replace(made, logp_sampler=np.where(made.mask, logp_ST, 0))


def hyper(cfg_, rates, temperature=TEMPERATURE, **spec):
  return {"learning_rate": np.float32(rates), "value_learning_rate": np.float32(rates),
          "spec": cfg_.objective.spec(NEW).replace(**spec),
          "temperature": np.float32(temperature), "gae_lambda": np.float32(1)}


def update(given: Experience, state=None, *, cfg_=None, rates=None, temperature=TEMPERATURE,
           key=0, **spec):
  """Updates the dense model once; the given state is copied, since an update donates it."""
  cfg_ = cfg_ or config()
  state = init_rl_state(tiny.variables(DENSE), cfg_) if state is None else state
  rates = np.full(cfg_.objective.updates, 1e-2) if rates is None else rates
  return make_update(DENSE, cfg_)(
      jax.tree.map(jnp.copy, state), given, hyper(cfg_, rates, temperature, **spec),
      jax.random.key(key))


def start(cfg_=None):
  return init_rl_state(tiny.variables(DENSE), cfg_ or config())


def moved(state) -> float:
  return train_small.max_rel_diff(state.train.params, tiny.variables(DENSE)["params"])


def test_the_mask_covers_the_completion_and_its_stop_token_even_if_that_is_the_padding():
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
  once, metrics = update(sampled())
  again, metrics_again = update(sampled())
  train_small.assert_same_bits(once, again)
  train_small.assert_same_bits(metrics, metrics_again)
  assert moved(once) > 1e-3


@pytest.mark.parametrize("change", ["micro-batches", "padding", "order"])
def test_an_update_does_not_depend_on(change):
  given, cfg_ = sampled(), config()
  if change == "micro-batches":  # pairs of sequences have 7, 6, 11 and 5 tokens
    cfg_ = config(micro_batch_size=2)
  elif change == "padding":
    given = sampled(multiple=2 * PAD)
  else:
    order = np.random.default_rng(0).permutation(SEQUENCES)
    given = jax.tree.map(lambda x: x[order], given)
  assert sampled().tokens.shape[1] == PAD + 1
  state, metrics = update(given, cfg_=cfg_)
  want, want_metrics = update(sampled())
  assert train_small.max_rel_diff(state.train.moments, want.train.moments) < ROUNDING
  assert train_small.max_rel_diff(state.train.params, want.train.params) < ROUNDING
  assert metrics.keys() == want_metrics.keys()
  for name in metrics:  # with an absolute tolerance: the loss is 0 up to rounding
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=ROUNDING, atol=1e-6)


@pytest.mark.cpu
def test_the_first_loss_is_zero_and_its_gradient_is_not():
  _, metrics = update(sampled())
  assert abs(metrics["loss"]) < 1e-6 and metrics["grad_norm"] > 0.1
  np.testing.assert_allclose(metrics["ratio/mean"], 1, rtol=1e-6)
  assert metrics["kl"] == 0 == metrics["approx_kl"]
  assert metrics["sampling_gap"] < 1e-6


def test_on_policy_no_token_is_clipped_and_epsilon_has_no_effect():
  narrow, metrics = update(sampled(), epsilon=1e-3)
  wide, _ = update(sampled(), epsilon=10.0)
  assert metrics["clip_ratio/region"] == 0
  train_small.assert_same_bits(narrow, wide)


def test_the_gradient_is_that_of_the_mean_log_probability_at_the_sampling_temperature():
  given = sampled()

  def loss(params, temperature):
    logp_ST = logprobs({"params": params}, given.tokens, given.token_mask, temperature)
    mean_S = jnp.where(given.mask, logp_ST, 0).sum(1) / given.mask.sum(1)
    return -(given.advantage * mean_S).mean()

  gradient = jax.jit(jax.grad(loss))
  state, _ = update(given)
  first_gradient = jax.tree.map(lambda mu: mu / (1 - OPTIMIZER.beta1), state.train.moments.mu)
  params = tiny.variables(DENSE)["params"]
  assert train_small.max_rel_diff(first_gradient, gradient(params, TEMPERATURE)) < ROUNDING
  assert train_small.max_rel_diff(first_gradient, gradient(params, 1.0)) > 0.1


@pytest.mark.parametrize("micro", [None, 2])
def test_the_entropy_bonus_is_the_mean_entropy_of_the_policy_at_all_learned_tokens(micro):
  given = sampled(np.zeros(SEQUENCES), learned_S=np.arange(SEQUENCES) != 3)

  def loss(params):
    hidden = model.Transformer(DENSE).apply(
        {"params": params}, given.tokens[:, :-1],
        segment_ids_BT=given.token_mask.astype(jnp.int32)).logits_BTV
    logp_STV = jax.nn.log_softmax(hidden / TEMPERATURE)
    entropy_ST = -(jnp.exp(logp_STV) * logp_STV).sum(-1)
    return -jnp.where(given.mask, entropy_ST, 0).sum() / given.mask.sum()

  wanted, gradient = jax.jit(jax.value_and_grad(loss))(tiny.variables(DENSE)["params"])
  state, metrics = update(
      given, cfg_=config(entropy_weight=0.5, micro_batch_size=micro), beta=0.0)
  ours = jax.tree.map(lambda mu: mu / (1 - OPTIMIZER.beta1), state.train.moments.mu)
  assert train_small.max_rel_diff(ours, jax.tree.map(lambda g: 0.5 * g, gradient)) < ROUNDING
  np.testing.assert_allclose(metrics["loss_entropy"], wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], 0.5 * wanted, rtol=1e-5)


def test_an_entropy_bonus_raises_the_entropy_and_without_one_nothing_is_computed():
  given, state, losses = sampled(np.zeros(SEQUENCES)), None, []
  for _ in range(5):
    state, metrics = update(given, state, cfg_=config(entropy_weight=1.0), beta=0.0)
    losses.append(metrics["loss_entropy"])
  assert losses[-1] < losses[0] - 1e-3
  assert "loss_entropy" not in update(given)[1]


def test_both_policies_in_the_ratio_use_the_sampling_temperature():
  several = config(minibatches=2, inner_epochs=2)
  _, metrics = update(sampled(), cfg_=several, rates=np.zeros(4))
  np.testing.assert_allclose(metrics["ratio/mean_square"], 1, rtol=1e-6)
  assert metrics["sampling_gap"] < 1e-6
  _, metrics = update(sampled(), cfg_=several, rates=np.zeros(4), temperature=1.0)
  np.testing.assert_allclose(metrics["ratio/mean_square"], 1, rtol=1e-6)
  assert metrics["sampling_gap"] > 0.05  # reveals that trainer and sampler disagree


def test_equal_rewards_change_no_parameter():
  given = sampled(group_advantages([0.1 + 0.2, 0.3] * 4, np.arange(SEQUENCES) // 4).values)
  state, metrics = update(given, beta=0.0)
  train_small.assert_same_bits(state.train.params, start().train.params)
  assert metrics["grad_norm"] == 0 and state.train.step == 1


def test_a_batch_with_nothing_to_learn_changes_no_parameter():
  state, metrics = update(sampled(learned_S=np.zeros(SEQUENCES, bool)))
  train_small.assert_same_bits(state.train.params, start().train.params)
  assert metrics["loss"] == 0 and metrics["skipped"] == 0


def test_masked_sequences_count_in_neither_numerator_nor_denominator():
  half = np.arange(SEQUENCES) < 4
  masked, _ = update(sampled(learned_S=half))
  twice = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), sampled())
  want, _ = update(twice)  # repeating all sequences does not change a mean
  assert train_small.max_rel_diff(masked.train.moments, want.train.moments) < ROUNDING


def test_several_steps_use_every_sequence_once_per_epoch():
  several = config(minibatches=2, inner_epochs=2)
  given = sampled(np.float32(2.0 ** np.arange(SEQUENCES)))
  state, metrics = update(given, cfg_=several, rates=np.zeros(4))
  _, want = update(given, rates=np.zeros(1))
  assert state.train.step == 4
  # Advantages are 8 different powers of two: no other 8 of these have the same sum.
  np.testing.assert_allclose(metrics["policy_loss"], want["policy_loss"], rtol=1e-5)
  one, _ = update(given, cfg_=several, rates=[1e-2, 0, 0, 0])
  other, _ = update(given, cfg_=several, rates=[1e-2, 0, 0, 0], key=1)
  assert train_small.max_rel_diff(one.train.params, other.train.params) > 1e-3


def test_later_steps_take_ratios_to_the_sampling_policy_as_computed_by_the_trainer():
  several = config(minibatches=2, inner_epochs=2)
  given = sampled()
  state, metrics = update(given, cfg_=several)
  assert metrics["approx_kl"] > 1e-5 and metrics["kl"] > 1e-5
  shifted = dataclasses.replace(given, logp_sampler=given.logp_sampler - 1)
  same, shifted_metrics = update(shifted, cfg_=several)
  train_small.assert_same_bits(same, state)
  np.testing.assert_allclose(
      shifted_metrics["sampling_gap"], metrics["sampling_gap"] + 1, atol=1e-5)


def test_completions_with_positive_advantages_become_likelier():
  given = sampled(np.float32([1, -1] * 4))
  state = start()
  for _ in range(10):
    state, _ = update(given, state, beta=0.0)
  after_ST = logprobs(state.train.variables, given.tokens, given.token_mask, TEMPERATURE)
  gain_S = np.where(given.mask, after_ST - given.logp_sampler, 0).sum(1)
  assert (gain_S[::2] > 0.1).all() and (gain_S[1::2] < -0.1).all()


def test_a_non_finite_update_is_skipped():
  state, metrics = update(sampled(np.float32([np.nan] + [1] * 7)))
  assert metrics["skipped"] == 1 == state.train.skipped
  train_small.assert_same_bits(state.train.params, start().train.params)


def test_the_reference_is_kept_until_it_is_refreshed():
  state, _ = update(sampled())
  train_small.assert_same_bits(state.reference, start().reference)
  refreshed = refresh(state)
  train_small.assert_same_bits(refreshed.reference, state.train.variables)
  after, metrics = update(sampled(), refreshed)
  train_small.assert_same_bits(after.reference, state.train.variables)
  assert metrics["kl"] < 1e-9
  # An update donates the state, so the reference must have arrays of its own.
  make_update(DENSE, config())(refreshed, sampled(), hyper(config(), [1e-2]), jax.random.key(0))
  assert start(config(name="dapo")).reference is None


def test_a_nudged_policy_starts_one_rounding_away_from_its_reference():
  cfg_ = config()
  state = init_rl_state(tiny.variables(DENSE), dataclasses.replace(
      cfg_, loop=dataclasses.replace(cfg_.loop, nudge=True)))
  train_small.assert_same_bits(state.reference, start().reference)
  for plain, moved in zip(jax.tree.leaves(start().train.params),
                          jax.tree.leaves(state.train.params), strict=True):
    np.testing.assert_array_equal(np.nextafter(plain, np.float32(np.inf)), moved)


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_balancing_bias_is_frozen_unless_a_rate_is_given(rate):
  cfg_ = config(name="dapo", **({"bias_rate": rate, "sequence_balance": 0.5} if rate else {}))
  state = init_rl_state(tiny.variables(MOE), cfg_)
  before = jax.tree.map(jnp.copy, state)
  after, metrics = make_update(MOE, cfg_)(
      state, sampled(), hyper(cfg_, [1e-2]), jax.random.key(0))
  assert train_small.max_rel_diff(after.train.params, before.train.params) > 1e-3
  step = jax.tree.leaves(jax.tree.map(
      lambda a, b: np.abs(np.asarray(a - b)), after.train.router, before.train.router))[0]
  np.testing.assert_allclose(step[step > 0], rate, rtol=1e-4)
  assert (step > 0).any() == bool(rate)
  np.testing.assert_allclose(
      metrics["loss_total"], metrics["loss_policy"]
      + (0.5 if rate else 0) * metrics["loss_sequence_balance"], rtol=1e-5)


@pytest.mark.cpu
def test_weights_are_quantised_once_per_step_and_per_forward_pass_before_the_first():
  cfg = dataclasses.replace(
      model.get_config("nano"), num_layers=1, num_dense_layers=0, mtp=None,
      numerics=model.NUMERICS["fp8"])
  # With several steps, the policy before them needs a forward pass, too.
  rl = config(minibatches=2, micro_batch_size=2)
  variables = model.abstract_variables(cfg)
  given = experience(*random_rollout(), np.zeros((SEQUENCES, NEW)), advantages(),
                     np.ones(SEQUENCES, bool), multiple=PAD)
  jaxpr = jax.make_jaxpr(make_update(cfg, rl))(
      abstract_rl_state(variables, rl), given, hyper(rl, np.full(2, 1e-2)), jax.random.key(0)).jaxpr
  weights = len(jax.tree.leaves(
      jax.eval_shape(functools.partial(model.quantize_weights, cfg), variables["params"]),
      is_leaf=lambda x: isinstance(x, WeightOperands)))
  passes = 2 if rl.objective.spec(NEW).kl_in != "none" else 1  # the second is the reference's
  assert train_small.fp8_blocks(jaxpr) == {0: passes * weights, 1: weights}
