"""One step: independent of the micro-batches, unchanged by non-finite losses, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import model
from model import Transformer
from tests.train import small
from train.losses import LanguageModelLoss
from train.optimizer import decay_mask
from train.step import TrainState, init_state, make_train_step

CFG = dataclasses.replace(small.OPTIMIZER, ema_decay=0.9)
WEIGHTS = {"lm": 1.0, "mtp": 0.3, "sequence_balance": 0.1, "batch_balance": 0.0,
           "expert_balance": 0.0}
PREDICTION = WEIGHTS | {"sequence_balance": 0.0}
RATE = 0.01
POISON = small.MOE.vocab_size - 1  # a token that no row of small.rows contains
# Gradients sum a few hundred float32 products, in an order that depends on the micro-batches.
ROUNDING = 2e-5
# Without a balancing bias, experts depend on the token, so that loads differ between micro-batches.
VARIABLES = tiny.variables(small.MOE) | {
    "router": jax.tree.map(jnp.zeros_like, tiny.variables(small.MOE)["router"])}


@functools.cache
def compiled(parts):
  return jax.jit(make_train_step(
      LanguageModelLoss(Transformer(small.MOE)), CFG, decay_mask(small.MOE), parts))


def hyper(parts, rate=RATE, weights=WEIGHTS, scale=1.0):
  return {"learning_rate": np.float32(CFG.learning_rate), "bias_rate": np.float32(rate),
          "weights": {name: np.float32(scale * weight) for name, weight in weights.items()},
          "num_micro_batches": np.int32(parts)}


def step(state, rows, parts=4, **values):
  return compiled(parts)(state, small.batch(rows, parts), hyper(parts, **values))


@functools.cache
def forward(seed=0):
  """Returns the network's output for all rows at once."""
  return tiny.apply(small.MOE)(VARIABLES, small.rows(seed=seed)["tokens"][:, :-1])


@pytest.fixture(scope="module")
def fresh():
  return init_state(VARIABLES, CFG)


@pytest.fixture(scope="module")
def trained(fresh):
  """Returns a state whose moments, average and step count differ from the initial ones."""
  return step(fresh, small.rows(seed=9))[0]


@pytest.mark.parametrize("parts", [
    1, pytest.param(2, marks=pytest.mark.long("compiles a third number of micro-batches"))])
def test_gradients_do_not_depend_on_the_number_of_micro_batches(fresh, parts):
  rows = small.rows()
  learned = rows["loss_mask"].reshape(4, -1).sum(1)
  assert learned.max() > 20 * learned.min()
  state, metrics = step(fresh, rows, parts)
  want, want_metrics = step(fresh, rows, 4)
  assert small.max_rel_diff(state.moments, want.moments) < ROUNDING
  assert small.max_rel_diff(state.params, want.params) < ROUNDING
  small.assert_same_bits(state.router, want.router)
  for name in ("loss", "loss_total", "loss_mtp", "loss_sequence_balance", "grad_norm"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=ROUNDING)


