r"""Runs RL on one and on eight simulated devices; prints the comparisons as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python tests/rl/on_eight_devices.py TASK FOLDER

Shape letters:  S sequences  N new tokens
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import tiny

import model
from rl.config import ObjectiveConfig, RLConfig, SamplingConfig
from rl.mtp import split_mtp
from rl.rollout import Prompts, Rollout, rollout
from rl.step import abstract_rl_state, experience, init_rl_state, make_update
from tests.rl import small, test_rollout
from tests.train import small as train_small
from train.config import MeshConfig
from train.mesh import make_mesh, make_sharded_model

MESH = {"data": 2, "fsdp": 4}
MOE = dataclasses.replace(train_small.MOE, mtp=None, d_model=32, max_seq_len=32)
WITH_MTP = dataclasses.replace(MOE, mtp=model.MTPConfig(depth=1))
WIDE = dataclasses.replace(small.MODEL, d_model=64, ffn_dim=256, vocab_size=MOE.vocab_size)
SEQUENCES, LENGTH = 32, 12


def refusal(function, *args) -> str:
  """Returns the message of the error that a call raises, or "" if it raises none."""
  try:
    function(*args)
  except (ValueError, AssertionError) as error:
    return str(error) or "an assertion failed"
  return ""


def roll(given: Prompts, mesh=None) -> Rollout:
  return jax.tree.map(np.asarray, rollout(
      model.Transformer(MOE), tiny.variables(MOE), given, slots=3, mesh=mesh, record_experts=True,
      max_new_tokens=test_rollout.NEW, stop_token=test_rollout.STOP,
      temperature=test_rollout.TEMPERATURE))


def rollouts() -> dict:
  """Counts the completions that differ, and reports one that differs other than at a near tie."""
  given, mesh = test_rollout.prompts(), make_mesh(**MESH)
  one, eight = roll(given), roll(given, mesh)
  same_S = (one.mask_SN == eight.mask_SN).all(1) & (
      (one.tokens_SN == eight.tokens_SN) | ~one.mask_SN).all(1)
  return {
      "sequences": len(same_S), "differ": int((~same_S).sum()),
      "beyond_near_ties": refusal(test_rollout.check_same, given, one, eight, MOE),
      "experts_differ": float((one.experts_STLK != eight.experts_STLK)[same_S].mean()),
      "decode_steps": [int(one.decode_steps), int(eight.decode_steps)],
      "refusal": refusal(roll, jax.tree.map(lambda x: x[:12], given), mesh)}


def config(micro: int = 8, **mesh) -> RLConfig:
  """Returns a config of two steps per rollout, in micro-batches, that move the balancing bias."""
  return RLConfig(
      sampling=SamplingConfig(num_prompts=8, num_generations=4, max_completion_length=20),
      objective=ObjectiveConfig(name="grpo", minibatches=2, micro_batch_size=micro, bias_rate=0.01,
                                sequence_balance=0.5, routing="observed", entropy_weight=0.01,
                                mtp_learning_rate=1e-2),
      optimizer=train_small.OPTIMIZER, loop=small.LOOP,
      mesh=MeshConfig(**mesh))


def sampled():
  """Returns ragged completions: some devices have many tokens, some have none to learn from."""
  rng, place_S = np.random.default_rng(0), np.arange(SEQUENCES)
  prompts = [rng.integers(1, MOE.vocab_size, 1 + i % 4) for i in place_S]
  lengths_S = np.where(place_S < 6, 1, rng.integers(1, LENGTH + 1, SEQUENCES))
  experts = np.tile(np.array([1, 4, 6], np.int16), (SEQUENCES, LENGTH + 4, 1, 1))
  return experience(
      prompts, rng.integers(0, MOE.vocab_size, (SEQUENCES, LENGTH)), lengths_S,
      np.full((SEQUENCES, LENGTH), -3.0), rng.standard_normal(SEQUENCES), place_S % 5 > 0,
      experts_STLK=experts, multiple=16)


def arguments(network: model.ModelConfig, cfg: RLConfig, given) -> tuple:
  """Returns the arguments of an update: state, experience, hyper-parameters and key."""
  rates = np.full(cfg.objective.updates, 1e-2, np.float32)
  hyper = {"learning_rate": rates, "value_learning_rate": rates, "spec": cfg.objective.spec(LENGTH),
           "temperature": np.float32(0.7), "gae_lambda": np.float32(1)}
  if cfg.objective.mtp_learning_rate:
    hyper["mtp_learning_rate"] = rates
  mesh = make_sharded_model(network, cfg.mesh)
  return init_rl_state(tiny.variables(network), cfg, mesh), given, hyper, jax.random.key(0)


def flops(**mesh) -> float:
  """Returns one device's FLOPs in an update of a dense model; its width makes products dominate."""
  cfg, given = config(**mesh), sampled().replace(experts=None)
  cfg = dataclasses.replace(cfg, objective=ObjectiveConfig(
      name="grpo", minibatches=1, micro_batch_size=8))
  compiled = make_update(WIDE, cfg).lower(*arguments(WIDE, cfg, given)).compile()
  return compiled.cost_analysis()["flops"]


