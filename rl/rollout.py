"""Samples many completions in a few slots, which are refilled as sequences end.

The whole rollout is one program on the device. A slot is a row of the latent cache; when enough
slots are free, the next prompts are prefilled as one batch and put into them. With several devices,
each decodes its own part of the sequences without waiting for the others.

Shape letters:  S sequences  B slots  R slots refilled at once  P prompt tokens  N new tokens
                V vocabulary  T prompt and new tokens  L MoE layers  K experts per token; of
                stops_K, stop tokens
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from model import Cache, Transformer, init_cache
from model.checks import require
from model.compiling import jit
from model.decoding.checks import as_stop_tokens
from model.decoding.generate import prefill, sample_token

_REFILLS = 8  # slots are refilled when one in this many is free


class Prompts(NamedTuple):
  """Prompts to complete; a prompt is repeated for each of its samples.

  Attributes:
    tokens_SP: int32 token ids, padded on the right.
    lengths_S: int32 lengths in tokens, in 1..P.
    keys_S: a jax.random key for each sequence, from `sequence_keys`.
  """

  tokens_SP: jax.Array
  lengths_S: jax.Array
  keys_S: jax.Array


class Rollout(NamedTuple):
  """The completions sampled.

  Attributes:
    tokens_SN: int32 token ids, up to and including the stop token; undefined after it.
    lengths_S: int32 lengths of the completions in tokens, the stop token included.
    logprobs_SN: float32 log-probabilities in nats, under the distribution sampled from; 0 after the
      completion's end.
    ended_S: bool, whether the stop token was sampled; otherwise the completion was truncated.
    decode_steps: int32, number of forward passes of one token per slot, on the device that needed
      the most.
    experts_STLK: int16, the experts to which every token of the prompt and the completion, but for
      the last one, was routed; None if they were not recorded.
  """

  tokens_SN: jax.Array
  lengths_S: jax.Array
  logprobs_SN: jax.Array
  ended_S: jax.Array
  decode_steps: jax.Array
  experts_STLK: jax.Array | None = None

  @property
  def mask_SN(self) -> jax.Array:
    """Bool, True at the tokens that were sampled."""
    return jnp.arange(self.tokens_SN.shape[1]) < self.lengths_S[:, None]


@functools.partial(jax.jit, static_argnames="seed")
def sequence_keys(seed: int, step, prompts_S: jax.Array, samples_S: jax.Array) -> jax.Array:
  """Returns a random key for every sequence, independent of rows, batches and devices.

  Args:
    seed: the run's seed.
    step: the run's step.
    prompts_S: an integer that identifies each sequence's prompt.
    samples_S: the index of each sequence among its prompt's samples.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  fold = jax.vmap(lambda prompt, sample: jax.random.fold_in(
      jax.random.fold_in(key, prompt), sample))
  return fold(prompts_S, samples_S)


