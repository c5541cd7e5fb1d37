"""FP8 experts: equal to FP8 linear layers applied expert by expert, with residuals in FP8.

Shape letters:  R rows, each a token with one expert  N tokens with K experts each  E experts
                D model width  F expert width  S rows with each expert starting at a multiple of 128
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
  dequantize,
  fp8_experts,
  fp8_linear,
  layout_expert_rows,
  quantize,
  swiglu,
)
from pallas_kernels.ops.fp8_grouped import aligned_rows
from pallas_kernels.ops.fp8_linear import SMALLEST_GRADIENT_AMAX
from pallas_kernels.quantized import error

R, E, D, F = 200, 4, 150, 70
SIZES = (3, 130, 0, 50)  # the remaining 17 rows are padding
NAMES = ("y", "dx", "dgates", "dw_gate_up", "dw_down")
# Float32 sums of up to 200 products, in a different order. An element next to a tie may be rounded
# to the other neighbour, which changes it by a step of at most 2^-3, but few elements are so close.
ROUNDING = 1e-3
# The largest error of rounding once to three mantissa bits, derived in test_fp8_linear.
LARGEST = 2.0**-4 / 3**0.5
PLAIN = Recipe(kept_swiglu=None, dispatch_power_of_two=False)


def normal(shape, seed, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, GATES, DY = normal((R, D), 0), jnp.abs(normal((R,), 1)), normal((R, D), 2, 1e-8)
W_GATE_UP, W_DOWN = normal((E, D, 2, F), 3, 0.1), normal((E, F, D), 4, 0.1)


def run(recipe, sizes=SIZES, dtype=jnp.float32):
  """Returns the output and the gradients, by the names in NAMES."""
  y, dx, dgates, *dw = _run(recipe, experts_of(sizes), dtype)
  return dict(zip(NAMES, (y, dx, dgates[:, 0], *dw), strict=True))


def experts_of(sizes):
  """Returns each row's expert, in group order; rows past the groups get an index past the last."""
  num_padding = R - sum(sizes)
  return jnp.repeat(jnp.arange(len(sizes) + 1), jnp.array((*sizes, num_padding)))[:, None]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(recipe, experts_R1, dtype):
  y, vjp = jax.vjp(lambda *args: fp8_experts(*args, layout_expert_rows(experts_R1, E), recipe),
                   X.astype(dtype), GATES[:, None], W_GATE_UP, W_DOWN)
  return y, *vjp(DY.astype(dtype))


def one_expert(x_RD, gates_R, w_gate_up, w_down, recipe):
  gate_up = fp8_linear(x_RD, w_gate_up.reshape(D, -1), recipe).reshape(-1, 2, F)
  return fp8_linear(swiglu(gate_up) * gates_R[:, None], w_down, recipe)


@functools.partial(jax.jit, static_argnums=0)
def one_by_one(recipe):
  """Returns what `run` does, computed by `fp8_linear` on one expert's rows at a time."""
  out, first = {name: [] for name in NAMES}, 0
  for expert, size in enumerate((*SIZES, R - sum(SIZES))):
    rows = slice(first, first + size)
    first += size
    is_padding = expert == E
    w_gate_up, w_down = ((jnp.zeros_like(w[0]) if is_padding else w[expert])
                         for w in (W_GATE_UP, W_DOWN))
    y, vjp = jax.vjp(lambda *args: one_expert(*args, recipe), X[rows], GATES[rows], w_gate_up,
                     w_down)
    for name, value in zip(NAMES, (y, *vjp(DY[rows])), strict=True):
      if not (is_padding and name.startswith("dw")):
        out[name].append(value)
  join = lambda name: jnp.stack if name.startswith("dw") else jnp.concatenate
  return {name: join(name)(values) for name, values in out.items()}


@pytest.fixture(scope="module")
def exact():
  return run(Recipe(None, None, None, kept_swiglu=None))


def test_experts_without_fp8_equal_unquantised_linear_layers(exact):
  want = one_by_one(Recipe(None, None, None))
  for name in NAMES:
    assert error(exact[name], want[name]) < 1e-6, name


