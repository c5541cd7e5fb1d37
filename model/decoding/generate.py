"""Sampling of text: the prompt is processed in one forward pass, then there is one per new token.

Shape letters:  B rows  T prompt tokens  N new tokens  V vocabulary  K stop tokens
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.compiling import jit
from model.decoding import checks
from model.decoding.cache import Cache, init_cache
from model.transformer import Output, Transformer

# Lower values of these two are raised to it: logits divided by a smaller temperature overflow, and
# float32 rounds a smaller top-p to 0. Either leaves only the most likely token.
_SMALLEST = 1e-20


class Limits(NamedTuple):
  """Which tokens may be sampled, besides the most likely one; see `sampling_logits`."""

  top_p: jax.Array | float = 1.0
  top_k: jax.Array | int = 0
  min_p: jax.Array | float = 0.0


class Generated(NamedTuple):
  """Sampled continuations.

  Attributes:
    tokens_BN: int32, the new tokens. The stop token that ends a row is included, and repeated to
      the row's end.
    lengths_B: int32, the number of new tokens, up to and including the stop token.
    logprobs_BN: float32, the log-probability in nats of each token under the distribution from
      which it was sampled; 0 after the stop token.
  """

  tokens_BN: jax.Array
  lengths_B: jax.Array
  logprobs_BN: jax.Array


def prefill(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, cache: Cache,
) -> tuple[jax.Array, Output]:
  """Processes right-padded prompts, or the next part of them, in one forward pass.

  Args:
    model: the network.
    variables: its variables.
    prompts_BT: int32, token ids; those past a prompt's length are ignored.
    lengths_B: int32, the prompts' lengths, in 1..T.
    cache: a cache of at least T slots, to which the prompts are appended: an empty one, or one with
      the earlier parts of the rows.

  Returns:
    float32 logits [B, V] of the token after each prompt, and the model's output, whose cache is
    longer by the prompts' lengths.

  Raises:
    ValueError: if shapes do not fit, or if a length, a token or the room in the cache is out of
      range. Values that are traced, as in a jitted function, cannot be checked.
  """
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompts_BT, lengths_B)
  cache.require_fit(*prompts_BT.shape)
  checks.check_room(cache, lengths_B)
  output = model.apply(variables, prompts_BT, cache=cache, logits=False)
  last_B1D = jnp.take_along_axis(output.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)
  logits_BV = model.apply(variables, last_B1D, method="unembed")[:, 0]
  return logits_BV, output.replace(
      cache=output.cache.with_lengths(cache.lengths_B + lengths_B))


def decode_step(
    model: Transformer, variables: dict, tokens_B: jax.Array, cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Appends one token to every row.

  Returns:
    float32 logits [B, V] of the token after it, and the cache.

  Raises:
    ValueError: if a row of the cache is full, where its length is known, that is outside of
      `jax.jit`.
  """
  checks.check_room(cache, np.ones(len(cache.lengths_B), np.int32))
  output = model.apply(variables, tokens_B[:, None], cache=cache)
  return output.logits_BTV[:, 0], output.cache


def sampling_logits(
    logits_BV: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float,
    top_k: jax.Array | int = 0, min_p: jax.Array | float = 0.0) -> jax.Array:
  """Divides logits by the temperature, and sets those of tokens that may not be sampled to -inf.

  The nucleus is the smallest set of most likely tokens whose probabilities reach `top_p` in total.
  The most likely token, or all that tie for it, may always be sampled; tokens that tie for the last
  place of the nucleus or of the `top_k` may all be.

  Args:
    logits_BV: logits of the next token.
    temperature: divides the logits; above 0. Below 1e-20 it counts as 1e-20, which leaves a
      probability only to the most likely token.
    top_p: probability of the nucleus, in (0, 1].
    top_k: number of most likely tokens; 0 for all.
    min_p: smallest probability relative to that of the most likely token, in [0, 1].

  Returns:
    float32 [B, V].
  """
  logits_BV = _tempered(logits_BV, temperature)
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  mass_before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
  inside_BV = mass_before_BV < jnp.maximum(top_p, _SMALLEST)
  vocabulary = logits_BV.shape[-1]
  inside_BV &= jnp.arange(vocabulary) < jnp.where(jnp.equal(top_k, 0), vocabulary, top_k)
  threshold_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
  threshold_B1 = jnp.maximum(threshold_B1, sorted_BV[:, :1] + jnp.log(jnp.float32(min_p)))
  return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def _tempered(logits_BV, temperature):
  return logits_BV.astype(jnp.float32) / jnp.maximum(temperature, _SMALLEST)


