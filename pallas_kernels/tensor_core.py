"""Emulation of the accumulation of FP8 products in Hopper's tensor cores.

A tensor core aligns the 32 products of an instruction and the accumulator to the largest exponent
among them, truncates all of them to 13 bits after the leading one, and accumulates what remains
(arXiv:2505.09343, section 3.1.1). V3 therefore promotes the partial sum of every 128 products to
float32 (arXiv:2412.19437, section 3.3.2).

Shape letters:  M, N rows of the operands  K contracted width  P products of an instruction
"""

import jax
import jax.numpy as jnp
from jax import lax

INSTRUCTION = 32     # FP8 products along K that one instruction accumulates
FRACTION_BITS = 13   # bits after the leading one that the accumulator keeps


def emulated_matmul(
    lhs_MK: jax.Array, rhs_NK: jax.Array, *, promote_every: int | None = None) -> jax.Array:
  """Returns lhs @ rhs.T as a tensor core accumulates it.

  Args:
    lhs_MK, rhs_NK: operands with FP8 values; K must be a multiple of 32.
    promote_every: interval of promotion along K: after so many products the partial sum is added to
      a float32 accumulator and restarts at zero. None promotes only once, at the end.

  Returns:
    float32 [M, N].

  Raises:
    ValueError: if K or `promote_every` is not a multiple of 32, or K not one of `promote_every`.
  """
  width = lhs_MK.shape[1]
  interval = promote_every or width
  if width % INSTRUCTION or interval % INSTRUCTION or width % interval:
    raise ValueError(f"emulated_matmul adds {INSTRUCTION} products at a time and promotes after a "
                     f"multiple of that which divides K={width}, not after {promote_every}")
  split = lambda x: jnp.moveaxis(x.astype(jnp.float32).reshape(
      len(x), -1, interval // INSTRUCTION, INSTRUCTION), 0, 2)

  def promote(total_MN, operands):
    partial_MN, _ = lax.scan(lambda sum_MN, pair: (_instruction(sum_MN, *pair), None),
                             jnp.zeros_like(total_MN), operands)
    return total_MN + partial_MN, None

  total_MN = jnp.zeros((len(lhs_MK), len(rhs_NK)), jnp.float32)
  return lax.scan(promote, total_MN, (split(lhs_MK), split(rhs_NK)))[0]


def _instruction(sum_MN, lhs_MP, rhs_NP):
  """Returns the accumulator after one instruction, which adds P products to it.

  The float32 arithmetic used here computes products of FP8 and sums of truncated terms exactly.
  """
  terms_MNP = jnp.concatenate(
      [lhs_MP[:, None] * rhs_NP[None], sum_MN[..., None]], -1)
  total_MN = _truncate(terms_MNP, jnp.abs(terms_MNP).max(-1, keepdims=True)).sum(-1)
  return _truncate(total_MN, jnp.abs(total_MN))


def _truncate(x, largest):
  """Truncates x towards zero to 13 bits after the leading one of `largest`."""
  _, exponent = jnp.frexp(largest)  # the leading one stands for 2 to the power exponent - 1
  quantum = jnp.ldexp(jnp.float32(1), exponent - 1 - FRACTION_BITS)
  return jnp.where(largest > 0, jnp.trunc(x / quantum) * quantum, 0)
