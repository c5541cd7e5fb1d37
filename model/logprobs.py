"""Log-probabilities of given tokens, without ever holding all logits.

Shape letters:  B batch  T tokens  D model width  V vocabulary  C chunks
"""

import functools

import jax
import jax.numpy as jnp

from model.numerics import Numerics


def token_logprobs(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *,
    numerics: Numerics, chunk_size: int = 512, temperature: float | jax.Array = 1.0) -> jax.Array:
  """Returns log P(target) in nats, float32 [B, T].

  Logits exist for `B * chunk_size` tokens at a time, forward and backward: V3's, for 4 x 4096
  tokens in float32, would be 8.5 GB. The backward pass computes each chunk's again.

  Args:
    hidden_BTD: the model's `hidden_BTD`, or one of its `mtp_hidden`.
    head_DV: the output head.
    targets_BT: int32; what each position is asked about. Where there is nothing to ask, any valid
      token will do, and the caller masks the result.
    numerics: the product's format; the log-softmax is in float32.
    chunk_size: tokens of each row that share a chunk.
    temperature: logits are divided by it.
  """
  batch, num_tokens, _ = hidden_BTD.shape
  num_chunks = -(-num_tokens // chunk_size)
  padding = num_chunks * chunk_size - num_tokens
  if num_chunks == 1:
    return _logprobs(hidden_BTD, head_DV, targets_BT, temperature, numerics)

  def chunks(x):
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(batch, num_chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)

  def one(_, chunk):
    hidden, targets = chunk
    return None, _chunk_logprobs(numerics, hidden, head_DV, targets, temperature)

  _, logp_CBt = jax.lax.scan(one, None, (chunks(hidden_BTD), chunks(targets_BT)))
  return logp_CBt.swapaxes(0, 1).reshape(batch, -1)[:, :num_tokens]


def _logits(hidden_BTD, head_DV, temperature, numerics):
  return numerics.einsum_f32("btd,dv->btv", hidden_BTD, head_DV) / temperature


def _is_target(logits_BTV, targets_BT):
  return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _parts(hidden_BTD, head_DV, targets_BT, temperature, numerics):
  """The targets' logits, and the logarithm of all logits' exponentials' sum."""
  logits_BTV = _logits(hidden_BTD, head_DV, temperature, numerics)
  # A masked sum, whose gradient is one comparison: a lookup's is a scatter into zeros.
  target_BT = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0).sum(-1)
  return target_BT, jax.nn.logsumexp(logits_BTV, axis=-1)


def _logprobs(*operands):
  target_BT, total_BT = _parts(*operands)
  return target_BT - total_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(numerics, hidden_BTD, head_DV, targets_BT, temperature):
  return _logprobs(hidden_BTD, head_DV, targets_BT, temperature, numerics)


def _chunk_forward(numerics, hidden_BTD, head_DV, targets_BT, temperature):
  target_BT, total_BT = _parts(hidden_BTD, head_DV, targets_BT, temperature, numerics)
  return target_BT - total_BT, (hidden_BTD, head_DV, targets_BT, temperature, total_BT)


def _chunk_backward(numerics, residuals, dlogp_BT):
  """Computes logits again, but no sums of them."""
  hidden_BTD, head_DV, targets_BT, temperature, total_BT = residuals
  logits_BTV, vjp = jax.vjp(
      functools.partial(_logits, numerics=numerics), hidden_BTD, head_DV, temperature)
  p_BTV = jnp.exp(logits_BTV - total_BT[..., None])
  dhidden_BTD, dhead_DV, dtemperature = vjp(
      dlogp_BT[..., None] * (_is_target(logits_BTV, targets_BT) - p_BTV))
  return dhidden_BTD, dhead_DV, None, dtemperature


_chunk_logprobs.defvjp(_chunk_forward, _chunk_backward)
