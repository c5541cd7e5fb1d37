"""Experts in FP8: what FP8 linear layers one expert after another give, kept in few bits.

Shape letters:  R rows, each a token with one expert  N tokens with K experts each  E experts
                D model width  F expert width  S rows with every expert at a multiple of 128
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

pytestmark = pytest.mark.usefixtures("quick_compiles")

R, E, D, F = 200, 4, 150, 70
SIZES = (3, 130, 0, 50)  # the last rows are nobody's
NAMES = ("y", "dx", "dgates", "dw_gate_up", "dw_down")
# Products of up to 200 terms in float32, in another order; an element next to a tie may round to
# the other side, by a step of 2^-3 at most, and these are few of many.
ROUNDING = 1e-3
# One rounding to three bits of mantissa; see test_fp8_linear.
LARGEST = 2.0**-4 / 3**0.5
PLAIN = Recipe(kept_swiglu=None, dispatch_power_of_two=False)


def normal(shape, seed, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, GATES, DY = normal((R, D), 0), jnp.abs(normal((R,), 1)), normal((R, D), 2, 1e-8)
W_GATE_UP, W_DOWN = normal((E, D, 2, F), 3, 0.1), normal((E, F, D), 4, 0.1)


def run(recipe, sizes=SIZES, dtype=jnp.float32):
  """Output and gradients."""
  y, dx, dgates, *dw = _run(recipe, experts_of(sizes), dtype)
  return dict(zip(NAMES, (y, dx, dgates[:, 0], *dw), strict=True))


def experts_of(sizes):
  """Each row's, in their order, and of those past their sum nobody."""
  nobody = R - sum(sizes)
  return jnp.repeat(jnp.arange(len(sizes) + 1), jnp.array((*sizes, nobody)))[:, None]


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
  """The same by `fp8_linear` on each expert's rows."""
  out, first = {name: [] for name in NAMES}, 0
  for expert, size in enumerate((*SIZES, R - sum(SIZES))):
    rows = slice(first, first + size)
    first += size
    nobody = expert == E
    w_gate_up, w_down = ((jnp.zeros_like(w[0]) if nobody else w[expert])
                         for w in (W_GATE_UP, W_DOWN))
    y, vjp = jax.vjp(lambda *args: one_expert(*args, recipe), X[rows], GATES[rows], w_gate_up,
                     w_down)
    for name, value in zip(NAMES, (y, *vjp(DY[rows])), strict=True):
      if not (nobody and name.startswith("dw")):
        out[name].append(value)
  join = lambda name: jnp.stack if name.startswith("dw") else jnp.concatenate
  return {name: join(name)(values) for name, values in out.items()}


@pytest.fixture(scope="module")
def exact():
  return run(Recipe(None, None, None, kept_swiglu=None))


def test_without_fp8_they_are_the_exact_layers(exact):
  want = one_by_one(Recipe(None, None, None))
  for name in NAMES:
    assert error(exact[name], want[name]) < 1e-6, name


def test_each_expert_is_two_fp8_layers_on_its_own_rows():
  ours, want = run(PLAIN), one_by_one(PLAIN)
  for name in ("y", "dx", "dgates", "dw_gate_up"):
    assert error(ours[name], want[name]) < ROUNDING, name


def test_the_hidden_units_are_computed_again_not_tiled_twice():
  dw_down, first = run(PLAIN)["dw_down"], 0
  for expert, size in enumerate(SIZES):
    rows = slice(first, first + size)
    first += size
    gate_up = fp8_linear(X[rows], W_GATE_UP[expert].reshape(D, -1)).reshape(-1, 2, F)
    hidden = swiglu(gate_up) * GATES[rows, None]
    want = np.zeros((F, D)) if not size else (
        np.asarray(dequantize(quantize(hidden.T)), np.float64) @ np.asarray(
            dequantize(quantize(DY[rows].T, smallest_amax=SMALLEST_GRADIENT_AMAX))).T)
    assert np.linalg.norm(dw_down[expert] - want) <= ROUNDING * np.linalg.norm(want)


@pytest.mark.parametrize("name", RECIPES)
def test_errors_are_those_of_few_roundings(exact, name):
  step = 2 if name == "e5m2_gradients" else 1
  for key, value in run(RECIPES[name]).items():
    # The longest way, to the up-projection's gradient, rounds x thrice, the weights twice, SwiGLU's
    # two inputs, the hidden units' gradient and its own; each at most as much as the largest.
    assert 0.02 < error(value, exact[key]) < step * 9**0.5 * LARGEST, key


def test_powers_of_two_spare_the_second_rounding_of_what_was_sent(exact):
  of = lambda recipe: error(run(recipe)["dw_gate_up"], exact["dw_gate_up"])
  assert of(dataclasses.replace(PLAIN, dispatch_power_of_two=True)) < of(PLAIN)


def test_rows_of_nobody_and_experts_without_rows_get_zeros():
  out = run(Recipe())
  assert not out["y"][sum(SIZES):].any() and not out["dx"][sum(SIZES):].any()
  assert not out["dgates"][sum(SIZES):].any()
  assert not out["dw_gate_up"][2].any() and not out["dw_down"][2].any()
  assert all(not value.any() for value in run(Recipe(), sizes=(0, 0, 0, 0)).values())


