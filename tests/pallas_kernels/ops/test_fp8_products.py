"""Products of FP8 operands equal products of the dequantised operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  dequantize,
  fp8_grouped_matmul,
  fp8_grouped_weight_gradient,
  fp8_matmul,
  quantize,
  quantize_groups,
)
from pallas_kernels.ops.fp8_grouped import aligned_rows, aligned_starts
from pallas_kernels.quantized import error

SIZES = [[3, 130, 0, 67], [0, 0, 200, 0], [50, 50, 50, 40], [0, 0, 0, 0], [200, 0, 0, 0]]
# Float32 sums of up to 300 products, in a different order.
ROUNDING = 300 * 2.0**-24


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def exact(x):
  return np.asarray(dequantize(x), np.float64)


@pytest.mark.parametrize("tile", ["128x128", "1x128"])
def test_product_equals_that_of_the_dequantised_operands(tile):
  lhs, rhs = quantize(normal((70, 300))), quantize(normal((140, 300), 1), tile)
  ours = fp8_matmul(lhs, rhs, dtype=jnp.float32)
  assert error(ours, exact(lhs) @ exact(rhs).T) < ROUNDING
  assert fp8_matmul(lhs, rhs).dtype == jnp.bfloat16


@pytest.mark.parametrize("sizes", SIZES)
def test_each_group_is_multiplied_by_its_own_matrix(sizes):
  lhs, rhs = quantize(normal((200, 140))), quantize(normal((4, 50, 140), 1), "128x128")
  ours = fp8_grouped_matmul(lhs, rhs, jnp.array(sizes), dtype=jnp.float32)
  want, first = np.zeros((200, 50)), 0
  for group, size in enumerate(sizes):
    rows = slice(first, first + size)
    want[rows] = exact(lhs)[rows] @ exact(rhs)[group].T
    first += size
  np.testing.assert_allclose(ours, want, atol=2e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_groups_start_at_multiples_of_128_with_zeros_between_them(sizes):
  x = normal((200, 60))
  ours = quantize_groups(x, jnp.array(sizes))
  starts = np.asarray(aligned_starts(jnp.array(sizes)))
  assert ours.shape == (60, aligned_rows(200, 4)) and not (starts % 128).any()
  want, first = np.zeros(ours.shape[::-1], np.float32), 0
  for start, size in zip(starts, sizes, strict=True):
    want[start:start + size] = x[first:first + size]
    first += size
  np.testing.assert_array_equal(dequantize(ours), dequantize(quantize(jnp.asarray(want.T))))


@pytest.mark.parametrize("sizes", SIZES)
def test_weight_gradients_contract_over_the_rows_of_their_group(sizes):
  sizes_G = jnp.array(sizes)
  lhs, rhs = (quantize_groups(normal((200, width), width), sizes_G) for width in (60, 40))
  ours = fp8_grouped_weight_gradient(lhs, rhs, sizes_G)
  want = np.zeros((4, 60, 40))
  for group, (start, size) in enumerate(zip(aligned_starts(sizes_G), sizes, strict=True)):
    rows = slice(int(start), int(start) + size)
    want[group] = exact(lhs)[:, rows] @ exact(rhs)[:, rows].T
  np.testing.assert_allclose(ours, want, atol=2e-4)


def test_weight_gradients_of_a_device_are_not_summed_over_the_mesh():
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  sizes_G = jnp.array([3, 5])
  local = lambda lhs, rhs: fp8_grouped_weight_gradient(
      quantize_groups(lhs, sizes_G), quantize_groups(rhs, sizes_G), sizes_G)
  run = lambda out: jax.eval_shape(
      jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=out),
      normal((8, 6)), normal((8, 4)))
  assert run(rows).shape == (2, 6, 4)
  with pytest.raises(ValueError, match="out_specs"):  # if summed, they would be replicated
    run(replicated)


@pytest.mark.parametrize("tile", ["tensor", "128x128"])
def test_groups_may_be_quantised_in_larger_tiles(tile):
  x, sizes_G = normal((200, 60)), jnp.array([3, 130, 0, 67])
  groups = dequantize(quantize_groups(x, sizes_G))
  ours = quantize_groups(x, sizes_G, tile)
  assert ours.tile == ((128, 128) if tile == "128x128" else ours.shape)
  assert error(dequantize(ours), groups) < 2 * 2.0**-4  # half a step from each quantisation


@pytest.mark.parametrize(("make", "message"), [
    (lambda: fp8_matmul(quantize(normal((4, 128))), quantize(normal((4, 130)), "128x128")),
     "last axes"),
    (lambda: fp8_matmul(quantize(normal((4, 128)), "128x1"), quantize(normal((4, 128)))),
     "lhs with 1x128 scales"),
    (lambda: fp8_grouped_matmul(quantize(normal((4, 128))), quantize(normal((2, 4, 128))),
                                jnp.array([2, 2])), "rhs with 128x128"),
    (lambda: fp8_grouped_matmul(quantize(normal((4, 128))),
                                quantize(normal((2, 4, 128)), "128x128"),
                                jnp.array([2, 1, 1])), "sizes \\[G\\]"),
    (lambda: fp8_grouped_weight_gradient(quantize(normal((4, 128))), quantize(normal((4, 256))),
                                         jnp.array([4])), "last axes"),
])
def test_operands_with_mismatched_shapes_or_wrong_tiles_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
