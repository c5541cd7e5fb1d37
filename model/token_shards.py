"""Runs a function on every device of a mesh, on the device's own shard of the tokens.

XLA partitions its own operations over devices, but not our kernels. The mesh axes that tokens are
sharded over are those that the logical axes "batch" and "length" map to while the model is traced.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def map_token_shards(
    function: Callable[[Any, jax.Array], jax.Array], weights: Any, x_BT: jax.Array) -> jax.Array:
  """Returns function(weights, x_BT), computed by each device for its own tokens.

  The weights are gathered whole on every device. Without a mesh, inside a `jax.shard_map` over the
  tokens' axes, or if the tokens do not divide evenly over those axes, the function is called
  directly, and XLA partitions what it can.

  Args:
    function: takes `weights` and [batch, length, ...] and returns [batch, length, ...]; the result
      for a token must not depend on other tokens.
    weights: a tree of arrays, whose gradients are summed over devices.
    x_BT: [batch, length, ...].
  """
  mesh, tokens = jax.sharding.get_abstract_mesh(), _axes_of_tokens()
  axes = tuple(jax.tree.leaves(tuple(tokens)))
  if not axes or set(mesh.manual_axes) & set(axes) or not _divides(mesh, tokens, x_BT.shape):
    return function(weights, x_BT)

  def local(weights, x_BT):
    # Marked as varying, so that the backward pass sums their gradients over the devices.
    varying = jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), weights)
    return function(varying, x_BT)

  return jax.shard_map(local, in_specs=(PartitionSpec(), tokens), out_specs=tokens)(weights, x_BT)


def num_token_shards() -> int:
  """Returns over how many devices the compiler spreads arrays of tokens; 1 without a mesh.

  Inside a `jax.shard_map` arrays are those of one device, and the axes that it maps do not count.
  """
  mesh, axes = jax.sharding.get_abstract_mesh(), jax.tree.leaves(tuple(_axes_of_tokens()))
  return math.prod(mesh.shape[axis] for axis in axes if axis not in mesh.manual_axes)


def sum_over_devices(x: jax.Array) -> jax.Array:
  """Returns the sum over all devices of a `jax.shard_map` on which x varies; x without one.

  Arrays that follow from shapes alone do not vary, and are not summed: mark them by
  `pallas_kernels.implementations.varying_as` if every device has its own part of what they count.
  """
  axes = tuple(jax.typeof(x).manual_axis_type.varying)
  return jax.lax.psum(x, axes) if axes else x


def num_devices(x: jax.Array) -> int:
  """Returns on how many devices of a `jax.shard_map` x varies; see `sum_over_devices`."""
  return math.prod(jax.lax.axis_size(axis) for axis in jax.typeof(x).manual_axis_type.varying)


def _axes_of_tokens() -> PartitionSpec:
  if jax.sharding.get_abstract_mesh().empty or not nn.get_logical_axis_rules():
    return PartitionSpec()
  return nn.logical_to_mesh_axes(("batch", "length"))


def _divides(mesh: jax.sharding.AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
  """Whether an array of this shape divides evenly over the mesh axes of the spec."""
  parts = (math.prod(mesh.shape[axis] for axis in jax.tree.leaves(axes)) for axes in spec)
  return all(size % part == 0 for size, part in zip(shape, parts, strict=False))
