"""Choice of the next token from its logits.

Shape letters:  B rows  V vocabulary
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Lower values of these two are raised to it: logits divided by a smaller temperature overflow, and
# float32 rounds a smaller top-p to 0. Either leaves only the most likely token.
_SMALLEST = 1e-20


class Limits(NamedTuple):
  """Which tokens may be sampled, besides the most likely one; see `sampling_logits`."""

  top_p: jax.Array | float = 1.0
  top_k: jax.Array | int = 0
  min_p: jax.Array | float = 0.0


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