@pytest.mark.cpu
def test_each_expert_equals_two_fp8_linear_layers_on_its_own_rows():
  ours, want = run(PLAIN), one_by_one(PLAIN)
  for name in ("y", "dx", "dgates", "dw_gate_up"):
    assert error(ours[name], want[name]) < ROUNDING, name


@jax.jit
def operands_of_dw_down():
  """Returns, for each expert with rows, its hidden units and DY, both quantised along the rows."""
  operands, first = {}, 0
  for expert, size in enumerate(SIZES):
    rows = slice(first, first + size)
    first += size
    if size:
      gate_up = fp8_linear(X[rows], W_GATE_UP[expert].reshape(D, -1)).reshape(-1, 2, F)
      hidden = swiglu(gate_up) * GATES[rows, None]
      operands[expert] = (
          dequantize(quantize(hidden.T)),
          dequantize(quantize(DY[rows].T, smallest_amax=SMALLEST_GRADIENT_AMAX)))
  return operands


@pytest.mark.cpu
def test_hidden_units_are_recomputed_for_the_gradient_of_w_down_instead_of_quantised_twice():
  dw_down, operands = run(PLAIN)["dw_down"], operands_of_dw_down()
  for expert, size in enumerate(SIZES):
    want = np.zeros((F, D))
    if size:
      hidden, dy = operands[expert]
      want = np.asarray(hidden, np.float64) @ np.asarray(dy).T
    assert np.linalg.norm(dw_down[expert] - want) <= ROUNDING * np.linalg.norm(want)


@pytest.mark.parametrize("name", RECIPES)
def test_errors_are_at_most_those_of_the_roundings_on_the_longest_path(exact, name):
  step = 2 if name == "e5m2_gradients" else 1
  for key, value in run(RECIPES[name]).items():
    # The longest path, to the gradient of w_gate_up, has nine roundings: x three times, the weights
    # twice, SwiGLU's two inputs, the hidden units' gradient and the gradient of gate and up. Each
    # adds an error of at most LARGEST.
    assert 0.02 < error(value, exact[key]) < step * 9**0.5 * LARGEST, key


def test_power_of_two_scales_avoid_a_second_rounding_of_dispatched_tokens(exact):
  dw_error = lambda recipe: error(run(recipe)["dw_gate_up"], exact["dw_gate_up"])
  assert dw_error(dataclasses.replace(PLAIN, dispatch_power_of_two=True)) < dw_error(PLAIN)


def test_padding_rows_and_experts_without_rows_get_zeros():
  out = run(Recipe())
  assert not out["y"][sum(SIZES):].any() and not out["dx"][sum(SIZES):].any()
  assert not out["dgates"][sum(SIZES):].any()
  assert not out["dw_gate_up"][2].any() and not out["dw_down"][2].any()
  assert all(not value.any() for value in run(Recipe(), sizes=(0, 0, 0, 0)).values())


def test_only_fp8_arrays_are_saved_for_the_backward_pass():
  experts = experts_of(SIZES)
  layer = lambda *args: fp8_experts(*args, layout_expert_rows(experts, E))
  vjp = jax.eval_shape(lambda *args: jax.vjp(layer, *args)[1],
                       X.astype(jnp.bfloat16), GATES[:, None], W_GATE_UP, W_DOWN)
  kept = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size >= R * F}
  rows = aligned_rows(R, E)
  assert kept.keys() == {(rows, D), (rows, 2 * F), (E, D, 2 * F), (E, F, D)}
  assert set(kept.values()) == {jnp.dtype(jnp.float8_e4m3fn)}


def test_results_have_the_dtypes_of_the_inputs():
  out = jax.eval_shape(lambda experts: _run(Recipe(), experts, jnp.bfloat16), experts_of(SIZES))
  assert {name: value.dtype for name, value in zip(NAMES, out, strict=True)} == {
      "y": jnp.bfloat16, "dx": jnp.bfloat16, "dgates": jnp.float32, "dw_gate_up": jnp.float32,
      "dw_down": jnp.float32}


def test_a_layout_for_another_number_of_experts_is_refused():
  with pytest.raises(ValueError, match=r"place_NK \[N, K\] and sizes_E \[E\], not"):
    fp8_experts(X, GATES[:, None], W_GATE_UP, W_DOWN, layout_expert_rows(experts_of((100, 100)), 2))


