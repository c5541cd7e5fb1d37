"""The TPU kernels against their oracles, in the interpreter, where unwritten memory is NaN.

Shape letters:  R rows  G groups  K contracted width  N result width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Quantized,
    fp8_grouped_matmul,
    fp8_grouped_weight_gradient,
    fp8_matmul,
    grouped_matmul,
    implementations,
    quantize,
    quantize_groups,
)
from pallas_kernels import grouped_weight_gradient as oracle_weight_gradient
from pallas_kernels.mosaic_tpu import fp8_grouped, fp8_weight_gradient
from pallas_kernels.mosaic_tpu import fp8_matmul as dense
from pallas_kernels.mosaic_tpu import grouped_matmul as grouped
from pallas_kernels.mosaic_tpu import quantize as quantizer
from pallas_kernels.quantized import FORMATS, dequantize

TILING = dense.Tiling(64, 128, 128)
TILES = {"1x128": (1, 128), "128x128": (128, 128)}
SIZES = [[3, 130, 0, 67], [0, 0, 200, 0], [57, 64, 8, 71], [0, 0, 0, 0]]
ROWS = 205  # 5 rows are past the last group, and 205 is not a multiple of a tile
OPTIONS = {"dtype": jnp.float32, "tiling": TILING, "interpret": True}
# Compiled once for all group sizes.
fp8_grouped_run = jax.jit(functools.partial(fp8_grouped.run, **OPTIONS))
fp8_gradient_run = jax.jit(functools.partial(fp8_weight_gradient.run, **OPTIONS))
fp8_grouped_oracle = jax.jit(functools.partial(
    fp8_grouped_matmul, dtype=jnp.float32, implementation="xla"))
fp8_gradient_oracle = jax.jit(functools.partial(fp8_grouped_weight_gradient, implementation="xla"))
quantize_rows = jax.jit(quantize_groups)


def all_products(run):
  """Returns a jitted function of the product by transposed matrices and of its two gradients.

  The gradient of lhs multiplies by the matrices without transposing them.
  """
  @jax.jit
  def products(sizes_G, lhs_RK, rhs_GNK, dout_RN):
    out_RN, transpose = jax.vjp(
        lambda lhs, rhs: run(lhs, rhs, sizes_G, transpose_rhs=True), lhs_RK, rhs_GNK)
    return out_RN, *transpose(dout_RN)
  return products


grouped_run = all_products(functools.partial(
    grouped.run, interpret=True, tiling=grouped.Tiling(64, 128, 128)))
grouped_oracle = all_products(functools.partial(
    grouped_matmul, precision="highest", implementation="xla"))


def numbers(shape, seed=0, dtype=jnp.float32):
  """Normal numbers, one in a thousand scaled by 1000, with a row of zeros and one of denormals."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * np.where(rng.random(shape) < 1e-3, 1e3, 1)
  x[..., 0, :], x[..., 1, :] = 0, 1e-39
  return jnp.asarray(x, dtype)


def assert_sums_agree(ours, want, magnitude, terms):
  """Asserts that float32 sums of `terms` products agree, in whatever order they are computed.

  Every product is scaled with two more roundings; `magnitude` is the sum of absolute products.
  """
  assert (ours.shape, ours.dtype) == (want.shape, want.dtype)
  difference = np.abs(np.asarray(ours, np.float64) - np.asarray(want, np.float64))
  assert (difference <= 2 * (terms + 3) * 2.0**-24 * np.asarray(magnitude, np.float64)).all()


def absolute(x):
  return Quantized.of(abs(x.values_MK.astype(jnp.float32)).astype(x.values_MK.dtype), x.scales_mk,
                      x.tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("shape", "dtype", "format", "power_of_two", "smallest_amax"), [
    ((131, 300), jnp.bfloat16, "e4m3", False, 1e-4),
    ((2, 70, 256), jnp.float32, "e5m2", True, 1e-20)])
def test_quantisation_is_bit_exact(tile, shape, dtype, format, power_of_two, smallest_amax):
  x = numbers(shape, dtype=dtype)
  options = {"format": format, "power_of_two": power_of_two, "smallest_amax": smallest_amax}
  ours = quantizer.run(x, TILES[tile], **options, interpret=True,
                       tiling=quantizer.Tiling(numbers=1 << 12))
  want = quantize(x, tile, **options, implementation="xla")
  assert ours.values_MK.dtype == FORMATS[format].dtype
  np.testing.assert_array_equal(ours.scales_mk, want.scales_mk)
  np.testing.assert_array_equal(ours.values_MK.astype(jnp.float32),
                                want.values_MK.astype(jnp.float32))


@pytest.mark.cpu
@pytest.mark.parametrize(("tile", "native"), [("128x128", False), ("1x128", True)])
def test_fp8_product_agrees_with_the_oracle(tile, native):
  lhs, rhs = quantize(numbers((70, 300))), quantize(numbers((200, 300), 1), tile)
  ours = dense.run(lhs, rhs, native=native, **OPTIONS)
  want, magnitude = (fp8_matmul(*pair, dtype=jnp.float32, implementation="xla")
                     for pair in ((lhs, rhs), map(absolute, (lhs, rhs))))
  assert_sums_agree(ours, want, magnitude, 300)


@pytest.mark.cpu
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_groups_are_multiplied_by_their_own_matrix_and_rows_past_them_give_zero(sizes):
  lhs, rhs = quantize(numbers((ROWS, 256))), quantize(numbers((4, 200, 256), 1), "128x128")
  sizes_G = jnp.array(sizes, jnp.int32)
  scales_mk = jnp.where(jnp.arange(ROWS)[:, None] < sum(sizes), lhs.scales_mk, jnp.nan)
  ours = fp8_grouped_run(Quantized.of(lhs.values_MK, scales_mk, lhs.tile), rhs, sizes_G)
  want, magnitude = (fp8_grouped_oracle(*pair, sizes_G)
                     for pair in ((lhs, rhs), map(absolute, (lhs, rhs))))
  assert_sums_agree(ours, want, magnitude, 256)


