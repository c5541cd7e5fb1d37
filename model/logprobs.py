"""Log-probabilities of given tokens, computed in chunks instead of from the logits of all tokens.

Shape letters:  B batch  T tokens  D model width  V vocabulary  C chunks  t tokens of a chunk
"""

import functools
import math

import jax
import jax.numpy as jnp

from model.numerics import Numerics
from model.token_shards import num_token_shards

_CHUNK_TOKENS = 512  # of each row
_CHUNK_BYTES = 2**30  # of float32 logits, on one device
_logsumexp = functools.partial(jax.nn.logsumexp, axis=-1)


def token_logprobs(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *,
    numerics: Numerics, chunk_size: int = _CHUNK_TOKENS,
    temperature: float | jax.Array = 1.0) -> jax.Array:
  """Returns log P(target) in nats, float32 [B, T].

  Logits exist for at most `B * chunk_size` tokens at a time, in the forward pass and in the
  backward pass, which recomputes them. V3's for 4 x 4096 tokens, in float32, would take 8.5 GB.

  Args:
    hidden_BTD: hidden states after a final norm: `hidden_BTD` of the model's output, or one of its
      `mtp_hidden`.
    head_DV: weights of the output head.
    targets_BT: int32, the token at each position whose probability is returned. At positions
      without a target, pass any valid token and mask the result.
    numerics: format of the product with the head; the log-softmax is computed in float32.
    chunk_size: tokens of each row in a chunk.
    temperature: divides the logits.
  """
  num_tokens = hidden_BTD.shape[1]
  if num_tokens <= chunk_size:
    return _logprobs(hidden_BTD, head_DV, targets_BT, temperature, numerics)

  def one(_, chunk):
    hidden, targets = chunk
    return None, _chunk_logprobs(numerics, hidden, head_DV, targets, temperature)

  chunks = (_chunked(hidden_BTD, chunk_size), _chunked(targets_BT, chunk_size))
  _, logp_CBt = jax.lax.scan(one, None, chunks)
  return _joined(logp_CBt, num_tokens)


def logprobs_and_entropy(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *,
    numerics: Numerics, chunk_size: int = _CHUNK_TOKENS,
    temperature: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array]:
  """Returns log P(target), and the entropy of each next-token distribution; both float32 [B, T].

  The entropy is the exact sum over the vocabulary of -p log p, in nats. Logits exist for a chunk of
  tokens at a time, as in `token_logprobs`, whose arguments these are.
  """
  num_tokens = hidden_BTD.shape[1]
  # Not saved for the backward pass: logits, and probabilities of the same size.
  of_chunk = jax.checkpoint(
      functools.partial(_with_entropy, temperature=temperature, numerics=numerics),
      prevent_cse=num_tokens <= chunk_size)
  if num_tokens <= chunk_size:
    return of_chunk(hidden_BTD, head_DV, targets_BT)

  def one(_, chunk):
    hidden, targets = chunk
    return None, of_chunk(hidden, head_DV, targets)

  chunks = (_chunked(hidden_BTD, chunk_size), _chunked(targets_BT, chunk_size))
  _, each = jax.lax.scan(one, None, chunks)
  return tuple(_joined(x_CBt, num_tokens) for x_CBt in each)


def logprob_sum(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *,
    numerics: Numerics, chunk_size: int | None = None) -> jax.Array:
  """Returns the sum over tokens of weight x log P(target), a float32 scalar.

  Every gradient is the gradient of this scalar times what is known as soon as a chunk's logits are.
  The forward pass therefore computes the gradients too, and computes logits once; `token_logprobs`
  has to recompute them in the backward pass.

  What the backward pass needs of a chunk is as large as its logits in the compute format, besides
  the logits in float32. The gradient of the head is summed over chunks in float32.

  Args:
    hidden_BTD, head_DV, targets_BT, numerics: as in `token_logprobs`. Inside a `jax.shard_map`,
      arrays that devices share must be marked as varying, with `jax.lax.pcast`.
    weights_BT: float32, the weights; zero at positions without a target.
    chunk_size: tokens of each row in a chunk. None for 512 where the program is compiled for a CPU,
      and elsewhere for as many as have at most 1 GiB of float32 logits on a device, fewer if then
      all chunks are equally large. In a `jax.vmap`, the limit holds for each member of the batch.
  """
  return _logprob_sum((numerics, chunk_size), hidden_BTD, head_DV, targets_BT, weights_BT)


