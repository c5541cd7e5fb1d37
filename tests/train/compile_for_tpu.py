"""Compiles a model's gradient with the real TPU compiler, for TPUs that this host does not have.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
      python tests/train/compile_for_tpu.py v5e:2x2

Prints a JSON object: the number of devices, the compile time in seconds, and the memory that one
device needs in GB: the peak, and its arguments, results, temporaries and program.
"""

import dataclasses
import json
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

import model
from pallas_kernels.targets import compiled_for
from train.mesh import ShardedModel, make_mesh

# A TPU computes a float32 product as six bfloat16 products, and the compiler takes more than twice
# as long.
CFG = dataclasses.replace(model.get_config("small"), numerics=model.NUMERICS["bf16"])
BATCH_PER_DEVICE = 2


def loss(transformer, params, router, tokens_BT):
  """Returns the mean negative log-probability of the next token plus 0.3 times the one after's."""
  variables = {"params": params, "router": router}
  out = transformer.apply(variables, tokens_BT, logits=False)
  nll = lambda hidden_BTD, ahead: -transformer.apply(
      variables, hidden_BTD[:, :-ahead], tokens_BT[:, ahead:], method="token_logprobs").mean()
  return nll(out.hidden_BTD, 1) + 0.3 * nll(out.mtp_hidden[0], 2)


def compile_gradient(sharded: ShardedModel):
  transformer, shardings = sharded.transformer(remat="v3"), sharded.variables()
  variables = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      model.abstract_variables(sharded.cfg), shardings)
  tokens_BT = jax.ShapeDtypeStruct(
      (BATCH_PER_DEVICE * sharded.mesh.size, sharded.cfg.max_seq_len), jnp.int32,
      sharding=sharded.batch())
  # Without out_shardings, the compiler replicates every gradient on all devices.
  step = jax.jit(jax.value_and_grad(lambda *args: loss(transformer, *args)),
                 out_shardings=(None, shardings["params"]))
  # The context that ShardedModel.jit traces in.
  with jax.set_mesh(sharded.mesh), nn.logical_axis_rules(sharded.rules.pairs()):
    return step.lower(variables["params"], variables["router"], tokens_BT).compile()


def main(topology: str) -> None:
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  started = time.perf_counter()
  with compiled_for(devices[0]):
    compiled = compile_gradient(ShardedModel(CFG, make_mesh(fsdp=len(devices), devices=devices)))
  seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
  print(json.dumps({
      "devices": len(devices), "seconds": seconds,
      "peak_gb": (memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes) / 1e9,
      "arguments_gb": memory.argument_size_in_bytes / 1e9,
      "results_gb": memory.output_size_in_bytes / 1e9,
      "temporaries_gb": memory.temp_size_in_bytes / 1e9,
      "program_gb": memory.generated_code_size_in_bytes / 1e9}))


if __name__ == "__main__":
  main(sys.argv[1])
