"""The decoding engine: rows of text that grow by one or several tokens at a time.

`begin` reads prompts and samples the first token of each row; `step` samples the next one or, with
drafts by MTP modules, up to one more than there are drafts; `insert` puts rows that have begun into
places of others that have ended. All three are pure functions, to be called within `jax.jit`: by
loops on the device (`generate`, `speculate`, `rl.rollout`) and by one on the host (`stream`).

One forward pass of the trunk over a row's last token and its drafts yields the tokens that follow
them. A draft and its verification choose with the same random key, so that the noise, too, is the
same (shared Gumbel noise): a draft is accepted if it is exactly the token that is sampled there
without drafts, whatever the temperature. In exact arithmetic the tokens are therefore the same with
any number of drafts; rounding differs, as it does between any two shapes of a batch.

Shape letters:  B rows  R rows that are inserted  T prompt tokens  V vocabulary  D drafts, or 0
                P = D + 1 tokens that are read at once  K stop tokens
"""

import enum
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.decoding import checks, drafting
from model.decoding.cache import Cache, init_cache
from model.decoding.sampling import Limits, sample_token
from model.transformer import Output, Transformer
from pallas_kernels.targets import target

# Parameters of networks whose layers `unrolled` takes apart.
_UNROLLED = 2**24, 2**32


class Status(enum.IntEnum):
  """Whether a row grows, or why it has ended.

  Attributes:
    RUNNING: it grows.
    LENGTH: it has `max_new_tokens` new tokens.
    STOP: its last token is a stop token.
    INVALID: the logits of its next token are NaN.
  """

  RUNNING = 0
  LENGTH = 1
  STOP = 2
  INVALID = 3


@flax.struct.dataclass
class Sampling:
  """How rows are sampled.

  Attributes:
    temperature, limits: as in `sampling.sample_token`.
    stops_K: int32, ids of the tokens that end a row.
    max_new_tokens: the number of new tokens after which a row ends otherwise.
    greedy: whether the most likely token is taken; None to do so if the temperature is 0, in a
      program that does both.
    nucleus: whether the limits apply.
    drafts: D, tokens that MTP modules draft at a time.
    cache_dtype: format of the caches' entries; see `init_cache`.
    chunk: prompt tokens of a row that are read at a time; None for all.
  """

  temperature: jax.Array | float
  limits: Limits
  stops_K: jax.Array
  max_new_tokens: int = flax.struct.field(pytree_node=False)
  greedy: bool | None = flax.struct.field(pytree_node=False)
  nucleus: bool = flax.struct.field(pytree_node=False, default=True)
  drafts: int = flax.struct.field(pytree_node=False, default=0)
  cache_dtype: str | None = flax.struct.field(pytree_node=False, default=None)
  chunk: int | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Rows:
  """Rows between two passes of the trunk.

  Attributes:
    cache: of the trunk, with all tokens of each row but the last one.
    keys_B: a jax.random key for each row. Its new token i is chosen with `fold_in(key, i)`.
    pending_BP: int32, the last token, and the drafts after it.
    position_B: int32, the number of new tokens.
    status_B: int8, a `Status`.
    drafter: what the drafts need; None without drafts.
    passes_B: int32, passes of the trunk while the row was running, after that of its prompt.
    accepted_BD: int32, in how many of them the first d + 1 drafts were all accepted.
  """

  cache: Cache
  keys_B: jax.Array
  pending_BP: jax.Array
  position_B: jax.Array
  status_B: jax.Array
  drafter: drafting.Drafter | None
  passes_B: jax.Array
  accepted_BD: jax.Array

  @property
  def running_B(self) -> jax.Array:
    return self.status_B == Status.RUNNING


