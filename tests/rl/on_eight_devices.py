r"""Runs RL on one and on eight simulated devices; prints what came of it as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python tests/rl/on_eight_devices.py TASK FOLDER

Shape letters:  S sequences
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import tiny

import model
from rl.config import ObjectiveConfig, RLConfig, SamplingConfig
from rl.rollout import rollout
from rl.step import abstract_rl_state, experience, init_rl_state, make_update
from tests.rl import small, test_rollout
from tests.train import small as train_small
from train.mesh import make_mesh, spread
from train.run_folder import MetricsFile

MESH = {"data": 2, "fsdp": 4}
MOE = dataclasses.replace(train_small.MOE, mtp=None, d_model=32, max_seq_len=32)
SAMPLING = SamplingConfig(num_prompts=8, num_generations=4, max_completion_length=20)
LENGTH = 12  # of the longest completion
OBJECTIVES = {
    # Two steps with the same rollout, micro-batches, and the balancing bias moved.
    "grpo": {"minibatches": 2, "micro_batch_size": 8, "bias_rate": 0.01, "sequence_balance": 0.5},
    "ppo": {"micro_batch_size": 16, "routing": "replayed"}}


def rollouts() -> dict:
  """Differing completions, each checked to differ from an unsure choice on only."""
  given, one, slots = test_rollout.prompts(), test_rollout.at_once(), test_rollout.by_twenty()
  variables, mesh = tiny.variables(test_rollout.MLA), make_mesh(**MESH)

  def eight(**changed):
    return jax.tree.map(np.asarray, rollout(
        model.Transformer(test_rollout.MLA), variables, given, mesh=mesh, **{
            "max_new_tokens": test_rollout.NEW, "stop_token": test_rollout.STOP,
            "temperature": test_rollout.TEMPERATURE, "slots": 3, **changed}))

  refilled, as_many = eight(), eight(slots=20)
  plain = rollout(model.Transformer(MOE), tiny.variables(MOE), given, mesh=mesh, slots=3,
                  max_new_tokens=3, stop_token=None, record_experts=True)
  want = rollout(model.Transformer(MOE), tiny.variables(MOE), given, slots=20, max_new_tokens=3,
                 stop_token=None, record_experts=True)
  try:
    eight(slots=0)
    given = jax.tree.map(lambda x: x[:12], given)
    eight()
  except ValueError as error:
    refusal = str(error)
  return {
      "other_shapes": test_rollout.check_same(test_rollout.prompts(), one, refilled),
      "equal_shapes": test_rollout.check_same(test_rollout.prompts(), slots, as_many),
      "decode_steps": int(refilled.decode_steps), "tokens": int(refilled.lengths_S.sum()),
      "experts_differ": float((np.asarray(plain.experts_STLK) != want.experts_STLK).mean()),
      "refusal": refusal}


def config(name: str, **mesh) -> RLConfig:
  return RLConfig(
      sampling=SAMPLING, objective=ObjectiveConfig(name=name, **OBJECTIVES[name]),
      optimizer=train_small.OPTIMIZER, loop=dataclasses.replace(small.LOOP, **mesh))


def seen(cfg: RLConfig):
  """Ragged completions, sharing devices unevenly: the first ones are all short."""
  rng, count = np.random.default_rng(0), SAMPLING.num_sequences
  prompts = [rng.integers(1, MOE.vocab_size, 1 + i % 4) for i in range(count)]
  lengths_S = np.where(np.arange(count) < 4, 1, rng.integers(1, LENGTH + 1, count))
  experts = None
  if cfg.objective.routing == "replayed":
    experts = np.tile(np.array([1, 4, 6], np.int16), (count, LENGTH + 4, 1, 1))
  return experience(
      prompts, rng.integers(0, MOE.vocab_size, (count, LENGTH)), lengths_S,
      np.full((count, LENGTH), -3.0), rng.standard_normal(count), np.arange(count) % 5 > 0,
      experts_STLK=experts, multiple=16)


def updated(cfg: RLConfig):
  """The state after two updates, with the metrics of the last, and whether it is where it was."""
  mesh = spread(MOE, data=cfg.loop.data, fsdp=cfg.loop.fsdp)
  state = init_rl_state(tiny.variables(MOE), cfg, mesh)
  told = abstract_rl_state(tiny.variables(MOE), cfg, mesh)
  rates = np.full(cfg.objective.updates, 1e-2, np.float32)
  hyper = {"learning_rate": rates, "value_learning_rate": rates, "spec": cfg.objective.spec(LENGTH),
           "temperature": np.float32(0.7), "gae_lambda": np.float32(0.95)}
  for step in range(2):
    state, metrics = make_update(MOE, cfg)(state, seen(cfg), hyper, jax.random.key(step))
  stays = all(jax.tree.leaves(jax.tree.map(
      lambda x, a: a.sharding is None or x.sharding.is_equivalent_to(a.sharding, x.ndim),
      state, told)))
  return state, metrics, stays


def update(name: str) -> dict:
  """How far apart one update is on one device and on eight, relative to each array's largest."""
  one, one_metrics, _ = updated(config(name))
  eight, metrics, stays = updated(config(name, **MESH))
  bias = jax.tree.leaves(eight.train.router)[0]
  copies = [np.asarray(shard.data) for shard in bias.addressable_shards]
  w_down = eight.train.params["moe_layers"]["ffn"]["w_down"]
  start = tiny.variables(MOE)["params"]
  return {
      "state": train_small.apart(
          (eight.train.params, eight.train.moments), (one.train.params, one.train.moments)),
      "value": train_small.apart(eight.value, one.value) if one.value else 0.0,
      "metrics": {key: abs(float(np.abs(np.asarray(metrics[key]) - np.asarray(value)).max()))
                  / max(1.0, float(np.abs(value).max())) for key, value in one_metrics.items()},
      "moved": train_small.apart(one.train.params, start),
      "router": train_small.apart(eight.train.router, one.train.router),
      "copies_equal": all((copy == copies[0]).all() for copy in copies),
      "stays": stays, "shard": list(w_down.addressable_shards[0].data.shape),
      "whole": list(w_down.shape)}


