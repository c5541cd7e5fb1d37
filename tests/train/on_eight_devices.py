"""Runs small models on one and on eight simulated devices; prints the differences as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/train/on_eight_devices.py FOLDER

FOLDER receives a checkpoint, which is loaded with and without a mesh.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import tiny

import model
from train.mesh import ShardedModel, ShardingRules, make_mesh

CFG = dataclasses.replace(
    tiny.V3, d_model=32, ffn_dim=24, vocab_size=40, mtp=None,
    attention=dataclasses.replace(tiny.V3.attention, num_heads=2),
    moe=dataclasses.replace(tiny.V3.moe, expert_dim=16))


def loss(transformer, variables, tokens_BT):
  out = transformer.apply(variables, tokens_BT, logits=False)
  logp_BT = transformer.apply(
      variables, out.hidden_BTD[:, :-1], tokens_BT[:, 1:], method="token_logprobs")
  return -logp_BT.mean(), (out.hidden_BTD, out.expert_load_LE)


def step(transformer):
  def run(params, router, tokens_BT):
    return jax.value_and_grad(
        lambda p: loss(transformer, {"params": p, "router": router}, tokens_BT),
        has_aux=True)(params)

  return run


def max_rel_diff(a, b) -> float:
  """Returns the largest difference in any array, relative to that array's largest value in b."""
  relative = lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()
                                / max(np.abs(np.asarray(y)).max(), 1e-30))
  return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def main(folder: str) -> None:
  assert jax.device_count() == 8
  variables, tokens_BT = tiny.variables(CFG), tiny.tokens(CFG, 8, 32)
  one = jax.jit(step(model.Transformer(CFG)))(
      variables["params"], variables["router"], tokens_BT)
  results = {}
  for name, sizes, fields in (
      ("data x fsdp, token parallel", {"data": 2, "fsdp": 4}, {}),
      ("data x fsdp, partitioned by the compiler", {"data": 2, "fsdp": 4},
       {"dispatch": model.moe.local_dispatch})):
    sharded = ShardedModel(CFG, make_mesh(**sizes))
    placed = jax.device_put(variables, sharded.variables())
    batch = jax.device_put(tokens_BT, sharded.batch())
    run = sharded.jit(step(sharded.transformer(**fields)))
    (value, (hidden, load)), grads = run(placed["params"], placed["router"], batch)
    (want, (want_hidden, want_load)), want_grads = one
    results[name] = {
        "forward": max_rel_diff([value, hidden], [want, want_hidden]),
        "gradients": max_rel_diff(grads, want_grads),
        "loads_equal": bool((np.asarray(load) == np.asarray(want_load)).all())}

  # Right-padded prompts, sampled on each mesh: the tokens are those of one device.
  lengths_B = np.array([5, 2, 7, 4, 3, 6, 7, 2], np.int32)
  sample = lambda net, variables: model.generate(
      net, variables, tokens_BT[:, :7], lengths_B, max_new_tokens=5, key=jax.random.key(3))
  want = sample(model.Transformer(CFG), variables)
  results["generate"] = {}
  for sizes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}):
    sharded = ShardedModel(CFG, make_mesh(**sizes))
    found = sharded.jit(functools.partial(sample, sharded.transformer()))(
        jax.device_put(variables, sharded.variables()))
    results["generate"][" ".join(sizes)] = {
        "tokens_equal": bool((np.asarray(found.tokens_BN) == np.asarray(want.tokens_BN)).all()),
        "logprobs": float(np.abs(np.asarray(found.logprobs_BN) - want.logprobs_BN).max())}

  mesh = make_mesh(data=2, fsdp=-1)
  dense = dataclasses.replace(tiny.MHA, d_model=32, num_layers=1)
  results["init"] = max_rel_diff(ShardedModel(dense, mesh).init(jax.random.key(0)),
                                 model.init(dense, jax.random.key(0)))
  model.hf.save(folder, CFG, variables)
  _, loaded = model.hf.load(folder, mesh=mesh, rules=ShardingRules())
  _, plain = model.hf.load(folder)
  w_down = loaded["params"]["moe_layers"]["ffn"]["w_down"]
  results["load"] = {
      "difference": max_rel_diff(loaded, plain),
      "shard": list(w_down.addressable_shards[0].data.shape), "whole": list(w_down.shape)}
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv[1])