def _chunked(x_BT, size):
  """Splits [B, T, ...] into chunks, [C, B, size, ...], the last one padded with zeros."""
  batch, num_tokens, *rest = x_BT.shape
  padding = -num_tokens % size
  x_BT = jnp.pad(x_BT, ((0, 0), (0, padding)) + ((0, 0),) * len(rest))
  return x_BT.reshape(batch, -1, size, *rest).swapaxes(0, 1)


def _joined(x_CBt, num_tokens):
  """Inverts `_chunked`: joins chunks, and drops the padding."""
  num_chunks, batch, size, *rest = x_CBt.shape
  return x_CBt.swapaxes(0, 1).reshape(batch, num_chunks * size, *rest)[:, :num_tokens]


def _logits(hidden_BTD, head_DV, temperature, numerics):
  return numerics.einsum_f32("btd,dv->btv", hidden_BTD, head_DV) / temperature


def _is_target(logits_BTV, targets_BT):
  return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _parts(logits_BTV, targets_BT, logsumexp=_logsumexp):
  """Returns the logit of each target, and the log-sum-exp of all logits, both [B, T]."""
  # A masked sum, whose gradient is a comparison; that of a gather is a scatter into zeros.
  target_BT = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0).sum(-1)
  return target_BT, logsumexp(logits_BTV)


def _dlogits(dlogp_BT, logits_BTV, targets_BT, total_BT):
  p_BTV = jnp.exp(logits_BTV - total_BT[..., None])
  return dlogp_BT[..., None] * (_is_target(logits_BTV, targets_BT) - p_BTV)


def _logprobs(hidden_BTD, head_DV, targets_BT, temperature, numerics):
  target_BT, total_BT = _parts(_logits(hidden_BTD, head_DV, temperature, numerics), targets_BT)
  return target_BT - total_BT


