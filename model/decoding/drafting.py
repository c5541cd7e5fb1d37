"""Drafts of the next tokens by MTP modules.

At position i, module k reads the module before at position i, and token i + k. So what it has in
its cache for the last D - 1 positions depends on drafts, and is computed again once tokens are
verified: all modules run on a window of 2 D positions, of which D - 1 were verified before and
D + 1 are new.

Shape letters:  B rows  T prompt tokens  V vocabulary  D drafts  W = 2 D positions of the window
                O = D - 1 old ones of them  C model width
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.checks import require
from model.decoding import checks
from model.decoding.cache import Cache, init_cache
from model.transformer import Output, Transformer

# Chooses tokens from logits [B, X, V], given the index of each among the row's new tokens, [B, X];
# returns them and their log-probabilities.
Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Drafter:
  """What the modules need between two passes of the trunk.

  Attributes:
    cache: of the modules, a layer for each; its lengths are set at each use.
    old_BOC: what the first module reads of the last D - 1 positions in the trunk's cache.
    next_BO: int32, the token after each of them.
  """

  cache: Cache
  old_BOC: jax.Array
  next_BO: jax.Array


def check_drafts(model: Transformer, drafts: int, lengths_B: Any) -> None:
  """Raises ValueError unless the model can draft so many tokens after prompts of these lengths."""
  modules = model.cfg.mtp.depth if model.cfg.mtp else 0
  require(modules > 0, "the model has no MTP modules to draft with: leave drafts out")
  again = modules == 1 and model.cfg.mtp.form == "sequential"  # it can read its own output
  require(drafts >= 1 and (drafts <= modules or again),
          f"drafts={drafts} should be at least 1"
          + ("" if again else f" and at most {modules}, the model's MTP modules"))
  lengths = checks.known(lengths_B)
  require(lengths is None or lengths.min() >= drafts,
          f"drafts={drafts} needs prompts of at least {drafts} tokens: draft fewer")


def read_prompts(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array,
    read: Output, token_B: jax.Array, slots: int, drafts: int, choose: Choose,
    cache_dtype: str | None = None) -> tuple[jax.Array, Drafter]:
  """Runs the modules on prompts, and drafts the tokens after the first new one.

  Args:
    model, variables: the network.
    prompts_BT, lengths_B: as in `generate`.
    read: what the trunk returned for them.
    token_B: int32, the first new token of each row.
    slots: of the modules' cache: at least T + 2 D.
    drafts: D.
    choose: chooses drafts.
    cache_dtype: format of the modules' cache.

  Returns:
    The drafts, int32 [B, D], and what the next ones need.
  """
  (batch, num_tokens), modules = prompts_BT.shape, model.cfg.mtp.depth
  cache = init_cache(model.cfg, batch, slots, cache_dtype, layers=modules)
  previous_BTC = read.mtp_input_BTD
  for module in range(1, min(drafts, modules) + 1):
    previous_BTC, _, cache = model.apply(
        variables, previous_BTC, jnp.roll(prompts_BT, -module, axis=1), cache, module=module,
        method="draft")
  # The window ends with the prompt, followed by positions that hold nothing yet.
  position_BW = (lengths_B - drafts)[:, None] + jnp.arange(2 * drafts)
  at = lambda x, index: jnp.take_along_axis(
      x, jnp.minimum(index, num_tokens - 1).reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
  next_BW = at(prompts_BT, position_BW + 1).at[:, drafts - 1].set(token_B)
  one_B = jnp.ones(batch, jnp.int32)
  return _draft(model, variables, cache, at(read.mtp_input_BTD, position_BW), next_BW,
                lengths_B - drafts, one_B, one_B, choose)


def read_verified(
    model: Transformer, variables: dict, drafter: Drafter, read: Output, token_BP: jax.Array,
    length_B: jax.Array, verified_B: jax.Array, position_B: jax.Array, choose: Choose,
) -> tuple[jax.Array, Drafter]:
  """Runs the modules on verified tokens, and drafts those after them.

  Args:
    model, variables: the network.
    drafter: of the pass before.
    read: what the trunk returned for the D + 1 tokens that were to be verified.
    token_BP: int32 [B, D + 1], the token that follows each of them.
    length_B: int32, the tokens in the trunk's cache before this pass.
    verified_B: int32, how many of the D + 1 tokens are verified; 0 for rows that have ended, whose
      drafts have no meaning.
    position_B: int32, the number of new tokens.
    choose: chooses drafts.

  Returns:
    The drafts, int32 [B, D], and what the next ones need.
  """
  window_BWC = jnp.concatenate([drafter.old_BOC, read.mtp_input_BTD], axis=1)
  next_BW = jnp.concatenate([drafter.next_BO, token_BP], axis=1)
  start_B = length_B - drafter.next_BO.shape[1]
  return _draft(model, variables, drafter.cache, window_BWC, next_BW, start_B, verified_B,
                position_B, choose)


def _draft(model, variables, cache, window_BWC, next_BW, start_B, verified_B, position_B, choose):
  """Runs the modules on a window, and drafts the tokens after its last verified position.

  Args:
    model, variables, choose: as in `read_verified`.
    cache: the modules' cache.
    window_BWC: what the first module reads of the window's positions.
    next_BW: int32, the token after each of them; undefined after the last verified one.
    start_B: int32, the first position of the window.
    verified_B: int32, how many of the last D + 1 positions are verified; 0 for rows that have
      ended, whose drafts have no meaning.
    position_B: int32, the number of new tokens, with the one after the last verified position.

  Returns:
    The drafts, int32 [B, D], and what the next ones need.
  """
  modules, drafts = model.cfg.mtp.depth, window_BWC.shape[1] // 2
  row_B, width = jnp.arange(len(start_B)), 2 * drafts
  last_B = drafts - 2 + jnp.maximum(verified_B, 1)  # the last verified position in the window
  tokens = jnp.pad(next_BW, ((0, 0), (0, drafts)))  # and the drafts after it, as they are made
  previous, last, drafted = window_BWC, next_BW[row_B, last_B], []
  for k in range(1, drafts + 1):
    if k <= modules:
      previous, normed, cache = model.apply(
          variables, previous, tokens[:, k - 1:k - 1 + width], cache.with_lengths(start_B),
          module=k, method="draft")
      normed_BC, read_BC = normed[row_B, last_B], previous[row_B, last_B]
    else:  # the only module once more, on its own output, as if the draft were verified
      previous, normed, cache = model.apply(
          variables, read_BC[:, None], last[:, None],
          cache.with_lengths(start_B + last_B + k - 1), module=modules, method="draft")
      normed_BC, read_BC = normed[:, 0], previous[:, 0]
    logits_B1V = model.apply(variables, normed_BC[:, None], method="unembed")
    draft_B1, _ = choose(logits_B1V, (position_B + k - 1)[:, None])
    last = draft_B1[:, 0]
    drafted.append(last)
    tokens = tokens.at[row_B, last_B + k].set(last)
  old_BO = last_B[:, None] - jnp.arange(drafts - 2, -1, -1)
  return jnp.stack(drafted, axis=1), Drafter(
      cache, jnp.take_along_axis(window_BWC, old_BO[..., None], axis=1),
      jnp.take_along_axis(next_BW, old_BO, axis=1))