def test_gradients_are_the_micro_batches_means_weighted_by_tokens(fresh):
  """Their unweighted mean, which averaging over micro-batches would give, is far off."""
  rows = small.rows()
  learned = rows["loss_mask"].reshape(4, -1).sum(1)
  run = lambda mask: step(fresh, rows | {"loss_mask": mask}, weights=PREDICTION,
                          scale=1e-3)[0].moments.mu  # too small to be clipped
  alone = [run(rows["loss_mask"] & (np.arange(8) // 2 == part)[:, None]) for part in range(4)]
  mean = lambda weights: jax.tree.map(
      lambda *parts: np.average(np.stack(parts), axis=0, weights=weights), *alone)
  whole = run(rows["loss_mask"])
  assert small.max_rel_diff(whole, mean(learned)) < ROUNDING
  assert small.max_rel_diff(whole, mean(None)) > 1000 * ROUNDING


def test_losses_are_means_over_all_learned_tokens_of_the_batch(fresh):
  rows = small.rows()
  logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(forward().logits_BTV)),
                            rows["tokens"][:, 1:, None], -1)[..., 0]
  _, metrics = step(fresh, rows)
  np.testing.assert_allclose(metrics["loss"], -logp[rows["loss_mask"]].mean(), rtol=1e-5)
  total = metrics["loss"] + 0.3 * metrics["loss_mtp"] + 0.1 * metrics["loss_sequence_balance"]
  np.testing.assert_allclose(metrics["loss_total"], total, rtol=1e-6)


@pytest.mark.parametrize("name", ["moe_layers", "mtp_1"])
def test_the_router_bias_moves_by_the_rate_to_balance_the_load_of_the_whole_batch(fresh, name):
  state, _ = step(fresh, small.rows(seed=2))
  load_BE = np.asarray(forward(seed=2).router[name].load_BE).reshape(8, -1)
  direction = lambda load_E: np.sign(load_E.mean() - load_E).astype(np.float32)
  want = direction(load_BE.sum(0))
  before, after = (np.ravel(*jax.tree.leaves(r[name])) for r in (fresh.router, state.router))
  np.testing.assert_array_equal(after, before + np.float32(RATE) * want)
  for part in range(4):  # no micro-batch alone gives the same directions
    assert (want != direction(load_BE[2 * part:2 * part + 2].sum(0))).any()


def test_max_violation_is_computed_over_the_whole_batch(fresh):
  _, metrics = step(fresh, small.rows())
  load_E = np.asarray(forward().expert_load_LE)[0]
  want = load_E.max() / load_E.mean() - 1
  np.testing.assert_allclose(metrics["max_violation_by_layer"], [want], rtol=1e-6)
  np.testing.assert_allclose(metrics["max_violation"], want, rtol=1e-6)


def test_a_bias_rate_of_zero_freezes_the_bias_and_nothing_else(fresh):
  state, _ = step(fresh, small.rows(), rate=0.0)
  moving, _ = step(fresh, small.rows())
  small.assert_same_bits(state.router, fresh.router)
  small.assert_same_bits(state.params, moving.params)


def poisoned(state, value):
  """Returns the state with POISON's embedding set to `value`, and rows that contain it.

  Only the last micro-batch of the rows contains it.
  """
  embedding = state.params["embedding"]
  bad = embedding | {"embedding": embedding["embedding"].at[POISON].set(value)}
  rows = small.rows(seed=1)
  rows["tokens"][-2, 3] = POISON
  return state.replace(params=state.params | {"embedding": bad}), rows


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_with_a_non_finite_loss_changes_nothing_and_is_counted(trained, value):
  before, rows = poisoned(trained, value)
  after, metrics = step(before, rows)
  assert not np.isfinite(metrics["loss_total"])
  assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
  small.assert_same_bits(after.replace(step=before.step, skipped=before.skipped), before)


def test_a_skipped_step_does_not_count_in_adams_bias_correction(trained):
  before, rows = poisoned(trained, np.nan)
  skipped, _ = step(before, rows)
  want, _ = step(before, small.rows(seed=2))
  got, metrics = step(skipped, small.rows(seed=2))
  assert np.isfinite(metrics["loss_total"]) and int(got.step) == 3 and int(got.skipped) == 1
  small.assert_same_bits(got.replace(step=want.step, skipped=want.skipped), want)
  later = got.replace(step=got.step, skipped=got.skipped - 1)  # as if the skipped step had counted
  moved = lambda state: step(state, small.rows(seed=2))[0].params["norm"]["scale"]
  assert not np.array_equal(moved(later), moved(got))


def test_gradients_are_clipped_and_their_norm_before_clipping_is_reported(fresh):
  rows = small.rows()
  state, metrics = step(fresh, rows)
  gradient_norm = lambda state: float(optax.tree.norm(state.moments.mu)) / (1 - CFG.beta1)
  assert metrics["grad_norm"] > 2 * CFG.max_grad_norm
  np.testing.assert_allclose(gradient_norm(state), CFG.max_grad_norm, rtol=1e-5)
  # Scale the loss down so far that its gradients need no clipping.
  scale = 0.5 * CFG.max_grad_norm / float(metrics["grad_norm"])
  small_state, small_metrics = step(fresh, rows, scale=scale)
  np.testing.assert_allclose(small_metrics["grad_norm"], scale * metrics["grad_norm"], rtol=1e-5)
  np.testing.assert_allclose(gradient_norm(small_state), small_metrics["grad_norm"], rtol=1e-5)


def test_ema_moves_towards_the_new_parameters(trained):
  state, _ = step(trained, small.rows(seed=3))
  assert small.max_rel_diff(state.params, trained.params) > 1e-3
  want = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, trained.ema, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
               state.ema, want)


