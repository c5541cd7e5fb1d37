"""Lanes and meshes change how fast runs are, not what they learn."""

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
from train.config import BalanceConfig, RunConfig, TrainConfig
from train.data import HeldOut
from train.program import Program, shared

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
STEPS = (0, 4, 9)  # with half of the batch, all of it, and after the bias has stopped

FIRST = RunConfig(
    dataclasses.replace(small.MOE, mtp=None), optimizer=small.OPTIMIZER,
    balance=BalanceConfig(bias_rate=0.01, bias_share=0.9),
    train=TrainConfig(steps=10, batch_size=8, micro_batch_size=2, batch_ramp_share=0.4,
                      batch_ramp_start=0.5))
SECOND = dataclasses.replace(
    FIRST, optimizer=dataclasses.replace(FIRST.optimizer, learning_rate=3e-3, schedule="cosine"),
    balance=BalanceConfig(bias_rate=0.02, sequence_weight=0.5),
    train=dataclasses.replace(FIRST.train, seed=1))
LANES = (FIRST, SECOND)


def lane_rows(program, step, lane):
  return small.rows(program.batch_size(step), seed=100 * lane + step)


@contextlib.contextmanager
def compiled():
  """A list to which everything that is compiled meanwhile is added."""
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
  """Each lane's program, start, and states and metrics after every step."""
  results = []
  for lane, cfg in enumerate(LANES):
    program = Program([cfg], {})
    start, state, history = jax.device_get(program.init()), program.init(), []
    for step in STEPS:
      state, metrics = program.step(state, step, lane_rows(program, step, lane))
      history.append(jax.device_get((state, metrics)))
    results.append((program, start, history))
  return results


@pytest.fixture(scope="module")
def together():
  """The program of all lanes, their start, what they learn, and what each step compiled."""
  program, history, compiles = Program(LANES, {}), [], []
  start, state = jax.device_get(program.init()), program.init()
  for step in STEPS:
    batch = jax.tree.map(
        lambda *lanes: np.stack(lanes), *(lane_rows(program, step, lane) for lane in (0, 1)))
    with compiled() as names:
      state, metrics = program.step(state, step, batch)
    history.append(jax.device_get((state, metrics)))
    compiles.append(len(names))
  return program, start, history, compiles


@pytest.mark.parametrize("lane", [0, 1])
def test_lanes_learn_what_they_learn_alone(alone, together, lane):
  _, start, history = alone[lane]
  _, lanes_start, lanes_history, _ = together
  pick = lambda tree: jax.tree.map(lambda x: x[lane], tree)
  small.assert_same_bits(pick(lanes_start), start)
  for i, ((state, metrics), (lanes_state, lanes_metrics)) in enumerate(
      zip(history, lanes_history, strict=True), 1):
    # Float32 sums of some hundred products, in another order at every step.
    assert small.apart(pick(lanes_state.params), state.params) < i * 2e-5
    assert small.apart(pick(lanes_state.moments), state.moments) < i * 2e-5
    assert small.apart(pick(lanes_metrics), metrics) < i * 2e-5
    small.assert_same_bits(pick(lanes_state.router), state.router)
  assert small.apart(history[-1][0].params, start.params) > 5e-3


def test_lanes_differ_in_what_their_configs_say(together):
  program, start, history, _ = together
  assert small.apart(*(jax.tree.map(lambda x, i=i: x[i], start.params["moe_layers"])
                       for i in (0, 1))) > 0.1
  biases = [np.abs(jax.tree.leaves(state.router)[0]).max(-1).ravel() for state, _ in history]
  np.testing.assert_allclose(biases[0], [0.01, 0.02], rtol=1e-6)
  hyper = program.hyper(9)
  assert [lane["bias_rate"] for lane in hyper] == [0, np.float32(0.02)]
  assert [lane["weights"]["sequence_balance"] for lane in hyper] == [np.float32(1e-4), 0.5]
  np.testing.assert_allclose([lane["learning_rate"] for lane in hyper], [1e-2, 3e-4], rtol=1e-5)


