"""The peak arithmetic rate and the memory of the devices, and the energy that they use."""

import ctypes
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 peaks from the vendors' data sheets, in FLOP/s, by a substring of `device_kind`.
# The first match counts.
_BF16_PEAKS = {"H200": 990e12, "H100": 990e12, "A100": 312e12, "TPU v5 lite": 197e12,
               "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU v4": 275e12}


@functools.cache
def peak_flops(compute: str = "float32") -> float:
  """Returns the peak FLOP/s of all devices together.

  For the accelerators listed above it is the data sheet's figure for dense bfloat16 products. Other
  devices, such as CPUs, have no such figure: there it is measured, with a 2048 x 2048 x 2048 matrix
  product in the compute format.

  Args:
    compute: format of the measured product, as in `Numerics.compute`.
  """
  kind = jax.devices()[0].device_kind
  for name, peak in _BF16_PEAKS.items():
    if name in kind:
      return peak * jax.device_count()
  size = 2048
  a = jnp.ones((size, size), compute)
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  times = []
  for _ in range(3):
    started = time.perf_counter()
    product(a).block_until_ready()
    times.append(time.perf_counter() - started)
  return 2 * size**3 / min(times)


def memory_bytes() -> int | None:
  """Returns the memory of all devices together, for CPUs that of the machine; None if unknown."""
  if jax.default_backend() != "cpu":
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.devices()]
    return None if None in limits else sum(limits)
  return host_memory_bytes()


def host_memory_bytes() -> int | None:
  """Returns the memory of the machine, without that of accelerators; None if unknown."""
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError, AttributeError):
    return None


def joules() -> float | None:
  """Returns a running count, in joules, of the energy used by all NVIDIA GPUs or the CPU packages.

  Only the difference of two counts is meaningful. None if the hardware does not report energy.
  """
  return _gpu_joules() if jax.default_backend() == "gpu" else _cpu_joules()


def _gpu_joules() -> float | None:
  try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
  except OSError:
    return None
  if nvml.nvmlInit_v2() != 0:
    return None
  count, total = ctypes.c_uint(), 0.0
  nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
  for index in range(count.value):
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
      return None
    total += millijoules.value / 1e3
  return total


def _cpu_joules() -> float | None:
  try:
    counters = sorted(pathlib.Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
    return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
  except OSError:
    return None
