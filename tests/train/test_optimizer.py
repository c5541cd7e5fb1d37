"""AdamW matches optax with moments of either dtype, and schedules have V3's shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import model
from train.config import BalanceConfig, OptimizerConfig, RunConfig, TrainConfig
from train.optimizer import Schedule, adamw, decay_mask, init_moments

SCHEDULES = ("constant", "cosine", "v3")
DECAYS = {"matrix": True, "norm": False}


def gradients(step):
  """Returns gradients whose scale changes from step to step, as in training."""
  rng = np.random.default_rng(step)
  scale = 10.0 ** rng.uniform(-3, 0)
  return {"matrix": np.float32(scale * rng.standard_normal((9, 7))),
          "norm": np.float32(scale * rng.standard_normal(7))}


def ours(cfg, params, steps, gradients=gradients):
  step = jax.jit(functools.partial(adamw, decays=DECAYS, cfg=cfg))
  moments = init_moments(params, cfg)
  for i in range(steps):
    rate = jnp.float32(cfg.learning_rate / (1 + i))
    params, moments = step(gradients(i), moments, params, jnp.int32(i), rate)
  return params, moments


PARAMS = {"matrix": jnp.linspace(-1, 1, 63, dtype=jnp.float32).reshape(9, 7),
          "norm": jnp.ones(7, jnp.float32)}


def test_adamw_with_float32_moments_equals_optax_adamw():
  cfg = OptimizerConfig(learning_rate=0.03, moments="float32")
  params, moments = ours(cfg, PARAMS, 30)
  optimizer = optax.adamw(lambda i: cfg.learning_rate / (1 + i), cfg.beta1, cfg.beta2, cfg.eps,
                          weight_decay=cfg.weight_decay, mask=DECAYS)
  want, state, update = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.update)
  for i in range(30):
    updates, state = update(gradients(i), state, want)
    want = optax.apply_updates(want, updates)
  # About ten roundings per step, of at most 2^-24 each; a sum that nearly cancels has the error of
  # its terms.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=300 * 2**-24,
                                                       atol=2**-23 * np.abs(b).max()),
               (params, *moments), (want, state[0].mu, state[0].nu))


def test_bfloat16_moments_stay_close_to_float32_moments():
  wide, narrow = (OptimizerConfig(learning_rate=0.03, moments=name)
                  for name in ("float32", "bfloat16"))
  want, _ = ours(wide, PARAMS, 30)
  params, moments = ours(narrow, PARAMS, 30)
  assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
  for name in params:
    moved, error = want[name] - PARAMS[name], params[name] - want[name]
    # Every update has a relative error of a few times 2^-9, and the errors partly cancel.
    assert 0 < jnp.linalg.norm(error) < 4 * 2**-9 * jnp.linalg.norm(moved)


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.1), (0.1, 1.0), (1.0, 0.8), (0.8, 1.0)])
def test_bfloat16_moments_follow_a_change_of_the_gradients_scale(before, after):
  cfg = OptimizerConfig()
  scale = lambda i: before if i < 150 else after
  constant = lambda i: jax.tree.map(lambda p: np.full(p.shape, scale(i), np.float32), PARAMS)
  _, moments = ours(cfg, PARAMS, 300, constant)
  # A mean stops moving once its next change is less than half a bfloat16 spacing: 2^-8 of itself.
  for mean, value, beta in ((moments.mu, after, cfg.beta1), (moments.nu, after**2, cfg.beta2)):
    for leaf in jax.tree.leaves(mean):
      np.testing.assert_allclose(leaf.astype(jnp.float32), value, rtol=2**-8 / (1 - beta) * 1.05)


def by_name(tree):
  """Returns the set of all leaves of a tree, each paired with the last part of its path."""
  return {(path[-1].key, value) for path, value in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(("cfg", "matrices", "others"), [
    (tiny.V3,
     {"embedding", "head", "w_dq", "w_uq", "w_dkv", "w_uk", "w_uv", "w_o", "w_gate_up", "w_down",
      "centroids", "w_proj"}, {"scale"}),
    (tiny.GQA, {"embedding", "w_q", "w_k", "w_v", "w_o", "w_gate_up", "w_down"},
     {"scale", "b_q", "b_k", "b_v"})], ids=["mla moe mtp", "gqa bias"])
def test_only_matrices_decay(cfg, matrices, others):
  assert by_name(decay_mask(cfg)) == (
      {(name, True) for name in matrices} | {(name, False) for name in others})


def test_weight_decay_alone_scales_the_matrices_and_leaves_the_rest():
  cfg = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, moments="float32")
  zeros = lambda i: jax.tree.map(jnp.zeros_like, PARAMS)
  params, _ = ours(cfg, PARAMS, 1, zeros)
  np.testing.assert_allclose(params["matrix"], 0.95 * PARAMS["matrix"], rtol=1e-6)
  np.testing.assert_array_equal(params["norm"], PARAMS["norm"])


def schedule(steps, train=None, balance=None, **optimizer):
  return Schedule(RunConfig(
      model.get_config("nano"), optimizer=OptimizerConfig(**optimizer),
      train=TrainConfig(steps=steps, **train or {}), balance=BalanceConfig(**balance or {})))


def rates(steps, **optimizer):
  values = schedule(steps, **optimizer)
  return np.array([values[i]["learning_rate"] for i in range(steps)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_from_above_zero_to_the_peak_at_its_end(name):
  lr = rates(1000, schedule=name, learning_rate=0.02, warmup_fraction=0.05)
  np.testing.assert_allclose(lr[:50], 0.02 * np.arange(1, 51) / 50, rtol=0, atol=0.02 * 2**-23)
  assert lr[49] == lr.max() == np.float32(0.02)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("fraction", [0, 0.05, 0.5])
def test_every_schedule_of_every_length_is_positive_and_at_most_the_peak(name, steps, fraction):
  lr = rates(steps, schedule=name, learning_rate=0.02, warmup_fraction=fraction)
  assert (lr > 0).all() and (lr <= np.float32(0.02)).all()
  assert lr[max(1, round(fraction * steps)) - 1] == np.float32(0.02)


def test_the_constant_schedule_stays_at_the_peak():
  assert set(rates(100, schedule="constant", learning_rate=0.02, warmup_fraction=0)) == {
      np.float32(0.02)}


def test_cosine_ends_at_its_final_ratio_on_the_last_step():
  lr = rates(1001, schedule="cosine", learning_rate=0.02, warmup_fraction=0.1, final_ratio=0.25)
  np.testing.assert_allclose(lr[-1], 0.25 * 0.02, rtol=1e-6)
  np.testing.assert_allclose(lr[550], (1 + 0.25) / 2 * 0.02, rtol=1e-6)  # halfway from 100 to 1000
  assert (np.diff(lr[100:]) <= 0).all()


def test_v3_schedule_has_v3s_breakpoints():
  peak = 2.2e-4
  # One step for every 10^9 of V3's 14.8 T tokens.
  lr = rates(14800, schedule="v3", learning_rate=peak, warmup_fraction=0.01)
  np.testing.assert_allclose(lr[148:10001], peak, rtol=1e-6)
  np.testing.assert_allclose(lr[12150], 0.55 * peak, rtol=1e-5)  # halfway between 1 and 0.1
  assert lr[10001] < lr[10000] and (np.diff(lr[148:]) <= 0).all()
  np.testing.assert_allclose(lr[14300:14633], 2.2e-5, rtol=1e-6)
  assert lr[14299] > lr[14300]
  np.testing.assert_allclose(lr[14633:], 7.3e-6, rtol=1e-6)


def test_the_batch_ramps_from_its_start_to_all_micro_batches():
  train = {"batch_size": 20, "micro_batch_size": 2, "batch_ramp_fraction": 0.5,
           "batch_ramp_start": 0.2}
  ramp = schedule(100, train)
  counts = [ramp.num_micro_batches(i) for i in range(100)]
  assert counts[0] == 2 and set(counts[50:]) == {10}
  assert sorted(set(counts[:50])) == list(range(2, 11)) and counts == sorted(counts)


def test_a_ramp_that_starts_near_zero_has_one_micro_batch():
  ramp = schedule(10, {"batch_size": 4, "micro_batch_size": 1, "batch_ramp_fraction": 1.0,
                       "batch_ramp_start": 0.01})
  assert ramp.num_micro_batches(0) == 1


def test_without_a_ramp_every_step_has_all_micro_batches():
  plain = schedule(3, {"batch_size": 8, "micro_batch_size": 2})
  assert [plain.num_micro_batches(i) for i in range(3)] == [4, 4, 4]


def test_gamma_and_lambda_switch_at_their_fractions_of_the_steps():
  values = schedule(
      10, {"mtp_weight": 0.3, "mtp_late_weight": 0.1, "mtp_fraction": 0.4},
      {"bias_rate": 1e-3, "bias_fraction": 0.7, "sequence_weight": 1e-4, "batch_weight": 0.02,
       "expert_weight": 0.03})
  steps = [values[i] for i in range(10)]
  f32 = np.float32
  assert [s["weights"].pop("mtp") for s in steps] == [f32(0.3)] * 4 + [f32(0.1)] * 6
  assert [s["bias_rate"] for s in steps] == [f32(1e-3)] * 7 + [0] * 3
  assert all(s["weights"] == {"lm": 1, "sequence_balance": f32(1e-4), "batch_balance": f32(0.02),
                              "expert_balance": f32(0.03)} for s in steps)


@pytest.mark.parametrize(("steps", "gamma"), [
    (240_000, 1e-3), (2000, 2e-3), (400, 1e-2), (40, 2e-2)])
def test_gamma_lets_a_bias_move_as_far_in_a_short_run_and_is_never_below_v3s(steps, gamma):
  assert schedule(steps)[0]["bias_rate"] == pytest.approx(gamma)
  assert schedule(steps, {}, {"bias_rate": 0.5})[0]["bias_rate"] == np.float32(0.5)
  trained = dataclasses.replace(schedule(steps).cfg, init="a/model")
  assert Schedule(trained)[0]["bias_rate"] == np.float32(1e-3)


def test_default_fractions_match_v3s_token_counts():
  values = schedule(14800)
  lambdas = [values[i]["weights"]["mtp"] for i in range(14800)]
  gammas = [values[i]["bias_rate"] for i in range(14800)]
  # The fractions have three digits; half a unit of the last digit is 7.4 steps.
  assert abs(lambdas.count(np.float32(0.3)) - 10000) <= 8
  assert abs(gammas.count(np.float32(1e-3)) - 14300) <= 8
