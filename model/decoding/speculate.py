"""Speculative sampling with MTP modules: the tokens of `generate`, several at a time.

The modules draft D tokens; one forward pass of the trunk over them and the token before them yields
the true ones. The draft of a position and its verification choose with the same random key, so that
the noise, too, is the same (shared Gumbel noise): a draft is accepted if it is exactly the token
that `generate` samples there, whatever the temperature. In exact arithmetic the tokens are those of
`generate`; rounding differs, as it does between any two shapes of a batch.

At position i, module k reads the module before at position i, and token i + k. So what it has in
its cache for the last D - 1 positions depends on drafts, and is computed again once tokens are
verified: all modules run on a window of 2 D positions, of which D - 1 were verified before and
D + 1 are new.

Shape letters:  B rows  T prompt tokens  N new tokens  V vocabulary  D drafts  P = D + 1 tokens that
                are verified at once  W = 2 D positions of the window  O = D - 1 old ones of them
                C model width  K stop tokens
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from model.checks import require
from model.compiling import jit
from model.decoding import checks
from model.decoding.cache import Cache, init_cache
from model.decoding.generate import Generated, Limits, prefill, sample_limited
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


@flax.struct.dataclass
class _Rows:
  """The rows between two passes of the trunk.

  Attributes:
    cache: of the trunk, with all tokens but the last one.
    drafts: the modules' cache; its lengths are set at each use.
    pending_BP: int32, the last token, and the drafts after it.
    old_BOC: what the first module reads of the last D - 1 positions in the trunk's cache.
    next_BO: int32, the token after each of them.
    position_B: int32, the number of new tokens.
    done_B: bool, whether the row has ended.
    passes_B, accepted_BD: see `Speculated`.
  """

  cache: Cache
  drafts: Cache
  pending_BP: jax.Array
  old_BOC: jax.Array
  next_BO: jax.Array
  position_B: jax.Array
  done_B: jax.Array
  passes_B: jax.Array
  accepted_BD: jax.Array


class _New(NamedTuple):
  """The tokens that a pass adds to each row: the first `count_B` of `tokens_BP`."""

  tokens_BP: jax.Array
  logprobs_BP: jax.Array
  count_B: jax.Array


# Chooses tokens from logits [B, X, V], given the index of each among the row's new tokens, [B, X].
_Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def speculate(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, *,
    max_new_tokens: int, drafts: int, key: jax.Array | None = None, temperature: float = 1.0,
    top_p: float = 1.0, stop_token: int | Sequence[int] | None = None, top_k: int = 0,
    min_p: float = 0.0) -> Speculated:
  """Samples what `generate` does, with drafts by the model's MTP modules.

  Args:
    model: the network, with MTP modules.
    variables: its variables.
    prompts_BT, lengths_B: as in `generate`; a prompt has at least `drafts` tokens.
    max_new_tokens, key, temperature, top_p, stop_token, top_k, min_p: as in `generate`.
    drafts: D, tokens that are drafted at a time: at most as many as the model has modules, or any
      number if it has one, which is then applied to its own output again.

  Raises:
    ValueError: for what `generate` raises it, without MTP modules, for another number of drafts, or
      if a prompt is too short for it.
  """
  limits = Limits(top_p, top_k, min_p)
  greedy = checks.check_sampling(temperature, limits, max_new_tokens, key)
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompts_BT, lengths_B)
  check_drafts(model, drafts, lengths_B)
  stops_K = checks.as_stop_tokens(stop_token)
  checks.warn_past_context(model.cfg, lengths_B, prompts_BT.shape[1], max_new_tokens)
  key = jax.random.key(0) if key is None else key
  return _speculate(model, variables, prompts_BT, lengths_B, key, temperature, limits, stops_K,
                    int(max_new_tokens), int(drafts), greedy)


def check_drafts(model: Transformer, drafts: int, lengths_B: Any) -> None:
  """Raises ValueError unless the model can draft so many tokens after prompts of these lengths."""
  modules = model.cfg.mtp.depth if model.cfg.mtp else 0
  require(modules > 0, "the model has no MTP modules to draft with: leave drafts out")
  require(drafts >= 1 and (drafts <= modules or modules == 1),
          f"drafts={drafts} should be at least 1"
          + (f" and at most {modules}, the model's MTP modules" if modules > 1 else ""))
  lengths = checks.known(lengths_B)
  require(lengths is None or lengths.min() >= drafts,
          f"drafts={drafts} needs prompts of at least {drafts} tokens: draft fewer")


@functools.partial(jit, static_argnames=("model", "max_new_tokens", "drafts", "greedy"))
def _speculate(model, variables, prompts_BT, lengths_B, key, temperature, limits, stops_K,
               max_new_tokens, drafts, greedy):
  choose = chooser(key, len(lengths_B), temperature, limits, greedy)
  rows, new = begin(model, variables, prompts_BT, lengths_B, max_new_tokens, drafts, choose,
                    stops_K)
  shape = (len(lengths_B), max_new_tokens)

  def write(out, new, start_B):
    offset_P = jnp.arange(new.tokens_BP.shape[1])
    column_BP = jnp.where(offset_P < new.count_B[:, None], start_B[:, None] + offset_P, shape[1])
    where = (jnp.arange(shape[0])[:, None], column_BP)
    return tuple(x.at[where].set(added, mode="drop") for x, added in zip(out, new[:2], strict=True))

  def advance(state):
    rows, out = state
    start_B = rows.position_B
    rows, new = step(model, variables, rows, max_new_tokens, choose, stops_K)
    return rows, write(out, new, start_B)

  out = write((jnp.zeros(shape, jnp.int32), jnp.zeros(shape)), new, jnp.zeros_like(lengths_B))
  rows, (tokens_BN, logprobs_BN) = jax.lax.while_loop(
      lambda state: ~state[0].done_B.all(), advance, (rows, out))
  last_B1 = jnp.take_along_axis(tokens_BN, rows.position_B[:, None] - 1, axis=1)
  tokens_BN = jnp.where(jnp.arange(shape[1]) < rows.position_B[:, None], tokens_BN, last_B1)
  return Speculated(
      Generated(tokens_BN, rows.position_B, logprobs_BN), rows.passes_B, rows.accepted_BD)


def chooser(key: jax.Array, batch: int, temperature: jax.Array | float, limits: Limits,
            greedy: bool) -> _Choose:
  """Returns a function that chooses tokens with the keys of `generate`."""
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))

  def choose(logits, index):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    chosen = sample_limited(flat(logits), flat(fold(keys_B, index)), temperature, limits, greedy)
    return tuple(x.reshape(index.shape) for x in chosen)

  return choose


def begin(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array,
    max_new_tokens: int, drafts: int, choose: _Choose, stops_K: jax.Array) -> tuple[_Rows, _New]:
  """Reads the prompts with the trunk and the modules, samples a token and drafts the next ones."""
  batch, num_tokens = prompts_BT.shape
  slots, modules = num_tokens + max_new_tokens + 2 * drafts, model.cfg.mtp.depth
  logits_BV, output = prefill(
      model, variables, prompts_BT, lengths_B, init_cache(model.cfg, batch, slots))
  cache = init_cache(model.cfg, batch, slots, layers=modules)
  previous_BTC = output.mtp_input_BTD
  for module in range(1, min(drafts, modules) + 1):
    previous_BTC, _, cache = model.apply(
        variables, previous_BTC, jnp.roll(prompts_BT, -module, axis=1), cache, module=module,
        method="draft")

  token_B1, logprob_B1 = choose(logits_BV[:, None], jnp.zeros((batch, 1), jnp.int32))
  # The window ends with the prompt, followed by positions that hold nothing yet.
  position_BW = (lengths_B - drafts)[:, None] + jnp.arange(2 * drafts)
  at = lambda x, index: jnp.take_along_axis(
      x, jnp.minimum(index, num_tokens - 1).reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
  next_BW = at(prompts_BT, position_BW + 1).at[:, drafts - 1].set(token_B1[:, 0])
  one_B = jnp.ones(batch, jnp.int32)
  rows = _Rows(
      cache=output.cache, position_B=one_B,
      done_B=(token_B1 == stops_K).any(1) | (max_new_tokens == 1),
      passes_B=jnp.zeros(batch, jnp.int32), accepted_BD=jnp.zeros((batch, drafts), jnp.int32),
      **_draft(model, variables, cache, at(output.mtp_input_BTD, position_BW), next_BW,
               lengths_B - drafts, one_B, one_B, choose))
  return rows, _New(token_B1, logprob_B1, one_B)


def step(model: Transformer, variables: dict, rows: _Rows, max_new_tokens: int, choose: _Choose,
         stops_K: jax.Array) -> tuple[_Rows, _New]:
  """Verifies the drafts of every row in one pass of the trunk, and drafts the next ones."""
  drafts, length_B = rows.pending_BP.shape[1] - 1, rows.cache.lengths_B
  offset_P = jnp.arange(drafts + 1)
  output = model.apply(variables, rows.pending_BP, cache=rows.cache, mtp=False)
  token_BP, logprob_BP = choose(output.logits_BTV, rows.position_B[:, None] + offset_P)
  accepted_BD = jnp.cumprod(rows.pending_BP[:, 1:] == token_BP[:, :-1], axis=1, dtype=jnp.int32)
  active_B = ~rows.done_B
  verified_B = jnp.where(active_B, 1 + accepted_BD.sum(1), 0)

  stops_BP = (token_BP[..., None] == stops_K).any(-1) & (offset_P < verified_B[:, None])
  ended_B = stops_BP.any(1)
  count_B = jnp.where(ended_B, stops_BP.argmax(1) + 1, verified_B)
  count_B = jnp.minimum(count_B, max_new_tokens - rows.position_B).astype(jnp.int32)
  rows = rows.replace(
      cache=output.cache.with_lengths(length_B + verified_B),
      position_B=rows.position_B + count_B,
      done_B=rows.done_B | (ended_B & (count_B > stops_BP.argmax(1)))
      | (rows.position_B + count_B == max_new_tokens),
      passes_B=rows.passes_B + active_B,
      accepted_BD=rows.accepted_BD + accepted_BD * active_B[:, None])
  window_BWC = jnp.concatenate([rows.old_BOC, output.mtp_input_BTD], axis=1)
  next_BW = jnp.concatenate([rows.next_BO, token_BP], axis=1)
  rows = rows.replace(**_draft(
      model, variables, rows.drafts, window_BWC, next_BW, length_B - (drafts - 1), verified_B,
      rows.position_B, choose))
  return rows, _New(token_BP, logprob_BP, count_B)


def _draft(model, variables, cache, window_BWC, next_BW, start_B, verified_B, position_B, choose):
  """Runs the modules on a window, and drafts the tokens after its last verified position.

  Args:
    model, variables, choose: as in `step`.
    cache: the modules' cache.
    window_BWC: what the first module reads of the window's positions.
    next_BW: int32, the token after each of them; undefined after the last verified one.
    start_B: int32, the first position of the window.
    verified_B: int32, how many of the last D + 1 positions are verified; 0 for rows that have
      ended, whose drafts have no meaning.
    position_B: int32, the number of new tokens, with the one after the last verified position.

  Returns:
    The fields of `_Rows` that change: the modules' cache, the drafts after the last token, and the
    next window's old positions.
  """
  modules, drafts = model.cfg.mtp.depth, window_BWC.shape[1] // 2
  row_B, width = jnp.arange(len(start_B)), 2 * drafts
  last_B = drafts - 2 + jnp.maximum(verified_B, 1)  # the last verified position in the window
  tokens = jnp.pad(next_BW, ((0, 0), (0, drafts)))  # and the drafts after it, as they are made
  previous, pending = window_BWC, [next_BW[row_B, last_B]]
  for k in range(1, drafts + 1):
    if k <= modules:
      previous, normed, cache = model.apply(
          variables, previous, tokens[:, k - 1:k - 1 + width], cache.with_lengths(start_B),
          module=k, method="draft")
      normed_BC, read_BC = normed[row_B, last_B], previous[row_B, last_B]
    else:  # the only module once more, on its own output, as if the draft were verified
      previous, normed, cache = model.apply(
          variables, read_BC[:, None], pending[-1][:, None],
          cache.with_lengths(start_B + last_B + k - 1), module=modules, method="draft")
      normed_BC, read_BC = normed[:, 0], previous[:, 0]
    logits_B1V = model.apply(variables, normed_BC[:, None], method="unembed")
    draft_B1, _ = choose(logits_B1V, (position_B + k - 1)[:, None])
    pending.append(draft_B1[:, 0])
    tokens = tokens.at[row_B, last_B + k].set(draft_B1[:, 0])
  old_BO = last_B[:, None] - jnp.arange(drafts - 2, -1, -1)
  return {"drafts": cache, "pending_BP": jnp.stack(pending, axis=1),
          "old_BOC": jnp.take_along_axis(window_BWC, old_BO[..., None], axis=1),
          "next_BO": jnp.take_along_axis(next_BW, old_BO, axis=1)}
