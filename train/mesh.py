"""Meshes of devices, and which axis of an array is divided over which axis of the mesh.

The model names the axes of its arrays (`model.logical_axes`); `ShardingRules` maps those names to
mesh axes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import model
from train.config import MeshConfig

AXES = ("data", "fsdp", "expert", "tensor", "pipe")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, pipe: int = 1,
    devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with all five axes, in AXES' order.

  Args:
    data, fsdp, expert, tensor, pipe: devices along each axis; one of them may be -1, for all that
      the others leave.
    devices: None for all there are.

  Raises:
    ValueError: if the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, expert, tensor, pipe]
  asked = dict(zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh axes must be positive, and at most one -1, not {asked}")
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
  if math.prod(sizes) != len(devices):
    raise ValueError(f"a mesh of {asked} does not fit {len(devices)} device(s)")
  return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Mesh axis (or axes, or None) for every logical axis of parameters and activations."""

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
  norm: Axes = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      unknown = set((value,) if isinstance(value, str) else value or ()) - set(AXES)
      if unknown:
        raise ValueError(f"ShardingRules.{field.name}={value!r} names no mesh axis; there are "
                         f"{', '.join(AXES)}")

  def pairs(self) -> list[tuple[str, Axes]]:
    return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class ShardedModel:
  """A model on a mesh: where its variables and batches live, and how to run it there."""

  cfg: model.ModelConfig
  mesh: Mesh
  rules: ShardingRules = ShardingRules()

  def variables(self) -> dict:
    """A NamedSharding for every variable."""
    return model.shardings(self.cfg, self.mesh, self.rules)

  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device has a copy of."""
    return NamedSharding(self.mesh, PartitionSpec())

  def train_state(self, state: Any, params: Any = None) -> Any:
    """A NamedSharding for every array of a `train.step.TrainState`.

    Args:
      state: arrays, or their shapes.
      params: of its parameters; None if they are the model's own.
    """
    variables = self.variables()
    params = variables["params"] if params is None else params
    return state.replace(
        step=self.replicated(), skipped=self.replicated(), params=params,
        router=variables.get("router", {}), moments=type(state.moments)(params, params),
        ema=params if state.ema is not None else None)

  @property
  def batch_devices(self) -> int:
    """How many parts a batch is divided into."""
    return math.prod(self.mesh.shape[axis] for axis in _tuple(self.rules.batch))

  def batch(self) -> NamedSharding:
    """The sharding of a [B, T] batch."""
    return NamedSharding(self.mesh, PartitionSpec(self.rules.batch, self.rules.length))

  def transformer(self, **fields) -> model.Transformer:
    """The network, its tokens routed to experts without leaving their device."""
    return model.Transformer(self.cfg, **({"dispatch": self.dispatch()} | fields))

  def init(self, key: jax.Array) -> dict:
    """`model.init`, each array made where it belongs."""
    return jax.jit(lambda key: model.init(self.cfg, key), out_shardings=self.variables())(key)

  def jit(self, function: Callable, **kwargs) -> Callable:
    """`jax.jit` with the mesh and the rules in force while tracing; it has `lower`, too."""
    def traced(*args):
      with nn.logical_axis_rules(self.rules.pairs()):
        return function(*args)

    jitted = jax.jit(traced, **kwargs)

    def on_mesh(function):
      def run(*args):
        with jax.set_mesh(self.mesh):
          return function(*args)

      return run

    run = on_mesh(jitted)
    run.lower = on_mesh(jitted.lower)
    return run

  def dispatch(self) -> Callable:
    """A `model.moe` dispatch: each device runs the experts on its own tokens.

    The experts' weights are gathered on every device.
    """
    axes = _tuple(self.rules.batch)
    tokens, replicated = PartitionSpec(axes or None), PartitionSpec()

    def dispatch(experts, weights, x_ND, gates_NK, experts_NK):
      def local(weights, *tokens):
        # Marked as varying, so that their gradients are summed over the devices on the way back.
        varying = jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), weights)
        return experts(varying, *tokens)

      return jax.shard_map(
          local, mesh=self.mesh, in_specs=(replicated, tokens, tokens, tokens),
          out_specs=tokens)(weights, x_ND, gates_NK, experts_NK)

    return dispatch


def _tuple(axes: Axes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def commit_to_device[T](tree: T) -> T:
  """Commits a tree's arrays to the single device that each is on.

  What a jitted function returns is committed; given arrays that are not, it compiles again.
  """
  return jax.tree.map(lambda x: jax.device_put(x, next(iter(x.devices()))), tree)


def make_sharded_model(cfg: model.ModelConfig, mesh: MeshConfig) -> ShardedModel | None:
  """The model on a mesh of all devices, or None for a single device, which needs no mesh.

  Args:
    cfg: of the model.
    mesh: devices along each axis; `make_mesh` says what is raised.
  """
  if mesh.is_single_device:
    return None
  return ShardedModel(cfg, make_mesh(**dataclasses.asdict(mesh)))
