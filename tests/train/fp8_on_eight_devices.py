"""Compares FP8 layers and a small model on one and on eight simulated devices; prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/train/fp8_on_eight_devices.py

Shape letters:  B sequences  T tokens  D model width  N output width
"""

import dataclasses
import functools
import json
import re
import unittest.mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import model
from model.token_shards import map_token_shards
from pallas_kernels import Weight, fp8_linear, implementations, quantize_weight
from train.config import OptimizerConfig
from train.losses import Batch, LanguageModelLoss
from train.mesh import ShardedModel, make_mesh
from train.optimizer import decay_mask
from train.step import init_state, make_train_step

jax.config.update("jax_disable_most_optimizations", True)

# Four shards of a width of 256 are 64 wide, half of a block of weights that shares a scale.
# Products are in float32, so that only the mesh makes a difference.
CFG = dataclasses.replace(
    tiny.V3, d_model=256, num_layers=1, num_dense_layers=0, mtp=None, vocab_size=40,
    attention=dataclasses.replace(tiny.V3.attention, num_heads=2),
    moe=dataclasses.replace(tiny.V3.moe, expert_dim=16),
    numerics=dataclasses.replace(model.NUMERICS["fp8"], compute="float32"))
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
HYPER = {"learning_rate": np.float32(1e-3), "bias_rate": np.float32(0), "num_micro_batches": 1,
         "weights": {"lm": 1.0, "mtp": 0.0, "sequence_balance": 0.0, "batch_balance": 0.0,
                     "expert_balance": 0.0}}
MESH = ShardedModel(CFG, make_mesh(data=2, fsdp=4))


def max_rel_norm(a, b) -> float:
  """Returns the largest Frobenius norm of any array's difference, relative to that array in b."""
  relative = lambda x, y: float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y))
                                / max(np.linalg.norm(np.asarray(y, np.float64)), 1e-30))
  return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def same(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(
      lambda x, y: np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)))


def training() -> dict:
  """Trains a step with 128 tokens per device, so that tiles along tokens are as on one device."""
  def step(net):
    return make_train_step(LanguageModelLoss(net), OPTIMIZER, decay_mask(CFG),
                           prepare=functools.partial(model.quantize_weights, CFG))

  tokens = np.random.default_rng(0).integers(0, 40, (1, 8, 129)).astype(np.int32)
  batch = Batch(tokens, np.ones((1, 8, 128), bool), None)
  state = init_state(tiny.variables(CFG), OPTIMIZER)
  one, one_metrics = jax.jit(step(model.Transformer(CFG)))(state, batch, HYPER)
  placed = jax.device_put(state, MESH.train_state(state))
  eight, metrics = MESH.jit(step(MESH.transformer()))(placed, batch, HYPER)
  # After one step, the first moment is a tenth of the gradient.
  return {"losses": [float(one_metrics["loss"]), float(metrics["loss"])],
          "difference": max_rel_norm(
              jax.device_get(eight.moments.mu), jax.device_get(one.moments.mu))}


def weights() -> dict:
  """Returns the width of a shard, and whether quantised weights equal one device's bit for bit."""
  variables = tiny.variables(CFG)
  quantize = functools.partial(model.quantize_weights, CFG)
  placed = jax.device_put(variables, MESH.variables())["params"]
  shard = placed["moe_layers"]["ffn"]["shared"]["w_gate_up"].addressable_shards[0].data.shape
  return {"width": shard[1],
          "same": same(MESH.jit(quantize)(placed), jax.jit(quantize)(variables["params"]))}


def layer(ahead: bool, implementation: str, w_DN, x_BTD):
  """A linear layer as the model calls it; `ahead` quantises its weight before the call."""
  w = Weight(w_DN, quantize_weight(w_DN, CFG.numerics.recipe)) if ahead else w_DN

  def local(w, x_BTD):
    y = fp8_linear(x_BTD.reshape(-1, x_BTD.shape[-1]), w, implementation=implementation)
    return y.reshape(*x_BTD.shape[:-1], -1)

  return map_token_shards(local, w, x_BTD)


def gradients(ahead: bool, implementation: str):
  def gradient(w_DN, x_BTD):
    loss = lambda *operands: (layer(ahead, implementation, *operands).astype(jnp.float32)**2).sum()
    return jax.grad(loss, argnums=(0, 1))(w_DN, x_BTD)

  return gradient


def compare_layer(ahead: bool) -> dict:
  """Compares a layer's gradients on eight devices; lists the operand sizes of its GPU kernels."""
  rng = np.random.default_rng(0)
  w_DN = jnp.asarray(rng.standard_normal((256, 384)), jnp.float32)
  x_BTD = jnp.asarray(rng.standard_normal((8, 128, 256)), jnp.float32)
  shardings = (NamedSharding(MESH.mesh, PartitionSpec("fsdp")), MESH.batch())
  placed = jax.device_put((w_DN, x_BTD), shardings)
  ours, want = (MESH.jit(gradients(ahead, "xla"))(*placed),
                jax.jit(gradients(ahead, "xla"))(w_DN, x_BTD))
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in placed]
  with (unittest.mock.patch.object(implementations, "local_backend", lambda: "mosaic_gpu"),
        jax.set_mesh(MESH.mesh), nn.logical_axis_rules(MESH.rules.pairs())):
    text = jax.jit(gradients(ahead, "mosaic_gpu")).trace(*shapes).lower(
        lowering_platforms=("cuda",)).as_text()
    try:
      jax.eval_shape(functools.partial(fp8_linear, implementation="mosaic_gpu"), x_BTD[0], w_DN)
      refused = ""
    except ValueError as error:
      refused = str(error)
  kernels = re.findall(r"@mosaic_gpu_v2.*?: \((.*?)\) -> \(?([^)\n]*)", text)
  sizes = {int(size) for kernel in kernels for size in re.findall(r"\d+(?=x)", " ".join(kernel))}
  return {"difference": max_rel_norm(ours, want), "dx same": same(ours[1], want[1]),
          "kernels": len(kernels), "sizes": sorted(sizes), "refused": refused}


if __name__ == "__main__":
  print(json.dumps({"training": training(), "weights": weights(),
                    "layer": {str(ahead): compare_layer(ahead) for ahead in (False, True)}}))
