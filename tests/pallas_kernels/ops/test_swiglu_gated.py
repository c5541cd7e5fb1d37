"""The backward pass of SwiGLU with gates against analytic gradients, interpreted and on a GPU.

Shape letters:  M rows  F hidden units
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations, swiglu_gated, swiglu_gated_backward
from pallas_kernels.mosaic_gpu import swiglu_gated as kernels
from pallas_kernels.mosaic_gpu.swiglu_gated import Tiling

ON_HOPPER = pytest.mark.skipif(
    implementations.local_backend() != "mosaic_gpu", reason="needs a Hopper GPU")
# Relative error of a number before it is rounded to its dtype, derived in
# test_quantize_gpu.assert_nearly_equal.
RELATIVE_ERROR = 252 * 2.0**-24
HALF_A_STEP = {"bfloat16": 2.0**-8, "float32": 2.0**-24}
# Error where the hardware flushes a denormal number to zero, times factors of 2^20 at most.
DENORMAL = 2.0**-106


def operands(m, f, *, gradient=1e-6, dtype=jnp.bfloat16):
  """Normal numbers, one in a thousand scaled by 1000, with a row of zeros and one of denormals."""
  rng = np.random.default_rng(0)

  def numbers(*shape):
    x = rng.standard_normal(shape) * np.where(rng.random(shape) < 1e-3, 1e3, 1)
    x[0], x[m // 2] = 0, 1e-39
    return x

  return (jnp.asarray(numbers(m, 2 * f), dtype), jnp.asarray(rng.random(m), jnp.float32),
          jnp.asarray(gradient * numbers(m, f), dtype))


def oracle(args):
  with jax.default_device(jax.devices("cpu")[0]):
    return swiglu_gated_backward(*(jnp.asarray(np.asarray(x)) for x in args), implementation="xla")


def interpreted(args, tiling):
  ours = kernels.run(*args, tiling=tiling,
                     interpret=plgpu.InterpretGPUParams(detect_races=True))
  assert not interpreter.get_races().races_found
  return ours


def assert_analytic(result, args):
  """Asserts equality with float64, up to the error of float32 on the way and one final rounding."""
  gate_up, gates, dhidden = (np.asarray(x, np.float64) for x in args)
  gate, up = np.split(gate_up, 2, 1)
  gates = gates[:, None]
  with np.errstate(over="ignore"):
    sigmoid = 1 / (1 + np.exp(-gate))
  hidden, silu = gate * sigmoid * up, gate * sigmoid
  dgate = dhidden * gates * up * (sigmoid + silu * (1 - sigmoid))
  # The terms of silu's derivative may cancel, and 1 - sigmoid errs by as much as sigmoid does.
  dgate_magnitude = np.abs(dhidden * gates * up) * (sigmoid + np.abs(silu))
  dup = dhidden * gates * silu

  dgate_up, *others = result
  dtype = args[0].dtype
  assert (dgate_up.shape, others[0].shape, others[1].shape) == (
      gate_up.shape, dhidden.shape, gates.shape[:1])
  assert dgate_up.dtype == others[0].dtype == dtype and others[1].dtype == jnp.float32
  for ours, exact, size in (*zip(np.split(np.asarray(dgate_up, np.float64), 2, 1), (dgate, dup),
                                 (dgate_magnitude, np.abs(dup)), strict=True),
                            (np.asarray(others[0], np.float64), hidden * gates,
                             np.abs(hidden * gates))):
    half_a_step = HALF_A_STEP[dtype.name] * (np.abs(exact) + RELATIVE_ERROR * size)
    assert (np.abs(ours - exact) <= half_a_step + RELATIVE_ERROR * size + DENORMAL).all()

  terms = dhidden * hidden  # summed in float32, in any order
  bound = (RELATIVE_ERROR + terms.shape[1] * 2.0**-24) * np.abs(terms).sum(1)
  assert (np.abs(np.asarray(others[1], np.float64) - terms.sum(1)) <= bound + DENORMAL).all()


@pytest.mark.parametrize(("m", "f", "dtype"), [
    (131, 100, jnp.bfloat16), (20, 128, jnp.float32), (1, 1, jnp.float32)])
def test_the_oracle_equals_the_analytic_gradients_up_to_rounding(m, f, dtype):
  args = operands(m, f, dtype=dtype)
  assert_analytic(oracle(args), args)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_recomputed_output_equals_that_of_the_forward_pass(dtype):
  gate_up, gates, dhidden = (jax.random.normal(jax.random.key(seed), shape, dtype)
                             for seed, shape in enumerate(((9, 20), (9,), (9, 10))))
  hidden = swiglu_gated_backward(gate_up, gates, dhidden).hidden_MF
  assert hidden.dtype == dtype
  np.testing.assert_array_equal(hidden, swiglu_gated(gate_up, gates).astype(dtype))


@pytest.mark.parametrize(("m", "f", "tiling"), [
    (37, 384, Tiling()),                      # fewer stages than pieces of 128 hidden units
    (5, 128, Tiling(rows=16, stages=4)),      # more stages than pieces
    (70, 256, Tiling(rows=32, stages=3)), (64, 128, Tiling(rows=64, stages=2))])
def test_the_interpreted_kernel_equals_the_analytic_gradients_and_has_no_races(m, f, tiling):
  args = operands(m, f)
  assert_analytic(interpreted(args, tiling), args)


def test_the_interpreted_kernel_rounds_once():
  up, dhidden = (jax.random.normal(jax.random.key(seed), (20, 256), jnp.bfloat16)
                 for seed in range(2))
  # The sigmoid of so large a gate is one, so that every result is a product that we can predict.
  gate_up = jnp.concatenate([jnp.full_like(up, 128), up], 1)
  dgate_up, hidden, _ = interpreted((gate_up, jnp.ones(20), dhidden), Tiling())
  up, dhidden = (np.asarray(x, np.float32) for x in (up, dhidden))
  nearest = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  np.testing.assert_array_equal(
      np.asarray(dgate_up, np.float32), nearest(np.concatenate([dhidden * up, dhidden * 128], 1)))
  np.testing.assert_array_equal(np.asarray(hidden, np.float32), nearest(up * 128))


def test_vmapped_calls_of_the_interpreted_kernel_are_independent():
  args = [jnp.stack([x, x[::-1]]) for x in operands(40, 128)]
  run = lambda *args: kernels.run(*args, interpret=plgpu.InterpretGPUParams())
  for index, result in enumerate(zip(*jax.vmap(run)(*args), strict=True)):
    assert_analytic(result, [x[index] for x in args])


@pytest.mark.parametrize(("m", "f", "tiling"), [
    *((*shape, None) for shape in (
        (98304, 512), (98304, 1408), (98304, 1536), (8192, 2048), (131, 128))),
    *((98304, 512, tiling) for tiling in (Tiling(16, 4), Tiling(64, 2), Tiling(96, 3)))])
def test_production_and_odd_shapes_lower_for_hopper(m, f, tiling):
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((m, 2 * f), jnp.bfloat16), ((m,), jnp.float32), ((m, f), jnp.bfloat16))]
  call = jax.jit(lambda *args: kernels.run(*args, tiling=tiling))
  lowered = call.trace(*shapes).lower(lowering_platforms=("cuda",))
  assert "swiglu_gated_backward_mosaic_gpu" in lowered.as_text()  # the name that profiles show


@pytest.mark.parametrize(("m", "f", "dtypes", "reason"), [
    (4, 130, "bfloat16 bfloat16", r"multiple of 128, and the shape is \(4, 130\)"),
    (0, 128, "bfloat16 bfloat16", r"at least one row .* the shape is \(0, 128\)"),
    (4, 128, "float32 bfloat16", "needs bfloat16, and gate and up have float32"),
    (4, 128, "bfloat16 float16", "needs bfloat16, and dhidden have float16")])
def test_unsupported_operands_are_refused_with_the_reason(m, f, dtypes, reason):
  gate_up, dhidden = (jnp.zeros(shape, dtype) for shape, dtype in zip(
      ((m, 2 * f), (m, f)), dtypes.split(), strict=True))
  refused = kernels.unsupported_reason(gate_up, jnp.zeros(m), dhidden)
  with pytest.raises(ValueError, match=reason):
    raise ValueError(refused)


def test_odd_numbers_of_rows_are_supported():
  assert kernels.unsupported_reason(*operands(131, 128)) is None


@pytest.mark.parametrize(("rows", "stages", "message"), [
    (24, 2, "multiple of 16, and they are 24"), (0, 2, "multiple of 16"),
    (32, 1, "2 stages or more"), (128, 3, "all in 226 KiB, and they are 3 of 128 rows")])
def test_invalid_tilings_are_refused(rows, stages, message):
  with pytest.raises(ValueError, match=message):
    Tiling(rows, stages)


@pytest.mark.parametrize(("shapes", "message"), [
    (((8, 128), (8,), (8, 128)), r"gate and up \[M, 2 F\]"),
    (((8, 256), (8, 1), (8, 128)), r"gates \[M\]")])
def test_mismatched_shapes_are_refused(shapes, message):
  with pytest.raises(ValueError, match=message):
    swiglu_gated_backward(*map(jnp.zeros, shapes))


@ON_HOPPER
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(16, 4), Tiling(32, 3), Tiling(64, 2)])
@pytest.mark.parametrize(("m", "f"), [(1, 128), (131, 1408), (4096, 512), (8192, 2048)])
def test_on_a_gpu_the_kernel_equals_the_analytic_gradients(m, f, tiling):
  args = operands(m, f)
  assert_analytic(jax.jit(lambda *args: kernels.run(*args, tiling=tiling))(*args), args)


@ON_HOPPER
def test_on_a_gpu_zeros_give_zeros():
  args = [jnp.zeros_like(x) for x in operands(67, 256)]
  for x in jax.jit(kernels.run)(*args):
    assert not np.asarray(x, np.float32).any()


@ON_HOPPER
def test_on_a_gpu_vmapped_calls_are_independent():
  args = [jnp.stack([x, x[::-1]]) for x in operands(40, 256)]
  for index, result in enumerate(zip(*jax.jit(jax.vmap(kernels.run))(*args), strict=True)):
    assert_analytic(result, [x[index] for x in args])


@ON_HOPPER
def test_on_a_gpu_the_kernel_is_the_default_implementation():
  text = jax.jit(swiglu_gated_backward).lower(*operands(128, 256)).as_text()
  assert "swiglu_gated_backward_mosaic_gpu" in text
