"""Sampling of text on the device: a forward pass for the prompts, then one for each new token.

Shape letters:  B rows  T prompt tokens  N new tokens  P tokens of a pass  D drafts
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.compiling import jit
from model.decoding import checks, engine
from model.decoding.engine import Rows, Sampling
from model.decoding.sampling import Limits
from model.transformer import Transformer
from model.weights import cast_weights


class Generated(NamedTuple):
  """Sampled continuations.

  Attributes:
    tokens_BN: int32, the new tokens. The stop token that ends a row is included; a row's last token
      is repeated to the row's end.
    lengths_B: int32, the number of new tokens, up to and including the stop token.
    logprobs_BN: float32, the log-probability in nats of each token under the distribution from
      which it was sampled; 0 after the last one.
    status_B: int8, why each row has ended, an `engine.Status`. A row whose logits are NaN ends
      before that token, as INVALID, and the others go on.
  """

  tokens_BN: jax.Array
  lengths_B: jax.Array
  logprobs_BN: jax.Array
  status_B: jax.Array


def generate(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, *,
    max_new_tokens: int, key: jax.Array | None = None, temperature: float = 1.0,
    top_p: float = 1.0, stop_token: int | Sequence[int] | None = None, top_k: int = 0,
    min_p: float = 0.0, cache_dtype: str | None = None,
    prefill_chunk: int | None = None) -> Generated:
  """Samples continuations of right-padded prompts.

  The random key of a row at a step is `fold_in(fold_in(key, row), step)`, so that samples depend
  neither on the other rows nor on the devices. Called within a jitted function, it does not check
  values that are traced.

  Args:
    model: the network; its MTP modules are not used.
    variables: its variables.
    prompts_BT: int32, token ids; those past a prompt's length are ignored.
    lengths_B: int32, the prompts' lengths, in 1..T.
    max_new_tokens: N, the number of tokens after which a row ends without a stop token. There is a
      warning if it may exceed the context, `max_seq_len`.
    key: a jax.random key; needed unless `temperature` is 0.
    temperature: divides the logits; 0 takes the most likely token. See `sampling_logits`.
    top_p: probability of the nucleus from which tokens are sampled, in (0, 1]; see
      `sampling_logits`.
    stop_token: id of the token that ends a row, or ids of several; None for none.
    top_k: number of most likely tokens of which one is sampled; 0 for all.
    min_p: smallest probability, relative to that of the most likely token, in [0, 1].
    cache_dtype: format of the cache, "float8_e4m3fn" or "bfloat16"; None for the compute format.
    prefill_chunk: prompt tokens of a row that are read at a time, at least 1; None for all. Long
      prompts take less memory in chunks.

  Returns:
    The new tokens, their number in each row, and their log-probabilities.

  Raises:
    ValueError: if an argument is out of range, shapes do not fit, or the key is missing.
  """
  sampling, prompts = checked(
      model, prompts_BT, lengths_B, max_new_tokens=max_new_tokens, key=key,
      temperature=temperature, limits=Limits(top_p, top_k, min_p), stop_token=stop_token,
      cache_dtype=cache_dtype, chunk=prefill_chunk)
  return run(model, variables, sampling, *prompts)[0]


def checked(
    model: Transformer, prompts_BT: jax.Array, lengths_B: jax.Array, *, max_new_tokens: int,
    key: jax.Array | None, temperature: float, limits: Limits,
    stop_token: int | Sequence[int] | None, drafts: int = 0, cache_dtype: str | None = None,
    chunk: int | None = None) -> tuple[Sampling, tuple[jax.Array, jax.Array, jax.Array]]:
  """Checks the arguments of `generate`, and returns those of `engine.begin`.

  Returns:
    How to sample; and the prompts, their lengths and the rows' keys.
  """
  greedy = checks.check_sampling(temperature, limits, max_new_tokens, key)
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompts_BT, lengths_B)
  stops_K = checks.as_stop_tokens(stop_token)
  checks.warn_past_context(model.cfg, lengths_B, prompts_BT.shape[1], max_new_tokens)
  keys_B = engine.row_keys(jax.random.key(0) if key is None else key, len(lengths_B))
  sampling = Sampling(
      temperature, limits, stops_K, int(max_new_tokens), greedy,
      nucleus=checks.may_exclude(limits), drafts=int(drafts),
      cache_dtype=checks.as_cache_dtype(cache_dtype), chunk=checks.as_chunk(chunk))
  return sampling, (prompts_BT, lengths_B, keys_B)


@functools.partial(jit, static_argnames="model")
def run(
    model: Transformer, variables: dict, sampling: Sampling, prompts_BT: jax.Array,
    lengths_B: jax.Array, keys_B: jax.Array) -> tuple[Generated, Rows]:
  """Samples until all rows have ended; also returns the rows as they are then."""
  variables = cast_weights(model.cfg, variables)
  rows, new = engine.begin(model, variables, sampling, prompts_BT, lengths_B, keys_B)
  model, variables, rows = engine.unrolled(model, variables, rows)
  batch, most = len(lengths_B), sampling.max_new_tokens

  def write(out, new, start_B):
    column_BP = engine.columns(start_B, new.count_B, new.tokens_BP.shape[1], most)
    where = (jnp.arange(batch)[:, None], column_BP)
    return tuple(x.at[where].set(added, mode="drop") for x, added in zip(out, new[:2], strict=True))

  def advance(state):
    rows, out = state
    grown, new = engine.step(model, variables, sampling, rows)
    return grown, write(out, new, rows.position_B)

  empty = (jnp.zeros((batch, most), jnp.int32), jnp.zeros((batch, most)))
  rows, (tokens_BN, logprobs_BN) = jax.lax.while_loop(
      lambda state: state[0].running_B.any(), advance,
      (rows, write(empty, new, jnp.zeros_like(lengths_B))))
  last_B1 = jnp.take_along_axis(tokens_BN, jnp.maximum(rows.position_B[:, None] - 1, 0), axis=1)
  tokens_BN = jnp.where(jnp.arange(most) < rows.position_B[:, None], tokens_BN, last_B1)
  return Generated(tokens_BN, rows.position_B, logprobs_BN, rows.status_B), rows