def _with_entropy(hidden_BTD, head_DV, targets_BT, *, temperature, numerics):
  logits_BTV = _logits(hidden_BTD, head_DV, temperature, numerics)
  target_BT, total_BT = _parts(logits_BTV, targets_BT)
  surprise_BTV = total_BT[..., None] - logits_BTV
  return target_BT - total_BT, (jnp.exp(-surprise_BTV) * surprise_BTV).sum(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(numerics, hidden_BTD, head_DV, targets_BT, temperature):
  return _logprobs(hidden_BTD, head_DV, targets_BT, temperature, numerics)


def _chunk_forward(numerics, hidden_BTD, head_DV, targets_BT, temperature):
  target_BT, total_BT = _parts(_logits(hidden_BTD, head_DV, temperature, numerics), targets_BT)
  return target_BT - total_BT, (hidden_BTD, head_DV, targets_BT, temperature, total_BT)


def _chunk_backward(numerics, residuals, dlogp_BT):
  """Recomputes the logits, but not their log-sum-exp, which is a residual."""
  hidden_BTD, head_DV, targets_BT, temperature, total_BT = residuals
  logits_BTV, vjp = jax.vjp(
      functools.partial(_logits, numerics=numerics), hidden_BTD, head_DV, temperature)
  dhidden_BTD, dhead_DV, dtemperature = vjp(_dlogits(dlogp_BT, logits_BTV, targets_BT, total_BT))
  return dhidden_BTD, dhead_DV, None, dtemperature


_chunk_logprobs.defvjp(_chunk_forward, _chunk_backward)


def _weighted(weights_BT, logp_BT):
  """Returns the weighted sum; log-probabilities of weight zero need not be finite."""
  return jnp.where(weights_BT == 0, 0, weights_BT * logp_BT).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprob_sum(static, hidden_BTD, head_DV, targets_BT, weights_BT):
  numerics, chunk_size = static
  logp_BT = token_logprobs(
      hidden_BTD, head_DV, targets_BT, numerics=numerics, chunk_size=chunk_size or _CHUNK_TOKENS)
  return _weighted(weights_BT, logp_BT)


def _sum_forward(static, hidden_BTD, head_DV, targets_BT, weights_BT):
  """Computes the sum and its gradients, in the way that suits what the program is compiled for."""
  numerics, chunk_size = static
  large = chunk_size or _even_chunk(*targets_BT.shape, head_DV.shape[1])
  run = lambda *how: functools.partial(_sum_and_gradients, numerics, *how)
  return jax.lax.platform_dependent(
      hidden_BTD, head_DV, targets_BT, weights_BT,
      cpu=run(chunk_size or _CHUNK_TOKENS, _logsumexp),
      cuda=run(large, _logsumexp_in_one_pass), default=run(large, _logsumexp))


def _even_chunk(batch: int, num_tokens: int, vocab: int) -> int:
  """Returns how many tokens of each row have at most `_CHUNK_BYTES` of logits on a device.

  It divides the number of tokens, unless it would then be less than half of what it could be.
  """
  most = max(1, _CHUNK_BYTES * num_token_shards() // (4 * batch * vocab))
  if most >= num_tokens:
    return num_tokens
  even = (size for size in range(most, most // 2, -1) if num_tokens % size == 0)
  return next(even, math.ceil(num_tokens / math.ceil(num_tokens / most)))


def _logsumexp_in_one_pass(logits_BTV: jax.Array) -> jax.Array:
  """Computes `jax.nn.logsumexp` over the last axis while reading the logits once, not twice.

  Partial results are the maximum of some logits, and the sum of the exponentials of their
  differences from it.
  """
  def joined(a, b):
    (max_a, sum_a), (max_b, sum_b) = a, b
    # Infinities that are equal have no difference.
    factor = jnp.where(max_a == max_b, 1, jnp.exp(-jnp.abs(max_a - max_b)))
    total = jnp.where(max_a >= max_b, sum_a + sum_b * factor, sum_b + sum_a * factor)
    return jnp.maximum(max_a, max_b), total

  largest_BT, total_BT = jax.lax.reduce(
      (logits_BTV, jnp.ones_like(logits_BTV)), (jnp.float32(-jnp.inf), jnp.float32(0)), joined,
      (logits_BTV.ndim - 1,))
  return largest_BT + jnp.log(total_BT)


def _sum_and_gradients(
    numerics, chunk_size, logsumexp, hidden_BTD, head_DV, targets_BT, weights_BT):
  num_tokens, head = hidden_BTD.shape[1], head_DV.astype(numerics.compute_dtype)
  chunk_size = min(chunk_size, num_tokens)

  def one(dhead_DV, chunk):
    hidden, targets, weights = chunk
    logits = _logits(hidden, head, 1.0, numerics)
    target, total = _parts(logits, targets, logsumexp)
    dlogits = _dlogits(weights, logits, targets, total)
    dhidden = numerics.einsum("btv,dv->btd", dlogits, head).astype(hidden.dtype)
    return dhead_DV + _head_gradient(dlogits, hidden, numerics), (target - total, dhidden)

  chunks = tuple(_chunked(x, chunk_size) for x in (hidden_BTD, targets_BT, weights_BT))
  dhead_DV, each = jax.lax.scan(one, jnp.zeros_like(head_DV, jnp.float32), chunks)
  logp_BT, dhidden_BTD = (_joined(x, num_tokens) for x in each)
  return _weighted(weights_BT, logp_BT), (dhidden_BTD, dhead_DV.astype(head_DV.dtype), logp_BT)


def _head_gradient(dlogits_BTV, hidden_BTD, numerics):
  """Returns [D, V] in float32: what `jax.vjp` of `_logits` would round to the compute format."""
  if numerics.compute == "float32":
    # The product that `jax.vjp` computes, to the bit.
    return numerics.einsum("btv,btd->vd", dlogits_BTV, hidden_BTD).T
  # Not that one, which fails on a CPU: XLA has no transposed float32 result of narrower operands.
  return numerics.einsum_f32("btv,btd->dv", dlogits_BTV, hidden_BTD)


def _sum_backward(static, gradients, dsum):
  dhidden_BTD, dhead_DV, logp_BT = ((x * dsum).astype(x.dtype) for x in gradients)
  return dhidden_BTD, dhead_DV, None, logp_BT


_logprob_sum.defvjp(_sum_forward, _sum_backward)
