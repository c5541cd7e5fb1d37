"""What differs between the versions of jax that the kernels run on."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref: jax.Ref, value: jax.Array) -> None:
  """Writes to shared or global memory, also where lanes do not fill whole sectors or banks."""
  if hasattr(plgpu, "store"):  # jax 0.12, which refuses such layouts unless told
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