def updated(cfg: RLConfig):
  """Returns the state and metrics after an update, and whether the state kept its shardings."""
  mesh = make_sharded_model(WITH_MTP, cfg.mesh)
  state, metrics = make_update(WITH_MTP, cfg)(*arguments(WITH_MTP, cfg, sampled()))
  same_sharding = lambda x, a: a.sharding is None or x.sharding.is_equivalent_to(a.sharding, x.ndim)
  abstract = abstract_rl_state(tiny.variables(WITH_MTP), cfg, mesh)
  return state, metrics, all(jax.tree.leaves(jax.tree.map(same_sharding, state, abstract)))


def update() -> dict:
  """Compares an update on one device and on eight, relative to each array's largest value."""
  one, one_metrics, _ = updated(config())
  eight, metrics, stays = updated(config(**MESH))
  magnitude = lambda name: np.abs(np.asarray(one_metrics[name]))
  copies = [np.asarray(shard.data)
            for shard in jax.tree.leaves(eight.train.router)[0].addressable_shards]
  w_down = eight.train.moments.mu["moe_layers"]["ffn"]["w_down"]
  return {
      "train": train_small.max_rel_diff((eight.train.params, eight.train.moments),
                                       (one.train.params, one.train.moments)),
      "mtp": train_small.max_rel_diff((eight.mtp.params, eight.mtp.moments),
                                      (one.mtp.params, one.mtp.moments)),
      "mtp_router": train_small.max_rel_diff(eight.mtp.router, one.mtp.router),
      "mtp_moved": train_small.max_rel_diff(
          one.mtp.params, split_mtp(tiny.variables(WITH_MTP))[1]["params"]),
      "reference": train_small.max_rel_diff(eight.reference, one.reference),
      "router": train_small.max_rel_diff(eight.train.router, one.train.router),
      "copies_equal": all((copy == copies[0]).all() for copy in copies),
      "metrics": {name: float(np.abs(np.asarray(metrics[name]) - one_metrics[name]).max()
                              / max(1, magnitude(name).max())) for name in one_metrics},
      "moved": train_small.max_rel_diff(
          one.train.params, split_mtp(tiny.variables(WITH_MTP))[0]["params"]),
      "flops": [flops(), flops(**MESH)], "stays": stays,
      "shard": list(w_down.addressable_shards[0].data.shape), "whole": list(w_down.shape),
      "refusal": refusal(make_update, MOE, config(micro=4, **MESH)),
      "misfit": refusal(make_update, MOE, config(data=3))}


def loop(task: str, folder: pathlib.Path) -> dict:
  """Runs two steps of PPO on eight devices: at once, with a stop, and the second on one device."""
  eight, one = (small.config(task, objective={"name": "ppo"}, loop={"steps": 2}, mesh=mesh)
                for mesh in (MESH, {}))
  whole = small.run(eight, folder / "whole")
  stopped = small.run(eight, folder / "parts", max_seconds=1e-9).status
  shutil.copytree(folder / "parts", folder / "moved")
  parts = small.run(eight, folder / "parts")
  moved = small.run(one, folder / "moved")
  devices = lambda run: len(run.state.train.params["norm"]["scale"].sharding.device_set)
  learned = lambda run: (run.state.train.params, run.state.value.params)
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
                      whole.state, parts.state)
  return {
      "stopped": stopped, "same_bits": all(jax.tree.leaves(same)),
      "devices": [devices(run) for run in (whole, parts, moved)],
      "difference_after_move": train_small.max_rel_diff(learned(moved), learned(whole)),
      "learned": train_small.max_rel_diff(whole.state.train.params, small.variables()["params"]),
      "rewards": [[row["reward"] for row in run.rows] for run in (whole, parts, moved)],
      "evaluations": [[row["pass@1"] for row in run.evaluations] for run in (whole, parts, moved)]}


def main(task: str, folder: str) -> None:
  assert jax.device_count() == 8
  print(json.dumps({"rollouts": rollouts(), "update": update(),
                    "loop": loop(task, pathlib.Path(folder))}))


if __name__ == "__main__":
  main(*sys.argv[1:])
