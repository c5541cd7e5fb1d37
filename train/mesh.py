"""Device meshes, and which axis of an array is divided over which axis of the mesh.

The model names the axes of its arrays (`model.logical_axes`); `ShardingRules` maps those logical
names to mesh axes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import model
from model import compiling
from train.config import MeshConfig

AXES = ("data", "fsdp", "expert", "tensor", "pipe")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, pipe: int = 1,
    devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with all five axes, in AXES' order.

  Args:
    data, fsdp, expert, tensor, pipe: number of devices along each axis; one of them may be -1, for
      all devices that the others leave.
    devices: the devices of the mesh; None for all devices.

  Raises:
    ValueError: if a size is invalid, or if their product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, expert, tensor, pipe]
  asked = dict(zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh axes must be positive, with at most one -1, and are {_written(asked)}")
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
  if math.prod(sizes) != len(devices):
    raise ValueError(
        f"{_written(asked)} is a mesh of {abs(math.prod(sizes))} devices, and there are "
        f"{len(devices)}: the product of the axes must be the number of devices, and one of them "
        "may be -1, for all that are left")
  return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def _written(sizes: dict[str, int]) -> str:
  """Returns the axes that are not 1 as they are set: `mesh.fsdp=2, mesh.tensor=4`."""
  return ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "mesh"


Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axes over which each logical axis of parameters and activations is divided.

  Every rule is a mesh axis, a tuple of mesh axes, or None for an axis that is not divided.

  Attributes:
    batch: sequences of a batch.
    length: tokens of a sequence.
    layers: layers of a stack.
    embed: width of the model.
    vocab: tokens of the vocabulary.
    heads: attention heads, those of the queries.
    kv_heads: heads of keys and values.
    head_dim: width of a head.
    q_lora: width of MLA's query latent.
    kv_lora: width of MLA's key-value latent.
    mlp: hidden width of dense feed-forward networks and experts.
    expert: routed experts.
    expert_embed: width of the model in the weights of routed experts.
    norm: weights of a normalisation.
  """

  batch: Axes = ("data", "fsdp")
  length: Axes = None
  layers: Axes = None
  embed: Axes = "fsdp"
  vocab: Axes = "tensor"
  heads: Axes = "tensor"
  kv_heads: Axes = "tensor"
  head_dim: Axes = None
  q_lora: Axes = None
  kv_lora: Axes = None
  mlp: Axes = "tensor"
  expert: Axes = "expert"
  expert_embed: Axes = "fsdp"
  norm: Axes = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      unknown = set((value,) if isinstance(value, str) else value or ()) - set(AXES)
      if unknown:
        raise ValueError(f"ShardingRules.{field.name}={value!r} names no mesh axis; there are "
                         f"{', '.join(AXES)}")

  def pairs(self) -> list[tuple[str, Axes]]:
    """Returns the rules as (logical axis, mesh axes), for `flax.linen.logical_axis_rules`."""
    return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class ShardedModel:
  """A model on a mesh: the shardings of its variables and batches, and how to run it there.

  Attributes:
    cfg: the architecture.
    mesh: the devices.
    rules: the mesh axes of every logical axis.
  """

  cfg: model.ModelConfig
  mesh: Mesh
  rules: ShardingRules = ShardingRules()

  def variables(self) -> dict:
    """Returns a NamedSharding for every variable."""
    return model.shardings(self.cfg, self.mesh, self.rules)

  def replicated(self) -> NamedSharding:
    """Returns the sharding of an array of which every device has a copy."""
    return NamedSharding(self.mesh, PartitionSpec())

  def train_state(self, state: Any, params: Any = None) -> Any:
    """Returns a NamedSharding for every array of a `train.step.TrainState`.

    Args:
      state: the state, with arrays or their shapes.
      params: shardings of its parameters; None if they are the parameters of `cfg`'s model.
    """
    variables = self.variables()
    params = variables["params"] if params is None else params
    return state.replace(
        step=self.replicated(), skipped=self.replicated(), params=params,
        router=variables.get("router", {}), moments=type(state.moments)(params, params),
        ema=params if state.ema is not None else None)

  @property
  def batch_devices(self) -> int:
    """The number of parts into which a batch is divided."""
    return math.prod(self.mesh.shape[axis] for axis in _tuple(self.rules.batch))

  def batch(self) -> NamedSharding:
    """Returns the sharding of a [B, T] batch."""
    return NamedSharding(self.mesh, PartitionSpec(self.rules.batch, self.rules.length))

  def transformer(self, **fields) -> model.Transformer:
    """Returns the network with `dispatch`, so that routed tokens do not leave their device.

    Args:
      **fields: further fields of `model.Transformer`.
    """
    return model.Transformer(self.cfg, **({"dispatch": self.dispatch()} | fields))

  def init(self, key: jax.Array) -> dict:
    """Returns `model.init` of a jax.random key, each array created on the devices that hold it."""
    return jax.jit(lambda key: model.init(self.cfg, key), out_shardings=self.variables())(key)

  def jit(self, function: Callable, **kwargs) -> Callable:
    """Returns `model.compiling.jit` of a function, traced with the mesh and the rules in force.

    Args:
      function: takes positional arguments only.
      **kwargs: further arguments of `model.compiling.jit`.

    Returns:
      The jitted function; of its other methods it has `lower`.
    """
    def traced(*args):
      with nn.logical_axis_rules(self.rules.pairs()):
        return function(*args)

    jitted = compiling.jit(traced, **kwargs)

    def on_mesh(function):
      def run(*args):
        with jax.set_mesh(self.mesh):
          return function(*args)

      return run

    run = on_mesh(jitted)
    run.lower = on_mesh(jitted.lower)
    return run

  @property
  def shares_parameters(self) -> bool:
    """Whether every device has all parameters, and only sequences are divided."""
    used = {axis for axis, size in self.mesh.shape.items() if size > 1}
    divided = {name for name, axes in self.rules.pairs() if "data" in _tuple(axes)}
    return used == {"data"} and divided == {"batch"}

  def on_each_device(self, function: Callable) -> Callable:
    """Returns a function that each device runs on its own sequences, and that adds up the results.

    Nothing is communicated before the results are, once; the compiler would add up the gradients of
    every layer and micro-batch as soon as it has them. Where a sum over all sequences is needed
    earlier, `model.token_shards.sum_over_devices` gives it.

    Args:
      function: takes a tree of arrays that all devices share, and a tree of arrays [..., B, T]
        of which each device has some of B; returns a tree of arrays, sums over sequences.
    """
    def local(shared, sequences):
      with nn.logical_axis_rules(()):  # there is nothing left to divide
        varying = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), shared)
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), function(varying, sequences))

    def run(shared, sequences):
      divided = jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 2), "data"), sequences)
      return jax.shard_map(local, mesh=self.mesh, in_specs=(PartitionSpec(), divided),
                           out_specs=PartitionSpec())(shared, sequences)

    return run

  def dispatch(self) -> Callable:
    """Returns a `model.moe` dispatch with which each device runs the experts on its own tokens.

    Every device gathers the weights of all experts, in the compute format, in which their gradients
    are then added up over devices, as are those of other weights.
    """
    axes, numerics = _tuple(self.rules.batch), self.cfg.numerics
    tokens, replicated = PartitionSpec(axes or None), PartitionSpec()

    def dispatch(experts, weights, x_ND, gates_NK, experts_NK):
      def local(weights, *tokens):
        # Marked as varying over devices, so that the backward pass sums their gradients over them.
        varying = jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), weights)
        return experts(varying, *tokens)

      if not numerics.recipe:  # whose weights are quantised already
        weights = jax.tree.map(lambda w: w.astype(numerics.compute_dtype), weights)
      return jax.shard_map(
          local, mesh=self.mesh, in_specs=(replicated, tokens, tokens, tokens),
          out_specs=tokens)(weights, x_ND, gates_NK, experts_NK)

    return dispatch


