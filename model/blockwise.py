"""Attention by blocks of queries and keys: memory grows with the length, not with its square.

The softmax is computed online, as in FlashAttention (arXiv:2205.14135, 2307.08691): a block of
queries visits those blocks of keys of which it may see any, with the largest score and the sum of
exponentials so far. The backward pass computes the weights of every pair of blocks again, from the
logarithm of that sum. It is plain JAX and runs on every backend.

Shape letters:  B batch  T query tokens  S key slots  G key heads  Q queries per key head
                K key width  V value width  N blocks of queries  X queries of a block
                Y keys of a block
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.numerics import Numerics
from pallas_kernels.implementations import varying_as

_LOWEST = float(jnp.finfo(jnp.float32).min)  # the score of a key that a query does not see


class Visibility(NamedTuple):
  """Which keys each query sees: those in slots up to its own and, with segments, of its segment.

  Attributes:
    slots_BT: int32, the last key slot that each query sees.
    queries_BT: int32, the segment of each query; None without segments.
    keys_BS: int32, the segment of each key.
  """

  slots_BT: jax.Array
  queries_BT: jax.Array | None = None
  keys_BS: jax.Array | None = None


class _Blocks(NamedTuple):
  """The sizes of blocks, and what is the same for all of them; static.

  Attributes:
    queries, keys: tokens of a block.
    scale: multiplies the scores.
    numerics: formats of the products.
  """

  queries: int
  keys: int
  scale: float
  numerics: Numerics


def blockwise_attention(
    q_BTGQK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, visible: Visibility, *,
    scale: float, numerics: Numerics, block: int = 128) -> jax.Array:
  """Softmax attention of grouped query heads over the keys that each query sees.

  Args:
    q_BTGQK, k_BSGK, v_BSGV: queries, keys and values in the compute format.
    visible: which keys each query sees. Every query should see at least one.
    scale: multiplies the scores.
    numerics: formats of the products; scores and their softmax are in float32.
    block: tokens of a block, for queries and for keys.

  Returns:
    [B, T, G, Q, V] in the compute format.
  """
  num_queries, num_keys = q_BTGQK.shape[1], k_BSGK.shape[1]
  visible = visible._replace(slots_BT=jnp.minimum(visible.slots_BT, num_keys - 1))
  blocks = _Blocks(min(block, num_queries), min(block, num_keys), scale, numerics)
  padded = _pad(visible, -num_queries % blocks.queries, -num_keys % blocks.keys)
  ends_N = _visited(padded, blocks)
  queries = _pad_tokens(q_BTGQK, padded.slots_BT.shape[1])
  keys, values = (_pad_tokens(x, num_keys + -num_keys % blocks.keys) for x in (k_BSGK, v_BSGV))
  return _attention(blocks, queries, keys, values, padded, ends_N)[:, :num_queries]


def _pad_tokens(x: jax.Array, length: int) -> jax.Array:
  return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _pad(visible: Visibility, queries: int, keys: int) -> Visibility:
  """Returns it for whole blocks; added queries see the first key, and added keys are not seen."""
  slots_BT = jnp.pad(visible.slots_BT, ((0, 0), (0, queries)))
  if visible.queries_BT is None:
    return Visibility(slots_BT)
  edge = lambda x, more: jnp.pad(x, ((0, 0), (0, more)), mode="edge")
  return Visibility(slots_BT, edge(visible.queries_BT, queries), edge(visible.keys_BS, keys))


def _visited(visible: Visibility, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
  """Returns the first key block that each block of queries visits, and the one after the last.

  Without segments these are all up to the last key that any of the queries sees. Of them, a block
  whose segments all lie before or after those of the queries is not visited, unless it lies between
  two that are.
  """
  by_block = lambda x, size: x.reshape(x.shape[0], -1, size)
  stop_N = by_block(visible.slots_BT, blocks.queries).max((0, 2)) // blocks.keys + 1
  if visible.queries_BT is None:
    return jnp.zeros_like(stop_N), stop_N
  queries = by_block(visible.queries_BT, blocks.queries)[:, :, None]
  keys = by_block(visible.keys_BS, blocks.keys)[:, None]
  meets_NM = ((queries.min(-1) <= keys.max(-1)) & (keys.min(-1) <= queries.max(-1))).any(0)
  meets_NM &= jnp.arange(meets_NM.shape[1]) < stop_N[:, None]
  count = meets_NM.shape[1]
  first_N = meets_NM.argmax(1).astype(jnp.int32)
  last_N = count - 1 - meets_NM[:, ::-1].argmax(1).astype(jnp.int32)
  return first_N, last_N + 1


def _slice(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, block * size, size, axis=1)


def _scores(blocks: _Blocks, q, k, slots_BX, queries_BX, visible: Visibility, y: jax.Array):
  """Returns the scores of a block of queries and key block y, float32 [B, G, Q, X, Y]."""
  scores = blocks.numerics.einsum_f32("bxgqk,bygk->bgqxy", q, k) * blocks.scale
  seen_BXY = y * blocks.keys + jnp.arange(blocks.keys) <= slots_BX[..., None]
  if queries_BX is not None:
    seen_BXY &= queries_BX[..., None] == _slice(visible.keys_BS, y, blocks.keys)[:, None]
  return jnp.where(seen_BXY[:, None, None], scores, _LOWEST)


def _of_queries(blocks: _Blocks, visible: Visibility, x: jax.Array):
  """Returns the slots and the segments of the queries of block x."""
  segments_BT = visible.queries_BT
  return (_slice(visible.slots_BT, x, blocks.queries),
          None if segments_BT is None else _slice(segments_BT, x, blocks.queries))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(blocks, q, k, v, visible, ends_N):
  return _forward(blocks, q, k, v, visible, ends_N)[0]


def _forward(blocks, q, k, v, visible, ends_N):
  """Returns the result, and the logarithms of the sums of exponentials [N, B, G, Q, X]."""
  batch, _, groups, heads, _ = q.shape
  all_operands = q, k, v, visible, ends_N

  def of_block(operands):
    x, first, stop = operands
    own = _slice(q, x, blocks.queries)
    where = _of_queries(blocks, visible, x)

    def visit(y, state):
      sums, total, highest = state
      scores = _scores(blocks, own, _slice(k, y, blocks.keys), *where, visible, y)
      higher = jnp.maximum(highest, scores.max(-1))
      weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
      added = blocks.numerics.einsum_f32(
          "bgqxy,bygv->bgqxv", weights, _slice(v, y, blocks.keys))
      return (sums * shrink[..., None] + added, total * shrink + weights.sum(-1), higher)

    shape = (batch, groups, heads, blocks.queries)
    sums, total, highest = lax.fori_loop(first, stop, visit, varying_as(all_operands, (
        jnp.zeros((*shape, v.shape[-1])), jnp.zeros(shape), jnp.full(shape, _LOWEST))))
    out = (sums / total[..., None]).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4), highest + jnp.log(total)

  count = len(ends_N[0])
  out_N, lse_N = lax.map(of_block, (jnp.arange(count), *ends_N))
  return out_N.swapaxes(0, 1).reshape(*q.shape[:-1], v.shape[-1]), lse_N


def _saved(blocks, q, k, v, visible, ends_N):
  out, lse_N = (checkpoint_name(x, "attention")
                for x in _forward(blocks, q, k, v, visible, ends_N))
  return out, (q, k, v, visible, ends_N, out, lse_N)


def _backward(blocks, saved, dout):
  q, k, v, visible, ends_N, out, lse_N = saved
  einsum_f32 = blocks.numerics.einsum_f32
  # The gradient of a softmax subtracts the mean of its weights' gradients, which is the same as
  # that of the output with the output.
  mean = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

  def of_block(operands, gradients):
    x, first, stop, lse = operands
    own, down = _slice(q, x, blocks.queries), _slice(dout, x, blocks.queries)
    own_mean = _slice(mean, x, blocks.queries).transpose(0, 2, 3, 1)
    where = _of_queries(blocks, visible, x)

    def visit(y, state):
      dq, dk, dv = state
      keys, values = _slice(k, y, blocks.keys), _slice(v, y, blocks.keys)
      weights = jnp.exp(_scores(blocks, own, keys, *where, visible, y) - lse[..., None])
      dweights = einsum_f32("bxgqv,bygv->bgqxy", down, values)
      dscores = weights * (dweights - own_mean[..., None]) * blocks.scale
      add = lambda total, more: lax.dynamic_update_slice_in_dim(
          total, _slice(total, y, blocks.keys) + more, y * blocks.keys, axis=1)
      return (dq + einsum_f32("bgqxy,bygk->bxgqk", dscores, keys),
              add(dk, einsum_f32("bgqxy,bxgqk->bygk", dscores, own)),
              add(dv, einsum_f32("bgqxy,bxgqv->bygv", weights, down)))

    dq, dk, dv = lax.fori_loop(first, stop, visit, (zeros(own), *gradients))
    return (dk, dv), dq.astype(q.dtype)

  zeros = lambda x: varying_as((saved, dout), jnp.zeros(x.shape, jnp.float32))
  (dk, dv), dq_N = lax.scan(
      lambda gradients, operands: of_block(operands, gradients), (zeros(k), zeros(v)),
      (jnp.arange(len(lse_N)), *ends_N, lse_N))
  dq = dq_N.swapaxes(0, 1).reshape(q.shape)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_saved, _backward)
