"""FP8 linear layers: products of the dequantised operands, with the error of three mantissa bits.

Shape letters:  M tokens  K, N widths
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  RECIPES,
  Recipe,
  Weight,
  dequantize,
  fp8_linear,
  implementations,
  quantize,
  quantize_weight,
)
from pallas_kernels.ops.fp8_linear import SMALLEST_GRADIENT_AMAX, _whole_blocks, with_tiles
from pallas_kernels.quantized import error

M, K, N = 150, 300, 140
# Float32 sums of up to 300 products, in a different order.
ROUNDING = 300 * 2.0**-24
# Rounding to three mantissa bits errs, in the root mean square, by 2^-4 / sqrt(3) of the number's
# power of two, which is between half the number and the number; the independent errors of two
# operands add in squares.
LARGEST = 2.0**-4 / 3**0.5
NAMES = ("y", "dx", "dw")


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, W, DY = normal((M, K)), normal((K, N), 1), normal((M, N), 2)
NO_FP8 = Recipe(None, None, None)


def run(recipe, x=X, w=W, dy=DY, **options):
  """Returns the output, the input gradient and the weight gradient."""
  return _run(x, w, dy, recipe=recipe, **options)


@functools.partial(jax.jit, static_argnames=("recipe", "after_attention"))
def _run(x, w, dy, **options):
  y, vjp = jax.vjp(lambda x, w: fp8_linear(x, w, **options), x, w)
  return (y, *vjp(dy.astype(y.dtype)))


def exact(x=X, w=W, dy=DY):
  x, w, dy = (np.asarray(value, np.float64) for value in (x, w, dy))
  return x @ w, dy @ w.T, x.T @ dy


def errors(recipe, **options):
  return dict(zip(NAMES, map(error, run(recipe, **options), exact()), strict=True))


def test_errors_are_those_of_three_mantissa_bits():
  measured = errors(Recipe())
  for name, roundings in (("y", 2), ("dx", 2), ("dw", 3)):  # the input is quantised twice for dw
    assert LARGEST / 2 < measured[name] / roundings**0.5 < LARGEST


@pytest.mark.cpu
@pytest.mark.parametrize("after_attention", [False, True])
def test_products_equal_those_of_the_dequantised_operands(after_attention):
  ours = run(Recipe(), after_attention=after_attention)
  dequantised = lambda x, *tile, **options: np.asarray(
      dequantize(quantize(x, *tile, **options)), np.float64)
  gradient = lambda dy: dequantised(dy, smallest_amax=SMALLEST_GRADIENT_AMAX)
  kept = dequantised(X, format="e5m6", power_of_two=True) if after_attention else dequantised(X)
  want = (dequantised(X) @ dequantised(W, "128x128"), gradient(DY) @ dequantised(W, "128x128").T,
          dequantised(jnp.asarray(kept, jnp.float32).T) @ gradient(DY.T).T)
  for name, one, other in zip(NAMES, ours, want, strict=True):
    assert error(one, other) < ROUNDING, name


def test_more_bits_after_attention_avoid_one_of_two_roundings_of_the_input():
  kept, attention = (errors(Recipe(), after_attention=value)["dw"] for value in (False, True))
  assert abs(attention / kept - (2 / 3)**0.5) < 0.05


def test_forward_and_input_gradient_use_the_same_quantised_weights():
  forward, _, _ = run(Recipe(), x=jnp.eye(K), dy=jnp.zeros((K, N)))
  _, backward, _ = run(Recipe(), x=jnp.zeros((N, K)), dy=jnp.eye(N))
  # A one is quantised to 448 with a scale of 1 / 448, whose product need not be exactly one.
  np.testing.assert_allclose(backward.T, forward, rtol=2.0**-22)
  assert error(forward, W) > 0.01


def test_only_the_products_that_the_recipe_names_are_rounded():
  assert max(errors(NO_FP8).values()) < ROUNDING
  for product, rounded in (("forward", "y"), ("input_gradient", "dx"), ("weight_gradient", "dw")):
    measured = errors(Recipe(**{"forward": None, "input_gradient": None, "weight_gradient": None,
                                product: getattr(Recipe(), product)}))
    assert {name for name, value in measured.items() if value > ROUNDING} == {rounded}


def test_e5m2_gradients_double_the_error_of_the_gradient_operand_only():
  tiles, hybrid = errors(Recipe()), errors(RECIPES["e5m2_gradients"])
  assert hybrid["y"] == tiles["y"]
  assert abs(hybrid["dx"] / tiles["dx"] - (5 / 2)**0.5) < 0.1
  assert abs(hybrid["dw"] / tiles["dw"] - (6 / 3)**0.5) < 0.1


def test_an_outlier_spoils_its_own_tile_or_with_a_single_scale_the_whole_matrix():
  x = X.at[7, 11].set(1e6)
  others = np.arange(M) != 7
  error_of_others = lambda name: error(run(RECIPES[name], x=x)[0][others], exact(x=x)[0][others])
  assert error_of_others("v3") < 2**0.5 * LARGEST and error_of_others("per_tensor") > 0.5


def test_an_outlier_token_spoils_gradients_of_its_block_only_if_blocks_share_a_scale():
  dy = DY.at[7].mul(1e5)
  others = np.arange(M) != 7
  error_of_others = lambda name: error(
      run(RECIPES[name], dy=dy)[1][others], exact(dy=dy)[1][others])
  assert (error_of_others("v3") < 2**0.5 * LARGEST
          and error_of_others("block_gradients") > 4 * error_of_others("v3"))


@pytest.mark.parametrize("name", RECIPES)
def test_zeros_give_zeros(name):
  for x, w, dy in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)):
    y, dx, dw = run(RECIPES[name], x * X, w * W, dy * DY)
    assert np.isfinite(y).all() and np.isfinite(dx).all() and np.isfinite(dw).all()
    assert (not y.any()) == (not x * w) and (not dx.any()) == (not w * dy)
    assert (not dw.any()) == (not x * dy)


def test_small_gradients_are_as_exact_as_large_ones():
  _, dx, dw = run(Recipe())
  _, small_dx, small_dw = run(Recipe(), dy=2.0**-56 * DY)
  np.testing.assert_array_equal(2.0**56 * small_dx, dx)
  np.testing.assert_array_equal(2.0**56 * small_dw, dw)


def test_results_have_the_dtypes_of_the_input_and_of_the_master_weight():
  x = X.astype(jnp.bfloat16)
  assert [value.dtype for value in run(Recipe(), x=x)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  assert run(Recipe(), x=x, w=W.astype(jnp.bfloat16))[2].dtype == jnp.bfloat16


@pytest.mark.cpu
@pytest.mark.parametrize("after_attention", [False, True])
def test_only_quantised_operands_are_saved_for_the_backward_pass(after_attention):
  _, vjp = jax.vjp(
      lambda x, w: fp8_linear(x, w, after_attention=after_attention), X.astype(jnp.bfloat16), W)
  kept = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size >= M * N}
  x = jnp.float16 if after_attention else jnp.float8_e4m3fn
  assert kept == {(M, K): x, (K, N): jnp.float8_e4m3fn}


@pytest.mark.parametrize(("tile", "smaller"), [
    ("tensor", (1, 128)), ("tensor", (128, 128)), ("128x128", (1, 128)), ("row", (1, 128))])
def test_converting_to_smaller_tiles_preserves_the_numbers(tile, smaller):
  x = quantize(X.at[140, 290].set(100.0), tile)
  np.testing.assert_array_equal(dequantize(with_tiles(x, smaller)), dequantize(x))
  assert with_tiles(x, smaller).tile == smaller


def test_mismatched_shapes_are_refused():
  with pytest.raises(ValueError, match=r"x \[M, K\] and w \[K, N\], not \(150, 300\) and \(140, 3"):
    fp8_linear(X, W.T)


@pytest.mark.parametrize("name", ["v3", "per_tensor"])
def test_a_weight_quantised_ahead_gives_the_same_results(name):
  recipe = RECIPES[name]
  ours, want = run(recipe, w=Weight(W, quantize_weight(W, recipe))), run(recipe)
  for one, other in zip((*ours[:2], ours[2].master), want, strict=True):
    assert error(one, other) < ROUNDING


@pytest.mark.parametrize("ahead", [False, True])
def test_sizes_that_are_not_multiples_of_128_are_padded_for_the_kernels(monkeypatch, ahead):
  monkeypatch.setattr(implementations, "local_backend", lambda: "mosaic_gpu")
  w = Weight(W, quantize_weight(W, Recipe())) if ahead else W

  def gradients(x, w):
    return jax.grad(lambda *operands: fp8_linear(*operands, implementation="mosaic_gpu").sum(),
                    allow_int=True)(x, w)

  lowered = jax.jit(gradients).trace(X, w).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text() and lowered.out_info.shape == X.shape


def test_on_hopper_kernels_quantise_everything_and_no_fp8_array_is_transposed_later(monkeypatch):
  monkeypatch.setattr(implementations, "local_backend", lambda: "mosaic_gpu")
  loss = lambda x, w: fp8_linear(x, w, after_attention=True).astype(jnp.float32).sum()
  x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((256, 512), jnp.bfloat16), ((512, 384), jnp.float32)))
  gradients = jax.jit(jax.grad(loss, (0, 1)))
  text = gradients.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
  assert "round_nearest_even" not in text and "quantize_both_mosaic_gpu" in text
  for line in text.splitlines():
    assert not ("stablehlo.transpose" in line and "f8E4M3" in line)


@pytest.mark.parametrize("name", ["v3", "per_tensor"])
def test_zero_padding_to_whole_blocks_changes_no_result(name):
  recipe = RECIPES[name]
  x, w, operands = _whole_blocks(X, W, quantize_weight(W, recipe))
  assert x.shape == (M, 384) and w.shape == (384, 256)
  ours = fp8_linear(x, Weight(w, operands), recipe)[:, :N]
  np.testing.assert_allclose(ours, fp8_linear(X, W, recipe), rtol=0, atol=ROUNDING * np.abs(
      exact()[0]).max())
