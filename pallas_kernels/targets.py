"""The kind of device for which programs are traced, on which choices of implementations depend.

It is that of this process's first device, unless a program is compiled ahead of time for another.
"""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
  """A kind of device.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: the device's name, such as "NVIDIA H200" or "TPU v5p".
    capability: compute capability of an NVIDIA GPU, such as 9.0; 0 for other devices.
  """

  platform: str
  kind: str
  capability: float = 0.0

  @classmethod
  def of(cls, device: jax.Device) -> "Target":
    """Returns the kind of a device, which may be one of a topology without hardware."""
    capability = str(getattr(device, "compute_capability", ""))
    nvidia = device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability)  # AMD's is a name
    return cls(device.platform, device.device_kind, float(capability) if nvidia else 0.0)


_COMPILED_FOR: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "compiled_for", default=None)


def target() -> Target:
  """Returns the kind of device that programs are traced for."""
  return _COMPILED_FOR.get() or Target.of(jax.devices()[0])


@contextlib.contextmanager
def compiled_for(device: jax.Device | Target) -> Iterator[Target]:
  """Traces programs for another device than this process's first one, to compile them for it.

      devices = jax.experimental.topologies.get_topology_desc("v5p:2x2x1", "tpu").devices
      with compiled_for(devices[0]):
        compiled = jax.jit(step).lower(...).compile()

  What was traced for one kind of device must not be used for another, so that JAX's caches are
  cleared at the beginning and at the end.

  Args:
    device: a device of the topology, or its kind.
  """
  jax.clear_caches()
  token = _COMPILED_FOR.set(device if isinstance(device, Target) else Target.of(device))
  try:
    yield target()
  finally:
    _COMPILED_FOR.reset(token)
    jax.clear_caches()
