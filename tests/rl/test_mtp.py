"""MTP modules ride along with the policy or learn from its completions, and never change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from rl.loading import as_dict, load_model
from rl.loop import train
from rl.mtp import split_mtp
from rl.step import init_rl_state, make_update
from tests.rl import small
from tests.rl.test_step import OPTIMIZER, ROUNDING, TEMPERATURE, config, hyper, sampled
from tests.train import small as train_small
from train.run_folder import MetricsFile, RunFolder

TWO = dataclasses.replace(train_small.DENSE, mtp=model.MTPConfig(depth=2))
EXPERTS = dataclasses.replace(
    train_small.MOE, vocab_size=small.MODEL.vocab_size, max_seq_len=32,
    mtp=model.MTPConfig(depth=1))


def run(cfg, path, start=None, cfg_model=EXPERTS, **kwargs):
  folder = RunFolder(path)
  try:
    folder.check_config(as_dict(cfg, cfg_model))
    return train(cfg, cfg_model, start or tiny.variables(cfg_model), small.tokenizer(), folder,
                 show=False, **kwargs)
  finally:
    folder.close()


def trained(cfg, given, state=None):
  state = init_rl_state(tiny.variables(TWO), cfg) if state is None else state
  rates = {"mtp_learning_rate": np.full(cfg.objective.updates, 1e-2)}
  return make_update(TWO, cfg)(
      state, given, hyper(cfg, np.full(cfg.objective.updates, 1e-2)) | rates, jax.random.key(0))


@pytest.mark.parametrize("micro", [None, 2])
def test_modules_descend_the_cross_entropy_of_learned_tokens_at_the_sampling_temperature(micro):
  given = sampled(learned_S=np.arange(8) != 3)
  policy, modules = split_mtp(tiny.variables(TWO))

  def loss(modules):
    logits = model.Transformer(TWO).apply(
        {"params": policy["params"] | modules}, given.tokens[:, :-1],
        segment_ids_BT=given.token_mask.astype(jnp.int32)).mtp_logits
    total = 0.0
    for k, logits_STV in enumerate(logits, 1):
      logp_STV = jax.nn.log_softmax(logits_STV / TEMPERATURE)
      for row, ends in enumerate(given.token_mask.sum(1)):
        for at in range(ends - k):
          if given.mask[row, at + k]:
            total -= logp_STV[row, at, given.tokens[row, at + k + 1]]
    return total / (2 * given.mask.sum())

  wanted, gradient = jax.jit(jax.value_and_grad(loss))(modules["params"])
  state, metrics = trained(config(mtp_learning_rate=0.01, micro_batch_size=micro), given)
  ours = jax.tree.map(lambda mu: mu / (1 - OPTIMIZER.beta1), state.mtp.moments.mu)
  assert train_small.max_rel_diff(ours, gradient) < ROUNDING
  np.testing.assert_allclose(metrics["mtp_loss"], wanted, rtol=1e-5)


def test_training_the_modules_does_not_change_the_policy(tmp_path, task):
  plain = small.config(task, loop={"steps": 2}, objective={"beta": 0.1, "bias_rate": 0.01})
  cfg = dataclasses.replace(
      plain, objective=dataclasses.replace(plain.objective, mtp_learning_rate=0.01))
  without, result = run(plain, tmp_path / "without"), run(cfg, tmp_path / "with")
  train_small.assert_same_bits(result.state.train, without.state.train)
  assert without.state.mtp is None and not (tmp_path / "with" / "mtp_modules").exists()
  assert [row["reward"] for row in result.rows] == [row["reward"] for row in without.rows]
  assert "mtp_loss" not in without.rows[0] and result.rows[0]["mtp_loss"] > 0


def test_a_stopped_run_trains_the_same_modules_which_are_loaded_with_the_policy(tmp_path, task):
  cfg = small.config(task, loop={"steps": 3}, optimizer={"ema_decay": 0.9},
                     objective={"mtp_learning_rate": 0.02, "bias_rate": 0.01})
  whole = run(cfg, tmp_path / "whole")
  for _ in range(3):
    parts = run(cfg, tmp_path / "parts", max_seconds=1e-9)
  assert parts.status == "finished"
  train_small.assert_same_bits(parts.state, whole.state)
  loaded = load_model(tmp_path / "parts")
  start = tiny.variables(EXPERTS)
  assert jax.tree.structure(loaded.variables["params"]) == jax.tree.structure(start["params"])
  modules = split_mtp(loaded.variables)[1]
  train_small.assert_same_bits(modules["params"], whole.state.mtp.params)
  train_small.assert_same_bits(modules["router"], whole.state.mtp.router)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), modules, split_mtp(start)[1])
  assert all(jax.tree.leaves(moved))


def test_the_loss_of_the_modules_falls():
  cfg, state, losses = config(mtp_learning_rate=0.01), None, []
  for _ in range(10):
    state, metrics = trained(cfg, sampled(), state)
    losses.append(float(metrics["mtp_loss"]))
  assert losses[-1] < 0.8 * losses[0]


def test_a_model_without_modules_is_refused(tmp_path, task):
  cfg = small.config(task, objective={"mtp_learning_rate": 0.02})
  with pytest.raises(ValueError, match="trains MTP modules, but the model has none: leave it out"):
    run(cfg, tmp_path / "run", small.variables(), small.MODEL)


@pytest.mark.parametrize("mtp_learning_rate", [None, 0.02])
def test_rollouts_with_drafts_are_those_without(tmp_path, task, mtp_learning_rate):
  kwargs = {"loop": {"steps": 2, "eval_problems": 4, "eval_samples": 2},
            "objective": {"mtp_learning_rate": mtp_learning_rate}}
  without = run(small.config(task, **kwargs), tmp_path / "without")
  cfg = small.config(task, sampling={"drafts": 1}, **kwargs)
  found = run(cfg, tmp_path / "with")
  read = lambda name: MetricsFile(tmp_path / name / "completions.jsonl").read()
  assert read("with") == read("without")
  assert [row["reward"] for row in found.rows] == [row["reward"] for row in without.rows]
  assert train_small.max_rel_diff(found.state.train.params, without.state.train.params) < 1e-4


def test_drafts_without_modules_are_refused_before_the_first_step(tmp_path, task):
  cfg = small.config(task, sampling={"drafts": 1})
  with pytest.raises(ValueError, match="the model has no MTP modules to draft with"):
    run(cfg, tmp_path / "run", small.variables(), small.MODEL)