def test_the_state_but_for_its_moments_is_float32_whatever_the_models_dtypes():
  numerics = model.Numerics(params="bfloat16", compute="bfloat16")
  cfg = dataclasses.replace(small.MOE, numerics=numerics)
  optimizer = dataclasses.replace(CFG, moments="bfloat16")
  before = jax.eval_shape(lambda v: init_state(v, optimizer), model.abstract_variables(cfg))
  train_step = make_train_step(
      LanguageModelLoss(Transformer(cfg)), optimizer, decay_mask(cfg), 4)
  after, _ = jax.eval_shape(train_step, before, small.batch(small.rows(), 4), hyper(4))
  for state in (before, after):
    dtypes = lambda tree: {x.dtype for x in jax.tree.leaves(tree)}
    assert dtypes((state.params, state.ema, state.router)) == {jnp.dtype("float32")}
    assert dtypes(state.moments) == {jnp.dtype("bfloat16")}
  assert jax.tree.structure(before) == jax.tree.structure(after)


def metric_names(cfg):
  optimizer = dataclasses.replace(CFG, ema_decay=0.0)
  state = jax.eval_shape(lambda v: init_state(v, optimizer), model.abstract_variables(cfg))
  assert state.ema is None
  train_step = make_train_step(LanguageModelLoss(Transformer(cfg)), optimizer, decay_mask(cfg))
  return set(jax.eval_shape(train_step, state, small.batch(small.rows(), 1), hyper(1))[1])


def test_metrics_cover_exactly_the_parts_that_the_model_has():
  always = {"loss", "loss_total", "grad_norm", "skipped"}
  assert metric_names(small.MOE) == always | {
      "loss_mtp", "loss_sequence_balance", "loss_batch_balance", "loss_expert_balance",
      "max_violation", "max_violation_by_layer"}
  assert metric_names(small.DENSE) == always | {"loss_mtp"}
  assert metric_names(dataclasses.replace(small.DENSE, mtp=None)) == always


def test_a_state_owns_its_parameters():
  """A step donates the state's buffers, so the variables it was made from must not share them."""
  variables = {"params": {"w": jnp.ones(3)}, "router": {"bias": jnp.ones(3)}}
  state = init_state(variables, CFG)
  take = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  assert isinstance(take(state), TrainState)
  assert not any(x.is_deleted() for x in jax.tree.leaves(variables))


@pytest.mark.parametrize(("parts", "numerics"), [
    (2, "fp8"), pytest.param(2, "fp32", marks=pytest.mark.long("FP8 tests all of it and more"))])
def test_a_step_on_unstacked_layers_equals_one_on_stacked_layers(parts, numerics):
  cfg = dataclasses.replace(
      small.MOE, num_layers=2, mtp=None, numerics=dataclasses.replace(
          model.NUMERICS[numerics], compute="float32"))
  net, fresh = Transformer(cfg, unroll=99), init_state(tiny.variables(cfg), CFG)
  ahead = {"prepare": functools.partial(model.quantize_weights, cfg)} if numerics == "fp8" else {}
  by_layer, stacked = (
      jax.jit(make_train_step(LanguageModelLoss(net), CFG, decay_mask(cfg), parts, **more))(
          fresh, small.batch(small.rows(), parts), hyper(parts))
      # The stacked step quantises each layer's weights inside that layer, so a layer that was given
      # another's operands would differ from it.
      for more in ({"by_layer": net.by_layer, **ahead}, {}))
  assert len(jax.tree.leaves(net.by_layer(fresh.params))) > len(jax.tree.leaves(fresh.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=1e-7),
               by_layer, stacked)