@pytest.mark.cpu
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_weight_gradient_sums_only_over_the_rows_of_its_group(sizes):
  sizes_G = jnp.array(sizes, jnp.int32)
  lhs, rhs = (quantize_rows(numbers((ROWS, n), n), sizes_G) for n in (140, 200))
  ours = fp8_gradient_run(lhs, rhs, sizes_G)
  want, magnitude = (fp8_gradient_oracle(*pair, sizes_G)
                     for pair in ((lhs, rhs), map(absolute, (lhs, rhs))))
  assert_sums_agree(ours, want, magnitude, ROWS)


@pytest.mark.cpu
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_product_and_its_gradients_agree_with_the_oracle(sizes):
  sizes_G, bf16 = jnp.array(sizes, jnp.int32), jnp.bfloat16
  lhs_RK, rhs_GNK = numbers((ROWS, 140), dtype=bf16), numbers((4, 200, 140), 1, bf16)
  dout_RN = numbers((ROWS, 200), 2, bf16)
  past_R1 = (jnp.arange(ROWS) >= sum(sizes))[:, None]
  lhs_RK, dout_RN = (jnp.where(past_R1, 0, x).astype(bf16) for x in (lhs_RK, dout_RN))
  stale = lambda x: jnp.where(past_R1, jnp.nan, x).astype(bf16)  # unwritten memory
  ours = grouped_run(sizes_G, stale(lhs_RK), rhs_GNK, stale(dout_RN))
  wide = [x.astype(jnp.float32) for x in (lhs_RK, rhs_GNK, dout_RN)]
  want, magnitude = (grouped_oracle(sizes_G, *operands)
                     for operands in (wide, map(abs, wide)))
  for our, their, size in zip(ours, want, magnitude, strict=True):
    assert our.dtype == jnp.bfloat16
    error = np.abs(np.asarray(our, np.float64) - np.asarray(their, np.float64))
    rounding = 2.0**-8 * np.abs(np.asarray(their, np.float64))
    assert (error <= rounding + 2 * ROWS * 2.0**-24 * np.asarray(size, np.float64)).all()


def test_a_weight_gradient_of_bfloat16_operands_may_be_float32():
  lhs_RK, rhs_RN = numbers((ROWS, 140), 0, jnp.bfloat16), numbers((ROWS, 200), 1, jnp.bfloat16)
  sizes_G = jnp.array(SIZES[0], jnp.int32)
  ours = grouped.run_weight_gradient(
      lhs_RK, rhs_RN, sizes_G, dtype=jnp.float32, interpret=True,
      tiling=grouped.Tiling(64, 128, 128))
  oracle = functools.partial(oracle_weight_gradient, dtype=jnp.float32, implementation="xla")
  assert_sums_agree(ours, oracle(lhs_RK, rhs_RN, sizes_G),
                    oracle(abs(lhs_RK), abs(rhs_RN), sizes_G), ROWS)


def test_unsupported_operands_are_refused_with_the_reason():
  bf16, sizes_G = jnp.zeros((4, 128), jnp.bfloat16), jnp.zeros(2, jnp.int32)
  options = {"format": "e4m3", "power_of_two": False, "smallest_amax": 1e-4}
  assert quantizer.unsupported_reason(bf16, (1, 128), **options) is None
  assert "1x128 or 128x128" in quantizer.unsupported_reason(bf16, (128, 1), **options)
  wide = jax.ShapeDtypeStruct((128, 30720), jnp.float32)
  assert "at most 29491 numbers" in quantizer.unsupported_reason(wide, (128, 128), **options)
  assert quantizer.unsupported_reason(wide, (1, 128), **options) is None
  assert "not support e5m6" in quantizer.unsupported_reason(
      bf16, (1, 128), **options | {"format": "e5m6"})
  assert grouped.unsupported_reason(bf16, jnp.zeros((2, 128, 3), jnp.bfloat16), sizes_G) is None
  assert "bfloat16" in grouped.unsupported_reason(dequantize(quantize(bf16)), bf16, sizes_G)
  many = jax.ShapeDtypeStruct(((1 << 21) + 1, 128), jnp.bfloat16)
  assert "at most 2097152 rows" in grouped.unsupported_reason(many, bf16, sizes_G)
  eight, six = quantize(bf16), quantize(bf16, format="e5m6")
  assert dense.unsupported_reason(eight, eight, dtype=jnp.bfloat16) is None
  assert "float8" in dense.unsupported_reason(six, eight, dtype=jnp.bfloat16)
  assert "not float16" in dense.unsupported_reason(eight, eight, dtype=jnp.float16)


@pytest.mark.parametrize("make", [
    lambda: dense.Tiling(rows=40), lambda: grouped.Tiling(depth=64), lambda: quantizer.Tiling(0)])
def test_invalid_tilings_are_refused(make):
  with pytest.raises(ValueError, match="Tiling's"):
    make()


@pytest.mark.skipif(implementations.local_backend() == "mosaic_tpu", reason="this is a TPU")
def test_requesting_a_tpu_kernel_without_a_tpu_is_refused():
  x = numbers((4, 128))
  with pytest.raises(ValueError, match="'mosaic_tpu' needs a TPU"):
    quantize(x, implementation="mosaic_tpu")
  with pytest.raises(ValueError, match="'mosaic_tpu' needs a TPU"):
    fp8_matmul(quantize(x), quantize(x), implementation="mosaic_tpu")
