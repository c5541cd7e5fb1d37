"""The model's variables as plain trees: making them, their shapes, and their logical axis names."""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.transformer import Transformer


def init(cfg: ModelConfig, key: jax.Array) -> dict:
  """Returns `{"params": ..., "router": ...}`, plain arrays in the policy's parameter format.

  Args:
    cfg: the architecture.
    key: a jax.random key; matrices are normal with std `cfg.init_std`, norms one, biases zero.
  """
  return nn.meta.unbox(_boxed(cfg)(key))


def init_on_host(cfg: ModelConfig, seed: int) -> dict:
  """The same distribution as numpy arrays: no compile, which takes a small model's `init` seconds.

  An array depends on the seed and on its own path alone, so that two architectures start from the
  same values wherever they share a parameter.

  Args:
    cfg: the architecture.
    seed: in 0..2^32 - 1.
  """
  def draw(path, shape):
    name = "/".join(key.key for key in path)
    if path[0].key != "params" or path[-1].key.startswith("b_"):
      return np.zeros(shape.shape, shape.dtype)
    if path[-1].key == "scale":
      return np.ones(shape.shape, shape.dtype)
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    values = generator.standard_normal(shape.shape, np.float32) * np.float32(cfg.init_std)
    return values.astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_variables(cfg))


def abstract_variables(cfg: ModelConfig) -> dict:
  """The same tree with a ShapeDtypeStruct for every array; nothing is allocated."""
  return nn.meta.unbox(jax.eval_shape(_boxed(cfg), jax.random.key(0)))


def logical_axes(cfg: ModelConfig) -> dict:
  """The same tree with a PartitionSpec of logical axis names for every array.

  Names: layers, embed, vocab, heads, kv_heads, head_dim, q_lora, kv_lora, mlp, expert, norm.
  """
  return nn.get_partition_spec(jax.eval_shape(_boxed(cfg), jax.random.key(0)))


def shardings(cfg: ModelConfig, mesh: jax.sharding.Mesh, rules: Any = None) -> dict:
  """The same tree with a NamedSharding for every array.

  Args:
    cfg: the architecture.
    mesh: the devices.
    rules: logical axis name to mesh axis name (or several, or None), as a mapping, as pairs, or as
      a dataclass such as `train.mesh.ShardingRules`; None means `embed` over an axis `fsdp`.

  Raises:
    ValueError: if an array would use a mesh axis twice, or does not divide over the mesh.
  """
  if rules is None:
    rules = {"embed": "fsdp"} if "fsdp" in mesh.axis_names else {}
  rules, wrong = _pairs(rules), []

  def one(path, names, shape):
    name = "/".join(key.key for key in path)
    try:
      sharding = nn.logical_to_mesh_sharding(names, mesh, rules)
      sharding.shard_shape(shape.shape)
    except ValueError as error:
      wrong.append(f"{name} {shape.shape}, axes {tuple(names)}: {error}")
      return None
    used = [axis for part in sharding.spec if part
            for axis in (part if isinstance(part, tuple) else (part,))]
    if len(used) < len(_wanted(names, dict(rules))):
      wrong.append(f"{name}, axes {tuple(names)}: two of them want the same mesh axis")
    return sharding

  tree = jax.tree_util.tree_map_with_path(
      one, logical_axes(cfg), abstract_variables(cfg),
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  if wrong:
    raise ValueError("these arrays do not fit the mesh:\n  " + "\n  ".join(wrong))
  return tree


def _wanted(names, rules: dict) -> list[str]:
  """The mesh axes that an array's logical axes ask for."""
  axes = [rules.get(name) for name in names if name]
  return [axis for part in axes if part for axis in (part if isinstance(part, tuple) else (part,))]


def _pairs(rules: Any) -> list[tuple[str, Any]]:
  if dataclasses.is_dataclass(rules):
    rules = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}
  if isinstance(rules, Mapping):
    rules = rules.items()
  if not isinstance(rules, Iterable):
    raise ValueError(f"rules should be a mapping, pairs or a dataclass, not {rules!r}")
  return [(name, axes) for name, axes in rules]


def _boxed(cfg: ModelConfig):
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(lambda key: Transformer(cfg).init(key, tokens_BT, logits=False))
