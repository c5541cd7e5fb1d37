"""The FP8 product on Hopper lowers, has no races, and errs no more than 14-bit sums of 128 do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Quantized, dequantize, fp8_matmul, implementations, quantize
from pallas_kernels.mosaic_gpu import fp8_matmul as kernel
from pallas_kernels.mosaic_gpu import fp8_tiling, schedule
from pallas_kernels.mosaic_gpu import hopper as hopper_module
from pallas_kernels.quantized import error, round_to

hopper = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu",
    reason="needs an NVIDIA GPU of compute capability 9.0")
TILES = {"128x128": (128, 128), "1x128": (1, 128)}
SHAPES = [(8192, 8192, 8192), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 16384)]
# Float32 sums of up to 384 products, in a different order.
ROUNDING = 384 * 2.0**-24


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outliers(shape, seed=0):
  x = normal(shape, seed)
  x.flat[np.random.default_rng(seed + 9).integers(0, x.size, max(8, x.size // 4096))] *= 1e3
  return x


def shaped(rows, columns, tile):
  values = jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn)
  scales = jax.ShapeDtypeStruct((-(-rows // tile[0]), columns // 128), jnp.float32)
  return jax.eval_shape(functools.partial(Quantized.of, tile=tile), values, scales)


def lower(m, n, k, tile="128x128", dtype=jnp.bfloat16, **tiling):
  chosen = kernel.Tiling(**tiling) if tiling else None
  product = jax.jit(functools.partial(kernel.run, dtype=dtype, tiling=chosen))
  operands = shaped(m, k, (1, 128)), shaped(n, k, TILES[tile])
  return product.trace(*operands).lower(lowering_platforms=("cuda",))


def interpreted(lhs, rhs, **tiling):
  with jax.default_device(jax.devices("cpu")[0]):
    return kernel.run(lhs, rhs, dtype=jnp.float32, tiling=kernel.Tiling(**tiling),
                      interpret=plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore"))


def fourteen_bits(lhs, rhs):
  """Returns the product as a tensor core sums it, promoted every 128 of K.

  A tensor core aligns 32 products and the sum so far to the largest of them, and truncates what is
  below its 13th fraction bit (arXiv:2505.09343, section 3.1.1).
  """
  lhs_values, rhs_values = (np.asarray(x.values_MK, np.float64) for x in (lhs, rhs))
  total = np.zeros((len(lhs_values), len(rhs_values)))
  for first in range(0, lhs.shape[1], 128):
    partial = np.zeros_like(total)
    for k in range(first, first + 128, 32):
      products = lhs_values[:, None, k:k + 32] * rhs_values[None, :, k:k + 32]
      terms = np.concatenate([products, partial[..., None]], -1)
      _, exponent = np.frexp(np.abs(terms).max(-1, keepdims=True))
      step = np.ldexp(1.0, exponent - 1 - 13)
      partial = (np.trunc(terms / step) * step).sum(-1)
    scales = [np.repeat(np.asarray(x.scales_mk)[:, first // 128], x.tile[0])[:x.shape[0]]
              for x in (lhs, rhs)]
    total += partial * scales[0][:, None] * scales[1]
  return total


def exact(lhs, rhs):
  return np.asarray(dequantize(lhs), np.float64) @ np.asarray(dequantize(rhs), np.float64).T


@pytest.mark.parametrize("shape", SHAPES)
def test_production_shapes_lower(shape):
  assert "fp8_matmul_mosaic_gpu" in lower(*shape).as_text()  # the name that profiles show


@pytest.mark.parametrize("tiling", [
    {"tile": "1x128"}, {"dtype": jnp.float32}, {"cluster": 2}, {"m": 4099},
    {"block_m": 256, "depth": 1, "stages": 3, "cluster": 4},
    {"block_n": 192, "depth": 1, "stages": 4}])
def test_every_variant_lowers(tiling):
  lower(**({"m": 4096, "n": 4096, "k": 7168} | tiling))


@pytest.mark.parametrize("shape", [
    (1, 4096, 7168), (40, 2112, 1536), (40, 14592, 2304), (7, 1664, 1280), (333, 1408, 6912)])
@pytest.mark.parametrize("tile", TILES)
def test_few_rows_and_shared_tiles_lower(shape, tile):
  lower(*shape, tile)
  lower(*shape, tile, stages=4, shared=True, depth=1)
  lower(*shape, tile, stages=4, share_last=True, depth=1)


@pytest.mark.parametrize(("shape", "swapped"), [
    ((20, 18432, 7168), True), ((63, 18432, 7168), True), ((7, 512, 7168), True),
    ((63, 13952, 2048), False), ((33, 1664, 1280), False), ((7, 1024, 512), False),
    ((2, 4032, 1408), True), ((17, 4416, 1792), True), ((15, 1664, 2048), False)])
def test_few_rows_take_the_tiling_that_was_measured_to_be_faster(shape, swapped):
  tiling = fp8_tiling.dense_tiling(jnp.bfloat16, False, *shape)
  assert tiling.swapped is swapped and tiling.shared is swapped


@pytest.mark.parametrize(("shape", "taken"), [
    ((136, 11904, 13056), {"swapped": True, "block_n": 160}),
    ((180, 16384, 8192), {"block_m": 256, "shared": False}),
    ((256, 7168, 16384), {"block_m": 128}),
    ((72, 6848, 5248), {"swapped": True, "block_n": 96}),
    ((76, 13952, 11520), {"cluster": 4, "shared": False})])
def test_up_to_256_rows_of_large_weights_read_them_once(shape, taken):
  tiling = fp8_tiling.dense_tiling(jnp.bfloat16, False, *shape)
  assert {name: getattr(tiling, name) for name in taken} == taken
  lower(*shape)


@pytest.mark.parametrize(("shape", "width"), [
    ((404, 576, 10240), 192), ((552, 1728, 9472), 192), ((616, 1024, 8576), 128),
    ((708, 1984, 5632), None), ((1388, 640, 3328), None)])
def test_few_tiles_of_a_long_contraction_are_shared_where_that_was_measured_to_be_faster(
    shape, width):
  tiling = fp8_tiling.dense_tiling(jnp.bfloat16, False, *shape)
  assert tiling.shared is bool(width) and (not width or tiling.block_n == width)
  lower(*shape)


@pytest.mark.parametrize(("tiles", "blocks", "sharers"), [
    (20, 80, 120), (44, 45, 132), (45, 74, 132), (67, 80, 132), (200, 80, 132)])
def test_programs_share_tiles_evenly_unless_that_takes_them_many_blocks_more(
    tiles, blocks, sharers):
  assert schedule.sharers(tiles, blocks, 132) == sharers
  if sharers % tiles == 0:
    assert schedule.most_parts(tiles, blocks, sharers) == sharers // tiles


@pytest.mark.parametrize(("shape", "shared"), [
    ((328, 16960, 7040), True), ((1428, 4672, 10240), True), ((7956, 2112, 14976), True),
    ((1552, 2304, 1792), False), ((8984, 4544, 16000), False), ((4096, 4224, 7168), False)])
def test_a_last_round_of_few_tiles_is_shared_where_that_was_measured_to_be_faster(shape, shared):
  tiling = fp8_tiling.dense_tiling(jnp.bfloat16, False, *shape)
  assert tiling.share_last is shared
  lower(*shape)


@pytest.mark.parametrize(("columns", "dtype"), [
    (4, jnp.float32), (8, jnp.bfloat16), (48, jnp.float32), (72, jnp.bfloat16),
    (84, jnp.float32), (192, jnp.bfloat16)])
def test_widths_of_any_multiple_of_16_bytes_lower(columns, dtype):
  operands = shaped(256, 256, (1, 128)), shaped(columns, 256, (128, 128))
  assert kernel.unsupported_reason(*operands, dtype=dtype) is None
  lower(256, columns, 256, dtype=dtype)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_product_overwrites_its_accumulator_instead_of_adding_to_zeros(monkeypatch, depth):
  found, overwrite = [], hopper_module.overwrite_last
  monkeypatch.setattr(
      hopper_module, "overwrite_last", lambda operations: found.append(overwrite(operations)))
  lower(1024, 1024, 1024, depth=depth)
  assert len(found) >= depth and all(found)


@pytest.mark.parametrize(("m", "n", "k", "tile", "tiling"), [
    (131, 256, 384, "128x128", {"stages": 3}),
    (27, 204, 336, "128x128", {"stages": 2, "depth": 1}),
    (27, 204, 144, "1x128", {"stages": 2, "depth": 1}),
    (133, 128, 256, "1x128", {"stages": 2, "depth": 1}),
    (264, 192, 384, "1x128", {"stages": 3, "block_m": 256, "block_n": 96}),
    (8, 384, 256, "128x128", {"stages": 2, "depth": 1, "block_n": 192}),
    (264, 256, 128, "128x128", {"stages": 2, "cluster": 2, "block_m": 256, "depth": 1}),
    (133, 200, 256, "128x128", {"stages": 2, "cluster_m": 2, "depth": 1}),
    (385, 256, 128, "1x128", {"stages": 2, "cluster_m": 2, "cluster": 2, "depth": 1}),
    (5, 384, 640, "128x128", {"stages": 3, "shared": True}),
    (133, 384, 640, "128x128", {"stages": 2, "depth": 1, "shared": True, "cluster": 2}),
    (133, 256, 384, "1x128", {"stages": 2, "depth": 1, "shared": True}),
    (5, 200, 640, "128x128", {"stages": 3, "block_n": 32, "shared": True, "swapped": True}),
    (33, 256, 384, "1x128", {"stages": 3, "block_n": 64, "shared": True, "swapped": True}),
    (136, 256, 384, "128x128",
     {"stages": 2, "block_n": 160, "depth": 1, "shared": True, "swapped": True}),
    (180, 384, 256, "128x128", {"stages": 2, "block_m": 256, "depth": 1}),
    (260, 400, 640, "128x128", {"stages": 3, "block_n": 96, "share_last": True}),
    (133, 456, 384, "1x128", {"stages": 2, "depth": 1, "share_last": True}),
    (700, 128, 256, "128x128", {"stages": 2, "block_m": 256, "depth": 1, "share_last": True}),
    (256, 256, 384, "128x128", {"stages": 3, "share_last": True}),
    (640, 128, 384, "128x128", {"stages": 3, "share_last": True}),
    (640, 128, 256, "128x128", {"stages": 3, "share_last": True})])
def test_interpreted_kernel_equals_the_exact_product_and_has_no_races(
    monkeypatch, m, n, k, tile, tiling):
  monkeypatch.setattr(fp8_tiling, "MULTIPROCESSORS", 4)  # so that each has several tiles
  lhs, rhs = quantize(jnp.asarray(normal((m, k)))), quantize(jnp.asarray(normal((n, k), 1)), tile)
  assert error(interpreted(lhs, rhs, **tiling), exact(lhs, rhs)) < ROUNDING


def test_unsupported_operands_and_tilings_are_refused_with_the_reason():
  unsupported_reason = functools.partial(kernel.unsupported_reason, dtype=jnp.bfloat16)
  weights = shaped(256, 256, (128, 128))
  assert unsupported_reason(shaped(3, 256, (1, 128)), weights) is None
  assert unsupported_reason(shaped(3, 256, (1, 128)), shaped(136, 256, (128, 128))) is None
  assert "N of a bfloat16 result to be a multiple of 8, and it is 130" in unsupported_reason(
      shaped(3, 256, (1, 128)), shaped(130, 256, (128, 128)))
  assert "(0, 256)" in unsupported_reason(shaped(0, 256, (1, 128)), weights)
  assert "float16" in kernel.unsupported_reason(
      shaped(3, 256, (1, 128)), weights, dtype=jnp.float16)
  e5m2 = quantize(jnp.ones((4, 256)), format="e5m2")
  assert "float8_e5m2" in unsupported_reason(e5m2, weights)
  with pytest.raises(ValueError, match="block_n=100"):
    kernel.Tiling(block_n=100)
  with pytest.raises(ValueError, match="too few registers"):
    kernel.Tiling(block_m=256, depth=2)


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("make", [normal, outliers])
def test_error_is_that_of_14_bit_sums_over_blocks_of_128(make, tile):
  lhs = quantize(jnp.asarray(make((200, 4096))))
  rhs = quantize(jnp.asarray(make((384, 4096), 1)), tile)
  ours = fp8_matmul(lhs, rhs, dtype=jnp.float32, implementation="mosaic_gpu")
  some = Quantized.of(lhs.values_MK[:24], lhs.scales_mk[:24], lhs.tile)
  want = exact(lhs, rhs)
  # A tensor core may keep a bit more or less than the emulation, and 24 rows are a sample.
  assert error(ours, want) < 2 * error(fourteen_bits(some, rhs), want[:24])


@hopper
def test_promoted_sums_err_less_than_sums_that_stay_in_the_tensor_core():
  lhs, rhs = (quantize(jnp.asarray(normal((256, 8192), seed)), "1x128") for seed in range(2))
  ours = fp8_matmul(lhs, rhs, dtype=jnp.float32, implementation="mosaic_gpu")
  assert error(ours, exact(lhs, rhs)) < 2e-4  # the error of XLA's FP8 dot at half the length


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), [
    (1, 384, 640), (7, 384, 640), (128, 384, 640), (131, 576, 640), (1000, 384, 576),
    (131, 16, 16)])
def test_every_row_is_computed_and_bfloat16_results_are_rounded_float32_ones(m, n, k, tile):
  lhs = quantize(jnp.asarray(normal((m, k))))
  rhs = quantize(jnp.asarray(normal((n, k), 1)), tile)
  ours = fp8_matmul(lhs, rhs, dtype=jnp.float32, implementation="mosaic_gpu")
  assert ours.shape == (m, n)
  assert error(ours, fp8_matmul(lhs, rhs, dtype=jnp.float32, implementation="xla")) < 3e-4
  rounded = fp8_matmul(lhs, rhs, implementation="mosaic_gpu")
  np.testing.assert_array_equal(np.asarray(rounded), np.asarray(ours.astype(jnp.bfloat16)))


@hopper
@pytest.mark.parametrize("tiling", [
    {"depth": 1}, {"cluster": 2}, {"depth": 1, "cluster": 4}, {"swizzle": 3},
    {"block_n": 192, "depth": 1, "stages": 4}, {"block_n": 96},
    {"block_m": 256, "depth": 1, "stages": 3}, {"block_m": 256, "block_n": 96, "stages": 3},
    {"block_m": 256, "depth": 1, "stages": 3, "cluster": 2}])
@pytest.mark.parametrize("m", [136, 3000])
def test_results_are_bit_identical_for_every_tiling(m, tiling):
  lhs = quantize(jnp.asarray(normal((m, 1408))))
  rhs = quantize(jnp.asarray(normal((1280, 1408), 1)), "128x128")
  want = kernel.run(lhs, rhs, dtype=jnp.bfloat16, tiling=kernel.Tiling())
  ours = kernel.run(lhs, rhs, dtype=jnp.bfloat16, tiling=kernel.Tiling(**tiling))
  np.testing.assert_array_equal(np.asarray(ours), np.asarray(want))


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "n", "k"), [
    (1428, 1472, 1024), (328, 16960, 640), (17000, 136, 1152), (16384, 2112, 256)])
def test_tiles_of_a_shared_last_round_are_summed_completely(m, n, k, tile):
  lhs, rhs = quantize(jnp.asarray(normal((m, k)))), quantize(jnp.asarray(normal((n, k), 1)), tile)
  ours, want = (kernel.run(lhs, rhs, dtype=jnp.float32,
                           tiling=kernel.Tiling(share_last=last, stages=4, depth=1))
                for last in (True, False))
  np.testing.assert_allclose(np.asarray(ours), np.asarray(want), rtol=1e-4, atol=1e-3)


@hopper
def test_zeros_give_zeros_and_subnormal_numbers_are_not_flushed():
  def values(scale, seed):
    x = round_to(jnp.asarray(normal((128, 512), seed)) * scale, "e4m3")
    return Quantized.of(x, jnp.ones((128, 4)), (1, 128))

  smallest = 2.0**-8  # e4m3's smallest normal number is 2**-6
  lhs, rhs = values(smallest, 0), values(1.0, 1)
  ours = fp8_matmul(lhs, rhs, dtype=jnp.float32, implementation="mosaic_gpu")
  assert error(ours, exact(lhs, rhs)) < 3e-4
  for empty in (values(0.0, 0), quantize(jnp.full((128, 512), 1e-40))):
    product = fp8_matmul(empty, rhs, dtype=jnp.float32, implementation="mosaic_gpu")
    assert not np.asarray(product).any()
