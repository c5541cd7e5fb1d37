"""A SwiGLU layer in FP8 equals two FP8 linear layers with SwiGLU between them.

Shape letters:  M tokens  D model width  F hidden units
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    RECIPES,
    Recipe,
    Weight,
    fp8_linear,
    fp8_swiglu,
    implementations,
    quantize_weight,
    swiglu,
)
from pallas_kernels.quantized import error

M, D, F = 96, 256, 128
NAMES = ("y", "dx", "dw_gate_up", "dw_down")
V3, NO_FP8 = Recipe(), Recipe(None, None, None)


def normal(shape, seed, scale=1.0):
  return scale * jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, DY = normal((M, D), 0), normal((M, D), 1)
W_GATE_UP, W_DOWN = normal((D, 2, F), 2, D**-0.5), normal((F, D), 3, F**-0.5)


def two_layers(x, w_gate_up, w_down, recipe):
  gate_up = fp8_linear(x, w_gate_up.reshape(len(w_gate_up), -1), recipe)
  return fp8_linear(swiglu(gate_up.reshape(len(x), 2, -1)), w_down, recipe)


@functools.partial(jax.jit, static_argnames=("layer", "recipe"))
def run(x, w_gate_up, w_down, dy, *, layer=fp8_swiglu, recipe=V3):
  y, vjp = jax.vjp(functools.partial(layer, recipe=recipe), x, w_gate_up, w_down)
  return dict(zip(NAMES, (y, *vjp(dy.astype(y.dtype))), strict=True))


def exact(x=X, w_gate_up=W_GATE_UP, w_down=W_DOWN, dy=DY):
  layer = lambda x, w_gate_up, w_down: swiglu(
      jnp.einsum("md,dgf->mgf", x, w_gate_up, precision="highest")) @ w_down
  with jax.default_matmul_precision("highest"):
    y, vjp = jax.vjp(layer, x, w_gate_up, w_down)
    return dict(zip(NAMES, (y, *vjp(dy)), strict=True))


def test_without_fp8_it_is_exact():
  ours, want = run(X, W_GATE_UP, W_DOWN, DY, recipe=NO_FP8), exact()
  for name in NAMES:
    assert error(ours[name], want[name]) < 1e-6, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_are_at_most_those_of_two_linear_layers(recipe):
  want = exact()
  ours, others = (run(X, W_GATE_UP, W_DOWN, DY, layer=layer, recipe=RECIPES[recipe])
                  for layer in (fp8_swiglu, two_layers))
  for name in NAMES:
    # The layer's hidden units are quantised once for their weight gradient, not twice.
    assert error(ours[name], want[name]) < 1.05 * error(others[name], want[name]) < 0.1, name
  assert (np.asarray(ours["y"]) != np.asarray(want["y"])).any()


def test_a_width_that_is_no_multiple_of_128_is_supported():
  w_gate_up, w_down = W_GATE_UP[..., :100], W_DOWN[:100]
  ours = run(X, w_gate_up, w_down, DY)
  want = exact(w_gate_up=w_gate_up, w_down=w_down)
  for name in NAMES:
    assert error(ours[name], want[name]) < 0.1, name


def test_weights_quantised_ahead_give_the_same_result():
  recipe = Recipe()
  ahead = [Weight(w, quantize_weight(w.reshape(rows, -1), recipe))
           for w, rows in ((W_GATE_UP, D), (W_DOWN, F))]
  np.testing.assert_array_equal(fp8_swiglu(X, *ahead), fp8_swiglu(X, W_GATE_UP, W_DOWN))


def test_gradients_have_the_dtypes_of_their_arguments_and_the_recipe_rounds_those_of_weights():
  x, dy = X.astype(jnp.bfloat16), DY.astype(jnp.bfloat16)
  recipe = dataclasses.replace(Recipe(), gradients="bfloat16")
  exactly, rounded = (run(x, W_GATE_UP, W_DOWN, dy, recipe=recipe)
                      for recipe in (Recipe(), recipe))
  assert [rounded[name].dtype for name in NAMES] == [jnp.bfloat16, jnp.bfloat16] + [jnp.float32] * 2
  for name in NAMES:
    want = exactly[name].astype(jnp.bfloat16).astype(exactly[name].dtype)
    np.testing.assert_array_equal(rounded[name], want)
  assert (np.asarray(exactly["dw_down"]) != np.asarray(rounded["dw_down"])).any()


def test_other_shapes_and_implementations_are_refused_with_the_reason():
  with pytest.raises(ValueError, match=r"w_down \[F, D\], not \(96, 256\), \(256, 2, 128\)"):
    fp8_swiglu(X, W_GATE_UP, W_DOWN.T)
  if implementations.local_backend() != "mosaic_gpu":
    with pytest.raises(ValueError, match="mosaic_gpu"):
      fp8_swiglu(X, W_GATE_UP, W_DOWN, implementation="mosaic_gpu")
