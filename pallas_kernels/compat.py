"""Functions whose API differs between the versions of jax that the kernels support."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref: jax.Ref, value: jax.Array) -> None:
  """Writes `value` to shared or global memory, in any layout.

  Layouts whose lanes do not fill whole memory sectors or shared-memory banks are allowed, too.
  """
  if hasattr(plgpu, "store"):  # jax 0.12 refuses such layouts unless `optimized=False`
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
