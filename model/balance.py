"""Load balancing of experts: loss-free bias updates and auxiliary losses, from router statistics.

Statistics are kept per sequence. The scopes of balancing (sequence, batch, device group) then
differ only in what is summed before frequencies f are multiplied by mean affinities P. It also
allows a batch that is split into micro-batches to use the frequencies of the whole batch, because
only P carries a gradient. Equation numbers are those of V3 (arXiv:2412.19437, section 2.1.2).

Shape letters:  B sequences  T tokens  K experts per token  E routed experts  M expert groups
"""

import flax.struct
import jax
import jax.numpy as jnp

from model.token_shards import num_devices, sum_over_devices
from pallas_kernels.implementations import varying_as


@flax.struct.dataclass
class RouterStats:
  """Statistics of one MoE layer's router, or of several layers' routers, with leading axes.

  Attributes:
    load_BE: int32, the number of tokens of each sequence that were sent to each expert, padding
      excluded.
    top_BE: int32, the number of tokens of each sequence, padding excluded, that have the expert
      among the top K of their scores *without* bias and group limit (eq. 18). It equals `load_BE`
      if the router uses neither.
    affinity_BE: float32, the sum over each sequence's tokens, padding excluded, of the normalised
      scores s' (eq. 19).
    tokens_B: int32, the number of tokens in each sequence, padding excluded.
    experts_BTK: int32, the experts that each token was sent to, padding included.
  """

  load_BE: jax.Array
  top_BE: jax.Array
  affinity_BE: jax.Array
  tokens_B: jax.Array
  experts_BTK: jax.Array


def update_bias(bias_E: jax.Array, load_E: jax.Array, rate: float | jax.Array) -> jax.Array:
  """One step of loss-free balancing (V3 section 2.1.2; arXiv:2408.15664, algorithm 1).

  An expert's bias grows by `rate` if its load is below the mean, shrinks by `rate` if its load is
  above the mean, and stays the same if they are equal.

  Args:
    bias_E: the current bias, float32; leading axes (layers) are allowed.
    load_E: int32, the number of tokens that each expert received over the WHOLE batch: sum it over
      all devices and gradient-accumulation steps first. Leading axes are those of `bias_E`.
    rate: gamma; V3 uses 1e-3 for the first 14.3 T tokens, then 0 (section 4.2).

  Returns:
    The bias for the next step, of the shape of `bias_E`.
  """
  # Computed in integers: in float32 the mean of loads as large as V3's is rounded, so that the bias
  # of experts with exactly the mean load would move.
  whole, rest = jnp.divmod(load_E.sum(-1, keepdims=True), load_E.shape[-1])
  below_mean_E = (load_E == whole) & (rest > 0)
  return bias_E + rate * (jnp.sign(whole - load_E) + below_mean_E)


def max_violation(load_E: jax.Array) -> jax.Array:
  """Returns MaxVio (arXiv:2408.15664): the maximum load divided by the mean load, minus 1.

  Args:
    load_E: the number of tokens that each expert received; leading axes are kept.
  """
  load_E = load_E.astype(jnp.float32)
  return load_E.max(-1) / load_E.mean(-1) - 1


def _dot_frequencies(
    counts_E: jax.Array, affinity_E: jax.Array, tokens: jax.Array, experts_per_token: int,
) -> jax.Array:
  """Returns sum_i f_i P_i (eq. 17-20), which is 1 at perfect balance, and 0 without tokens."""
  tokens = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
  f_E = counts_E.astype(jnp.float32) * (counts_E.shape[-1] / experts_per_token) / tokens
  return (jax.lax.stop_gradient(f_E) * affinity_E / tokens).sum(-1)


def _of_batch(counts_BE: jax.Array, stats: RouterStats, experts_per_token: int) -> jax.Array:
  """Returns `_dot_frequencies` of all sequences.

  In a `jax.shard_map` over sequences, it is that of the sequences of all devices, divided by the
  number of devices, so that it is counted once where losses of devices are added up.
  """
  # Without padding, the numbers of tokens are constants, which are not marked as varying.
  parts = counts_BE.sum(-2), stats.affinity_BE.sum(-2), stats.tokens_B.sum(-1)
  parts = varying_as(parts, parts)
  return _dot_frequencies(*map(sum_over_devices, parts), experts_per_token) / num_devices(parts[0])


def sequence_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """V3's complementary sequence-wise balance loss (eq. 17-20), without its weight alpha.

  Args:
    stats: statistics of the router; leading axes (layers) are kept.
    experts_per_token: K, the number of routed experts of each token.

  Returns:
    float32 [B], a loss for every sequence.
  """
  return _dot_frequencies(stats.top_BE, stats.affinity_BE, stats.tokens_B, experts_per_token)


def batch_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """The batch-wise balance loss (V3 section 4.5.3), without its weight.

  It is that of eq. 17-20, with f and P taken over all tokens of the batch.

  Args:
    stats: statistics of the router; leading axes (layers) are kept.
    experts_per_token: K, the number of routed experts of each token.

  Returns:
    float32, a scalar.
  """
  return _of_batch(stats.top_BE, stats, experts_per_token)


def expert_balance_loss(stats: RouterStats, experts_per_token: int) -> jax.Array:
  """V2's expert-level balance loss (arXiv:2405.04434, section 2.2.3), without its weight.

  Frequencies count the experts that tokens were actually sent to, over the whole batch.

  Args:
    stats: statistics of the router; leading axes (layers) are kept.
    experts_per_token: K, the number of routed experts of each token.

  Returns:
    float32, a scalar.
  """
  return _of_batch(stats.load_BE, stats, experts_per_token)


def device_balance_loss(
    stats: RouterStats, experts_per_token: int, num_groups: int) -> jax.Array:
  """V2's device-level balance loss (arXiv:2405.04434, section 2.2.3), without its weight.

  It sums, over groups of experts, the group's mean frequency times its summed affinity.

  Args:
    stats: statistics of the router; leading axes (layers) are kept.
    experts_per_token: K, the number of routed experts of each token.
    num_groups: M, the number of groups (devices), each of E / M consecutive experts.

  Returns:
    float32, a scalar.
  """
  load_ME = stats.load_BE.sum(-2).reshape(*stats.load_BE.shape[:-2], num_groups, -1)
  affinity_ME = stats.affinity_BE.sum(-2).reshape(load_ME.shape)
  # The mean of f_i over a group is the group's count, normalised by M groups instead of E experts.
  return _dot_frequencies(load_ME.sum(-1), affinity_ME.sum(-1), stats.tokens_B.sum(-1),
                          experts_per_token)
