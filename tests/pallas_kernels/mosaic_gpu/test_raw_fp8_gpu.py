"""The product that stays in the tensor core lowers, has no races, and errs as 14-bit sums do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Quantized, fp8_matmul, implementations
from pallas_kernels.mosaic_gpu.raw_fp8 import raw_matmul
from pallas_kernels.quantized import error

hopper = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu",
    reason="needs an NVIDIA GPU of compute capability 9.0")


def normal(rows, width, seed):
  x = np.random.default_rng(seed).standard_normal((rows, width))
  return jnp.asarray(x, jnp.float32).astype(jnp.float8_e4m3fn)


def exact(lhs, rhs):
  return np.asarray(lhs, np.float64) @ np.asarray(rhs, np.float64).T


@pytest.mark.parametrize(("m", "n", "k"), [(256, 256, 512), (256, 256, 16384), (64, 128, 128)])
def test_the_kernel_lowers_for_cuda(m, n, k):
  shaped = lambda rows: jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn)
  text = jax.jit(raw_matmul).trace(shaped(m), shaped(n)).lower(
      lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text


def test_interpreted_kernel_equals_the_exact_product_and_has_no_races():
  lhs, rhs = normal(128, 384, 0), normal(256, 384, 1)
  with jax.default_device(jax.devices("cpu")[0]):
    ours = raw_matmul(lhs, rhs, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert error(ours, exact(lhs, rhs)) < 384 * 2.0**-24  # the interpreter accumulates in float32


@pytest.mark.parametrize(("m", "n", "k"), [(63, 128, 128), (64, 64, 128), (64, 128, 96)])
def test_shapes_that_are_not_multiples_of_a_tile_are_refused(m, n, k):
  with pytest.raises(ValueError, match="pad the operands"):
    raw_matmul(normal(m, k, 0), normal(n, k, 1))


@hopper
def test_error_of_sums_that_stay_in_the_tensor_core_grows_with_their_length():
  """Their 14 bits, truncated towards zero, err more than twice as much as promoted sums."""
  unscaled = lambda x: Quantized.of(x, jnp.ones((len(x), x.shape[1] // 128)), (1, 128))
  errors = {}
  for width in (512, 4096):
    lhs, rhs = normal(128, width, 0), normal(128, width, 1)
    want = exact(lhs, rhs)
    errors[width] = error(raw_matmul(lhs, rhs), want)
    promoted = fp8_matmul(unscaled(lhs), unscaled(rhs), dtype=jnp.float32,
                          implementation="mosaic_gpu")
    assert errors[width] > 2 * error(promoted, want)
  assert 2 * errors[512] < errors[4096] < 0.02
