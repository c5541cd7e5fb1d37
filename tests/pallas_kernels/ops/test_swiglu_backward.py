"""SwiGLU's quantised backward pass against analytic gradients; its kernel in interpreter and GPU.

Shape letters:  M rows  F hidden units
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
  Quantized,
  dequantize,
  implementations,
  quantize,
  swiglu_backward_quantize,
)
from pallas_kernels.mosaic_gpu import swiglu_backward as kernels
from pallas_kernels.ops.fp8_linear import SMALLEST_GRADIENT_AMAX
from pallas_kernels.ops.quantize import SMALLEST_AMAX
from pallas_kernels.quantized import FORMATS

ON_HOPPER = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu", reason="needs a Hopper GPU")
DEFAULTS = {"format": "e4m3", "power_of_two": False, "smallest_amax": SMALLEST_AMAX,
            "smallest_gradient_amax": SMALLEST_GRADIENT_AMAX}
SMALL = DEFAULTS | {"format": "e5m2", "power_of_two": True}
# Relative error of hidden units and gradients before they are rounded, derived in
# test_quantize_gpu.assert_nearly_equal.
RELATIVE_ERROR = 252 * 2.0**-24


def operands(m, f, *, gradient=1e-6, dtype=jnp.bfloat16, kept=None):
  """Normal numbers, one in a thousand scaled by 1000, with a row of zeros and one of denormals.

  Gate and up are quantised to the format `kept` if one is given.
  """
  rng = np.random.default_rng(0)

  def numbers(*shape):
    x = rng.standard_normal(shape) * np.where(rng.random(shape) < 1e-3, 1e3, 1)
    x[0], x[m // 2] = 0, 1e-39
    return x

  gate_up = jnp.asarray(numbers(m, 2 * f), dtype)
  if kept:
    with jax.default_device(jax.devices("cpu")[0]):
      gate_up = quantize(jnp.asarray(np.asarray(gate_up)), format=kept, implementation="xla")
  return (gate_up, jnp.asarray(rng.random(m), jnp.float32),
          jnp.asarray(gradient * numbers(m, f), dtype))


def open_gates(m, f):
  """Returns operands with gate so large that the sigmoid is one and all gradients are products."""
  gate_up, gates, dhidden = operands(m, f, gradient=1e-3)
  return gate_up.at[:, :f].set(128), jnp.ones_like(gates), dhidden


def oracle(args, options):
  with jax.default_device(jax.devices("cpu")[0]):
    args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), args)
    return swiglu_backward_quantize(*args, implementation="xla", **options)


def interpreted(args, options):
  ours = kernels.run(*args, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  return ours


def analytic(gate_up, gates_M, dhidden_MF):
  """Returns, in float64, gate and up's gradient, hidden units and the gates' gradient's terms."""
  gate_up = dequantize(gate_up) if isinstance(gate_up, Quantized) else gate_up
  gate, up = np.split(np.asarray(gate_up, np.float64), 2, 1)
  dhidden = np.asarray(dhidden_MF, np.float64)
  gates = np.asarray(gates_M, np.float64)[:, None]
  with np.errstate(over="ignore"):
    sigmoid = 1 / (1 + np.exp(-gate))
  dgate = dhidden * gates * up * sigmoid * (1 + gate * (1 - sigmoid))
  dup = dhidden * gates * gate * sigmoid
  hidden = gate * sigmoid * up
  return np.concatenate([dgate, dup], 1), hidden * gates, dhidden * hidden