class New(NamedTuple):
  """What a pass adds to each row.

  Attributes:
    tokens_BP: int32, of which the first `count_B` are new; P is 1 for `begin`.
    logprobs_BP: float32, their log-probabilities in nats, as sampled.
    count_B: int32; 0 for rows that had ended.
    read: what the trunk returned: of the prompt, or of the tokens that were pending.
  """

  tokens_BP: jax.Array
  logprobs_BP: jax.Array
  count_B: jax.Array
  read: Output


def row_keys(key: jax.Array, batch: int) -> jax.Array:
  """Returns a key for each row, which depends neither on the other rows nor on the devices."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def columns(start_B: jax.Array, count_B: jax.Array, num: int, width: int) -> jax.Array:
  """Returns where to write the first `count_B` of `num` new columns of each row, int32 [B, num].

  Args:
    start_B: int32, the first column that each row has not yet.
    count_B: int32, the new columns of each row.
    num: the columns that there are for every row.
    width: of the array that is written; it stands for the others of them, as it is out of bounds.
  """
  offset = jnp.arange(num)
  return jnp.where(offset < count_B[:, None], start_B[:, None] + offset, width)


def num_slots(num_tokens: int, sampling: Sampling) -> int:
  """Returns the slots that a cache needs for prompts of `num_tokens` and all that follows."""
  return num_tokens + sampling.max_new_tokens + 2 * sampling.drafts


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
  return _read(model, variables, prompts_BT, lengths_B, cache)


def _read(model, variables, prompts_BT, lengths_B, cache):
  """Does what `prefill` does, without its checks."""
  # Attention multiplies what it does not attend to by 0, which leaves NaN: padding is made of a
  # token of the row itself, so that no other token's embedding can spoil the row.
  inside_BT = jnp.arange(prompts_BT.shape[1]) < lengths_B[:, None]
  prompts_BT = jnp.where(inside_BT, prompts_BT, prompts_BT[:, :1])
  output = model.apply(variables, prompts_BT, cache=cache, logits=False)
  last_B1D = jnp.take_along_axis(output.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)
  logits_BV = model.apply(variables, last_B1D, method="unembed")[:, 0]
  return logits_BV, output.replace(
      cache=output.cache.with_lengths(cache.lengths_B + lengths_B))


def prefill_in_chunks(
    model: Transformer, variables: dict, prompts_BT: jax.Array, lengths_B: jax.Array, cache: Cache,
    chunk: int) -> tuple[jax.Array, Output]:
  """Does what `prefill` does, reading a number of tokens at a time, which takes less memory.

  Args:
    model, variables, prompts_BT, lengths_B, cache: as in `prefill`.
    chunk: tokens of a row that are read at a time.

  Returns:
    What `prefill` returns; what a pass returned besides its cache is that of the last chunk.
  """
  prompts_BT, lengths_B = checks.as_prompts(model.cfg, prompts_BT, lengths_B)
  checks.check_room(cache, lengths_B)
  num_tokens = prompts_BT.shape[1]
  chunk = min(chunk, num_tokens)
  count = -(-num_tokens // chunk)
  padding = [(0, 0), (0, count * chunk - num_tokens)]
  chunks_CBP = jnp.moveaxis(
      jnp.pad(prompts_BT, padding).reshape(len(prompts_BT), count, chunk), 1, 0)

  def read(cache, index, prompts_BP):
    # A row that has ended reads its first token again, which is not kept.
    left_B = lengths_B - index * chunk
    first_B1 = prompts_BT[:, :1]
    logits_BV, output = _read(
        model, variables, jnp.where(left_B[:, None] > 0, prompts_BP, first_B1),
        jnp.clip(left_B, 1, chunk), cache)
    kept_B = cache.lengths_B + jnp.clip(left_B, 0, chunk)
    return logits_BV, output.replace(cache=output.cache.with_lengths(kept_B))

  def one(state, chunk_of):
    cache, logits_BV = state
    index, prompts_BP = chunk_of
    new_BV, output = read(cache, index, prompts_BP)
    return (output.cache, jnp.where((lengths_B > index * chunk)[:, None], new_BV, logits_BV)), None

  start = cache, jnp.zeros((len(prompts_BT), model.cfg.vocab_size), jnp.float32)
  (cache, logits_BV), _ = jax.lax.scan(
      one, start, (jnp.arange(count - 1, dtype=jnp.int32), chunks_CBP[:-1]))
  new_BV, output = read(cache, jnp.int32(count - 1), chunks_CBP[-1])
  return jnp.where((lengths_B > (count - 1) * chunk)[:, None], new_BV, logits_BV), output


def fork(cache: Cache, row_B: jax.Array, slots: int) -> Cache:
  """Returns a cache of other rows, each a copy of one of these: of a prefix that several share.

  Args:
    cache: the cache, with no more than `slots` slots.
    row_B: int32, the row that each new one copies.
    slots: of the new cache.
  """
  rest = slots - cache.num_slots
  copied = lambda x: jnp.pad(
      x[:, row_B], [(0, 0), (0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 3))
  return Cache(cache.lengths_B[row_B], jax.tree.map(copied, cache.entries))


def begin(
    model: Transformer, variables: dict, sampling: Sampling, prompts_BT: jax.Array,
    lengths_B: jax.Array, keys_B: jax.Array, slots: int | None = None,
    prefix: Cache | None = None, copies: int = 1) -> tuple[Rows, New]:
  """Reads prompts, samples a token after each and drafts the next ones.

  Args:
    model, variables: the network; with drafts, one with MTP modules.
    sampling: how to sample.
    prompts_BT: int32, token ids; those past a prompt's length are ignored.
    lengths_B: int32, the prompts' lengths: at least 1 and at least D.
    keys_B: a jax.random key for each row; with copies, for each copy of each prompt.
    slots: of the caches; None for as many as `step` may need. Rows that are only inserted into
      others need T + 2 D.
    prefix: a cache with the tokens before each prompt and room for all that follow (`fork`); None
      if there are none. It cannot be used with drafts.
    copies: rows that continue each prompt, which is read once for them; with drafts 1.
  """
  batch, num_tokens = prompts_BT.shape
  slots = num_slots(num_tokens, sampling) if slots is None else slots
  if sampling.drafts and (prefix is not None or copies > 1 or sampling.chunk):
    raise ValueError("MTP modules read whole prompts of their own rows: leave drafts out, or the "
                     "prefix, copies and chunks")
  if prefix is None:
    prefix = init_cache(model.cfg, batch, slots, sampling.cache_dtype)
  read_prompts = prefill if sampling.chunk is None else functools.partial(
      prefill_in_chunks, chunk=sampling.chunk)
  logits_BV, read = read_prompts(model, variables, prompts_BT, lengths_B, prefix)
  if copies > 1:
    prompt_B = jnp.repeat(jnp.arange(batch), copies)
    logits_BV, read = logits_BV[prompt_B], _copied(read, prompt_B)
  zero_B = jnp.zeros(batch * copies, jnp.int32)
  choose = _chooser(sampling, keys_B)
  token_B1, logprob_B1 = choose(logits_BV[:, None], zero_B[:, None])
  count_B, status_B = _ends(sampling, token_B1, logprob_B1, zero_B + 1, zero_B)
  drafts_BD, drafter = jnp.zeros((len(zero_B), 0), jnp.int32), None
  if sampling.drafts:
    drafts_BD, drafter = drafting.read_prompts(
        model, variables, prompts_BT, lengths_B, read, token_B1[:, 0], slots, sampling.drafts,
        choose, sampling.cache_dtype)
  rows = Rows(
      cache=read.cache, keys_B=keys_B, pending_BP=jnp.concatenate([token_B1, drafts_BD], axis=1),
      position_B=count_B, status_B=status_B, drafter=drafter, passes_B=zero_B,
      accepted_BD=jnp.zeros((len(zero_B), sampling.drafts), jnp.int32))
  return rows, New(token_B1, logprob_B1, count_B, read)


def _copied(read: Output, row_B: jax.Array) -> Output:
  """Returns what a pass over prompts returned, with a copy of a row in the place of each."""
  return read.replace(
      hidden_BTD=read.hidden_BTD[row_B],
      mtp_input_BTD=None if read.mtp_input_BTD is None else read.mtp_input_BTD[row_B],
      router=jax.tree.map(lambda x: x[:, row_B], read.router),  # of each layer
      cache=fork(read.cache, row_B, read.cache.num_slots))


def step(
    model: Transformer, variables: dict, sampling: Sampling, rows: Rows) -> tuple[Rows, New]:
  """Reads the pending tokens of every row in one pass, and samples the tokens that follow.

  Rows that have ended stay as they are.
  """
  length_B, active_B = rows.cache.lengths_B, rows.running_B
  choose = _chooser(sampling, rows.keys_B)
  read = model.apply(variables, rows.pending_BP, cache=rows.cache, mtp=False)
  index_BP = rows.position_B[:, None] + jnp.arange(sampling.drafts + 1)
  token_BP, logprob_BP = choose(read.logits_BTV, index_BP)
  accepted_BD = jnp.cumprod(rows.pending_BP[:, 1:] == token_BP[:, :-1], axis=1, dtype=jnp.int32)
  verified_B = jnp.where(active_B, 1 + accepted_BD.sum(1), 0)
  count_B, status_B = _ends(sampling, token_BP, logprob_BP, verified_B, rows.position_B)
  position_B = rows.position_B + count_B
  last_B1 = jnp.take_along_axis(token_BP, jnp.maximum(verified_B[:, None] - 1, 0), axis=1)
  drafts_BD, drafter = rows.pending_BP[:, 1:], None
  if sampling.drafts:
    drafts_BD, drafter = drafting.read_verified(
        model, variables, rows.drafter, read, token_BP, length_B, verified_B, position_B, choose)
  rows = rows.replace(
      cache=read.cache.with_lengths(length_B + verified_B),
      pending_BP=jnp.concatenate([last_B1, drafts_BD], axis=1), position_B=position_B,
      status_B=jnp.where(active_B, status_B, rows.status_B), drafter=drafter,
      passes_B=rows.passes_B + active_B,
      accepted_BD=rows.accepted_BD + accepted_BD * active_B[:, None])
  return rows, New(token_BP, logprob_BP, count_B, read)


def unrolled(
    model: Transformer, variables: dict, rows: Rows) -> tuple[Transformer, dict, Rows]:
  """Returns a network, its variables and rows for `step`: on GPUs, without a loop over layers.

  In a loop, every pass would copy each layer's part of the cache out of that of all layers. A small
  network is compiled faster with a loop, and in a large one such copies take little of the time.
  """
  if not _unrolls(model.cfg):
    return model, variables, rows
  model = model.clone(unroll=max(2, model.cfg.num_layers))
  return (model, variables | {"params": model.by_layer(variables["params"])},
          rows.replace(cache=rows.cache.apart()))


def _unrolls(cfg: ModelConfig) -> bool:
  return target().platform == "gpu" and _UNROLLED[0] <= cfg.param_count() <= _UNROLLED[1]


def insert(rows: Rows, begun: Rows, place_R: jax.Array) -> Rows:
  """Returns rows with others in the place of some of them.

  Args:
    rows: B rows, whose caches have at least as many slots as those of `begun`.
    begun: R rows, as `begin` returns them.
    place_R: int32, the row whose place each takes; one of B or more is left out.
  """
  put = lambda x, new: x.at[place_R].set(new, mode="drop")

  def put_cache(cache: Cache, new: Cache) -> Cache:
    # All slots, as attention multiplies what an ended row may have left by 0: NaN would stay.
    rest = [(0, 0), (0, 0), (0, cache.num_slots - new.num_slots)]
    entries = jax.tree.map(
        lambda whole, part: whole.at[:, place_R].set(
            jnp.pad(part, rest + [(0, 0)] * (whole.ndim - 3)), mode="drop"),
        cache.entries, (new.apart() if cache.is_apart else new).entries)
    return Cache(put(cache.lengths_B, new.lengths_B), entries)

  drafter = begun.drafter
  if drafter is not None:
    drafter = drafting.Drafter(
        put_cache(rows.drafter.cache, drafter.cache),
        put(rows.drafter.old_BOC, drafter.old_BOC), put(rows.drafter.next_BO, drafter.next_BO))
  names = ("keys_B", "pending_BP", "position_B", "status_B", "passes_B", "accepted_BD")
  return rows.replace(
      cache=put_cache(rows.cache, begun.cache), drafter=drafter,
      **{name: put(getattr(rows, name), getattr(begun, name)) for name in names})


def empty_rows(
    model: Transformer, sampling: Sampling, keys_B: jax.Array, num_tokens: int) -> Rows:
  """Returns rows that have all ended, to insert others of up to `num_tokens` prompt tokens."""
  batch, slots = len(keys_B), num_slots(num_tokens, sampling)
  drafter = None
  if sampling.drafts:
    old = (batch, sampling.drafts - 1)
    drafter = drafting.Drafter(
        init_cache(model.cfg, batch, slots, sampling.cache_dtype, layers=model.cfg.mtp.depth),
        jnp.zeros((*old, model.cfg.d_model), model.cfg.numerics.compute_dtype),
        jnp.zeros(old, jnp.int32))
  zero_B = jnp.zeros(batch, jnp.int32)
  return Rows(
      init_cache(model.cfg, batch, slots, sampling.cache_dtype), keys_B,
      jnp.zeros((batch, sampling.drafts + 1), jnp.int32), zero_B,
      jnp.full(batch, Status.LENGTH, jnp.int8), drafter, zero_B,
      jnp.zeros((batch, sampling.drafts), jnp.int32))


def _chooser(sampling: Sampling, keys_B: jax.Array) -> drafting.Choose:
  """Returns a function that chooses the new tokens of these indices with the rows' keys."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  greedy = sampling.greedy
  if greedy is None:
    greedy = jnp.equal(sampling.temperature, 0)

  def choose(logits, index):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    limits = sampling.limits
    chosen = sample_token(
        flat(logits), flat(fold(keys_B, index)), sampling.temperature, limits.top_p, greedy,
        sampling.nucleus, limits.top_k, limits.min_p)
    return tuple(x.reshape(index.shape) for x in chosen)

  return choose