def _tuple(axes: Axes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def commit_to_device[T](tree: T) -> T:
  """Returns a tree with each array committed to the single device that it is on.

  Arrays that a jitted function returns are committed. If a first call is given uncommitted arrays,
  the next one, on results of the first, compiles the function again.
  """
  return jax.tree.map(lambda x: jax.device_put(x, next(iter(x.devices()))), tree)


def make_sharded_model(cfg: model.ModelConfig, mesh: MeshConfig) -> ShardedModel | None:
  """Returns the model on a mesh of all devices, or None for a single device, which needs no mesh.

  Args:
    cfg: the architecture.
    mesh: number of devices along each axis.

  Raises:
    ValueError: if the mesh does not fit the number of devices; see `make_mesh`.
  """
  if mesh.is_single_device:
    return None
  devices = make_mesh(**dataclasses.asdict(mesh))
  return ShardedModel(cfg, devices, _rules(cfg, devices))


def _rules(cfg: model.ModelConfig, mesh: Mesh) -> ShardingRules:
  """Returns the rules that suit a model: with `fsdp`, its experts are divided if they can be.

  Gathering whole experts needs no transposes, which gathering parts of each does.
  """
  if cfg.moe is None or cfg.moe.num_experts % (mesh.shape["expert"] * mesh.shape["fsdp"]):
    return ShardingRules()
  return ShardingRules(expert=("expert", "fsdp"), expert_embed=None)
