"""The model's variables as plain trees: initialisation, shapes, logical axis names, shardings."""

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
  """Initialises the model's variables.

  Args:
    cfg: the architecture.
    key: a jax.random key.

  Returns:
    `{"params": ..., "router": ...}`, trees of plain arrays; "router" only if there is a balancing
    bias. Matrices are normally distributed with std `cfg.init_std`, the scales of norms are one,
    and biases zero. Parameters have the format `cfg.numerics.params`, balancing biases float32.
  """
  return nn.meta.unbox(_boxed(cfg)(key))


def init_on_host(cfg: ModelConfig, seed: int) -> dict:
  """Returns variables like those of `init`, as numpy arrays, without compiling anything.

  Compiling `init` takes seconds, even for a small model. The distribution is the same, the values
  are not. An array depends only on the seed and on its own path and shape, so that two
  architectures start from the same values wherever they share a parameter.

  Args:
    cfg: the architecture.
    seed: an integer in 0..2^32 - 1.
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
  """Returns the tree of `init` with a ShapeDtypeStruct for every array; nothing is allocated."""
  return nn.meta.unbox(jax.eval_shape(_boxed(cfg), jax.random.key(0)))


def logical_axes(cfg: ModelConfig) -> dict:
  """Returns the tree of `init` with a PartitionSpec of logical axis names for every array.

  The names are: layers, embed, vocab, heads, kv_heads, head_dim, q_lora, kv_lora, mlp, expert,
  expert_embed, norm.
  """
  return nn.get_partition_spec(jax.eval_shape(_boxed(cfg), jax.random.key(0)))


def shardings(cfg: ModelConfig, mesh: jax.sharding.Mesh, rules: Any = None) -> dict:
  """Returns the tree of `init` with a NamedSharding for every array.

  Args:
    cfg: the architecture.
    mesh: the devices.
    rules: a mesh axis (or several, or None) for every logical axis name: a mapping, a sequence of
      pairs, or a dataclass such as `train.mesh.ShardingRules`. None shards `embed` and
      `expert_embed` over the mesh axis `fsdp`, if there is one, and nothing else.

  Raises:
    ValueError: if an array would use a mesh axis twice, or does not divide evenly over its mesh
      axes; all such arrays are named.
  """
  if rules is None:
    rules = dict.fromkeys(("embed", "expert_embed"), "fsdp") if "fsdp" in mesh.axis_names else {}
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
    if len(used) < len(_mapped_axes(names, dict(rules))):
      wrong.append(f"{name}, axes {tuple(names)}: two of them map to the same mesh axis")
    return sharding

  tree = jax.tree_util.tree_map_with_path(
      one, logical_axes(cfg), abstract_variables(cfg),
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  if wrong:
    raise ValueError("the rules cannot shard these arrays over the mesh:\n  " + "\n  ".join(wrong))
  return tree


def _mapped_axes(names, rules: dict) -> list[str]:
  """Returns the mesh axes that the rules give for an array's logical axes."""
  axes = [rules.get(name) for name in names if name]
  return [axis for part in axes if part for axis in (part if isinstance(part, tuple) else (part,))]


def _pairs(rules: Any) -> list[tuple[str, Any]]:
  if dataclasses.is_dataclass(rules):
    rules = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}
  if isinstance(rules, Mapping):
    rules = rules.items()
  if not isinstance(rules, Iterable):
    raise ValueError(
        f"sharding rules must be a mapping, a sequence of pairs or a dataclass, not {rules!r}")
  return [(name, axes) for name, axes in rules]


def _boxed(cfg: ModelConfig):
  """Returns the jitted initialisation, whose arrays come in boxes with their logical axis names."""
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(lambda key: Transformer(cfg).init(key, tokens_BT, logits=False))
