"""Running a function on every device of a mesh, on the tokens that are there.

The compiler divides what it has made itself among devices, but no kernel. Which axes tokens are
spread over is what the logical axes "batch" and "length" mean where the model is traced.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def map_token_shards(
    function: Callable[[Any, jax.Array], jax.Array], weights: Any, x_BT: jax.Array) -> jax.Array:
  """function(weights, x), by each device for its own tokens, the weights gathered whole.

  Without a mesh, on one device of it already, or where tokens do not divide over it, it is just
  that, and the compiler's to divide.

  Args:
    function: gives for every token what depends on no other.
    weights: a tree; its gradients are summed over devices.
    x_BT: [batch, length, ...].
  """
  mesh, tokens = jax.sharding.get_abstract_mesh(), _axes_of_tokens()
  axes = tuple(jax.tree.leaves(tuple(tokens)))
  if not axes or set(mesh.manual_axes) & set(axes) or not _divides(mesh, tokens, x_BT.shape):
    return function(weights, x_BT)

  def local(weights, x_BT):
    # Marked as varying, so that their gradients are summed over the devices on the way back.
    varying = jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), weights)
    return function(varying, x_BT)

  return jax.shard_map(local, in_specs=(PartitionSpec(), tokens), out_specs=tokens)(weights, x_BT)


def _axes_of_tokens() -> PartitionSpec:
  if jax.sharding.get_abstract_mesh().empty or not nn.get_logical_axis_rules():
    return PartitionSpec()
  return nn.logical_to_mesh_axes(("batch", "length"))


def _divides(mesh: jax.sharding.AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
  """Whether an array of this shape can be spread so."""
  parts = (math.prod(mesh.shape[axis] for axis in jax.tree.leaves(axes)) for axes in spec)
  return all(size % part == 0 for size, part in zip(shape, parts, strict=False))
