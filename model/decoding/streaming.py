"""Sampling of one text, token by token, as a terminal shows it.

Shape letters:  B rows, of which there is one  T prompt tokens  K stop tokens
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from model.compiling import jit
from model.decoding import checks, speculate
from model.decoding.cache import init_cache
from model.decoding.generate import Limits, decode_step, prefill, sample_limited
from model.transformer import Transformer


def stream(
    model: Transformer, variables: dict, prompt_T: jax.Array, *, max_new_tokens: int,
    key: jax.Array | None = None, temperature: float = 1.0, top_p: float = 1.0,
    stop_token: int | Sequence[int] | None = None, drafts: int = 0, top_k: int = 0,
    min_p: float = 0.0) -> Iterator[int]:
  """Returns an iterator over the tokens that `generate` samples for one prompt.

  Each comes as soon as it is known; a stop token is the last.

  Args:
    model: the network; its MTP modules are used for drafts only.
    variables: its variables.
    prompt_T: int32, token ids of the prompt, without padding.
    max_new_tokens, key, temperature, top_p, stop_token, top_k, min_p: as in `generate`.
    drafts: tokens that MTP modules draft at a time, as in `speculate`; 0 for none.

  Raises:
    ValueError: for what `generate` or `speculate` raises it.
  """
  limits = Limits(top_p, top_k, min_p)
  greedy = checks.check_sampling(temperature, limits, max_new_tokens, key)
  prompt_T = prompt_T if isinstance(prompt_T, jax.Array) else np.asarray(prompt_T)
  if prompt_T.ndim != 1 or not prompt_T.size:
    raise ValueError(f"the prompt should have the shape [T >= 1], and has {prompt_T.shape}")
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompt_T[None], [prompt_T.size])
  checks.warn_past_context(model.cfg, lengths_B, prompt_T.size, max_new_tokens)
  stops_K = checks.as_stop_tokens(stop_token)
  stops = frozenset(stops_K.tolist())
  key = jax.random.key(0) if key is None else key
  if drafts:
    speculate.check_drafts(model, drafts, lengths_B)
    return _stream_drafted(model, variables, prompts_BT, lengths_B, max_new_tokens, key,
                           temperature, limits, stops_K, drafts, greedy)
  return _stream(model, variables, prompts_BT, lengths_B, max_new_tokens, key, temperature,
                 limits, stops, greedy)


def _stream(model, variables, prompts_BT, lengths_B, max_new_tokens, key, temperature, limits,
            stops, greedy):
  row_key = jax.random.fold_in(key, 0)
  cache = init_cache(model.cfg, 1, prompts_BT.shape[1] + max_new_tokens)
  logits_BV, cache = _prefill(model, variables, prompts_BT, lengths_B, cache)
  for step in range(max_new_tokens):
    keys_B = jax.random.fold_in(row_key, step)[None]
    chosen_B, logits_BV, cache = _advance(
        model, variables, logits_BV, cache, keys_B, temperature, limits, greedy)
    token = int(chosen_B[0])
    yield token
    if token in stops:
      return


@functools.partial(jit, static_argnames="model", donate_argnames="cache")
def _prefill(model, variables, prompts_BT, lengths_B, cache):
  logits_BV, output = prefill(model, variables, prompts_BT, lengths_B, cache)
  return logits_BV, output.cache


@functools.partial(jit, static_argnames=("model", "greedy"), donate_argnames="cache")
def _advance(model, variables, logits_BV, cache, keys_B, temperature, limits, greedy):
  chosen_B, _ = sample_limited(logits_BV, keys_B, temperature, limits, greedy)
  logits_BV, cache = decode_step(model, variables, chosen_B, cache)
  return chosen_B, logits_BV, cache


def _stream_drafted(model, variables, prompts_BT, lengths_B, max_new_tokens, key, temperature,
                    limits, stops_K, drafts, greedy):
  how = key, temperature, limits, stops_K
  rows, new = _begin(model, variables, prompts_BT, lengths_B, *how, max_new_tokens, drafts, greedy)
  while True:
    yield from new.tokens_BP[0, :int(new.count_B[0])].tolist()
    if rows.done_B[0]:
      return
    rows, new = _step(model, variables, rows, *how, max_new_tokens, greedy)


@functools.partial(jit, static_argnames=("model", "max_new_tokens", "drafts", "greedy"))
def _begin(model, variables, prompts_BT, lengths_B, key, temperature, limits, stops_K,
           max_new_tokens, drafts, greedy):
  choose = speculate.chooser(key, len(lengths_B), temperature, limits, greedy)
  return speculate.begin(
      model, variables, prompts_BT, lengths_B, max_new_tokens, drafts, choose, stops_K)


@functools.partial(jit, static_argnames=("model", "greedy"), donate_argnames="rows")
def _step(model, variables, rows, key, temperature, limits, stops_K, max_new_tokens, greedy):
  choose = speculate.chooser(key, len(rows.done_B), temperature, limits, greedy)
  return speculate.step(model, variables, rows, max_new_tokens, choose, stops_K)