def test_lanes_share_one_program_for_all_steps(together):
  assert shared(FIRST) == shared(SECOND)
  first, *later = together[-1]
  assert first and not any(later)


def test_a_ramping_batch_learns_from_its_own_sequences_only(alone):
  """Half of the micro-batches, and the same ones twice over, are the same step."""
  program, _, _ = alone[0]
  assert (program.batch_size(0), program.batch_size(4)) == (4, 8)
  half = small.rows(4, seed=5)
  twice = {name: np.concatenate([value, value]) for name, value in half.items()}
  state, metrics = program.step(program.init(), 0, half)
  want, want_metrics = program.step(program.init(), 4, twice)
  assert small.apart(state.params, want.params) < 2e-5
  small.assert_same_bits(state.router, want.router)
  for name in ("loss", "loss_sequence_balance", "grad_norm", "max_violation"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-5)


def test_lanes_may_start_from_the_same_variables():
  cfg = FIRST.model
  state = Program(LANES, {}).init(tiny.variables(cfg))
  for lane in (0, 1):
    small.assert_same_bits(jax.tree.map(lambda x, i=lane: x[i], state.variables),
                           tiny.variables(cfg))


def test_abstract_state_has_the_states_shapes_and_formats(alone, together):
  shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for program, start in (alone[0][:2], together[:2]):
    assert shapes(program.abstract_state()) == shapes(start)


@pytest.mark.parametrize(("part", "change"), [
    (None, {"model": small.DENSE}), ("train", {"steps": 20}), ("train", {"batch_size": 16}),
    ("optimizer", {"weight_decay": 0.0}), ("data", {"sample_masking": True})])
def test_lanes_that_need_different_programs_are_refused_by_what_is_allowed(part, change):
  if part:
    change = {part: dataclasses.replace(getattr(FIRST, part), **change)}
  with pytest.raises(ValueError, match=r"optimizer\.learning_rate.*train\.seed"):
    Program([FIRST, dataclasses.replace(FIRST, **change)], {})


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="cuDNN may attend here")
def test_evaluations_attend_as_steps_do():
  cfg = dataclasses.replace(FIRST, train=dataclasses.replace(FIRST.train, attend="cudnn"))
  rows = small.rows()
  heldout = HeldOut(rows["tokens"], rows["loss_mask"], np.ones_like(rows["loss_mask"]), 1, 1)
  with pytest.raises(ValueError, match="attention by cuDNN needs an NVIDIA GPU"):
    Program([cfg], {"web": heldout}).evaluate(tiny.variables(cfg.model))


def test_lanes_on_a_mesh_are_refused():
  cfg = dataclasses.replace(FIRST, train=dataclasses.replace(FIRST.train, data=2))
  with pytest.raises(ValueError, match=r"train\.data=2.*one at a time"):
    Program([cfg, cfg], {})


@pytest.fixture(scope="module")
def eight_devices():
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu",
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run([sys.executable, HERE / "program_on_eight_devices.py"], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_step_on_eight_devices_equals_one_devices(eight_devices):
  assert eight_devices["start"] == eight_devices["router"] == 0
  # Float32, the sums over tokens split in eight.
  assert max(eight_devices[name] for name in ("params", "moments", "metrics")) < 1e-5
  assert eight_devices["moved"] > 1e-2


def test_sample_masking_keeps_documents_apart(eight_devices):
  assert abs(eight_devices["loss"] / eight_devices["joined_loss"] - 1) > 1e-4


def test_the_state_stays_where_abstract_state_says(eight_devices):
  assert eight_devices["as_told"]
  assert eight_devices["shard"] == [*eight_devices["whole"][:-1], eight_devices["whole"][-1] // 4]


def test_micro_batches_that_do_not_divide_over_the_mesh_are_refused(eight_devices):
  assert eight_devices["refusal"] == "4 sequences at a time do not divide over 8 devices"
