"""Quantisation: values, scales and errors against ml_dtypes and exact arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import (
    FORMATS,
    dequantize,
    quantize,
    quantize_both,
    swiglu,
    swiglu_quantize,
)
from pallas_kernels.quantized import error, round_to


def normal(shape, seed=0, scale=1.0):
  return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [
    ("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_rounding_equals_that_of_ml_dtypes_at_and_next_to_every_tie(name, dtype):
  bits = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
  finite = np.unique(bits[np.isfinite(bits)])
  middles = (finite[1:] + finite[:-1]) / 2
  x = np.concatenate([finite, middles, np.nextafter(middles, np.inf, dtype=np.float32),
                      np.nextafter(middles, -np.inf, dtype=np.float32)])
  ours = jax.jit(round_to, static_argnums=1)(x, name)
  np.testing.assert_array_equal(np.asarray(ours, np.float32), x.astype(dtype).astype(np.float32))


def test_e5m6_rounds_to_the_nearest_number_with_ties_to_even():
  exponents, mantissas = np.arange(-14, 16), np.arange(64)
  normals = np.ldexp(1 + mantissas / 64, exponents[:, None]).ravel()
  numbers = np.unique(np.concatenate([mantissas / 64 * 2.0**-14, normals])).astype(np.float32)
  middles = (numbers[1:] + numbers[:-1]) / 2
  even = np.where(np.arange(len(middles)) % 2 == 0, numbers[:-1], numbers[1:])
  for x, want in ((numbers, numbers), (middles, even),
                  (np.nextafter(middles, np.float32(np.inf)), numbers[1:]),
                  (np.nextafter(middles, np.float32(0)), numbers[:-1])):
    np.testing.assert_array_equal(np.asarray(round_to(x, "e5m6"), np.float32), want)
    np.testing.assert_array_equal(np.asarray(round_to(-x, "e5m6"), np.float32), -want)
  assert numbers[-1] == FORMATS["e5m6"].largest


def test_nans_stay_nans_in_e5m6():
  bits = np.array([0x7F800001, 0x7F802000, 0xFF802000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
  assert np.isnan(round_to(bits.astype(np.uint32).view(np.float32), "e5m6")).all()


def by_hand(x, tile, largest, power_of_two, smallest=1e-4):
  scales = np.zeros((-(-x.shape[0] // tile[0]), -(-x.shape[1] // tile[1])), np.float32)
  values = np.zeros_like(x)
  for i in range(scales.shape[0]):
    for j in range(scales.shape[1]):
      part = (slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1]))
      scale = np.maximum(np.abs(x[part]).max(), np.float32(smallest)) / np.float32(largest)
      scales[i, j] = 2.0**np.ceil(np.log2(np.float64(scale))) if power_of_two else scale
      values[part] = np.clip(x[part] / scales[i, j], -largest, largest)
  return values, scales


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("tile", "size"), [
    ("1x128", (1, 128)), ("128x1", (128, 1)), ("128x128", (128, 128)), ("row", (1, 300)),
    ("tensor", (200, 300))])
def test_every_tile_has_its_own_scale_including_partial_tiles_at_edges(tile, size, power_of_two):
  x = normal((200, 300))
  x[3, 5] = 1e4
  x[130:] = 0
  ours = jax.jit(quantize, static_argnames=("tile", "power_of_two"))(
      x, tile=tile, power_of_two=power_of_two)
  values, scales = by_hand(x, size, 448.0, power_of_two)
  assert ours.tile == size and ours.values_MK.dtype == jnp.float8_e4m3fn
  # A float32 quotient may differ in its last bit, and then the rounded value by a step.
  np.testing.assert_allclose(ours.scales_mk, scales, rtol=0 if power_of_two else 2e-7)
  rounded = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
  differ = np.asarray(ours.values_MK, np.float32) != rounded
  assert differ.mean() < 1e-4


def test_a_batch_of_matrices_is_quantised_matrix_by_matrix():
  x = jnp.asarray(normal((3, 130, 140)))
  whole = quantize(x, "128x128")
  for i in range(3):
    alone = quantize(x[i], "128x128")
    np.testing.assert_array_equal(whole.values_MK[i], alone.values_MK)
    np.testing.assert_array_equal(whole.scales_mk[i], alone.scales_mk)


@pytest.mark.parametrize(("x", "exact"), [
    (np.zeros((2, 256), np.float32), True),
    (np.full((2, 256), 1e-40, np.float32), False),
    (np.full((2, 256), 3e38, np.float32), True)])
def test_zeros_denormals_and_the_largest_numbers_give_finite_values(x, exact):
  ours = quantize(x)
  assert np.isfinite(np.asarray(ours.values_MK, np.float32)).all()
  assert np.isfinite(ours.scales_mk).all() and (np.asarray(ours.scales_mk) > 0).all()
  np.testing.assert_allclose(dequantize(ours), x if exact else 0, rtol=1e-6)


def test_error_of_normal_numbers_is_that_of_three_mantissa_bits():
  x = normal((256, 512))
  # A mantissa in [1, 2) is rounded by up to half a step, 2^-4, uniformly: by 2^-4 / sqrt(3) in the
  # root mean square, which is relative to that of the mantissa, 1 or more.
  assert 0.02 < error(dequantize(quantize(x)), x) < 2**-4 / np.sqrt(3)
  ratio = error(dequantize(quantize(x, format="e5m2")), x) / error(dequantize(quantize(x)), x)
  assert 1.8 < ratio < 2.2


def test_one_outlier_spoils_a_tensor_with_a_single_scale_but_not_one_with_1x128_tiles():
  x = normal((256, 512))
  x[7, 11] = 1e6
  rest = np.ones_like(x, bool)
  rest[7, 0:128] = False
  error_of_rest = lambda tile: error(np.asarray(dequantize(quantize(x, tile)))[rest], x[rest])
  assert error_of_rest("tensor") > 0.9 and error_of_rest("1x128") < 0.03


def test_power_of_two_scales_let_rows_be_requantised_along_columns_without_loss():
  x = normal((256, 384))
  by_rows = lambda pow2: dequantize(quantize(x, "1x128", power_of_two=pow2))
  by_columns = lambda y, pow2: dequantize(quantize(y, "128x1", power_of_two=pow2))
  assert error(by_columns(by_rows(True), True), by_rows(True)) == 0
  assert error(by_columns(by_rows(False), False), by_rows(False)) > 0.01


def test_transposing_a_quantised_matrix_equals_quantising_its_transpose():
  x = jnp.asarray(normal((256, 130)))
  ours, want = quantize(x, "128x1").mT, quantize(x.T, "1x128")
  assert ours.tile == want.tile
  np.testing.assert_array_equal(ours.values_MK, want.values_MK)
  np.testing.assert_array_equal(ours.scales_mk, want.scales_mk)


@pytest.mark.parametrize(("x", "options", "message"), [
    (jnp.zeros(3), {}, "at least two axes"),
    (jnp.zeros((3, 3), jnp.int32), {}, "float32 or bfloat16"),
    (jnp.zeros((3, 3)), {"format": "e3m4"}, "there are: e4m3, e5m2, e5m6"),
    (jnp.zeros((3, 3)), {"tile": "64x64"}, "there are: 1x128, 128x1, 128x128, row, tensor"),
    (jnp.zeros((3, 3)), {"implementation": "magic"}, "no implementation 'magic'; there are: xla"),
])
def test_unsupported_arrays_and_unknown_options_are_refused(x, options, message):
  with pytest.raises(ValueError, match=message):
    quantize(x, **options)


def test_hidden_units_are_quantised_from_float32_without_rounding_to_bfloat16_first():
  gate_up = jnp.asarray(normal((3, 60, 2, 200)), jnp.bfloat16)
  gate, up = np.asarray(gate_up, np.float64)[..., 0, :], np.asarray(gate_up, np.float64)[..., 1, :]
  hidden = gate / (1 + np.exp(-gate)) * up
  ours, rounded = swiglu_quantize(gate_up), quantize(swiglu(gate_up))
  assert ours.shape == (3, 60, 200) and ours.tile == (1, 128)
  # The exponential errs by at most two units in the last place, and five roundings of half a unit
  # each follow.
  amax = np.stack([np.abs(hidden[..., :128]).max(-1), np.abs(hidden[..., 128:]).max(-1)], -1)
  np.testing.assert_allclose(ours.scales_mk, amax / 448, rtol=9 * 2.0**-24)
  assert (np.asarray(ours.scales_mk) != np.asarray(rounded.scales_mk)).any()
  assert error(dequantize(ours), hidden) < 2**-4 / np.sqrt(3)


@pytest.mark.parametrize("options", [{}, {"format": "e5m2", "power_of_two": True}])
def test_quantize_both_equals_quantising_the_matrix_and_its_transpose(options):
  x = jnp.asarray(normal((2, 130, 200)))
  straight, transposed = quantize_both(x, **options)
  for ours, want in ((straight, quantize(x, **options)), (transposed, quantize(x.mT, **options))):
    assert ours.tile == want.tile == (1, 128)
    np.testing.assert_array_equal(ours.values_MK, want.values_MK)
    np.testing.assert_array_equal(ours.scales_mk, want.scales_mk)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: swiglu_quantize(jnp.zeros((4, 3, 128))), r"\[..., M, 2, F\], not \(4, 3, 128\)"),
    (lambda: swiglu_quantize(jnp.zeros((2, 128))), r"\[..., M, 2, F\], not \(2, 128\)"),
    (lambda: swiglu_quantize(jnp.zeros((4, 2, 8)), format="e3m4"), "there are: e4m3, e5m2, e5m6"),
    (lambda: quantize_both(jnp.zeros(4)), "at least two axes"),
    (lambda: quantize_both(jnp.zeros((4, 4)), implementation="mosaic_gpu"), "'mosaic_gpu' needs"),
])
def test_unsupported_arguments_of_the_fused_operations_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