def test_only_fp8_is_kept_for_the_backward_pass():
  _, vjp = jax.vjp(
      lambda *args: fp8_experts(*args, layout_expert_rows(experts_of(SIZES), E)),
      X.astype(jnp.bfloat16), GATES[:, None], W_GATE_UP, W_DOWN)
  kept = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size >= R * F}
  rows = aligned_rows(R, E)
  assert kept.keys() == {(rows, D), (rows, 2 * F), (E, D, 2 * F), (E, F, D)}
  assert set(kept.values()) == {jnp.dtype(jnp.float8_e4m3fn)}


def test_formats_are_those_of_the_inputs():
  formats = {name: value.dtype for name, value in run(Recipe(), dtype=jnp.bfloat16).items()}
  assert formats == {"y": jnp.bfloat16, "dx": jnp.bfloat16, "dgates": jnp.float32,
                     "dw_gate_up": jnp.float32, "dw_down": jnp.float32}


def test_shapes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"rows of \[N, K\] to \[E\], not"):
    fp8_experts(X, GATES[:, None], W_GATE_UP, W_DOWN, layout_expert_rows(experts_of((100, 100)), 2))


N, K = 40, 3
# Each token has three of three experts and two that mean none; expert 2 has no token.
EXPERTS = jnp.asarray(np.random.default_rng(5).permuted(
    np.tile([0, 1, 3, -1, E], (N, 1)), axis=1)[:, :K])
NOBODYS = (EXPERTS < 0) | (EXPERTS >= E)
TOKENS = (X[:N], normal((N, K), 6), W_GATE_UP, W_DOWN)
# A sum of n terms of random signs rounds n times, each time by at most 2^-24 of what it has come
# to, which grows as the root of the terms so far: in squares, n / 2 of those for a sum of norm
# root n. The longest way is three products long, here and in what this is compared with, and no
# sum has more terms than D.
SUMS = (2 * 3 * D / 2)**0.5 * 2.0**-24
# E4M3 has steps of at most 2^-3 of a number, so rounding errs by at most 2^-4 of it, in the mean
# over that half step by LARGEST. Products of random signs keep an error's share of the norm, as
# the sums over a token's experts do, and errors independent of each other add in squares. So what
# counts is how many numbers are rounded on the way to a result. SwiGLU's two inputs each come of x
# and the weights, 2 forward, and are rounded once more to be kept, 3; the hidden units' gradient
# of dy and the weights, 2.
ROUNDINGS = {
    "y": 2 * 2 + 2,  # its inputs; the hidden units; the weights
    "dx": 2 * 3 + 2 + 2,  # its inputs; the hidden gradient; its own gradient; the weights
    "dgates": 2 * 3 + 2,  # its inputs; the hidden gradient
    "dw_gate_up": 2 * 3 + 2 + 2,  # its inputs; the hidden gradient; its own gradient; x
    "dw_down": 2 * 3 + 2,  # its inputs; the hidden units; dy
}


def densely(x_ND, gates_NK, w_gate_up, w_down):
  """Every token by every expert, weighed by its gates for that expert."""
  einsum = functools.partial(jnp.einsum, precision="highest")
  gate_NEF, up_NEF = (einsum("nd,edf->nef", x_ND, w_gate_up[:, :, i]) for i in range(2))
  y_NED = einsum("nef,efd->ned", gate_NEF / (1 + jnp.exp(-gate_NEF)) * up_NEF, w_down)
  chosen_NKE = (EXPERTS[..., None] == jnp.arange(E)).astype(jnp.float32)
  return einsum("nk,nke,ned->nd", gates_NK, chosen_NKE, y_NED)


@functools.partial(jax.jit, static_argnums=0)
def of_tokens(layer):
  """Output and gradients of a layer of TOKENS."""
  y, vjp = jax.vjp(layer, *TOKENS)
  return dict(zip(NAMES, (y, *vjp(DY[:N])), strict=True))


def by_kernel_layout(recipe):
  return of_tokens(lambda *args: fp8_experts(*args, layout_expert_rows(EXPERTS, E), recipe))


def assert_nobodys_are_zero(out):
  assert NOBODYS.any() and not out["dgates"][NOBODYS].any()
  assert not out["dw_gate_up"][2].any() and not out["dw_down"][2].any()


def test_several_experts_for_a_token_are_the_dense_layer_without_fp8():
  ours, want = by_kernel_layout(Recipe(None, None, None, kept_swiglu=None)), of_tokens(densely)
  for name in NAMES:
    assert error(ours[name], want[name]) < SUMS, name
  assert_nobodys_are_zero(ours)


def test_several_experts_for_a_token_err_by_fp8s_roundings():
  ours, want = by_kernel_layout(RECIPES["v3"]), of_tokens(densely)
  for name in NAMES:
    assert 0.02 < error(ours[name], want[name]) < ROUNDINGS[name]**0.5 * LARGEST, name
  assert_nobodys_are_zero(ours)
