r"""Trains one step on one and on eight simulated devices; prints the differences as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python tests/train/program_on_eight_devices.py
"""

import collections
import dataclasses
import json
import re

import jax
import numpy as np

import model
from tests.train import small
from train.config import BalanceConfig, DataConfig, MeshConfig, RunConfig, TrainConfig
from train.program import Program

ROWS = small.rows(16)
JOINED = np.ones_like(ROWS["loss_mask"], np.int32)
SEPARATE = JOINED + (np.arange(small.LENGTH, dtype=np.int32) > 6)  # two documents in every row
MODEL = dataclasses.replace(  # every width divides over the mesh axes below
    small.MOE, d_model=32, ffn_dim=32, vocab_size=small.MOE.vocab_size // 2 * 2,
    attention=dataclasses.replace(small.MOE.attention, num_heads=4, num_kv_heads=2),
    moe=dataclasses.replace(small.MOE.moe, expert_dim=8))
ONE = RunConfig(
    MODEL, data=DataConfig(sample_masking=True),
    optimizer=small.OPTIMIZER, train=TrainConfig(steps=2, batch_size=16, micro_batch_size=8))
EIGHT = dataclasses.replace(ONE, mesh=MeshConfig(data=2, fsdp=4))
# Here every device has all parameters.
DATA = dataclasses.replace(ONE, mesh=MeshConfig(data=8))
# Losses of the whole batch need sums over all devices.
BALANCED = dataclasses.replace(
    ONE, balance=BalanceConfig(sequence_weight=0.5, batch_weight=0.5, expert_weight=0.5),
    data=DataConfig(), train=dataclasses.replace(ONE.train, micro_batch_size=None))
BALANCED_DATA = dataclasses.replace(BALANCED, mesh=MeshConfig(data=8))
# Together with EIGHT, this uses every axis that a mesh may have: experts over `expert`, heads and
# hidden widths over `tensor`. A sequence is never divided.
MIXED = dataclasses.replace(ONE, mesh=MeshConfig(fsdp=2, expert=2, tensor=2))
# Here gradients are added up in bfloat16.
HALF = dataclasses.replace(
    BALANCED, model=dataclasses.replace(MODEL, numerics=model.NUMERICS["bf16"]))
HALF_DATA = dataclasses.replace(HALF, mesh=MeshConfig(data=8))


def summed(cfg) -> dict[str, int]:
  """Returns the number of matrices that devices add up in a step, by their format."""
  text = Program([cfg], {}).lower().as_text()
  found = re.findall(r"stablehlo\.all_reduce.*?\}\) : \(tensor<(\w*x\w*x)(\w+)>", text, re.DOTALL)
  return dict(collections.Counter(dtype for _, dtype in found))


def refusal(**train) -> str:
  try:
    Program([dataclasses.replace(EIGHT, train=dataclasses.replace(EIGHT.train, **train))], {})
  except ValueError as error:
    return str(error)
  return ""


def run(cfg):
  """Returns a step's results, a shard's shape, and whether the state matches `abstract_state`."""
  program = Program([cfg], {})
  first, abstract = program.init(), program.abstract_state()
  start = jax.device_get(first.params)
  state, metrics = program.step(first, 0, ROWS | {"segments": SEPARATE})
  as_declared = jax.tree.map(
      lambda x, a: (x.shape, x.dtype) == (a.shape, a.dtype)
      and (a.sharding is None or x.sharding.is_equivalent_to(a.sharding, x.ndim)),
      state, abstract)
  _, joined = program.step(program.init(), 0, ROWS | {"segments": JOINED})
  w_down = state.params["moe_layers"]["ffn"]["w_down"].addressable_shards[0].data.shape
  return {"start": start, "state": state, "metrics": metrics, "loss": float(metrics["loss"]),
          "joined_loss": float(joined["loss"]), "w_down": list(w_down),
          "as_declared": all(jax.tree.leaves(as_declared))}


def compared(ours, want) -> dict:
  """Returns how much results differ from those of one device."""
  return {"params": small.max_rel_diff(ours["state"].params, want["state"].params),
          "router": small.max_rel_diff(ours["state"].router, want["state"].router),
          "metrics": small.max_rel_diff(ours["metrics"], want["metrics"]),
          "shard": ours["w_down"], "as_declared": ours["as_declared"]}


def main() -> None:
  assert jax.device_count() == 8
  one, eight, mixed, data, balanced, balanced_data, half, half_data = map(
      run, (ONE, EIGHT, MIXED, DATA, BALANCED, BALANCED_DATA, HALF, HALF_DATA))
  state, want = eight["state"], one["state"]
  print(json.dumps({
      "start": small.max_rel_diff(eight["start"], one["start"]),
      "params": small.max_rel_diff(state.params, want.params),
      "moments": small.max_rel_diff(state.moments, want.moments),
      "router": small.max_rel_diff(state.router, want.router),
      "metrics": small.max_rel_diff(eight["metrics"], one["metrics"]),
      "moved": small.max_rel_diff(want.params, one["start"]),
      "whole": one["w_down"], "shard": eight["w_down"], "as_declared": eight["as_declared"],
      "loss": eight["loss"], "joined_loss": eight["joined_loss"],
      "refusal": refusal(micro_batch_size=4),
      "data": compared(data, one), "balanced": compared(balanced_data, balanced),
      "mixed": compared(mixed, one), "half": compared(half_data, half),
      "summed": {"float32": summed(BALANCED_DATA), "bfloat16": summed(HALF_DATA),
                 "micro-batches": summed(dataclasses.replace(DATA, model=HALF.model))}}))


if __name__ == "__main__":
  main()
