"""Gathering rows equals indexing: interpreted, lowered and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import gather_rows as kernels
from pallas_kernels.ops.gather_rows import gather_rows

ON_HOPPER = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu", reason="needs a Hopper GPU")
FORMATS = [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32]
M = 20


def operands(dtype, width=256, num_indices=70):
  """Returns rows, and indices of which some repeat and some are past the last row."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((M, width)), jnp.float32).astype(dtype)
  return x, jnp.asarray(rng.integers(0, M + 3, num_indices), jnp.int32)


def assert_gathered(ours, x, index):
  padded = np.concatenate([np.asarray(x, np.float32), np.zeros((M, *x.shape[1:]), np.float32)])
  np.testing.assert_array_equal(np.asarray(ours, np.float32), padded[np.asarray(index)])


@pytest.mark.parametrize("shape", [(3,), (2, 5), ()])
def test_an_index_of_any_shape_gathers_rows_of_any_shape(shape):
  index = jnp.asarray(np.random.default_rng(0).integers(0, M + 3, shape), jnp.int32)
  for x in (jnp.arange(1.0, M + 1), operands(jnp.float32)[0]):
    assert_gathered(gather_rows(x, index), x, index)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [128, 1408])
def test_the_interpreted_kernel_gathers_the_same_rows_and_has_no_races(dtype, width):
  x, index = operands(dtype, width)
  ours = kernels.run(x, index, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  assert_gathered(ours, x, index)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [1024, 2048, 7168, 32768])
def test_the_kernel_lowers_for_cuda_at_the_widths_of_models(dtype, width):
  shapes = jax.ShapeDtypeStruct((4096, width), dtype), jax.ShapeDtypeStruct((98304,), jnp.int32)
  jax.jit(kernels.run).trace(*shapes).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("x", "index", "message"), [
    ((M, 100), (3,), "N to be a multiple of 128, and at most 32768, and it is 100"),
    ((M, 32896), (3,), "and it is 32896"), ((M,), (3,), "needs a matrix and a list"),
    ((M, 128), (3, 2), "needs a matrix and a list"), ((0, 128), (3,), "at least one row")])
def test_unsupported_arguments_are_refused_with_the_reason(x, index, message):
  assert message in kernels.unsupported_reason(jnp.zeros(x), jnp.zeros(index, jnp.int32))
  assert "not with 7" in kernels.unsupported_reason(*operands(jnp.float32), fill_value=7)


@ON_HOPPER
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [128, 1408, 32768])
def test_on_a_gpu_the_kernel_gathers_the_same_rows(dtype, width):
  for num_indices in (1, 70, 1001):
    x, index = operands(dtype, width, num_indices)
    assert_gathered(gather_rows(x, index, implementation="mosaic_gpu"), x, index)
