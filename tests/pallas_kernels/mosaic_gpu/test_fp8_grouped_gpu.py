"""Grouped FP8 products on Hopper equal the product of each group alone, whatever the sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
  Quantized,
  fp8_grouped_matmul,
  fp8_grouped_weight_gradient,
  fp8_matmul,
  implementations,
  quantize,
  quantize_groups,
)
from pallas_kernels.mosaic_gpu import fp8_grouped, fp8_tiling, fp8_weight_gradient
from pallas_kernels.mosaic_gpu import fp8_matmul as dense
from pallas_kernels.ops.fp8_grouped import aligned_rows, aligned_starts
from pallas_kernels.quantized import error

hopper = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu",
    reason="needs an NVIDIA GPU of compute capability 9.0")
# Tokens, K, N and number of groups of an MoE layer: V2-Lite's, and V3's divided over 8 machines.
SHAPES = {"v2_lite": (65536, 2048, 1408, 64), "deepseek_v3": (65536, 7168, 2048, 32)}
SIZES = [[3, 130, 0, 67], [0, 0, 200, 0], [57, 64, 8, 71], [0, 0, 0, 0], [1, 1, 1, 1]]
# Float32 sums of up to 256 products, in a different order.
ROUNDING = 256 * 2.0**-24
# Sums of 128 products in 14 bits err by 1.2e-4 (see test_fp8_matmul_gpu), and sums promoted only
# at the end by 3.5e-4 and more.
PROMOTED = 2e-4


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def outliers(shape, seed=0):
  some = np.random.default_rng(seed + 9).random(shape) < 1e-3
  return normal(shape, seed) * jnp.where(some, 1e3, 1.0)


def shaped(shape, tile):
  scales = (*shape[:-2], -(-shape[-2] // tile[0]), shape[-1] // 128)
  return jax.eval_shape(functools.partial(Quantized.of, tile=tile),
                        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
                        jax.ShapeDtypeStruct(scales, jnp.float32))


def lower(run, lhs, rhs, groups, dtype, tiling):
  product = jax.jit(functools.partial(run, dtype=dtype, tiling=tiling))
  sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
  return product.trace(lhs, rhs, sizes).lower(lowering_platforms=("cuda",))


def interpreted(run, lhs, rhs, sizes, **tiling):
  with jax.default_device(jax.devices("cpu")[0]):
    return run(lhs, rhs, jnp.array(sizes), dtype=jnp.float32, tiling=dense.Tiling(**tiling),
               interpret=plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore"))


def test_vmapped_calls_of_the_kernel_use_their_own_group_sizes():
  lhs, rhs = quantize(jnp.asarray(normal((72, 128)))), quantize(
      jnp.asarray(normal((2, 64, 128), 1)), "128x128")
  sizes_LG = jnp.array([[3, 60], [0, 72]])
  run = lambda sizes_G: interpreted(
      fp8_grouped.run, lhs, rhs, sizes_G, block_n=64, stages=2, depth=1)
  want = jnp.stack([run(sizes_G) for sizes_G in sizes_LG])
  np.testing.assert_array_equal(jax.vmap(run)(sizes_LG), want)


@pytest.mark.parametrize("tiling", [
    None, dense.Tiling(cluster=2), dense.Tiling(block_n=192, depth=1, stages=4),
    dense.Tiling(block_m=256, depth=1, stages=3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_production_shapes_lower(shape, tiling):
  rows, k, n, groups = SHAPES[shape]
  lower(fp8_grouped.run, shaped((rows, k), (1, 128)), shaped((groups, n, k), (128, 128)), groups,
        jnp.bfloat16, tiling)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_production_shapes_of_weight_gradients_lower(shape, dtype):
  rows, k, n, groups = SHAPES[shape]
  aligned = aligned_rows(rows, groups)
  lower(fp8_weight_gradient.run, shaped((k, aligned), (1, 128)), shaped((n, aligned), (1, 128)),
        groups, dtype, None)


@pytest.mark.parametrize("tiling", [
    {"stages": 3}, {"stages": 2, "depth": 1, "cluster": 2, "block_m": 256}])
def test_interpreted_product_agrees_with_the_oracle_and_has_no_races(monkeypatch, tiling):
  monkeypatch.setattr(fp8_tiling, "MULTIPROCESSORS", 2)  # so that each has several tiles
  sizes = [3, 130, 0]
  lhs, rhs = quantize(normal((137, 128))), quantize(normal((3, 128, 128), 1), "128x128")
  ours = interpreted(fp8_grouped.run, lhs, rhs, sizes, **tiling)
  want = fp8_grouped_matmul(lhs, rhs, jnp.array(sizes), dtype=jnp.float32, implementation="xla")
  assert error(ours, want) < ROUNDING
  assert not np.asarray(ours[133:]).any()


@pytest.mark.parametrize("tiling", [{"stages": 2, "depth": 1, "cluster": 2}])
def test_interpreted_weight_gradient_agrees_with_the_oracle_and_has_no_races(monkeypatch, tiling):
  monkeypatch.setattr(fp8_tiling, "MULTIPROCESSORS", 2)
  sizes = jnp.array([3, 130, 0])
  lhs, rhs = (quantize_groups(normal((140, 128), seed), sizes) for seed in range(2))
  ours = interpreted(fp8_weight_gradient.run, lhs, rhs, sizes, **tiling)
  want = fp8_grouped_weight_gradient(lhs, rhs, sizes, implementation="xla")
  assert error(ours, want) < ROUNDING
  assert not np.asarray(ours[2]).any()


def test_unsupported_operands_are_refused_with_the_reason():
  weights, sizes = shaped((2, 256, 128), (128, 128)), np.zeros(2)
  unsupported_reason = functools.partial(fp8_grouped.unsupported_reason, dtype=jnp.bfloat16)
  assert unsupported_reason(shaped((5, 128), (1, 128)), weights, sizes) is None
  assert "rows" in unsupported_reason(shaped((0, 128), (1, 128)), weights, sizes)
  assert "N to be a multiple of 64" in unsupported_reason(
      shaped((5, 128), (1, 128)), shaped((2, 50, 128), (128, 128)), sizes)
  unsupported_reason = functools.partial(fp8_weight_gradient.unsupported_reason, dtype=jnp.float32)
  assert unsupported_reason(
      shaped((128, 384), (1, 128)), shaped((256, 384), (1, 128)), sizes) is None
  assert unsupported_reason(
      shaped((61, 384), (1, 128)), shaped((260, 384), (1, 128)), sizes) is None
  assert "N of a float32 result to be a multiple of 4, and it is 62" in unsupported_reason(
      shaped((60, 384), (1, 128)), shaped((62, 384), (1, 128)), sizes)


@hopper
@pytest.mark.parametrize("make", [normal, outliers])
@pytest.mark.parametrize("sizes", SIZES)
def test_each_group_equals_the_dense_product_to_the_bit(sizes, make):
  lhs, rhs = quantize(make((203, 1408))), quantize(make((4, 384, 1408), 1), "128x128")
  run = functools.partial(fp8_grouped_matmul, lhs, rhs, jnp.array(sizes), dtype=jnp.float32)
  ours = np.asarray(run(implementation="mosaic_gpu"))
  first = 0
  for group, size in enumerate(sizes):
    rows = slice(first, first + size)
    if size:
      some = Quantized.of(lhs.values_MK[rows], lhs.scales_mk[rows], lhs.tile)
      one = Quantized.of(rhs.values_MK[group], rhs.scales_mk[group], rhs.tile)
      # By the same tiling: few rows are summed in another order otherwise.
      want = dense.run(some, one, dtype=jnp.float32, tiling=dense.Tiling(stages=4))
      np.testing.assert_array_equal(ours[rows], np.asarray(want))
    first += size
  assert not ours[first:].any()
  if first:
    assert error(ours, run(implementation="xla")) < PROMOTED


@hopper
@pytest.mark.parametrize("tiling", [
    {"depth": 1}, {"cluster": 2}, {"block_n": 192, "depth": 1, "stages": 4}, {"block_n": 64},
    {"block_m": 256, "depth": 1, "stages": 3},
    {"block_m": 256, "depth": 1, "stages": 3, "cluster": 2}])
def test_results_are_bit_identical_for_every_tiling(tiling):
  sizes = jnp.asarray(np.random.default_rng(0).multinomial(4000, np.full(16, 1 / 16)), jnp.int32)
  lhs, rhs = quantize(normal((4099, 512))), quantize(normal((16, 640, 512), 1), "128x128")
  want = fp8_grouped.run(lhs, rhs, sizes, dtype=jnp.bfloat16)
  ours = fp8_grouped.run(lhs, rhs, sizes, dtype=jnp.bfloat16, tiling=dense.Tiling(**tiling))
  np.testing.assert_array_equal(np.asarray(ours), np.asarray(want))


@hopper
@pytest.mark.parametrize("make", [normal, outliers])
@pytest.mark.parametrize("sizes", SIZES)
def test_each_weight_gradient_equals_the_dense_product_to_the_bit(sizes, make):
  sizes_G = jnp.array(sizes)
  lhs, rhs = (quantize_groups(make((203, width), width), sizes_G) for width in (256, 384))
  run = functools.partial(fp8_grouped_weight_gradient, lhs, rhs, sizes_G)
  ours = np.asarray(run(implementation="mosaic_gpu"))
  for group, (start, size) in enumerate(zip(aligned_starts(sizes_G), sizes, strict=True)):
    blocks = -(-size // 128)
    if not blocks:
      assert not ours[group].any()
      continue
    first = int(start) // 128
    parts = [Quantized.of(x.values_MK[:, first * 128:(first + blocks) * 128],
                          x.scales_mk[:, first:first + blocks], x.tile) for x in (lhs, rhs)]
    want = fp8_matmul(*parts, dtype=jnp.float32, implementation="mosaic_gpu")
    np.testing.assert_array_equal(ours[group], np.asarray(want))
  if any(sizes):
    assert error(ours, run(implementation="xla")) < PROMOTED


@hopper
def test_weight_gradients_of_many_groups_agree_with_the_oracle_for_every_tiling():
  sizes = jnp.asarray(np.random.default_rng(0).multinomial(4000, np.full(16, 1 / 16)), jnp.int32)
  lhs, rhs = (quantize_groups(normal((4000, width), width), sizes) for width in (256, 384))
  want = fp8_grouped_weight_gradient(lhs, rhs, sizes, implementation="xla")
  ours = fp8_grouped_weight_gradient(lhs, rhs, sizes, implementation="mosaic_gpu")
  assert error(ours, want) < PROMOTED
  for tiling in (dense.Tiling(depth=1, stages=4, cluster=2),
                 dense.Tiling(block_m=256, depth=1, stages=3)):
    other = fp8_weight_gradient.run(lhs, rhs, sizes, dtype=jnp.float32, tiling=tiling)
    np.testing.assert_array_equal(np.asarray(other), np.asarray(ours))
