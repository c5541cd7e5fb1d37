"""Grouped products equal one product per group, by the oracle and by Hopper's kernels.

The kernels run in the interpreter here, which finds races but neither layout faults nor misaligned
copies; `test_grouped_matmul_gpu` tests for these.

Shape letters:  R rows  G groups  K contracted width  N result width
"""

import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_matmul
from pallas_kernels.mosaic_gpu import grouped_matmul as product_kernel
from pallas_kernels.mosaic_gpu import grouped_weight_gradient as gradient_kernel
from pallas_kernels.mosaic_gpu import schedule
from pallas_kernels.ops.grouped_matmul import grouped_weight_gradient

row_tiles = jax.jit(schedule.row_tiles, static_argnums=(1, 2))
SIZES = [[3, 4, 5], [0, 12, 0], [12, 0, 0], [1, 0, 2], [0, 0, 0]]


def normal(seed, shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def products(lhs_RK, rhs_GKN, sizes):
  """Returns the grouped product, computed in float64."""
  lhs_RK, rhs_GKN = np.asarray(lhs_RK, np.float64), np.asarray(rhs_GKN, np.float64)
  want_RN, first = np.zeros((len(lhs_RK), rhs_GKN.shape[2])), 0
  for group, size in enumerate(sizes):
    want_RN[first:first + size] = lhs_RK[first:first + size] @ rhs_GKN[group]
    first += size
  return want_RN


def gradients(lhs_RK, rhs_RN, sizes):
  """Returns the grouped weight gradient, computed in float64."""
  ends = np.cumsum(sizes)
  return np.stack([
      np.asarray(lhs_RK, np.float64)[end - size:end].T
      @ np.asarray(rhs_RN, np.float64)[end - size:end]
      for size, end in zip(sizes, ends, strict=True)])


def assert_rounded(ours, want, magnitude, terms):
  """Asserts that `ours` is a float32 sum of `terms` exact products, rounded to its own dtype.

  `magnitude` is the sum of the absolute products, to which the error of summation is relative.
  """
  rounding = {jnp.bfloat16.dtype: 2.0**-8, jnp.float32.dtype: 2.0**-23}[ours.dtype]
  error = np.abs(np.asarray(ours, np.float64) - want)
  assert (error <= rounding * np.abs(want) + terms * 2.0**-23 * magnitude).all()


@pytest.fixture
def interpreted():
  """Has Hopper's kernels run in the interpreter; fails if warpgroups or programs raced."""
  interpreter = importlib.import_module(
      "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
  interpreter.reset_gpu_interpret_mode_state()
  yield plgpu.InterpretGPUParams(detect_races=True)
  assert not interpreter.get_races().races_found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_each_group_is_multiplied_by_its_own_matrix_and_rows_of_no_group_give_zero(
    sizes, transpose_rhs):
  lhs_RK, rhs_GKN = normal(0, (12, 5)), normal(1, (3, 5, 7))
  ours = grouped_matmul(
      lhs_RK, rhs_GKN.mT if transpose_rhs else rhs_GKN, jnp.array(sizes, jnp.int32),
      transpose_rhs=transpose_rhs, precision="highest")
  np.testing.assert_allclose(ours, products(lhs_RK, rhs_GKN, sizes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_weight_gradient_sums_only_over_the_rows_of_its_group(sizes):
  lhs_RK, rhs_RN = normal(0, (12, 5)), normal(1, (12, 7))
  ours = grouped_weight_gradient(lhs_RK, rhs_RN, jnp.array(sizes, jnp.int32))
  np.testing.assert_allclose(ours, gradients(lhs_RK, rhs_RN, sizes), rtol=1e-5, atol=1e-5)


def test_gradients_are_a_transposed_grouped_product_and_a_grouped_weight_gradient():
  lhs_RK, rhs_GKN, dout_RN = normal(0, (12, 5)), normal(1, (3, 5, 7)), normal(2, (12, 7))
  sizes_G = jnp.array([3, 0, 7], jnp.int32)
  _, transpose = jax.vjp(
      lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes_G, precision="highest"), lhs_RK, rhs_GKN)
  dlhs_RK, drhs_GKN = transpose(dout_RN)
  np.testing.assert_allclose(dlhs_RK, grouped_matmul(
      dout_RN, rhs_GKN, sizes_G, transpose_rhs=True, precision="highest"), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      drhs_GKN, grouped_weight_gradient(lhs_RK, dout_RN, sizes_G), rtol=1e-5, atol=1e-5)


def test_a_weight_gradient_of_bfloat16_operands_may_be_float32():
  lhs_RK, rhs_RN = normal(0, (12, 5), jnp.bfloat16), normal(1, (12, 7), jnp.bfloat16)
  sizes_G = jnp.array([5, 7], jnp.int32)
  ours = grouped_weight_gradient(lhs_RK, rhs_RN, sizes_G, dtype=jnp.float32)
  assert ours.dtype == jnp.float32
  assert grouped_weight_gradient(lhs_RK, rhs_RN, sizes_G).dtype == jnp.bfloat16
  np.testing.assert_allclose(ours, gradients(lhs_RK, rhs_RN, [5, 7]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shapes", "transpose_rhs", "message"), [
    (((4, 5), (2, 6, 7), (2,)), False, "contracts K: lhs has 5, rhs 6"),
    (((4, 5), (2, 5, 7), (2,)), True, "contracts K: lhs has 5, rhs 7"),
    (((4, 5), (2, 5, 7), (3,)), False, "sizes \\[G\\]"),
    (((4, 5, 1), (2, 5, 7), (2,)), False, "lhs \\[R, K\\]"),
])
def test_mismatched_shapes_are_refused(shapes, transpose_rhs, message):
  lhs, rhs, sizes = (jnp.zeros(shape, jnp.int32) for shape in shapes)
  with pytest.raises(ValueError, match=message):
    grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)


def test_a_weight_gradient_of_operands_with_different_row_counts_is_refused():
  with pytest.raises(ValueError, match=r"lhs \[R, K\], rhs \[R, N\]"):
    grouped_weight_gradient(jnp.zeros((4, 5)), jnp.zeros((3, 5)), jnp.zeros(2, jnp.int32))


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="no implementation 'magic'; there are: xla"):
    grouped_matmul(jnp.zeros((4, 5)), jnp.zeros((2, 5, 7)), jnp.zeros(2, jnp.int32),
                   implementation="magic")


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 96), min_size=5, max_size=5), st.sampled_from([8, 24]))
def test_row_tiles_cover_every_row_once(ends, tile):
  rows, sizes = 96, np.diff(sorted(ends), prepend=0)
  fields_TF, (count,) = map(
      np.asarray, row_tiles(jnp.array(sizes, jnp.int32), rows, tile))
  group_of_row = np.repeat(np.arange(6), [*sizes, rows - sum(sizes)])
  owned = []
  for group, start, end in fields_TF[:count]:
    rows_of_tile = range(start, min(start + tile, end))
    assert (group_of_row[list(rows_of_tile)] == group).all()
    owned.extend(rows_of_tile)
  assert owned == list(range(rows))