N, K = 40, 3
# Each token has K of five entries: the experts 0, 1 and 3, and -1 and E, which mean no expert. No
# token has expert 2.
EXPERTS = jnp.asarray(np.random.default_rng(5).permuted(
    np.tile([0, 1, 3, -1, E], (N, 1)), axis=1)[:, :K])
UNASSIGNED = (EXPERTS < 0) | (EXPERTS >= E)
TOKENS = (X[:N], normal((N, K), 6), W_GATE_UP, W_DOWN)
# A float32 sum of n terms with random signs is rounded n times, each time by at most 2^-24 of the
# partial sum, whose norm grows as the root of the number of terms so far. The squared errors thus
# add up to n / 2 times 2^-48 of the squared norm of the whole sum. The longest path has three
# products, both here and in the reference, and no sum has more than D terms.
SUMS = (2 * 3 * D / 2)**0.5 * 2.0**-24
# The number of roundings on the path to each result. Steps of E4M3 are at most 2^-3 of a number, so
# rounding errs by at most 2^-4 of it, and by LARGEST in the root mean square over that half step.
# Products with random signs preserve an error's fraction of the norm, as do sums over a token's
# experts, and independent errors add in squares; so only the number of roundings matters. Each of
# SwiGLU's two inputs is computed from quantised x and weights, 2 roundings in the forward pass, and
# is rounded once more when it is saved, 3 in the backward pass. The hidden units' gradient is
# computed from dy and the weights, 2.
ROUNDINGS = {
    "y": 2 * 2 + 2,  # SwiGLU's inputs; the hidden units; the weights
    "dx": 2 * 3 + 2 + 2,  # SwiGLU's inputs; hidden gradient; gate and up's gradient; weights
    "dgates": 2 * 3 + 2,  # SwiGLU's inputs; the hidden units' gradient
    "dw_gate_up": 2 * 3 + 2 + 2,  # SwiGLU's inputs; hidden gradient; gate and up's gradient; x
    "dw_down": 2 * 3 + 2,  # SwiGLU's inputs; the hidden units; dy
}


def densely(x_ND, gates_NK, w_gate_up, w_down):
  """Returns the layer's output, with every token computed by every expert and weighted by gates."""
  einsum = functools.partial(jnp.einsum, precision="highest")
  gate_NEF, up_NEF = (einsum("nd,edf->nef", x_ND, w_gate_up[:, :, i]) for i in range(2))
  y_NED = einsum("nef,efd->ned", gate_NEF / (1 + jnp.exp(-gate_NEF)) * up_NEF, w_down)
  chosen_NKE = (EXPERTS[..., None] == jnp.arange(E)).astype(jnp.float32)
  return einsum("nk,nke,ned->nd", gates_NK, chosen_NKE, y_NED)


@functools.partial(jax.jit, static_argnums=0)
def run_on_tokens(layer):
  """Returns the output and the gradients of a layer applied to TOKENS, by the names in NAMES."""
  y, vjp = jax.vjp(layer, *TOKENS)
  return dict(zip(NAMES, (y, *vjp(DY[:N])), strict=True))


def by_kernel_layout(recipe):
  return run_on_tokens(lambda *args: fp8_experts(*args, layout_expert_rows(EXPERTS, E), recipe))


def assert_unassigned_are_zero(out):
  assert UNASSIGNED.any() and not out["dgates"][UNASSIGNED].any()
  assert not out["dw_gate_up"][2].any() and not out["dw_down"][2].any()


def test_several_experts_per_token_without_fp8_equal_the_dense_layer():
  ours, want = by_kernel_layout(Recipe(None, None, None, kept_swiglu=None)), run_on_tokens(densely)
  for name in NAMES:
    assert error(ours[name], want[name]) < SUMS, name
  assert_unassigned_are_zero(ours)


def test_several_experts_per_token_in_fp8_err_by_their_number_of_roundings():
  ours, want = by_kernel_layout(RECIPES["v3"]), run_on_tokens(densely)
  for name in NAMES:
    assert 0.02 < error(ours[name], want[name]) < ROUNDINGS[name]**0.5 * LARGEST, name
  assert_unassigned_are_zero(ours)