def loop(task: str, folder: pathlib.Path) -> dict:
  """Two steps on eight devices, at once, one by one, and the second on one device."""
  eight = small.config(task, loop={"steps": 2, **MESH})
  one = small.config(task, loop={"steps": 2})
  whole = small.run(eight, folder / "whole")
  small.run(eight, folder / "parts", max_seconds=1e-9)
  parts = small.run(eight, folder / "parts")
  small.run(eight, folder / "moved", max_seconds=1e-9)
  moved = small.run(one, folder / "moved")
  alone = small.run(one, folder / "alone")
  bits = lambda state: [np.asarray(x).view(np.int32).tolist() for x in jax.tree.leaves(state)]
  rewards = lambda name: [
      row["reward"] for row in MetricsFile(folder / name / "metrics.jsonl").read()]
  return {
      "same_bits": bits(whole.state) == bits(parts.state),
      "devices": len(whole.state.train.params["norm"]["scale"].sharding.device_set),
      "moved_devices": len(moved.state.train.params["norm"]["scale"].sharding.device_set),
      "moved": train_small.apart(moved.state.train.params, whole.state.train.params),
      "alone": train_small.apart(alone.state.train.params, whole.state.train.params),
      "rewards": [rewards(name) for name in ("whole", "parts", "moved", "alone")],
      "evaluations": [row["pass@1"] for row in whole.evaluations],
      "alone_evaluations": [row["pass@1"] for row in alone.evaluations]}


def main(task: str, folder: str) -> None:
  assert jax.device_count() == 8
  print(json.dumps({"rollouts": rollouts(), "loop": loop(task, pathlib.Path(folder)),
                    **{name: update(name) for name in OBJECTIVES}}))


if __name__ == "__main__":
  main(*sys.argv[1:])
