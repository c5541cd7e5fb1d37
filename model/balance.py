"""Balancing experts: the loss-free bias and the auxiliary losses, from router statistics.

The statistics are kept per sequence, so that every scope (sequence, batch, device group) is a
choice of what to sum before multiplying, and so that a batch split into micro-batches can use
frequencies of the whole batch: f carries no gradient, P does.

Shape letters:  B sequences  E routed experts  M expert groups
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class RouterStats:
  """What one MoE layer's router saw, or, with leading axes, what several did.

  Attributes:
    load_BE: int32, tokens of each sequence sent to each expert.
    top_BE: int32, tokens of each sequence that have the expert among the top K of the *unbiased*,
      unrestricted scores (eq. 18); equal to the load without bias and groups.
    affinity_BE: float32, each sequence's sum of normalised scores s' (eq. 19).
    tokens_B: int32, tokens that count, padding left out.
    experts_BTK: int32, the experts that each token was sent to, padding's too.
  """

  load_BE: jax.Array
  top_BE: jax.Array
  affinity_BE: jax.Array
  tokens_B: jax.Array
  experts_BTK: jax.Array


def update_bias(bias_E: jax.Array, load_E: jax.Array, rate: float | jax.Array) -> jax.Array:
  """One step of loss-free balancing: towards the underloaded, by a fixed rate (V3 section 2.1.2).

  Args:
    bias_E: current bias, float32; leading axes (layers) are allowed.
    load_E: tokens that each expert received over the WHOLE batch, so summed over every device and
      every gradient-accumulation step before it comes here.
    rate: V3's gamma; 1e-3 for most of training, then 0.

  Returns:
    The bias for the next step.
  """
  # In integers: a float32 mean of loads like V3's rounds, and would push balanced experts.
  whole, rest = jnp.divmod(load_E.sum(-1, keepdims=True), load_E.shape[-1])
  below_mean_E = (load_E == whole) & (rest > 0)
  return bias_E + rate * (jnp.sign(whole - load_E) + below_mean_E)


def max_violation(load_E: jax.Array) -> jax.Array:
  """MaxVio (arXiv:2408.15664): the busiest load over the mean, less 1; leading axes are kept."""
  load_E = load_E.astype(jnp.float32)
  return load_E.max(-1) / load_E.mean(-1) - 1


def _dot_frequencies(
    counts_E: jax.Array, affinity_E: jax.Array, tokens: jax.Array, experts_per_token: int,
) -> jax.Array:
  """sum_i f_i P_i (eq. 17-20): 1 at balance; 0 where there are no tokens."""
  tokens = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
  f_E = counts_E.astype(jnp.float32) * (counts_E.shape[-1] / experts_per_token) / tokens
  return (jax.lax.stop_gradient(f_E) * affinity_E / tokens).sum(-1)


def sequence_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """V3's complementary loss without its weight alpha, per sequence (eq. 17-20): [B]."""
  return _dot_frequencies(stats.top_BE, stats.affinity_BE, stats.tokens_B, experts_per_token)


def batch_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """The same over all tokens of the batch at once (V3 section 4.5.3): a scalar."""
  return _dot_frequencies(stats.top_BE.sum(-2), stats.affinity_BE.sum(-2), stats.tokens_B.sum(-1),
                          experts_per_token)


def expert_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """The classic auxiliary loss: frequencies of the experts actually used (V2 section 2.2.3)."""
  return _dot_frequencies(stats.load_BE.sum(-2), stats.affinity_BE.sum(-2), stats.tokens_B.sum(-1),
                          experts_per_token)


def device_balance_loss(
    stats: RouterStats, experts_per_token: int, num_groups: int) -> jax.Array:
  """V2's device-level loss: mean frequency times summed affinity, over groups of experts."""
  load_ME = stats.load_BE.sum(-2).reshape(*stats.load_BE.shape[:-2], num_groups, -1)
  affinity_ME = stats.affinity_BE.sum(-2).reshape(load_ME.shape)
  # A mean of f_i over a group is the group's count against M groups instead of E experts.
  return _dot_frequencies(load_ME.sum(-1), affinity_ME.sum(-1), stats.tokens_B.sum(-1),
                          experts_per_token)
