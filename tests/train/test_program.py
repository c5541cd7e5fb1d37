"""Vmapped batches of runs and meshes change how fast runs train, not what they learn."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from tests.train import small
from train.config import BalanceConfig, DataConfig, MeshConfig, RunConfig, TrainConfig
from train.data import HeldOut
from train.program import Program, static_config

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
STEPS = (0, 4, 9)  # half of the batch, the whole batch, and after the bias is frozen

FIRST = RunConfig(
    dataclasses.replace(small.MOE, mtp=None), data=DataConfig(seq_len=small.LENGTH),
    optimizer=small.OPTIMIZER,
    balance=BalanceConfig(bias_rate=0.01, bias_fraction=0.9),
    train=TrainConfig(steps=10, batch_size=8, micro_batch_size=2, batch_ramp_fraction=0.4,
                      batch_ramp_start=0.5))
SECOND = dataclasses.replace(
    FIRST, optimizer=dataclasses.replace(FIRST.optimizer, learning_rate=3e-3, schedule="cosine"),
    balance=BalanceConfig(bias_rate=0.02, sequence_weight=0.5),
    train=dataclasses.replace(FIRST.train, seed=1))
BOTH = (FIRST, SECOND)


def rows_of(program, step, run):
  return small.rows(program.batch_size(step), seed=100 * run + step)


@contextlib.contextmanager
def compiled():
  """Yields a list that collects the log message of every compilation inside the context."""
  names, logger = [], logging.getLogger("jax")
  handler = logging.Handler()
  handler.emit = lambda record: (
      names.append(record.getMessage()) if record.getMessage().startswith("Compiling") else None)
  logger.addHandler(handler)
  with jax.log_compiles():
    yield names
  logger.removeHandler(handler)


@pytest.fixture(scope="module")
def alone():
  """Returns, for each run alone: its program, initial state, and state and metrics of each step."""
  results = []
  for run, cfg in enumerate(BOTH):
    program = Program([cfg], {})
    start, state, history = jax.device_get(program.init()), program.init(), []
    for step in STEPS:
      state, metrics = program.step(state, step, rows_of(program, step, run))
      history.append(jax.device_get((state, metrics)))
    results.append((program, start, history))
  return results


@pytest.fixture(scope="module")
def as_batch():
  """Returns what `alone` does, for the program of both runs, and the compilations in each step."""
  program, history, compiles = Program(BOTH, {}), [], []
  start, state = jax.device_get(program.init()), program.init()
  for step in STEPS:
    batch = jax.tree.map(
        lambda *runs: np.stack(runs), *(rows_of(program, step, run) for run in (0, 1)))
    with compiled() as names:
      state, metrics = program.step(state, step, batch)
    history.append(jax.device_get((state, metrics)))
    compiles.append(len(names))
  return program, start, history, compiles


@pytest.mark.parametrize("run", [0, 1])
def test_runs_of_a_vmapped_batch_learn_what_they_learn_alone(alone, as_batch, run):
  _, start, history = alone[run]
  _, batch_start, batch_history, _ = as_batch
  pick = lambda tree: jax.tree.map(lambda x: x[run], tree)
  small.assert_same_bits(pick(batch_start), start)
  for i, ((state, metrics), (batch_state, batch_metrics)) in enumerate(
      zip(history, batch_history, strict=True), 1):
    # Float32 sums of a few hundred products in another order; the error grows with every step.
    assert small.max_rel_diff(pick(batch_state.params), state.params) < i * 2e-5
    assert small.max_rel_diff(pick(batch_state.moments), state.moments) < i * 2e-5
    assert small.max_rel_diff(pick(batch_metrics), metrics) < i * 2e-5
    small.assert_same_bits(pick(batch_state.router), state.router)
  assert small.max_rel_diff(history[-1][0].params, start.params) > 5e-3


def test_runs_of_a_vmapped_batch_differ_in_what_their_configs_set(as_batch):
  program, start, history, _ = as_batch
  assert small.max_rel_diff(*(jax.tree.map(lambda x, i=i: x[i], start.params["moe_layers"])
                       for i in (0, 1))) > 0.1
  biases = [np.abs(jax.tree.leaves(state.router)[0]).max(-1).ravel() for state, _ in history]
  np.testing.assert_allclose(biases[0], [0.01, 0.02], rtol=1e-6)
  hyper = program.hyper(9)
  assert [run["bias_rate"] for run in hyper] == [0, np.float32(0.02)]
  assert [run["weights"]["sequence_balance"] for run in hyper] == [np.float32(1e-4), 0.5]
  np.testing.assert_allclose([run["learning_rate"] for run in hyper], [1e-2, 3e-4], rtol=1e-5)


def test_a_vmapped_batch_compiles_one_program_for_all_steps(as_batch):
  assert static_config(FIRST) == static_config(SECOND)
  first, *later = as_batch[-1]
  assert first and not any(later)


def test_a_ramping_batch_learns_from_its_own_sequences_only(alone):
  """A step on half of the micro-batches equals a full step in which each of them occurs twice."""
  program, _, _ = alone[0]
  assert (program.batch_size(0), program.batch_size(4)) == (4, 8)
  half = small.rows(4, seed=5)
  twice = {name: np.concatenate([value, value]) for name, value in half.items()}
  state, metrics = program.step(program.init(), 0, half)
  want, want_metrics = program.step(program.init(), 4, twice)
  assert small.max_rel_diff(state.params, want.params) < 2e-5
  small.assert_same_bits(state.router, want.router)
  for name in ("loss", "loss_sequence_balance", "grad_norm", "max_violation"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-5)


def test_runs_of_a_vmapped_batch_may_start_from_the_same_variables():
  cfg = FIRST.model
  state = Program(BOTH, {}).init(tiny.variables(cfg))
  for run in (0, 1):
    small.assert_same_bits(jax.tree.map(lambda x, i=run: x[i], state.variables),
                           tiny.variables(cfg))


def test_a_nudged_run_starts_one_rounding_away_and_shares_the_program(alone):
  nudged = dataclasses.replace(FIRST, train=dataclasses.replace(FIRST.train, nudge=True))
  assert static_config(nudged) == static_config(FIRST)
  _, start, _ = alone[0]
  for plain, moved in zip(jax.tree.leaves(start.params),
                          jax.tree.leaves(Program([nudged], {}).init().params), strict=True):
    np.testing.assert_array_equal(np.nextafter(plain, np.float32(np.inf)), moved)


def test_abstract_state_has_the_shapes_and_dtypes_of_the_state(alone, as_batch):
  shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for program, start in (alone[0][:2], as_batch[:2]):
    assert shapes(program.abstract_state()) == shapes(start)


def test_the_step_lowered_for_abstract_arguments_is_the_step_that_runs(alone, as_batch):
  """For one run and for a vmapped batch: the same results, and nothing is compiled again."""
  for program, start, cfgs in ((*alone[0][:2], (FIRST,)), (*as_batch[:2], BOTH)):
    rows = [rows_of(program, 4, run) for run in range(len(cfgs))]
    batch = jax.tree.map(lambda *runs: np.stack(runs), *rows) if len(cfgs) > 1 else rows[0]
    step = program.lower().compile()
    with compiled() as names:
      made = step(jax.device_put(start), *program.step_arguments(4, batch))
    assert not names
    small.assert_same_bits(made, program.step(jax.device_put(start), 4, batch))


def test_gradients_lowered_alone_cover_every_parameter(alone):
  program = alone[0][0]
  made = jax.tree.leaves(program.lower_gradients().out_info)
  assert sum(x.size for x in made) == FIRST.model.param_count()


@pytest.mark.parametrize(("part", "change"), [
    (None, {"model": small.DENSE}), ("train", {"steps": 20}), ("train", {"batch_size": 16}),
    ("optimizer", {"weight_decay": 0.0}), ("data", {"sample_masking": True})])
def test_runs_that_need_different_programs_cannot_train_as_a_vmapped_batch(part, change):
  if part:
    change = {part: dataclasses.replace(getattr(FIRST, part), **change)}
  with pytest.raises(ValueError, match=r"optimizer\.learning_rate.*train\.seed"):
    Program([FIRST, dataclasses.replace(FIRST, **change)], {})


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="cuDNN attention works on a GPU")
def test_evaluations_use_the_attention_implementation_of_training_steps():
  cfg = dataclasses.replace(FIRST, train=dataclasses.replace(FIRST.train, attend="cudnn"))
  rows = small.rows()
  heldout = HeldOut(rows["tokens"], rows["loss_mask"], np.ones_like(rows["loss_mask"]), 1, 1)
  with pytest.raises(ValueError, match="attention by cuDNN needs an NVIDIA GPU"):
    Program([cfg], {"web": heldout}).evaluate(tiny.variables(cfg.model))


def test_a_vmapped_batch_on_a_mesh_is_an_error():
  cfg = dataclasses.replace(FIRST, mesh=MeshConfig(data=2))
  with pytest.raises(ValueError, match=r"MeshConfig\(data=2.*one seed at a time"):
    Program([cfg, cfg], {})


@pytest.fixture(scope="module")
def eight_devices():
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, HERE / "program_on_eight_devices.py"], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("losses", ["data", "balanced"])
def test_a_step_of_devices_that_have_all_parameters_equals_that_of_one(eight_devices, losses):
  found = eight_devices[losses]
  assert found["router"] == 0 and max(found["params"], found["metrics"]) < 1e-5
  assert found["shard"] == eight_devices["whole"] and found["as_declared"]


def test_devices_add_up_gradients_in_the_compute_format(eight_devices):
  float32, half, several = (eight_devices["summed"][name] for name in (
      "float32", "bfloat16", "micro-batches"))
  assert "bf16" not in float32 and "bf16" not in several
  assert half["bf16"] > half["f32"]  # which the embedding, the head and the loads are
  assert sum(half.values()) == sum(float32.values())
  # Eight devices round a sum seven times, and AdamW divides by the size of a gradient.
  assert eight_devices["half"]["metrics"] < 0.02 and eight_devices["half"]["router"] == 0


def test_a_step_on_eight_devices_equals_that_on_one(eight_devices):
  assert eight_devices["start"] == eight_devices["router"] == 0
  # Rounding of float32: eight devices add up the tokens in another order.
  assert max(eight_devices[name] for name in ("params", "moments", "metrics")) < 1e-5
  assert eight_devices["moved"] > 1e-2


def test_a_step_with_sharded_experts_and_heads_equals_that_on_one_device(eight_devices):
  mixed, whole = eight_devices["mixed"], eight_devices["whole"]
  assert max(mixed["params"], mixed["metrics"]) < 1e-5 and mixed["router"] == 0
  layers, experts, hidden, width = whole
  assert mixed["as_declared"] and mixed["shard"] == [layers, experts // 4, hidden // 2, width]


def test_sample_masking_changes_the_loss_of_documents_that_share_a_row(eight_devices):
  assert abs(eight_devices["loss"] / eight_devices["joined_loss"] - 1) > 1e-4


def test_the_state_keeps_the_shardings_of_abstract_state(eight_devices):
  assert eight_devices["as_declared"]
  layers, experts, *widths = eight_devices["whole"]
  assert eight_devices["shard"] == [layers, experts // 4, *widths]


def test_micro_batches_that_do_not_divide_over_the_mesh_are_an_error(eight_devices):
  assert eight_devices["refusal"].startswith(
      "4 sequences at a time do not divide over 8 devices")
