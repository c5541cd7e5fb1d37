"""Choice of an operation's implementation: the one named, or the best that can run here.

Hopper kernels are chosen by default, as they have been run on Hopper and agree with the oracle. No
TPU kernel has been run on a TPU yet, so TPU kernels run only if they are named.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels import targets

BACKENDS = {"mosaic_gpu": "an NVIDIA GPU of compute capability 9.0 (Hopper)",
            "mosaic_tpu": "a TPU"}
_PROVEN = frozenset({"mosaic_gpu"})  # backends whose kernels have been run on hardware


class Kernel(NamedTuple):
  """An operation's implementation for one type of hardware.

  Attributes:
    run: computes the operation; takes the operation's operands and options.
    unsupported_reason: takes the operands and options of `run`; returns why `run` does not support
      them, as a phrase that follows the kernel's name, or None if it does.
  """

  run: Callable
  unsupported_reason: Callable[..., str | None]


def lazy(module: str, name: str = "KERNEL") -> Kernel:
  """Returns the kernel `name` of `pallas_kernels.MODULE`, imported on first use.

  The import is delayed because importing Pallas takes long. The kernel is jitted, so that a process
  traces it only once for all calls with the same shapes and options: a kernel's code contains the
  source location from which it was traced, so without this it would be compiled again for every
  call site. Options are static arguments of the jitted function, so they must be hashable.

  Args:
    module: path of the module below `pallas_kernels`, such as "mosaic_gpu.quantize".
    name: name of the `Kernel` in that module.
  """
  @functools.cache
  def kernel() -> Kernel:
    return getattr(importlib.import_module(f"pallas_kernels.{module}"), name)

  @functools.cache
  def traced_once(options: tuple[str, ...]) -> Callable:
    return jax.jit(kernel().run, static_argnames=options)

  def run(*operands, **options):
    return varying_as(operands, traced_once(tuple(options))(*operands, **options))

  return Kernel(run, lambda *operands, **options: kernel().unsupported_reason(*operands, **options))


def varying_as(operands: Any, results: Any) -> Any:
  """Returns the results marked as varying over the `shard_map` axes over which operands vary.

  Pallas leaves its results unmarked, and so are arrays that follow from shapes alone.
  """
  varies = lambda x: jax.typeof(x).manual_axis_type.varying
  arrays = [x for x in jax.tree.leaves(operands) if isinstance(x, jax.Array)]
  axes = frozenset().union(*map(varies, arrays))

  def mark(x):
    missing = tuple(axes - varies(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, results)


def auto_partitioned() -> bool:
  """Whether the compiler partitions this program over the devices of a mesh.

  The compiler cannot partition a kernel: every device would run all of it. Inside a `shard_map`
  over all axes each device has its own program, so nothing is partitioned.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in mesh.axis_names
                   if axis not in mesh.manual_axes) > 1


def local_backend() -> str | None:
  """Returns the backend whose kernels `targets.target` runs, or None if there is none."""
  device = targets.target()
  if device.platform == "gpu" and device.capability == 9.0:
    return "mosaic_gpu"
  return "mosaic_tpu" if device.platform == "tpu" else None


def run(
    operation: str, implementation: str | None, xla: Callable, kernels: Mapping[str, Kernel],
    *operands: Any, **options: Any) -> Any:
  """Runs an operation with the named implementation.

  Args:
    operation: name of the operation, for error messages and profiles.
    implementation: "xla", "mosaic_gpu", "mosaic_tpu", or None for this device's kernel where
      kernels of its kind have been run on hardware, the kernel supports the operands and the
      compiler does not partition the program; otherwise "xla".
    xla: the oracle; it supports all operands and options of the operation.
    kernels: the operation's kernels by backend name.
    *operands: the operation's operands: arrays, or pytrees of arrays.
    **options: the operation's options: hashable values that do not depend on arrays.

  Returns:
    The result of the chosen implementation.

  Raises:
    ValueError: if the named implementation does not exist, or cannot run on this device, on these
      operands or in a program that the compiler partitions.
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
  """Returns the kernel of that name; raises ValueError with the reason if it cannot run here."""
  if implementation not in kernels:
    available = ", ".join(("xla", *kernels))
    raise ValueError(
        f"{operation} has no implementation {implementation!r}; there are: {available}")
  if local_backend() != implementation:
    raise ValueError(f"{operation}: {implementation!r} needs {BACKENDS[implementation]}, and this "
                     f"device is {targets.target().kind}; use 'xla', which runs everywhere")
  if auto_partitioned():
    raise ValueError(f"{operation}: {implementation!r} runs on one device, and here the compiler "
                     "partitions the program over a mesh: call the operation inside jax.shard_map, "
                     "on each device's rows, or use 'xla'")
  if reason := kernels[implementation].unsupported_reason(*operands, **options):
    raise ValueError(f"{operation}: {implementation!r} {reason}; use 'xla', which supports it")
  return kernels[implementation].run
