"""Runs small models on one and on eight simulated devices; prints how far apart they are as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/train/on_eight_devices.py FOLDER

FOLDER is for a checkpoint that is written and read back under the mesh.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

import model
from train.mesh import ShardedModel, ShardingRules, make_mesh

CFG = dataclasses.replace(
    model.get_config("nano"), init_std=0.08, num_layers=3,
    moe=dataclasses.replace(model.get_config("nano").moe, num_experts=8))


def loss(transformer, variables, tokens_BT):
  out = transformer.apply(variables, tokens_BT, logits=False)
  logp = lambda hidden, ahead: transformer.apply(
      variables, hidden[:, :-ahead], tokens_BT[:, ahead:], method="token_logprobs").mean()
  return -logp(out.hidden_BTD, 1) - 0.3 * logp(out.mtp_hidden[0], 2), (
      out.hidden_BTD, out.expert_load_LE)


def step(transformer):
  def run(params, router, tokens_BT):
    return jax.value_and_grad(
        lambda p: loss(transformer, {"params": p, "router": router}, tokens_BT),
        has_aux=True)(params)

  return run


def apart(a, b) -> float:
  """Largest difference over any array, relative to that array's largest value."""
  relative = lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()
                                / max(np.abs(np.asarray(y)).max(), 1e-30))
  return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def main(folder: str) -> None:
  assert jax.device_count() == 8
  variables = model.init(CFG, jax.random.key(0))
  tokens_BT = jax.random.randint(jax.random.key(1), (8, 32), 0, CFG.vocab_size)
  one = jax.jit(step(model.Transformer(CFG)))(
      variables["params"], variables["router"], tokens_BT)
  results = {}
  for name, sizes, fields in (
      ("data x fsdp, token parallel", {"data": 2, "fsdp": 4}, {}),
      ("data x fsdp, left to the compiler", {"data": 2, "fsdp": 4},
       {"dispatch": model.moe.local_dispatch}),
      ("fsdp x tensor, token parallel", {"fsdp": 4, "tensor": 2}, {})):
    sharded = ShardedModel(CFG, make_mesh(**sizes))
    placed = jax.device_put(variables, sharded.variables())
    batch = jax.device_put(tokens_BT, sharded.batch())
    run = sharded.jit(step(sharded.transformer(**fields)))
    (value, (hidden, load)), grads = run(placed["params"], placed["router"], batch)
    (want, (want_hidden, want_load)), want_grads = one
    results[name] = {
        "forward": apart([value, hidden], [want, want_hidden]),
        "gradients": apart(grads, want_grads),
        "loads_equal": bool((np.asarray(load) == np.asarray(want_load)).all())}

  sharded = ShardedModel(CFG, make_mesh(data=2, fsdp=-1))
  made = sharded.init(jax.random.key(0))
  results["init"] = apart(made, variables)
  model.hf.save(folder, CFG, made)
  _, loaded = model.hf.load(folder, mesh=sharded.mesh, rules=ShardingRules())
  _, plain = model.hf.load(folder)
  w_down = loaded["params"]["moe_layers"]["ffn"]["w_down"]
  results["load"] = {
      "apart": apart(loaded, plain), "shard": list(w_down.addressable_shards[0].data.shape),
      "whole": list(w_down.shape)}
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv[1])
