"""Which implementation of an operation runs: the one named, or the best that can here.

Hopper's kernels are taken by default: they have run there, and agree with the oracle. No TPU's has
run yet, so those are to be named.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

BACKENDS = {"mosaic_gpu": "an NVIDIA GPU of compute capability 9.0 (Hopper)",
            "mosaic_tpu": "a TPU"}
_PROVEN = frozenset({"mosaic_gpu"})


class Kernel(NamedTuple):
  """An implementation for one kind of hardware.

  Attributes:
    run: takes what the operation takes.
    unsupported_reason: takes the same, and says why `run` cannot do it, or None if it can.
  """

  run: Callable
  unsupported_reason: Callable[..., str | None]


def lazy(module: str, name: str = "KERNEL") -> Kernel:
  """A kernel of `pallas_kernels.MODULE`, imported when it is first asked: Pallas takes long to.

  A process traces it once for all that call it alike: a kernel's code holds where it was traced
  from, so that it would be compiled again for every place that calls it. Options are static
  arguments of a jitted function, so they must be hashable.
  """
  @functools.cache
  def kernel() -> Kernel:
    return getattr(importlib.import_module(f"pallas_kernels.{module}"), name)

  @functools.cache
  def traced_once(options: tuple[str, ...]) -> Callable:
    return jax.jit(kernel().run, static_argnames=options)

  def run(*operands, **options):
    return _varying_as(operands, traced_once(tuple(options))(*operands, **options))

  return Kernel(run, lambda *operands, **options: kernel().unsupported_reason(*operands, **options))


def _varying_as(operands: Any, results: Any) -> Any:
  """Results marked as different on each device of a `shard_map`, as Pallas leaves them unmarked."""
  varies = lambda x: jax.typeof(x).manual_axis_type.varying
  arrays = [x for x in jax.tree.leaves(operands) if isinstance(x, jax.Array)]
  axes = frozenset().union(*map(varies, arrays))

  def mark(x):
    missing = tuple(axes - varies(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, results)


def auto_partitioned() -> bool:
  """Whether the compiler divides this program among devices, which it cannot do with a kernel.

  It would run the whole of it on each. In a `shard_map`, each device has a program of its own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in mesh.axis_names
                   if axis not in mesh.manual_axes) > 1


def local_backend() -> str | None:
  """The name of the kernels that this process' first device runs, None if there are none."""
  device = jax.devices()[0]
  if device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0":
    return "mosaic_gpu"
  return "mosaic_tpu" if device.platform == "tpu" else None


def run(
    operation: str, implementation: str | None, xla: Callable, kernels: Mapping[str, Kernel],
    *operands: Any, **options: Any) -> Any:
  """Runs an operation by the implementation named.

  Args:
    operation: its name, for errors.
    implementation: "xla", "mosaic_gpu", "mosaic_tpu", or None for this device's kernel where that
      has run before and can do it, on one device, and else "xla".
    xla: the oracle; it takes everything that the operation takes.
    kernels: by name.
    *operands: of the operation: arrays.
    **options: of the operation: nothing that depends on arrays.

  Raises:
    ValueError: if the named implementation does not exist, not here, or not for these operands.
  """
  if implementation is None:
    runs_here = local_backend() in _PROVEN and not auto_partitioned()
    kernel = kernels.get(local_backend()) if runs_here else None
    chosen = kernel.run if kernel and not kernel.unsupported_reason(*operands, **options) else xla
  elif implementation == "xla":
    chosen = xla
  else:
    chosen = _named(operation, implementation, kernels, *operands, **options)
  with jax.named_scope(operation):  # for profiles
    return chosen(*operands, **options)


def _named(operation, implementation, kernels, *operands, **options) -> Callable:
  if implementation not in kernels:
    there = ", ".join(("xla", *kernels))
    raise ValueError(f"{operation} has no implementation {implementation!r}; there are: {there}")
  if local_backend() != implementation:
    raise ValueError(f"{operation}: {implementation!r} needs {BACKENDS[implementation]}, and this "
                     f"is {jax.devices()[0].device_kind}; 'xla' runs everywhere")
  if auto_partitioned():
    raise ValueError(f"{operation}: {implementation!r} runs on one device, and here the compiler "
                     "divides the program over a mesh: call it in jax.shard_map, on each device's "
                     "rows, or take 'xla'")
  if reason := kernels[implementation].unsupported_reason(*operands, **options):
    raise ValueError(f"{operation}: {implementation!r} {reason}; 'xla' takes it")
  return kernels[implementation].run