def assert_shapes(result, m, f, format="e4m3"):
  dgate_up, dgate_up_t, hidden_t, dgates = result
  blocks = -(-m // 128)
  for x, shape, scales in ((dgate_up, (m, 2 * f), (m, 2 * f // 128)),
                           (dgate_up_t, (2 * f, m), (2 * f, blocks)),
                           (hidden_t, (f, m), (f, blocks))):
    assert (x.shape, x.scales_mk.shape, x.tile) == (shape, scales, (1, 128))
    assert x.values_MK.dtype == FORMATS[format].dtype
  assert (dgates.shape, dgates.dtype) == ((m,), jnp.float32)


def steps_of(x, format):
  """Returns the spacing of FP8 numbers at each element, times the element's scale."""
  form = FORMATS[format]
  smallest = np.repeat(np.asarray(x.scales_mk), 128, 1)[:, :x.shape[1]]
  smallest = smallest * 2.0**(form.smallest_exponent - form.mantissa_bits)
  return np.maximum(np.abs(dequantize(x)) * 2.0**-form.mantissa_bits, smallest)


def assert_nearly_equal(ours, want, format="e4m3"):
  """Asserts that results agree, except for RELATIVE_ERROR before the rounding to bfloat16 and FP8.

  Ties of bfloat16 are at least 2^-8 apart, so at most a fraction of 2^8 * 2 RELATIVE_ERROR of the
  numbers is so close to a tie that it is rounded to the other neighbour. Then its FP8 number may
  differ by a step; and where it is the largest of a tile, the tile's scale differs by 2^-7, and
  with it any number of the tile by a step. Near the zero of silu's derivative a gradient errs by
  more, but few are that near.
  """
  for a, b in zip(ours[:3], want[:3], strict=True):
    np.testing.assert_allclose(a.scales_mk, b.scales_mk, rtol=2.0**-7)
    difference = np.abs(np.asarray(dequantize(a)) - np.asarray(dequantize(b)))
    step = np.maximum(steps_of(a, format), steps_of(b, format))
    assert (difference <= step + 2.0**-7 * np.abs(dequantize(b))).all()
    values = (np.asarray(x.values_MK, np.float32) for x in (a, b))
    for x, y in (values, (a.scales_mk, b.scales_mk)):
      assert (np.asarray(x) != np.asarray(y)).mean() <= 2 * 2**8 * 2 * RELATIVE_ERROR


def assert_gates_gradient(ours, terms):
  """Asserts that `ours` is the float32 sum of `terms` over their last axis, in any order."""
  bound = (RELATIVE_ERROR + terms.shape[1] * 2.0**-24) * np.abs(terms).sum(1)
  assert (np.abs(np.asarray(ours, np.float64) - terms.sum(1)) <= bound + 1e-37).all()


def assert_nearest(result, args, format="e4m3"):
  """Asserts that results of `open_gates` are the predicted products, rounded to nearest FP8."""
  up, dhidden = (np.asarray(x, np.float32) for x in (args[0][:, args[2].shape[1]:], args[2]))
  rounded = lambda x: np.asarray(x.astype(ml_dtypes.bfloat16), np.float32)
  dgate_up = np.concatenate([rounded(dhidden * up), dhidden * 128], 1)
  for exact, x in zip((dgate_up, dgate_up.T, up.T * 128), result[:3], strict=True):
    scales = np.repeat(np.asarray(x.scales_mk), 128, 1)[:, :exact.shape[1]]
    nearest = (exact / scales).astype(FORMATS[format].dtype)
    np.testing.assert_array_equal(
        np.asarray(x.values_MK, np.float32), nearest.astype(np.float32))


@pytest.mark.parametrize(("m", "f", "dtype", "kept"), [
    (131, 128, jnp.bfloat16, None), (5, 128, jnp.float32, None), (5, 128, jnp.bfloat16, "e4m3")])
def test_the_oracle_equals_the_analytic_gradients_up_to_rounding(m, f, dtype, kept):
  args = operands(m, f, dtype=dtype, kept=kept)
  result = oracle(args, DEFAULTS)
  assert_shapes(result, m, f)
  dgate_up, hidden, terms = analytic(*args)
  for exact, x in ((dgate_up, result.dgate_up), (dgate_up.T, result.dgate_up_t),
                   (hidden.T, result.hidden_t)):
    # Half a step of FP8, and half a step of bfloat16, which is more than float32 loses on the way.
    difference = np.abs(np.asarray(dequantize(x), np.float64) - exact)
    assert (difference <= 0.5 * steps_of(x, "e4m3") * (1 + 2.0**-7) + 2.0**-8 * np.abs(exact)).all()
  assert_gates_gradient(result.dgates_M, terms)


def test_results_are_rounded_to_the_layers_dtype_before_they_are_quantised():
  args = open_gates(40, 128)
  assert_nearest(oracle(args, DEFAULTS), args)
  exact = [x.astype(jnp.float32) for x in args]
  with pytest.raises(AssertionError):  # unrounded products have 16 bits instead of 8
    assert_nearest(oracle(exact, DEFAULTS), args)


@pytest.mark.cpu
@pytest.mark.parametrize(("m", "f", "options", "kept"), [
    (131, 256, DEFAULTS, None), (131, 128, DEFAULTS, "e4m3"), (5, 256, SMALL, "e5m6")])
def test_the_interpreted_kernel_agrees_with_the_oracle_and_has_no_races(m, f, options, kept):
  args = operands(m, f, kept=kept)
  ours = interpreted(args, options)
  assert_shapes(ours, m, f, options["format"])
  assert_nearly_equal(ours, oracle(args, options), options["format"])
  assert_gates_gradient(ours[3], analytic(*args)[2])


@pytest.mark.cpu
def test_the_interpreted_kernel_rounds_to_nearest():
  args = open_gates(40, 128)
  assert_nearest(interpreted(args, DEFAULTS), args)


def test_division_free_quotients_round_to_the_nearest_fp8_number_for_every_bfloat16():
  # Doubling a scale halves the quotients, except among FP8's smallest numbers. So one binade of the
  # largest magnitude suffices, with the numbers of the 28 binades from it down.
  single, x = np.float32, np.arange(128, 256, dtype=np.float32)
  x = (x[:, None] * 2.0**-np.arange(28)).astype(single).reshape(-1)
  for format in ("e4m3", "e5m2"):
    form = FORMATS[format]
    floors = SMALLEST_AMAX * 2.0**21, SMALLEST_GRADIENT_AMAX * 2.0**71  # moved into that binade
    amax = np.append(np.arange(128, 256), floors)
    scale = (amax.astype(single) / single(form.largest))[:, None]
    for error in (-2, -1, 0, 1, 2):  # the hardware's reciprocal errs by one unit at most
      inverse = ((1 / scale).astype(single).view(np.int32) + error).view(single)
      # These products and sums of few bits are exact in float64, as before a fused rounding.
      residual = (1 - np.float64(scale) * inverse).astype(single)
      rest = residual * inverse
      ours = (np.float64(x) * inverse + np.float64(x * rest)).astype(single)
      inside = x <= amax[:, None]
      np.testing.assert_array_equal(
          ours.astype(form.dtype)[inside].view(np.uint8),
          (x / scale).astype(form.dtype)[inside].view(np.uint8))


@pytest.mark.parametrize(("options", "kept"), [
    (DEFAULTS, None), (DEFAULTS, "e4m3"), (SMALL, "e5m6")])
@pytest.mark.parametrize(("m", "f"), [(106496, 1408), (65536, 2048), (131, 128)])
def test_production_and_odd_shapes_lower_for_hopper(m, f, options, kept):
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((m, 2 * f), jnp.bfloat16), ((m,), jnp.float32), ((m, f), jnp.bfloat16))]
  if kept:
    shapes[0] = jax.eval_shape(lambda x: quantize(x, format=kept, implementation="xla"), shapes[0])
  call = jax.jit(lambda *args: kernels.run(*args, **options))
  lowered = call.trace(*shapes).lower(lowering_platforms=("cuda",))
  assert "swiglu_backward_mosaic_gpu" in lowered.as_text()  # the name that profiles show


@pytest.mark.parametrize(("f", "dtype", "options", "reason"), [
    (130, jnp.bfloat16, {}, "multiple of 128, and it is 130"),
    (128, jnp.float32, {}, "needs bfloat16, and gate and up are float32"),
    (128, jnp.bfloat16, {"format": "e5m6"}, "no e5m6"),
    (128, jnp.bfloat16, {"smallest_gradient_amax": 0.0}, "at least 1e-20, and it is 0.0")])
def test_unsupported_operands_are_refused_with_the_reason(f, dtype, options, reason):
  assert reason in kernels.unsupported_reason(*operands(4, f, dtype=dtype), **DEFAULTS | options)


def test_float32_gradients_are_refused():
  *others, dhidden = operands(4, 128)
  reason = kernels.unsupported_reason(*others, dhidden.astype(jnp.float32), **DEFAULTS)
  assert reason == "needs bfloat16, and dhidden is float32"


def test_quantised_inputs_with_other_tiles_are_refused():
  gate_up, *others = operands(128, 128)
  gate_up = quantize(gate_up, "128x128")
  reason = "needs tiles of 1x128, and gate and up have 128x128"
  assert kernels.unsupported_reason(gate_up, *others, **DEFAULTS) == reason


@pytest.mark.parametrize("kept", [None, "e4m3"])
def test_odd_numbers_of_rows_are_supported(kept):
  assert kernels.unsupported_reason(*operands(131, 128, kept=kept), **SMALL) is None


def test_gate_and_up_may_be_stacked_along_an_axis_of_their_own():
  gate_up, *others = operands(4, 128)
  for a, b in zip(*(jax.tree.leaves(swiglu_backward_quantize(x, *others))
                    for x in (gate_up, gate_up.reshape(4, 2, 128))), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(("shapes", "message"), [
    (((8, 128), (8,), (8, 128)), r"gate and up \[M, 2, F\]"),
    (((8, 2, 128), (8, 1), (8, 128)), r"gates \[M\]"),
    (((8, 2, 128), (8,), (8, 256)), r"not \(8, 2, 128\), \(8,\) and \(8, 256\)")])
def test_mismatched_shapes_are_refused(shapes, message):
  with pytest.raises(ValueError, match=message):
    swiglu_backward_quantize(*map(jnp.zeros, shapes))


def test_an_unknown_format_is_refused_on_hopper_too(monkeypatch):
  monkeypatch.setattr(implementations, "local_backend", lambda: "mosaic_gpu")
  with pytest.raises(ValueError, match="no format 'e3m4'"):
    swiglu_backward_quantize(*operands(4, 128), format="e3m4")


@ON_HOPPER
@pytest.mark.parametrize(("options", "kept"), [
    (DEFAULTS, None), (DEFAULTS | {"power_of_two": True}, None), (SMALL, None),
    (DEFAULTS, "e4m3"), (SMALL, "e5m2"), (DEFAULTS, "e5m6")])
@pytest.mark.parametrize(("m", "f"), [(1, 128), (131, 1408), (4096, 2048)])
def test_on_a_gpu_the_kernel_agrees_with_the_oracle(m, f, options, kept):
  args = operands(m, f, kept=kept)
  ours = jax.jit(lambda *args: kernels.run(*args, **options))(*args)
  assert_shapes(ours, m, f, options["format"])
  assert_nearly_equal(ours, oracle(args, options), options["format"])
  assert_gates_gradient(ours[3], analytic(*args)[2])


@ON_HOPPER
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("m", "f"), [(1, 128), (131, 1408), (4096, 2048)])
def test_on_a_gpu_the_kernel_rounds_to_nearest(m, f, format):
  args, options = open_gates(m, f), DEFAULTS | {"format": format}
  ours = jax.jit(lambda *args: kernels.run(*args, **options))(*args)
  for a, b in zip(ours[:3], oracle(args, options)[:3], strict=True):
    np.testing.assert_array_equal(np.asarray(a.scales_mk), np.asarray(b.scales_mk))
  assert_nearest(ours, args, format)


@ON_HOPPER
def test_on_a_gpu_the_kernel_is_the_default_implementation():
  text = jax.jit(swiglu_backward_quantize).lower(*operands(128, 256)).as_text()
  assert "swiglu_backward_mosaic_gpu" in text
