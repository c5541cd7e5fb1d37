"""Speculative sampling with MTP modules: the tokens of `generate`, several at a time.

See `engine` for why the tokens are the same, and `drafting` for how they are drafted.

Shape letters:  B rows  T prompt tokens  N new tokens  D drafts
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from model.decoding.drafting import check_drafts
from model.decoding.generate import Generated, checked, run
from model.decoding.sampling import Limits
from model.transformer import Transformer


class Speculated(NamedTuple):
  """Sampled continuations, and how many of the drafts were right.

  Attributes:
    generated: what `generate` returns.
    passes_B: int32, forward passes of the trunk for each row after that of its prompt.
    accepted_BD: int32, in how many of them the first d + 1 drafts were all accepted.
  """

  generated: Generated
  passes_B: jax.Array
  accepted_BD: jax.Array


def speculate(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, *,
    max_new_tokens: int, drafts: int, key: jax.Array | None = None, temperature: float = 1.0,
    top_p: float = 1.0, stop_token: int | Sequence[int] | None = None, top_k: int = 0,
    min_p: float = 0.0, cache_dtype: str | None = None) -> Speculated:
  """Samples what `generate` does, with drafts by the model's MTP modules.

  Args:
    model: the network, with MTP modules.
    variables: its variables.
    prompts_BT, lengths_B: as in `generate`; a prompt has at least `drafts` tokens.
    max_new_tokens, key, temperature, top_p, stop_token, top_k, min_p, cache_dtype: as in
      `generate`.
    drafts: D, tokens that are drafted at a time: at most as many as the model has modules, or any
      number if it has one, which is then applied to its own output again.

  Raises:
    ValueError: for what `generate` raises it, without MTP modules, for another number of drafts, or
      if a prompt is too short for it.
  """
  sampling, prompts = checked(
      model, prompts_BT, lengths_B, max_new_tokens=max_new_tokens, key=key,
      temperature=temperature, limits=Limits(top_p, top_k, min_p), stop_token=stop_token,
      drafts=drafts, cache_dtype=cache_dtype)
  check_drafts(model, drafts, prompts[1])
  generated, rows = run(model, variables, sampling, *prompts)
  return Speculated(generated, rows.passes_B, rows.accepted_BD)
