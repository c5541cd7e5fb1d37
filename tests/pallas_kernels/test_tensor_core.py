"""The emulated tensor core keeps 13 fraction bits, and promotion avoids most of that error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tensor_core import emulated_matmul

matmul = jax.jit(emulated_matmul, static_argnames="promote_every")


def fp8(values):
  return jnp.asarray(values, jnp.float32).astype(jnp.float8_e4m3fn)


def exact(lhs, rhs):
  return np.asarray(lhs, np.float64) @ np.asarray(rhs, np.float64).T


def row(**products):
  """Returns a row of 64 zeros except for the given elements: `p3=2` sets element 3 to 2."""
  x = np.zeros((1, 64), np.float32)
  for place, value in products.items():
    x[0, int(place[1:])] = value
  return fp8(x)


@pytest.mark.parametrize(("lhs", "want"), [
    (row(p0=256, p1=2**-5), 256 + 2**-5),    # 2^-13 of the largest: the lowest bit that is kept
    (row(p0=256, p1=2**-6), 256),            # half of that is truncated, not rounded
    (row(p0=-256, p1=-2**-6), -256),         # truncation is towards zero
    (row(p0=256, p1=-2**-6), 256),
    (row(p0=256, p40=2**-5), 256 + 2**-5),   # the second instruction adds the sum so far
    (row(p0=256, p40=2**-6), 256),
    (row(p0=2**-6, p40=256), 256),           # which is truncated if it is the smaller
    (row(), 0),
])
def test_terms_are_aligned_to_the_largest_and_truncated_13_bits_below_it(lhs, want):
  assert float(matmul(lhs, fp8(np.ones((1, 64))))[0, 0]) == want


def test_a_promoted_sum_keeps_bits_that_the_next_instruction_would_truncate():
  lhs, ones = row(p0=2**-6, p40=256), fp8(np.ones((1, 64)))
  assert float(matmul(lhs, ones, promote_every=32)[0, 0]) == 256 + 2**-6


def random(width, positive):
  rng = np.random.default_rng(width)
  draw = lambda: fp8(np.abs(x) if positive else x)
  operands = []
  for _ in range(2):
    x = rng.standard_normal((48, width))
    operands.append(draw())
  return operands


@pytest.mark.parametrize("positive", [False, True])
def test_error_grows_with_k_and_promotion_removes_most_of_it(positive):
  errors = {}
  for width in (512, 4096):
    lhs, rhs = random(width, positive)
    want = exact(lhs, rhs)
    for every in (None, 128):
      ours = matmul(lhs, rhs, promote_every=every)
      errors[width, every] = np.abs(ours - want).max() / want.std()
  assert errors[4096, None] > 2 * errors[512, None]
  assert errors[4096, None] > 3 * errors[4096, 128]


@pytest.mark.parametrize(("width", "every"), [(48, None), (64, 48), (96, 64)])
def test_k_and_promotion_intervals_that_are_not_whole_multiples_are_refused(width, every):
  x = fp8(np.ones((1, width)))
  with pytest.raises(ValueError, match="promotes after a multiple"):
    emulated_matmul(x, x, promote_every=every)
