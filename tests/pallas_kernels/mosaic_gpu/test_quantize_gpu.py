"""Hopper's quantisation kernels against their oracles: interpreted, lowered and on a GPU.

The oracles run on the CPU, whose division is correctly rounded; XLA's division on a GPU is not.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
  Quantized,
  implementations,
  quantize,
  quantize_both,
  swiglu_quantize,
  swiglu_quantize_with_inputs,
)
from pallas_kernels.mosaic_gpu import quantize as kernels
from pallas_kernels.mosaic_gpu import quantize_fused as fused

ON_HOPPER = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu", reason="needs a Hopper GPU")
DEFAULTS = {"format": "e4m3", "power_of_two": False, "smallest_amax": 1e-4}
SMALL = DEFAULTS | {"format": "e5m2", "power_of_two": True}
SIX = DEFAULTS | {"format": "e5m6", "power_of_two": True}
TILES = {"1x128": (1, 128), "128x1": (128, 1), "128x128": (128, 128)}
RUNS = {"swiglu": fused.run_swiglu, "swiglu and inputs": fused.run_swiglu_with_inputs,
        "both": lambda x, **options: fused.run_both(x, (1, 128), **options),
        "both, 128x128": lambda x, **options: fused.run_both(x, (128, 128), **options)} | {
    name: lambda x, tile=tile, **options: kernels.run(x, tile, **options)
    for name, tile in TILES.items()}
ORACLES = {"swiglu": swiglu_quantize, "swiglu and inputs": swiglu_quantize_with_inputs,
           "both": quantize_both,
           "both, 128x128": functools.partial(quantize_both, tile="128x128")} | {
    name: lambda x, tile=name, **options: quantize(x, tile, **options) for name in TILES}
unsupported_rows = functools.partial(kernels.unsupported_reason, tile=(1, 128))
unsupported_columns = functools.partial(kernels.unsupported_reason, tile=(128, 1))
unsupported_both = functools.partial(fused.unsupported_both, tile=(1, 128))
unsupported_whole = functools.partial(kernels.unsupported_reason, tile=(1, 256))


def numbers(shape, dtype=jnp.bfloat16, seed=0):
  """Normal numbers, one in a thousand scaled by 1000, with a row of zeros and one of denormals."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape).astype(np.float32)
  x *= np.where(rng.random(shape) < 1e-3, 1e3, 1)
  x[0], x[shape[0] // 2] = 0, 1e-39
  return jnp.asarray(x, dtype)


def oracle(name, x, options):
  with jax.default_device(jax.devices("cpu")[0]):
    return ORACLES[name](jnp.asarray(np.asarray(x)), implementation="xla", **options)


def arrays(found):
  """Returns values and scales; what scales are padded with may differ."""
  found = (found,) if isinstance(found, Quantized) else found
  return [array for x in found for array in (x.values_MK, x.scales_mk)]


def assert_equal(ours, want):
  assert jax.tree.structure(ours) == jax.tree.structure(want)
  for a, b in zip(arrays(ours), arrays(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def assert_nearly_equal(ours, want):
  """Asserts that hidden units agree, up to the approximation of the exponential.

  The exponential's argument x log2(e) is rounded twice, which matters up to |x| = 104, where the
  exponential underflows. The exponential itself, two inverse roots and eight roundings err by less
  than 2^-22 each: (208 + 44) 2^-24 in all. A quantised value then differs only where it is that
  close to one of the ties, which are 2^-4 or more apart.
  """
  tolerance = 252 * 2.0**-24
  np.testing.assert_allclose(ours.scales_mk, want.scales_mk, rtol=tolerance)
  a, b = (np.asarray(x.values_MK, np.float32) for x in (ours, want))
  np.testing.assert_allclose(a, b, rtol=2.0**-3, atol=2.0**-9)  # one step
  assert (a != b).mean() < 2 * 2 * tolerance * 2**4


@pytest.mark.parametrize(("name", "dtype", "options"), [
    ("1x128", jnp.bfloat16, DEFAULTS), ("1x128", jnp.float32, SMALL),
    ("128x1", jnp.bfloat16, SMALL), ("128x128", jnp.float32, DEFAULTS),
    *((tile, dtype, SIX) for tile in TILES for dtype in (jnp.bfloat16, jnp.float32)),
    ("both", jnp.bfloat16, DEFAULTS), ("both, 128x128", jnp.float32, SMALL)])
def test_interpreted_kernels_are_bit_exact_and_have_no_races(name, dtype, options):
  x = numbers((131, 256), dtype)
  ours = RUNS[name](x, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  assert_equal(ours, oracle(name, x, options))


def test_interpreted_swiglu_agrees_with_the_oracle_and_has_no_races():
  x = numbers((3, 15, 2, 256))
  ours = fused.run_swiglu(x, **DEFAULTS, tiling=kernels.Tiling(rows=32, step=16),
                          interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  assert ours.shape == (3, 15, 256)
  assert_nearly_equal(ours, oracle("swiglu", x, DEFAULTS))


def test_interpreted_swiglu_quantises_its_inputs_bit_exactly():
  x = numbers((3, 15, 2, 256))
  hidden, inputs = fused.run_swiglu_with_inputs(
      x, **DEFAULTS, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  want_hidden, want_inputs = oracle("swiglu and inputs", x, DEFAULTS)
  assert_nearly_equal(hidden, want_hidden)
  assert_equal(inputs, want_inputs)


@pytest.mark.parametrize(("name", "shape", "dtype", "options"), [
    ("1x128", (131072, 7168), jnp.bfloat16, DEFAULTS), ("1x128", (1, 7168), jnp.float32, SMALL),
    ("128x1", (65536, 2048), jnp.bfloat16, SMALL), ("128x1", (16384, 7168), jnp.float32, DEFAULTS),
    ("128x128", (256, 2048, 7168), jnp.float32, DEFAULTS),
    ("1x128", (16384, 2048), jnp.bfloat16, SIX),
    ("swiglu", (65536, 2, 2048), jnp.bfloat16, DEFAULTS),
    ("swiglu", (65536, 2, 2048), jnp.float32, SMALL),
    ("swiglu and inputs", (106496, 2, 1408), jnp.bfloat16, DEFAULTS),
    ("both", (16384, 7168), jnp.bfloat16, DEFAULTS), ("both", (65536, 2048), jnp.float32, SMALL),
    ("both, 128x128", (256, 2048, 7168), jnp.float32, DEFAULTS),
    *((name, (131, 2, 1408) if "swiglu" in name else (131, 1408), jnp.bfloat16, DEFAULTS)
      for name in RUNS)])
def test_production_and_odd_shapes_lower_for_hopper(name, shape, dtype, options):
  call = jax.jit(lambda x: RUNS[name](x, **options))
  lowered = call.trace(jax.ShapeDtypeStruct(shape, dtype)).lower(lowering_platforms=("cuda",))
  named = {"swiglu": "swiglu_quantize", "swiglu and inputs": "swiglu_quantize_with_inputs",
           "both": "quantize_both", "both, 128x128": "quantize_both"}.get(name, "quantize")
  assert f"{named}_mosaic_gpu" in lowered.as_text()  # the name that profiles show


def to_float32(x: Fraction) -> Fraction:
  """Returns the nearest float32, ties to even, of a number that is positive or already exact."""
  exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
  exponent -= Fraction(2)**exponent > abs(x)
  unit = Fraction(2)**(exponent - 23)
  return round(x / unit) * unit


def test_the_division_free_quotient_changes_no_fp8_number():
  # Before its last rounding the quotient x / s errs by less than 2.3 2^-24 units. That changes an
  # FP8 number only if the quotient is that close to m, half a unit from a tie t: |2^k x - s m| < 5
  # for 24-bit integers x and s. As m is t 2^20 -+ 1, and 16 divides no smaller multiple, s must be
  # within 4 of a multiple of 2^20. The loops below try every such case.
  tried = 0
  for s in (c * 2**20 + d for c in range(8, 17) for d in range(-4, 5)):
    middles = [t * 2**20 + side for t in range(16, 33) for side in (-1, 1)][1:-1]
    for x in ((s * middle >> k) + d for middle in middles for k in (24, 25) for d in range(-1, 3)):
      if not (2**23 <= x < 2**24 and 2**23 <= s < 2**24):
        continue
      inverse = to_float32(Fraction(1, s))
      quotient = to_float32(x * inverse)
      residual = x - quotient * s
      ours = to_float32(quotient + (residual and to_float32(residual)) * inverse)
      assert ours == to_float32(Fraction(x, s))
      tried += 1
  assert tried > 5000


@pytest.mark.parametrize(("unsupported_reason", "shape", "options", "reason"), [
    (unsupported_rows, (4, 130), {}, "multiple of 128, and it is 130"),
    (unsupported_rows, (0, 128), {}, "at least one row"),
    (unsupported_rows, (4, 128), {"format": "e5m6"}, "e5m6 with powers of two for scales only"),
    (unsupported_both, (4, 128), {"format": "e5m6", "power_of_two": True}, "no e5m6"),
    (unsupported_rows, (4, 128), {"smallest_amax": 0.0}, "at least 1e-20, and it is 0.0"),
    (unsupported_columns, (2, 130, 128), {}, "several matrices, and it is 130"),
    (unsupported_whole, (2, 256), {}, "they are 1x256"),
    (unsupported_both, (2, 128, 128), {}, "single matrix"),
    (fused.SWIGLU_KERNEL.unsupported_reason, (2, 2, 64), {}, "multiple of 128, and it is 64")])
def test_unsupported_operands_are_refused_with_the_reason(
    unsupported_reason, shape, options, reason):
  assert reason in unsupported_reason(jnp.zeros(shape), **DEFAULTS | options)


@pytest.mark.parametrize(("unsupported_reason", "shape"), [
    (unsupported_rows, (3, 5, 128)), (unsupported_columns, (130, 128)),
    (unsupported_columns, (2, 256, 128)),
    (unsupported_both, (1, 128)), (fused.SWIGLU_KERNEL.unsupported_reason, (3, 1, 2, 128))])
def test_odd_numbers_of_rows_are_supported(unsupported_reason, shape):
  assert unsupported_reason(jnp.zeros(shape), **SMALL) is None


def test_a_tiling_with_an_invalid_step_is_refused():
  with pytest.raises(ValueError, match="multiple of 16 that divides 128 and rows, and is 48 of 96"):
    kernels.Tiling(rows=96, step=48)


@ON_HOPPER
@pytest.mark.parametrize(("dtype", "options"), [
    (jnp.bfloat16, DEFAULTS), (jnp.bfloat16, SMALL), (jnp.float32, DEFAULTS),
    (jnp.float32, DEFAULTS | {"power_of_two": True})])
@pytest.mark.parametrize("shape", [(1, 128), (131, 1408), (4096, 7168)])
@pytest.mark.parametrize("name", [*TILES, "both", "both, 128x128"])
def test_on_a_gpu_kernels_are_bit_exact(name, shape, dtype, options):
  x = numbers(shape, dtype)
  ours = jax.jit(lambda x: RUNS[name](x, **options))(x)
  want = oracle(name, x, options)
  each, wanted = ((y,) if isinstance(y, Quantized) else y for y in (ours, want))
  x = np.asarray(x, np.float32)
  for kernel, xla, exact in zip(each, wanted, (x, x.T), strict=False):
    np.testing.assert_array_equal(np.asarray(kernel.scales_mk), np.asarray(xla.scales_mk))
    # XLA's quotient is not the nearest in one of a hundred thousand cases.
    scales = np.repeat(np.asarray(kernel.scales_mk), kernel.tile[0], 0)[:len(exact)]
    nearest = (exact / np.repeat(scales, kernel.tile[1], 1)[:, :exact.shape[1]]).astype(
        kernel.values_MK.dtype)
    np.testing.assert_array_equal(
        np.asarray(kernel.values_MK, np.float32), nearest.astype(np.float32))


@ON_HOPPER
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", TILES)
def test_on_a_gpu_kernels_round_to_e5m6_bit_exactly(name, dtype):
  x = numbers((131, 1408), dtype)
  assert_equal(jax.jit(lambda x: RUNS[name](x, **SIX))(x), oracle(name, x, SIX))


@ON_HOPPER
@pytest.mark.parametrize("name", [*TILES, "both"])
def test_on_a_gpu_kernels_agree_with_the_oracle_on_extreme_values(name):
  options = DEFAULTS | {"smallest_amax": kernels.LEAST_AMAX}
  call = jax.jit(lambda x: RUNS[name](x, **options))
  for value in (0.0, 1e-40, 3e-20, 3e38, -448.0):
    x = jnp.full((130, 256), value, jnp.float32)
    assert_equal(call(x), oracle(name, x, options))


@ON_HOPPER
def test_on_a_gpu_a_batch_of_matrices_is_quantised_matrix_by_matrix():
  x = jnp.stack([numbers((256, 384), seed=seed) for seed in range(3)])
  for name in (*TILES, "both, 128x128"):
    run = jax.jit(lambda x, name=name: RUNS[name](x, **DEFAULTS))
    assert_equal(run(x), jax.tree.map(lambda *each: jnp.stack(each), *map(run, x)))


@ON_HOPPER
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 2, 128), (131, 2, 256), (4096, 2, 2048)])
def test_on_a_gpu_swiglu_agrees_with_the_oracle(shape, dtype):
  x = numbers(shape, dtype)
  ours = jax.jit(lambda x: fused.run_swiglu(x, **DEFAULTS))(x)
  assert_nearly_equal(ours, oracle("swiglu", x, DEFAULTS))
  hidden, inputs = jax.jit(lambda x: fused.run_swiglu_with_inputs(x, **DEFAULTS))(x)
  assert_equal(hidden, ours)
  # Not the oracle's: XLA's quotients on a CPU are off by a unit for one number in three million.
  assert_equal(inputs, RUNS["1x128"](x.reshape(len(x), -1), **DEFAULTS))


@ON_HOPPER
def test_on_a_gpu_the_kernels_are_the_default_implementation():
  x = numbers((128, 256))
  for call in (quantize, quantize_both):
    assert "mosaic_gpu" in jax.jit(call).lower(x).as_text()
