"""Training in FP8 follows training in bfloat16, and each resumes from the other's checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from pallas_kernels import WeightOperands
from tests.train.small import fp8_blocks
from train.checkpoint import Checkpoints
from train.config import OptimizerConfig
from train.losses import Batch, LanguageModelLoss
from train.optimizer import decay_mask
from train.step import init_state, make_train_step

# One MoE layer of the smallest preset, since compilation dominates the cost of a step here.
NANO = dataclasses.replace(model.get_config("nano"), num_layers=1, num_dense_layers=0, mtp=None)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)
HYPER = {"learning_rate": np.float32(3e-3), "bias_rate": np.float32(1e-3), "num_micro_batches": 1,
         "weights": {"lm": 1.0, "mtp": 0.0, "sequence_balance": 1e-4, "batch_balance": 0.0,
                     "expert_balance": 0.0}}


def config(numerics):
  return dataclasses.replace(NANO, numerics=model.NUMERICS[numerics])


def fresh(numerics):
  return init_state(model.init_on_host(config(numerics), seed=0), OPTIMIZER)


@functools.cache
def compiled(numerics):
  cfg = config(numerics)
  return jax.jit(make_train_step(
      LanguageModelLoss(model.Transformer(cfg)), OPTIMIZER, decay_mask(cfg)))


def train(state, numerics, steps):
  """Returns the state and losses after `steps` on one batch from a quarter of the vocabulary."""
  tokens = np.random.default_rng(0).integers(0, 128, (1, 2, 65)).astype(np.int32)
  batch, losses = Batch(tokens, np.ones((1, 2, 64), bool), None), []
  for _ in range(steps):
    state, metrics = compiled(numerics)(state, batch, HYPER)
    losses.append(float(metrics["loss"]))
  return state, losses


@pytest.fixture(scope="module")
def trained():
  return {numerics: train(fresh(numerics), numerics, 3) for numerics in ("bf16", "fp8")}


def test_fp8_losses_stay_within_a_percent_of_those_of_bfloat16(trained):
  (_, bf16), (state, fp8) = trained["bf16"], trained["fp8"]
  np.testing.assert_allclose(fp8, bf16, rtol=0.01)
  assert fp8 != bf16 and fp8[2] < fp8[0] - 0.5 and int(state.skipped) == 0


@pytest.mark.parametrize(("saved", "loaded"), [("fp8", "bf16"), ("bf16", "fp8")])
def test_a_run_resumes_from_its_checkpoint_in_the_other_numerics(tmp_path, trained, saved, loaded):
  state, losses = trained[saved]
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  checkpoints.save(3, state, {})
  restored = checkpoints.restore(jax.eval_shape(lambda: fresh(loaded))).arrays
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  # Restored arrays are committed to a device, for which the step would be compiled again.
  _, (other,) = train(jax.tree.map(np.asarray, restored), loaded, 1)
  _, (same,) = train(state, saved, 1)
  assert abs(other - same) < 0.01 * same < 0.01 * losses[-1]


@pytest.mark.cpu
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_quantises_each_weight_once_before_its_micro_batches(ahead):
  cfg = config("fp8")
  prepare = functools.partial(model.quantize_weights, cfg)
  step = make_train_step(
      LanguageModelLoss(model.Transformer(cfg, remat="v3", mla_form="expanded")), OPTIMIZER,
      decay_mask(cfg), 2, prepare=prepare if ahead else lambda params: {})
  state = jax.eval_shape(lambda: fresh("fp8"))
  batch = Batch(*(jax.ShapeDtypeStruct((2, 1, 8 + more), dtype)
                  for more, dtype in ((1, jnp.int32), (0, bool))), None)
  found = fp8_blocks(jax.make_jaxpr(step)(state, batch, HYPER).jaxpr)
  count = len(jax.tree.leaves(jax.eval_shape(prepare, state.params),
                              is_leaf=lambda x: isinstance(x, WeightOperands)))
  # Otherwise in every layer of every micro-batch, in the forward pass and in its recomputation.
  assert found == ({0: count} if ahead else {2: 2 * count})