def test_the_kernel_multiplies_groups_that_end_at_any_row(interpreted):
  sizes = [37, 0, 155, 3]  # then 8 rows of no group; nothing is aligned to a tile
  lhs_RK, rhs_GKN = normal(0, (203, 128), jnp.bfloat16), normal(1, (4, 128, 128), jnp.bfloat16)
  ours = product_kernel.run(
      lhs_RK, rhs_GKN, jnp.array(sizes, jnp.int32), programs=2, interpret=interpreted,
      tiling=product_kernel.Tiling(128, 64, 3))
  want, magnitude = products(lhs_RK, rhs_GKN, sizes), products(abs(lhs_RK), abs(rhs_GKN), sizes)
  assert_rounded(ours, want, magnitude, 128)


def test_the_kernel_multiplies_by_transposed_matrices(interpreted):
  sizes = [130, 62]
  lhs_RK, rhs_GKN = normal(0, (192, 128), jnp.bfloat16), normal(1, (2, 128, 128), jnp.bfloat16)
  ours = product_kernel.run(
      lhs_RK, rhs_GKN.mT, jnp.array(sizes, jnp.int32), transpose_rhs=True, dtype=jnp.float32,
      programs=1, interpret=interpreted,
      tiling=product_kernel.Tiling(128, 128, 2))
  want, magnitude = products(lhs_RK, rhs_GKN, sizes), products(abs(lhs_RK), abs(rhs_GKN), sizes)
  assert_rounded(ours, want, magnitude, 128)