def _ends(sampling: Sampling, token_BP: jax.Array, logprob_BP: jax.Array, verified_B: jax.Array,
          position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns how many of the verified tokens each row takes, and its status afterwards.

  A row ends with the first stop token, before the first token whose logits are invalid, or at its
  largest number of tokens.
  """
  verified_BP = jnp.arange(token_BP.shape[1]) < verified_B[:, None]
  stop_BP = (token_BP[..., None] == sampling.stops_K).any(-1) & verified_BP
  invalid_BP = jnp.isnan(logprob_BP) & verified_BP
  none = token_BP.shape[1] + 1
  first = lambda x_BP: jnp.where(x_BP.any(1), x_BP.argmax(1), none)
  left_B = sampling.max_new_tokens - position_B
  taken_B = jnp.minimum(jnp.minimum(verified_B, left_B), first(invalid_BP))
  stops_B = first(stop_BP) < taken_B
  count_B = jnp.where(stops_B, first(stop_BP) + 1, taken_B).astype(jnp.int32)
  status_B = jnp.select(
      [stops_B, count_B == left_B, first(invalid_BP) == count_B],
      [jnp.int8(Status.STOP), jnp.int8(Status.LENGTH), jnp.int8(Status.INVALID)],
      jnp.int8(Status.RUNNING))
  return count_B, status_B