def pad_prompts(prompts: list[np.ndarray], max_length: int, keys_S: jax.Array) -> Prompts:
  """Pads prompts on the right, with zeros, into one array.

  Args:
    prompts: token ids of each prompt.
    max_length: P, the length to pad to.
    keys_S: a random key for each prompt, see `sequence_keys`.

  Raises:
    ValueError: if there are no prompts, or one is empty or longer than `max_length`.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  require(len(lengths) > 0, "there is no prompt to complete: give at least one")
  require(lengths.min() > 0, f"prompt {lengths.argmin()} is empty: it needs at least one token")
  require(lengths.max() <= max_length,
          f"prompt {lengths.argmax()} has {lengths.max()} tokens, more than the {max_length} "
          "allowed: raise max_prompt_length, or leave this prompt out")
  tokens = np.zeros((len(prompts), max_length), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:len(prompt)] = prompt
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), keys_S)


def rollout(
    model: Transformer, variables: dict, prompts: Prompts, *, max_new_tokens: int,
    stop_token: int | Sequence[int] | None, temperature: float = 1.0, top_p: float = 1.0,
    slots: int | None = None, record_experts: bool = False, mesh: Mesh | None = None) -> Rollout:
  """Samples a completion of every prompt.

  The n-th token of a sequence is drawn with the key `fold_in(key, n)`, where `key` is the
  sequence's. It is therefore the same with any number of slots and devices, unless the different
  rounding of another batch shape changes a choice.

  Args:
    model: the network; its MTP modules are not used.
    variables: the network's variables.
    prompts: prompts to complete, see `pad_prompts`.
    max_new_tokens: tokens after which a completion is truncated.
    stop_token: id of the token that ends a completion and is part of it, or ids of several; None
      for none.
    temperature: sampling temperature; at 0 the most likely token is taken.
    top_p: probability mass of nucleus sampling, in (0, 1].
    slots: sequences that each device decodes at a time; None for all of its sequences.
    record_experts: whether to return the routers' choices.
    mesh: devices over which the sequences are divided, in order. The variables are replicated to
      all of them. None for the single device that holds the variables.

  Raises:
    ValueError: for arguments out of range, sequences longer than the model's context, or a number
      of sequences that does not divide over the devices.
  """
  require(temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 1,
          "rollout needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, not "
          f"{temperature}, {top_p} and {max_new_tokens}")
  longest = prompts.tokens_SP.shape[1] + max_new_tokens
  require(longest <= model.cfg.max_seq_len,
          f"prompts of {prompts.tokens_SP.shape[1]} and completions of {max_new_tokens} tokens are "
          f"longer than the model's context of {model.cfg.max_seq_len}: lower a limit, or raise "
          "max_seq_len")
  num_sequences, devices = len(prompts.lengths_S), 1 if mesh is None else mesh.size
  require(num_sequences % devices == 0,
          f"{num_sequences} sequences do not divide over {devices} devices: sample a multiple of "
          "the number of devices")
  slots = num_sequences // devices if slots is None else min(slots, num_sequences // devices)
  require(slots >= 1, f"slots={slots} must be positive")
  stops_K = as_stop_tokens(stop_token)
  static = (max_new_tokens, slots, temperature > 0 and top_p < 1, record_experts)
  temperature, top_p = float(temperature), float(top_p)
  if mesh is None:
    return _rollout(model, variables, prompts, temperature, top_p, stops_K, *static)
  return _rollout_on_mesh(mesh, model, variables, prompts, temperature, top_p, stops_K, static)


@functools.partial(jit, static_argnames=("mesh", "model", "static"))
def _rollout_on_mesh(mesh, model, variables, prompts, temperature, top_p, stops_K, static):
  replicated, sharded = PartitionSpec(), PartitionSpec(mesh.axis_names)

  def on_one_device(prompts, *args):
    out = _rollout(model, args[0], prompts, *args[1:], *static)
    return out._replace(decode_steps=out.decode_steps[None])

  # No output is declared to be replicated, so check_vma has nothing to check.
  out = jax.shard_map(
      on_one_device, mesh=mesh, in_specs=(sharded, *[replicated] * 4), out_specs=sharded,
      check_vma=False)(prompts, variables, temperature, top_p, stops_K)
  return out._replace(decode_steps=out.decode_steps.max())


class _Slots(NamedTuple):
  """The sequences that are being decoded.

  Attributes:
    cache: the latent cache, one row per slot.
    logits_BV: logits of each slot's next token.
    sequence_B: index of the sequence in each slot; S, the number of sequences, for a free slot.
    position_B: number of new tokens in each slot so far.
  """

  cache: Cache
  logits_BV: jax.Array
  sequence_B: jax.Array
  position_B: jax.Array


@functools.partial(jit, static_argnames=(
    "model", "max_new_tokens", "slots", "nucleus", "record"))
def _rollout(model, variables, prompts, temperature, top_p, stops_K, max_new_tokens, slots,
             nucleus, record):
  num_sequences, prompt_tokens = prompts.tokens_SP.shape
  refill = max(1, slots // _REFILLS)
  free_B = lambda s: s.sequence_B == num_sequences

  def refill_slots(state):
    """Prefills the next prompts and puts them into free slots."""
    s, out, begun = state
    slot_R = jnp.nonzero(free_B(s), size=refill, fill_value=slots)[0]
    sequence_R = begun + jnp.arange(refill, dtype=jnp.int32)
    slot_R = jnp.where(sequence_R < num_sequences, slot_R, slots)
    row_R = jnp.minimum(sequence_R, num_sequences - 1)
    logits_RV, read = prefill(
        model, variables, prompts.tokens_SP[row_R], prompts.lengths_S[row_R],
        init_cache(model.cfg, refill, prompt_tokens))
    put = lambda x, new: x.at[slot_R].set(new, mode="drop")
    entries = {name: whole.at[:, slot_R, :prompt_tokens].set(read.cache.entries[name], mode="drop")
               for name, whole in s.cache.entries.items()}
    cache = Cache(put(s.cache.lengths_B, read.cache.lengths_B), entries)
    if record:
      reader_R = jnp.where(slot_R < slots, sequence_R, num_sequences)
      out = out._replace(experts_STLK=out.experts_STLK.at[reader_R, :prompt_tokens].set(
          _experts(read), mode="drop"))
    s = _Slots(cache, put(s.logits_BV, logits_RV), put(s.sequence_B, sequence_R),
               put(s.position_B, 0))
    return s, out, begun + (slot_R < slots).sum(dtype=jnp.int32)

  def can_read(state):
    s, _, begun = state
    # A full refill's slots must be free, or enough for all prompts left: the last few do not wait.
    needed = jnp.minimum(refill, num_sequences - begun)
    return (begun < num_sequences) & (free_B(s).sum() >= needed)

  def decode(state):
    s, out, begun = state
    active_B = ~free_B(s)
    row_B = jnp.minimum(s.sequence_B, num_sequences - 1)
    keys_B = jax.vmap(jax.random.fold_in)(prompts.keys_S[row_B], s.position_B)
    token_B, logp_B = sample_token(
        s.logits_BV, keys_B, temperature, top_p, temperature == 0, nucleus)
    where = (s.sequence_B, s.position_B)  # out of bounds, and so dropped, for a free slot
    position_B = s.position_B + active_B
    stopped_B = (token_B[:, None] == stops_K).any(1)
    out = Rollout(
        out.tokens_SN.at[where].set(token_B, mode="drop"),
        out.lengths_S.at[s.sequence_B].set(position_B, mode="drop"),
        out.logprobs_SN.at[where].set(logp_B, mode="drop"),
        out.ended_S.at[s.sequence_B].set(stopped_B, mode="drop"), out.decode_steps + 1,
        out.experts_STLK)
    read = model.apply(variables, token_B[:, None], cache=s.cache)
    if record:
      out = out._replace(experts_STLK=out.experts_STLK.at[s.sequence_B, s.cache.lengths_B].set(
          _experts(read)[:, 0], mode="drop"))
    logits_BV = read.logits_BTV[:, 0]
    cache = read.cache.with_lengths(
        jnp.where(active_B, read.cache.lengths_B, s.cache.lengths_B))
    done_B = stopped_B | (position_B == max_new_tokens)
    sequence_B = jnp.where(done_B, num_sequences, s.sequence_B)
    return _Slots(cache, logits_BV, sequence_B, position_B), out, begun

  def round_(state):
    state = jax.lax.while_loop(can_read, refill_slots, state)
    return jax.lax.while_loop(
        lambda state: ~free_B(state[0]).all() & ~can_read(state), decode, state)

  unfinished = lambda state: (state[2] < num_sequences) | ~free_B(state[0]).all()
  _, out, _ = jax.lax.while_loop(
      unfinished, round_, _initial_state(model.cfg, prompts, max_new_tokens, slots, record))
  return out


def _initial_state(cfg, prompts, max_new_tokens, slots, record):
  """Returns free slots, an empty Rollout, and 0, the number of sequences begun."""
  num_sequences, prompt_tokens = prompts.tokens_SP.shape
  longest, shape = prompt_tokens + max_new_tokens, (num_sequences, max_new_tokens)
  s = _Slots(init_cache(cfg, slots, longest), jnp.zeros((slots, cfg.vocab_size)),
             jnp.full(slots, num_sequences, jnp.int32), jnp.zeros(slots, jnp.int32))
  experts = None
  if record:
    moe_layers = cfg.num_layers - cfg.num_dense_layers
    experts = jnp.zeros(
        (num_sequences, longest, moe_layers, cfg.moe.experts_per_token), jnp.int16)
  out = Rollout(jnp.zeros(shape, jnp.int32), jnp.zeros(num_sequences, jnp.int32),
                jnp.zeros(shape), jnp.zeros(num_sequences, bool), jnp.int32(0), experts)
  return s, out, jnp.int32(0)


def _experts(read) -> jax.Array:
  """Returns the experts that the trunk's routers chose in a forward pass: int16 [B, T, L, K]."""
  return jnp.moveaxis(read.router["moe_layers"].experts_BTK, 0, 2).astype(jnp.int16)