def sample_token(
    logits_BV: jax.Array, keys_B: jax.Array, temperature: jax.Array | float,
    top_p: jax.Array | float, greedy: bool | jax.Array, nucleus: bool = True,
    top_k: jax.Array | int = 0, min_p: jax.Array | float = 0.0) -> tuple[jax.Array, jax.Array]:
  """Samples the next token of every row, or takes the most likely one.

  Args:
    logits_BV: logits of the next token.
    keys_B: a jax.random key for each row; ignored if `greedy`.
    temperature: as in `sampling_logits`; ignored if `greedy`.
    top_p: as in `sampling_logits`; ignored if `greedy` or unless `nucleus`.
    greedy: take the most likely token. A traced value serves both cases with one program.
    nucleus: sample only what `top_p`, `top_k` and `min_p` allow, which costs a sort.
    top_k, min_p: as `top_p`.

  Returns:
    The tokens, int32 [B], and their log-probabilities under the distribution from which they were
    sampled (if `greedy`, that of the logits as they are), float32 [B].
  """
  either = isinstance(greedy, jax.Array)
  likeliest_B = logits_BV.argmax(-1).astype(jnp.int32)
  if either or not greedy:
    temperature = jnp.where(greedy, 1.0, temperature) if either else temperature
    logits_BV = (sampling_logits(logits_BV, temperature, top_p, top_k, min_p) if nucleus
                 else _tempered(logits_BV, temperature))
    tokens_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    tokens_B = jnp.where(greedy, likeliest_B, tokens_B) if either else tokens_B
  else:
    tokens_B = likeliest_B
  logprobs_BV = jax.nn.log_softmax(logits_BV)
  return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def sample_limited(
    logits_BV: jax.Array, keys_B: jax.Array, temperature: jax.Array | float, limits: Limits,
    greedy: bool) -> tuple[jax.Array, jax.Array]:
  """Does what `sample_token` does, within limits."""
  return sample_token(logits_BV, keys_B, temperature, limits.top_p, greedy, top_k=limits.top_k,
                      min_p=limits.min_p)


def generate(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, *,
    max_new_tokens: int, key: jax.Array | None = None, temperature: float = 1.0,
    top_p: float = 1.0, stop_token: int | Sequence[int] | None = None, top_k: int = 0,
    min_p: float = 0.0) -> Generated:
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

  Returns:
    The new tokens, their number in each row, and their log-probabilities.

  Raises:
    ValueError: if an argument is out of range, shapes do not fit, or the key is missing.
  """
  limits = Limits(top_p, top_k, min_p)
  greedy = checks.check_sampling(temperature, limits, max_new_tokens, key)
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompts_BT, lengths_B)
  stops_K = checks.as_stop_tokens(stop_token)
  checks.warn_past_context(model.cfg, lengths_B, prompts_BT.shape[1], max_new_tokens)
  key = jax.random.key(0) if key is None else key
  return _generate(model, variables, prompts_BT, lengths_B, key, temperature, limits, stops_K,
                   int(max_new_tokens), greedy)


@functools.partial(jit, static_argnames=("model", "max_new_tokens", "greedy"))
def _generate(model, variables, prompts_BT, lengths_B, key, temperature, limits, stops_K,
              max_new_tokens, greedy):
  batch, num_tokens = prompts_BT.shape
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  cache = init_cache(model.cfg, batch, num_tokens + max_new_tokens)
  logits_BV, output = prefill(model, variables, prompts_BT, lengths_B, cache)

  def is_stop(tokens):
    return (tokens[..., None] == stops_K).any(-1)

  def not_done(state):
    step, *_, done_B = state
    return (step < max_new_tokens) & ~done_B.all()

  def advance(state):
    step, logits_BV, last_B, cache, tokens_BN, logprobs_BN, done_B = state
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    chosen_B, logprob_B = sample_limited(logits_BV, keys, temperature, limits, greedy)
    chosen_B = jnp.where(done_B, last_B, chosen_B)
    tokens_BN = tokens_BN.at[:, step].set(chosen_B)
    logprobs_BN = logprobs_BN.at[:, step].set(jnp.where(done_B, 0.0, logprob_B))
    logits_BV, cache = decode_step(model, variables, chosen_B, cache)
    done_B |= is_stop(chosen_B)
    return step + 1, logits_BV, chosen_B, cache, tokens_BN, logprobs_BN, done_B

  state = (jnp.int32(0), logits_BV, jnp.zeros(batch, jnp.int32), output.cache,
           jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros((batch, max_new_tokens)),
           jnp.zeros(batch, bool))
  steps, _, last_B, _, tokens_BN, logprobs_BN, _ = jax.lax.while_loop(not_done, advance, state)
  written_N = jnp.arange(max_new_tokens) < steps
  tokens_BN = jnp.where(written_N, tokens_BN, last_B[:, None])
  stops_BN = is_stop(tokens_BN)
  lengths_B = jnp.where(stops_BN.any(1), stops_BN.argmax(1) + 1, max_new_tokens)
  return Generated(tokens_BN, lengths_B.astype(jnp.int32), logprobs_BN)
