"""Sampling of one text, token by token, as a terminal shows it.

Shape letters:  T prompt tokens
"""

import functools
from collections.abc import Generator, Sequence

import jax
import numpy as np

from model.compiling import jit
from model.decoding import engine
from model.decoding.drafting import check_drafts
from model.decoding.engine import Status
from model.decoding.generate import checked
from model.decoding.sampling import Limits
from model.transformer import Transformer
from model.weights import cast_weights

_SHORTEST = 16  # prompts are padded to this length or a larger power of two


def stream(
    model: Transformer, variables: dict, prompt_T: jax.Array, *, max_new_tokens: int,
    key: jax.Array | None = None, temperature: float = 1.0, top_p: float = 1.0,
    stop_token: int | Sequence[int] | None = None, drafts: int = 0, top_k: int = 0,
    min_p: float = 0.0, cache_dtype: str | None = None) -> Generator[int, None, Status]:
  """Returns an iterator over the tokens that `generate` samples for one prompt.

  Each comes as soon as it is known; a stop token is the last. The iterator's return value is the
  `engine.Status` that says why the text has ended. Closing the iterator ends it, too.

  Args:
    model: the network; its MTP modules are used for drafts only.
    variables: its variables.
    prompt_T: int32, token ids of the prompt, without padding.
    max_new_tokens, key, temperature, top_p, stop_token, top_k, min_p, cache_dtype: as in
      `generate`.
    drafts: tokens that MTP modules draft at a time, as in `speculate`; 0 for none.

  Raises:
    ValueError: for what `generate` or `speculate` raises it.
  """
  prompt_T = np.asarray(prompt_T)
  if prompt_T.ndim != 1 or not prompt_T.size:
    raise ValueError(f"the prompt should have the shape [T >= 1], and has {prompt_T.shape}")
  # Padded to one of a few lengths, each of which is compiled once.
  padded = max(_SHORTEST, 1 << int(prompt_T.size - 1).bit_length())
  prompt_1T = np.pad(prompt_T, (0, padded - prompt_T.size))[None]
  sampling, prompts = checked(
      model, prompt_1T, [prompt_T.size], max_new_tokens=max_new_tokens, key=key,
      temperature=temperature, limits=Limits(top_p, top_k, min_p), stop_token=stop_token,
      drafts=drafts, cache_dtype=cache_dtype)
  if drafts:
    check_drafts(model, drafts, prompts[1])
  return _stream(model, cast_weights(model.cfg, variables), sampling, prompts)


def _stream(model, variables, sampling, prompts):
  rows, new = _begin(model, variables, sampling, *prompts)
  for step in range(1, sampling.max_new_tokens + 1):
    # The next pass is started before the tokens of this one are read, so that the device does not
    # wait for the host. It changes nothing if the text has ended.
    ahead = None
    if step < sampling.max_new_tokens:
      ahead = _step(model, variables, sampling, rows)
    tokens_BP, count_B, status_B = new
    yield from np.asarray(tokens_BP)[0, :int(count_B[0])].tolist()
    status = Status(int(status_B[0]))
    if ahead is None or status is not Status.RUNNING:
      return status
    rows, new = ahead


@functools.partial(jit, static_argnames="model")
def _begin(model, variables, sampling, prompts_BT, lengths_B, keys_B):
  return _for_the_host(engine.begin(model, variables, sampling, prompts_BT, lengths_B, keys_B))


@functools.partial(jit, static_argnames="model", donate_argnames="rows")
def _step(model, variables, sampling, rows):
  return _for_the_host(engine.step(model, variables, sampling, rows))


def _for_the_host(result):
  """Returns rows, and what the host reads of them: not their own arrays, which are donated."""
  rows, new = result
  return rows, (new.tokens_BP, new.count_B, rows.status_B + 0)
