"""What Hopper's tensor cores do to a sum of FP8 products, emulated.

They align the 32 products of an instruction, and the sum so far, to the largest exponent among
them, cut off what is below 13 bits after the leading one, and keep that (arXiv:2505.09343,
section 3.1.1). V3 therefore adds the sum of every 128 products in float32 (arXiv:2412.19437,
section 3.3.2).

Shape letters:  M, N rows of the operands  K contracted width
"""

import jax
import jax.numpy as jnp
from jax import lax

INSTRUCTION = 32     # products of FP8 that one instruction adds
FRACTION_BITS = 13


def emulated_matmul(
    lhs_MK: jax.Array, rhs_NK: jax.Array, *, promote_every: int | None = None) -> jax.Array:
  """lhs @ rhs.T as a tensor core adds it up.

  Args:
    lhs_MK, rhs_NK: FP8; K a multiple of 32.
    promote_every: products after which a sum is added in float32 and begins anew; None for never.

  Returns:
    float32 [M, N].

  Raises:
    ValueError: if K is no multiple of 32, or of `promote_every`, or that of 32.
  """
  width = lhs_MK.shape[1]
  interval = promote_every or width
  if width % INSTRUCTION or interval % INSTRUCTION or width % interval:
    raise ValueError(f"emulated_matmul adds {INSTRUCTION} products at a time, and promotes after a "
                     f"multiple of them that divides K={width}; not after {promote_every}")
  cut = lambda x: jnp.moveaxis(x.astype(jnp.float32).reshape(
      len(x), -1, interval // INSTRUCTION, INSTRUCTION), 0, 2)

  def promote(total_MN, operands):
    partial_MN, _ = lax.scan(lambda sum_MN, pair: (_instruction(sum_MN, *pair), None),
                             jnp.zeros_like(total_MN), operands)
    return total_MN + partial_MN, None

  total_MN = jnp.zeros((len(lhs_MK), len(rhs_NK)), jnp.float32)
  return lax.scan(promote, total_MN, (cut(lhs_MK), cut(rhs_NK)))[0]


def _instruction(sum_MN, lhs_MP, rhs_NP):
  """Adds an instruction's P products; products of FP8 and sums of what is kept are exact here."""
  terms_MNP = jnp.concatenate(
      [lhs_MP[:, None] * rhs_NP[None], sum_MN[..., None]], -1)
  kept = _cut_off(terms_MNP, jnp.abs(terms_MNP).max(-1, keepdims=True)).sum(-1)
  return _cut_off(kept, jnp.abs(kept))


def _cut_off(x, largest):
  """Towards zero, to 13 bits after the leading one of `largest`."""
  _, exponent = jnp.frexp(largest)  # the leading one is of 2 to the power exponent - 1
  quantum = jnp.ldexp(jnp.float32(1), exponent - 1 - FRACTION_BITS)
  return jnp.where(largest > 0, jnp.trunc(x / quantum) * quantum, 0)
