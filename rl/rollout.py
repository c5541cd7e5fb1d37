"""Samples many completions in a few slots, which are refilled as sequences end.

The whole rollout is one program on the device. A slot is a row of the decoding engine; when enough
slots are free, the next prompts are read as one batch and put into them. With several devices, each
decodes its own part of the sequences without waiting for the others.

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

from model import Transformer
from model.checks import require
from model.compiling import jit
from model.decoding import engine
from model.decoding.checks import as_cache_dtype, as_stop_tokens
from model.decoding.drafting import check_drafts
from model.decoding.engine import Rows, Sampling, Status
from model.decoding.sampling import Limits
from model.weights import cast_weights

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
    decode_steps: int32, number of forward passes after those of the prompts, on the device that
      needed the most.
    invalid_S: bool, whether the completion ended because the logits of its next token were NaN.
    experts_STLK: int16, the experts to which every token of the prompt and the completion, but for
      the last one, was routed; None if they were not recorded.
  """

  tokens_SN: jax.Array
  lengths_S: jax.Array
  logprobs_SN: jax.Array
  ended_S: jax.Array
  decode_steps: jax.Array
  invalid_S: jax.Array | None = None
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
    slots: int | None = None, record_experts: bool = False, mesh: Mesh | None = None,
    drafts: int = 0, cache_dtype: str | None = None, group: int = 1) -> Rollout:
  """Samples a completion of every prompt.

  The n-th token of a sequence is drawn with the key `fold_in(key, n)`, where `key` is the
  sequence's. It is therefore the same with any number of slots and devices, unless the different
  rounding of another batch shape changes a choice.

  Args:
    model: the network; its MTP modules are used for drafts only.
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
    drafts: tokens that MTP modules draft at a time, as in `model.speculate`; 0 for none.
    cache_dtype: format of the cache, as in `model.generate`.
    group: consecutive sequences that have the same prompt; it is read once for all of them, unless
      there are drafts, or too few slots for sequences of a group to begin together.

  Raises:
    ValueError: for arguments out of range, sequences longer than the model's context, a number of
      sequences that does not divide over the devices, or drafts that the model cannot make.
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
  require(group >= 1 and num_sequences // devices % group == 0,
          f"{num_sequences // devices} sequences of a device do not divide into groups of {group}")
  slots = num_sequences // devices if slots is None else min(slots, num_sequences // devices)
  require(slots >= 1, f"slots={slots} must be positive")
  if drafts:
    check_drafts(model, drafts, prompts.lengths_S)
  sampling = Sampling(
      float(temperature), Limits(float(top_p)), as_stop_tokens(stop_token), int(max_new_tokens),
      greedy=None, nucleus=temperature > 0 and top_p < 1, drafts=int(drafts),
      cache_dtype=as_cache_dtype(cache_dtype))
  if mesh is None:
    return _rollout(model, variables, sampling, prompts, slots, record_experts, group)
  return _rollout_on_mesh(
      mesh, model, variables, sampling, prompts, slots, record_experts, group)


@functools.partial(jit, static_argnames=("mesh", "model", "slots", "record", "group"))
def _rollout_on_mesh(mesh, model, variables, sampling, prompts, slots, record, group):
  replicated, sharded = PartitionSpec(), PartitionSpec(mesh.axis_names)

  def on_one_device(prompts, variables, sampling):
    out = _rollout(model, variables, sampling, prompts, slots, record, group)
    return out._replace(decode_steps=out.decode_steps[None])

  # No output is declared to be replicated, so check_vma has nothing to check.
  out = jax.shard_map(
      on_one_device, mesh=mesh, in_specs=(sharded, replicated, replicated), out_specs=sharded,
      check_vma=False)(prompts, variables, sampling)
  return out._replace(decode_steps=out.decode_steps.max())


class _Slots(NamedTuple):
  """The sequences that are being decoded.

  Attributes:
    rows: those of the engine, one for each slot; a slot is free if its row has ended.
    sequence_B: index of the sequence in each slot; S, the number of sequences, if there was none.
  """

  rows: Rows
  sequence_B: jax.Array


@functools.partial(jit, static_argnames=("model", "slots", "record", "group"))
def _rollout(model, variables, sampling, prompts, slots, record, group):
  variables = cast_weights(model.cfg, variables)
  free, *others = _initial_state(model, sampling, prompts, slots, record)
  *unrolled, rows = engine.unrolled(model, variables, free.rows)
  num_sequences, prompt_tokens = prompts.tokens_SP.shape
  refill = max(1, slots // _REFILLS)
  copies = group if group <= refill and not sampling.drafts else 1
  refill -= refill % copies  # so that whole groups begin together
  longest = prompt_tokens + sampling.max_new_tokens
  running_B = lambda state: state[0].rows.running_B

  def record_experts(out, sequence_B, start_B, count_B, read):
    """Writes the experts of the first `count_B` tokens that were read, from `start_B` on."""
    if not record:
      return out
    experts_BTLK = _experts(read)
    column_BT = engine.columns(start_B, count_B, experts_BTLK.shape[1], longest)
    return out._replace(experts_STLK=out.experts_STLK.at[sequence_B[:, None], column_BT].set(
        experts_BTLK, mode="drop"))

  def refill_slots(state):
    """Reads the next prompts and puts them into free slots."""
    s, out, begun = state
    slot_R = jnp.nonzero(~running_B(state), size=refill, fill_value=slots)[0]
    sequence_R = begun + jnp.arange(refill, dtype=jnp.int32)
    slot_R = jnp.where(sequence_R < num_sequences, slot_R, slots)
    row_R = jnp.minimum(sequence_R, num_sequences - 1)
    length_R = prompts.lengths_S[row_R]
    rows_R, new = engine.begin(
        model, variables, sampling, prompts.tokens_SP[row_R[::copies]], length_R[::copies],
        prompts.keys_S[row_R], slots=prompt_tokens + 2 * sampling.drafts, copies=copies)
    writer_R = jnp.where(slot_R < slots, sequence_R, num_sequences)
    out = _write(out, writer_R, jnp.zeros_like(row_R), new, rows_R)
    out = record_experts(out, writer_R, jnp.zeros_like(row_R), length_R, new.read)
    s = _Slots(engine.insert(s.rows, rows_R, slot_R),
               s.sequence_B.at[slot_R].set(sequence_R, mode="drop"))
    return s, out, begun + (slot_R < slots).sum(dtype=jnp.int32)

  def can_read(state):
    begun = state[2]
    # A full refill's slots must be free, or enough for all prompts left: the last few do not wait.
    needed = jnp.minimum(refill, num_sequences - begun)
    return (begun < num_sequences) & ((~running_B(state)).sum() >= needed)

  def decode(state):
    s, out, begun = state
    rows, new = engine.step(*unrolled, sampling, s.rows)
    out = _write(out, s.sequence_B, s.rows.position_B, new, rows)
    out = out._replace(decode_steps=out.decode_steps + 1)
    start_B = s.rows.cache.lengths_B
    out = record_experts(out, s.sequence_B, start_B, rows.cache.lengths_B - start_B, new.read)
    return _Slots(rows, s.sequence_B), out, begun

  def round_(state):
    state = jax.lax.while_loop(can_read, refill_slots, state)
    return jax.lax.while_loop(
        lambda state: running_B(state).any() & ~can_read(state), decode, state)

  unfinished = lambda state: (state[2] < num_sequences) | running_B(state).any()
  _, out, _ = jax.lax.while_loop(
      unfinished, round_, (free._replace(rows=rows), *others))
  return out


def _write(out, sequence_B, start_B, new, rows) -> Rollout:
  """Returns a rollout with what a pass has added; what lies out of bounds is dropped."""
  where = sequence_B[:, None], engine.columns(
      start_B, new.count_B, new.tokens_BP.shape[1], out.tokens_SN.shape[1])
  put = lambda x, value_B: x.at[sequence_B].set(value_B, mode="drop")
  return out._replace(
      tokens_SN=out.tokens_SN.at[where].set(new.tokens_BP, mode="drop"),
      logprobs_SN=out.logprobs_SN.at[where].set(new.logprobs_BP, mode="drop"),
      lengths_S=put(out.lengths_S, rows.position_B),
      ended_S=put(out.ended_S, rows.status_B == Status.STOP),
      invalid_S=put(out.invalid_S, rows.status_B == Status.INVALID))


def _initial_state(model, sampling, prompts, slots, record):
  """Returns free slots, an empty Rollout, and 0, the number of sequences begun."""
  (num_sequences, prompt_tokens), cfg = prompts.tokens_SP.shape, model.cfg
  shape = (num_sequences, sampling.max_new_tokens)
  # The keys of free slots are not used.
  rows = engine.empty_rows(
      model, sampling, jnp.resize(prompts.keys_S, (slots,)), prompt_tokens)
  experts = None
  if record:
    moe_layers = cfg.num_layers - cfg.num_dense_layers
    experts = jnp.zeros((num_sequences, prompt_tokens + sampling.max_new_tokens, moe_layers,
                         cfg.moe.experts_per_token), jnp.int16)
  out = Rollout(jnp.zeros(shape, jnp.int32), jnp.zeros(num_sequences, jnp.int32),
                jnp.zeros(shape), jnp.zeros(num_sequences, bool), jnp.int32(0),
                jnp.zeros(num_sequences, bool), experts)
  return _Slots(rows, jnp.full(slots, num_sequences, jnp.int32)), out, jnp.int32(0)


def _experts(read) -> jax.Array:
  """Returns the experts that the trunk's routers chose in a forward pass: int16 [B, T, L, K]."""
  return jnp.moveaxis(read.router["moe_layers"].experts_BTK, 0, 2).astype(jnp.int16)