def test_the_weight_gradient_kernel_ignores_rows_of_other_groups_and_of_no_group(interpreted):
  sizes = [37, 0, 75]
  lhs_RK, rhs_RN = normal(0, (117, 128), jnp.bfloat16), normal(1, (117, 256), jnp.bfloat16)
  lhs_RK, rhs_RN = lhs_RK.at[112:].set(jnp.nan), rhs_RN.at[112:].set(jnp.nan)
  ours = gradient_kernel.run(
      lhs_RK, rhs_RN, jnp.array(sizes, jnp.int32), dtype=jnp.float32, programs=2,
      interpret=interpreted,
      tiling=product_kernel.Tiling(128, 128, 2))
  magnitude = gradients(abs(lhs_RK), abs(rhs_RN), sizes)
  assert_rounded(ours, gradients(lhs_RK, rhs_RN, sizes), magnitude, 75)


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_the_custom_gradients_equal_those_of_the_oracle(transpose_rhs):
  operation = importlib.import_module("pallas_kernels.ops.grouped_matmul")
  differentiable = operation.differentiable(
      functools.partial(operation._xla, precision=None),
      functools.partial(operation._xla_weight_gradient, dtype=None))
  lhs_RK, rhs_GKN, dout_RN = normal(0, (12, 5)), normal(1, (3, 5, 7)), normal(2, (12, 7))
  rhs = rhs_GKN.mT if transpose_rhs else rhs_GKN
  sizes_G = jnp.array([3, 0, 7], jnp.int32)
  run = lambda run: jax.vjp(
      lambda lhs, rhs: run(lhs, rhs, sizes_G, transpose_rhs=transpose_rhs, precision=None),
      lhs_RK, rhs)[1](dout_RN)
  ours, want = run(differentiable), run(operation._xla)
  for our, their in zip(ours, want, strict=True):
    np.testing.assert_allclose(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shapes", "dtype", "reason"), [
    (((4, 130), (2, 130, 128)), jnp.bfloat16, "K to be a multiple of 128, and it is 130"),
    (((4, 128), (2, 128, 64)), jnp.bfloat16, "N to be a multiple of 128, and it is 64"),
    (((4, 128), (2, 128, 128)), jnp.float32, "needs bfloat16, not float32"),
    (((0, 128), (2, 128, 128)), jnp.bfloat16, "needs rows and groups, not 0 and 2"),
    (((4, 128), (2, 128, 128)), jnp.bfloat16, None),
])
def test_the_reason_is_given_for_operands_that_the_kernel_does_not_support(shapes, dtype, reason):
  lhs, rhs = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
  actual = product_kernel.unsupported_reason(lhs, rhs, jax.ShapeDtypeStruct((2,), jnp.int32))
  assert actual is reason if reason is None else reason in actual


@pytest.mark.parametrize("fields", [(100, 128), (128, 32), (128, 512), (128, 128, 1)])
def test_tilings_that_no_warpgroup_can_compute_are_refused(fields):
  with pytest.raises(ValueError):
    product_kernel.Tiling(*fields)
