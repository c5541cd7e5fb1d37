"""Completions depend on the prompt and its key only, not on slots, rows or other sequences.

Shape letters:  S sequences  P prompt tokens  N new tokens  T tokens of both  V vocabulary
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.decoding import engine
from rl.rollout import Prompts, Rollout, pad_prompts, rollout, sequence_keys
from rl.step import experience, sequence_logprobs
from tests.train import small as train_small

MLA = dataclasses.replace(
    tiny.V3, num_layers=1, num_dense_layers=0, mtp=None, max_seq_len=16)
DENSE = dataclasses.replace(train_small.DENSE, mtp=None, max_seq_len=16)
STOP, PROMPT, NEW, SEQUENCES = 0, 5, 10, 160
TEMPERATURE = 0.7
# Logits of order 1 are sums of a few dozen float32 terms, a few layers deep, in an order that
# depends on the batch's shape; the temperature enlarges their error.
LOGIT_ERROR = 2e-5


@functools.cache
def prompts(count=SEQUENCES) -> Prompts:
  """Returns prompts of one to five tokens, with the keys that `model.generate` gives its rows."""
  rng = np.random.default_rng(0)
  rows = [rng.integers(1, MLA.vocab_size, 1 + i % PROMPT) for i in range(count)]
  keys_S = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(count))
  return pad_prompts(rows, PROMPT, keys_S)


def roll(cfg, given: Prompts, slots=None, temperature=TEMPERATURE, top_p=1.0,
         stop=STOP) -> Rollout:
  return jax.tree.map(np.asarray, rollout(
      model.Transformer(cfg), tiny.variables(cfg), given, max_new_tokens=NEW, stop_token=stop,
      temperature=temperature, top_p=top_p, slots=slots))


@functools.cache
def at_once(temperature=TEMPERATURE) -> Rollout:
  return roll(MLA, prompts(), temperature=temperature)


@functools.cache
def in_20_slots() -> Rollout:
  return roll(MLA, prompts(), slots=20)


def to_experience(given: Prompts, out: Rollout):
  rows = [row[:length] for row, length in zip(
      np.asarray(given.tokens_SP), given.lengths_S, strict=True)]
  count = len(rows)
  return experience(rows, out.tokens_SN, out.lengths_S, out.logprobs_SN, np.zeros(count),
                    np.ones(count, bool), multiple=PROMPT + NEW)


def next_logits(cfg, given: Prompts, out: Rollout) -> np.ndarray:
  """Returns the trainer's logits [S, N, V] for the new tokens, from a pass over whole sequences."""
  sampled = to_experience(given, out)
  logits_STV = np.asarray(tiny.apply(cfg)(tiny.variables(cfg), sampled.tokens[:, :-1]).logits_BTV)
  position_SN = np.asarray(given.lengths_S)[:, None] - 1 + np.arange(NEW)
  return np.take_along_axis(logits_STV, position_SN[..., None], axis=1)


@jax.jit
def noise(keys_S):
  """Returns the noise [S, N, V] that `jax.random.categorical` adds to the new tokens' logits."""
  one = lambda key, n: jax.random.gumbel(jax.random.fold_in(key, n), (MLA.vocab_size,))
  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys_S, jnp.arange(NEW))


def margins(cfg, given: Prompts, out: Rollout, temperature=TEMPERATURE):
  """Returns the trainer's choice of each new token under the same noise, and its lead, [S, N].

  The lead is the difference to the second largest logit with noise.
  """
  perturbed_SNV = next_logits(cfg, given, out) / temperature + np.asarray(noise(given.keys_S))
  second, first = np.moveaxis(np.sort(perturbed_SNV, axis=-1)[..., -2:], -1, 0)
  return perturbed_SNV.argmax(-1), first - second


def check_same(given: Prompts, a: Rollout, b: Rollout, cfg=MLA, error=LOGIT_ERROR) -> int:
  """Counts rows that differ; asserts that each first does where its lead is within the error."""
  _, lead_SN = margins(cfg, given, a)
  differ_SN = a.mask_SN & (a.tokens_SN != b.tokens_SN)
  rows = np.flatnonzero(differ_SN.any(1))
  for row in rows:
    assert lead_SN[row, differ_SN[row].argmax()] < 2 * error / TEMPERATURE
  same = np.setdiff1d(np.arange(len(differ_SN)), rows)
  np.testing.assert_array_equal(a.lengths_S[same], b.lengths_S[same])
  np.testing.assert_array_equal(a.ended_S[same], b.ended_S[same])
  np.testing.assert_allclose(
      a.logprobs_SN[same], b.logprobs_SN[same], rtol=0, atol=2 * error / TEMPERATURE)
  return len(rows)


def test_refilled_slots_give_the_same_completions_as_one_slot_per_sequence():
  differing = check_same(prompts(), at_once(), in_20_slots())
  print(f"{differing} of {SEQUENCES} completions differ")
  assert differing <= 2


def test_slots_are_refilled_without_a_loop_over_layers_too(monkeypatch):
  monkeypatch.setattr(engine, "_unrolls", lambda cfg: True)
  jax.clear_caches()
  apart = roll(MLA, prompts(), slots=20)
  jax.clear_caches()
  assert check_same(prompts(), in_20_slots(), apart) <= 2


@pytest.mark.parametrize("slots", [None, 24, 6])
@pytest.mark.parametrize("record", [False, True])
def test_the_prompt_of_a_group_is_read_once(monkeypatch, slots, record):
  cfg = dataclasses.replace(tiny.V3, mtp=None, num_layers=2) if record else MLA
  given, group = prompts(24), 3
  first = np.arange(24) // group * group
  given = given._replace(tokens_SP=given.tokens_SP[first], lengths_S=given.lengths_S[first])
  read, begin = [], engine.begin

  def counting(*args, **kwargs):
    read.append(args[3].shape[0])
    return begin(*args, **kwargs)

  monkeypatch.setattr(engine, "begin", counting)
  ask = lambda **how: jax.tree.map(np.asarray, rollout(
      model.Transformer(cfg), tiny.variables(cfg), given, max_new_tokens=NEW, stop_token=STOP,
      temperature=TEMPERATURE, slots=slots, record_experts=record, **how))
  jax.clear_caches()
  want = ask()
  apart = list(read)
  found = ask(group=group)
  assert check_same(given, want, found, cfg) <= 1
  if slots != 6:  # of which too few are refilled at a time
    assert read[-1] * group == apart[-1] - apart[-1] % group
  if record:
    for row in range(24):
      kept = int(given.lengths_S[row]) + int(found.lengths_S[row]) - 1
      np.testing.assert_array_equal(
          found.experts_STLK[row, :kept], want.experts_STLK[row, :kept])


def test_a_difference_other_than_at_a_near_tie_is_noticed():
  _, lead_SN = margins(MLA, prompts(), at_once())
  row, position = np.unravel_index(np.where(at_once().mask_SN, lead_SN, 0).argmax(), lead_SN.shape)
  other = at_once().tokens_SN.copy()
  other[row, position] += 1
  with pytest.raises(AssertionError):
    check_same(prompts(), at_once(), at_once()._replace(tokens_SN=other))


def test_generate_gives_the_same_completions_with_the_same_keys():
  want = jax.tree.map(np.asarray, model.generate(
      model.Transformer(MLA), tiny.variables(MLA), prompts().tokens_SP, prompts().lengths_S,
      max_new_tokens=NEW, key=jax.random.key(7), temperature=TEMPERATURE, stop_token=STOP))
  ended_S = want.tokens_BN[np.arange(SEQUENCES), want.lengths_B - 1] == STOP
  want = Rollout(want.tokens_BN, want.lengths_B, want.logprobs_BN, ended_S, 0)
  assert check_same(prompts(), in_20_slots(), want) <= 2


def test_each_of_several_stop_tokens_ends_a_completion():
  """What is sampled before the end does not depend on the stop tokens."""
  none = roll(MLA, prompts(), stop=None)
  assert (none.lengths_S == NEW).all() and not none.ended_S.any()
  other = int(np.bincount(none.tokens_SN[none.tokens_SN != STOP]).argmax())
  both = roll(MLA, prompts(), stop=(STOP, other))
  for stops, out in (((STOP,), at_once()), ((STOP, other), both)):
    is_stop_SN = np.isin(none.tokens_SN, stops)
    ended_S = is_stop_SN.any(1)
    want = none._replace(ended_S=ended_S, lengths_S=np.where(
        ended_S, is_stop_SN.argmax(1) + 1, NEW))
    want = want._replace(logprobs_SN=np.where(want.mask_SN, want.logprobs_SN, 0))
    assert check_same(prompts(), want, out) <= 2
  last_S = both.tokens_SN[np.arange(SEQUENCES), both.lengths_S - 1]
  assert set(last_S[both.ended_S]) == {STOP, other}


def test_slots_do_not_wait_for_the_longest_completion():
  out = in_20_slots()
  tokens = int(out.lengths_S.sum())
  assert at_once().decode_steps == NEW - 1  # the first tokens come with the prompts' pass
  assert (tokens - SEQUENCES) / 20 <= out.decode_steps < SEQUENCES / 20 * (NEW - 1)


def test_every_token_is_the_trainers_choice_under_the_noise_of_its_sequence():
  for temperature in (TEMPERATURE, 1.3):  # an argument of the program, which both share
    out = at_once(temperature)
    chosen_SN, lead_SN = margins(MLA, prompts(), out, temperature)
    near_tie_SN = lead_SN < 2 * LOGIT_ERROR / temperature
    assert (near_tie_SN & out.mask_SN).sum() <= 2
    np.testing.assert_array_equal(out.tokens_SN[out.mask_SN & ~near_tie_SN],
                                  chosen_SN[out.mask_SN & ~near_tie_SN])


def test_a_completion_ends_with_its_first_stop_token_or_is_marked_as_truncated():
  out = at_once()
  stops_SN = out.mask_SN & (out.tokens_SN == STOP)
  np.testing.assert_array_equal(out.ended_S, stops_SN.any(1))
  np.testing.assert_array_equal(stops_SN.sum(1), out.ended_S)
  last_S = out.tokens_SN[np.arange(SEQUENCES), out.lengths_S - 1]
  np.testing.assert_array_equal(last_S == STOP, out.ended_S)
  assert (out.lengths_S[~out.ended_S] == NEW).all() and (~out.ended_S).any()
  assert (out.ended_S & (out.lengths_S < NEW)).any()
  assert (out.ended_S & (out.lengths_S == NEW)).any()  # ending at the limit is not truncation
  assert (out.logprobs_SN[~out.mask_SN] == 0).all() and (out.logprobs_SN[out.mask_SN] < 0).all()


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.3])
def test_log_probabilities_are_the_trainers_at_the_same_temperature(temperature):
  out = at_once(temperature)
  sampled = to_experience(prompts(), out)

  def gap(at):
    logp_ST, _ = trainer_logprobs(tiny.variables(MLA), sampled.tokens, sampled.token_mask, at)
    return np.abs(np.where(sampled.mask, logp_ST - sampled.logp_sampler, 0)).max()

  assert sampled.mask.sum() == out.lengths_S.sum()
  print(f"largest gap at temperature {temperature}: {gap(temperature):.1e} nats")
  assert gap(temperature) < 1e-4
  assert gap(1.0) > 0.1


@jax.jit
def trainer_logprobs(variables, tokens, inside, temperature):
  return sequence_logprobs(model.Transformer(MLA), variables, tokens, inside, temperature)


def test_completions_do_not_depend_on_the_order_of_rows_or_on_their_neighbours():
  order = np.random.default_rng(1).permutation(SEQUENCES)
  given = jax.tree.map(lambda x: x[order], prompts())
  moved = roll(MLA, given, slots=20)
  unsorted = jax.tree.map(lambda x: x[np.argsort(order)], moved._replace(decode_steps=order))
  assert check_same(prompts(), in_20_slots(), unsorted) <= 2
  half = np.arange(SEQUENCES) % 2 == 0  # the other half becomes copies of the first sequence
  given = jax.tree.map(lambda x: x[np.where(half, np.arange(SEQUENCES), 0)], prompts())
  among_others = roll(MLA, given, slots=20)
  same_S = (np.where(in_20_slots().mask_SN, in_20_slots().tokens_SN, -1)
            == np.where(among_others.mask_SN, among_others.tokens_SN, -1)).all(1)
  assert same_S[half].sum() >= half.sum() - 2 and same_S[~half].sum() <= 2


def test_the_nucleus_consists_of_the_likeliest_tokens_that_reach_top_p():
  given, top_p = prompts(24), 0.5
  out = roll(DENSE, given, slots=5, top_p=top_p)
  logits_SNV = next_logits(DENSE, given, out).astype(np.float64) / TEMPERATURE
  probability_SNV = np.exp(logits_SNV - np.logaddexp.reduce(logits_SNV, axis=-1)[..., None])
  order = np.argsort(-probability_SNV, axis=-1)
  sorted_SNV = np.take_along_axis(probability_SNV, order, -1)
  inside_SNV = np.cumsum(sorted_SNV, -1) - sorted_SNV < top_p
  mass_SN = np.where(inside_SNV, sorted_SNV, 0).sum(-1)
  rank_SN = (order == out.tokens_SN[..., None]).argmax(-1)
  allowed_SN = np.take_along_axis(inside_SNV, rank_SN[..., None], -1)[..., 0]
  assert allowed_SN[out.mask_SN].all() and rank_SN[out.mask_SN].max() > 0
  want_SN = np.log(np.take_along_axis(sorted_SNV, rank_SN[..., None], -1)[..., 0] / mass_SN)
  np.testing.assert_allclose(out.logprobs_SN[out.mask_SN], want_SN[out.mask_SN], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("drafts", "slots"), [(1, 5), (2, 24)])
def test_drafts_change_neither_completions_nor_the_experts_that_are_recorded(drafts, slots):
  cfg = dataclasses.replace(
      tiny.V3, num_layers=2, mtp=model.MTPConfig(depth=1), max_seq_len=24)
  given = Prompts(*(x[::2][:24] for x in prompts()[:2]), prompts(24).keys_S)
  given = given._replace(lengths_S=jnp.maximum(given.lengths_S, drafts))
  ask = lambda **how: jax.tree.map(np.asarray, rollout(
      model.Transformer(cfg), tiny.variables(cfg), given, max_new_tokens=NEW, stop_token=STOP,
      temperature=TEMPERATURE, record_experts=True, **how))
  want, found = ask(), ask(drafts=drafts, slots=slots)
  np.testing.assert_array_equal(found.tokens_SN[want.mask_SN], want.tokens_SN[want.mask_SN])
  for name in ("lengths_S", "ended_S", "invalid_S"):
    np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
  np.testing.assert_allclose(found.logprobs_SN, want.logprobs_SN, atol=1e-4)
  read_ST = np.arange(PROMPT + NEW) < (np.asarray(given.lengths_S) + want.lengths_S - 1)[:, None]
  np.testing.assert_array_equal(
      np.sort(found.experts_STLK[read_ST]), np.sort(want.experts_STLK[read_ST]))
  with pytest.raises(ValueError, match="no MTP modules"):
    rollout(model.Transformer(MLA), {}, given, max_new_tokens=2, stop_token=None, drafts=1)


def test_what_a_row_with_nan_leaves_in_its_slot_does_not_reach_the_next_one():
  given, v = prompts(24), tiny.variables(DENSE)
  embedding = v["params"]["embedding"]
  broken = v | {"params": v["params"] | {"embedding": embedding | {
      "embedding": embedding["embedding"].at[7].set(jnp.nan)}}}
  ask = lambda slots: jax.tree.map(np.asarray, rollout(
      model.Transformer(DENSE), broken, given, max_new_tokens=NEW, stop_token=STOP, slots=slots,
      temperature=TEMPERATURE))
  alone, shared = ask(None), ask(4)
  assert 0 < alone.invalid_S.sum() < 24
  np.testing.assert_array_equal(shared.invalid_S, alone.invalid_S)
  np.testing.assert_array_equal(shared.lengths_S, alone.lengths_S)


def test_greedy_decoding_takes_the_likeliest_token_whatever_the_keys():
  given = prompts(24)
  out = roll(DENSE, given, slots=5, temperature=0)
  np.testing.assert_array_equal(
      out.tokens_SN[out.mask_SN], next_logits(DENSE, given, out).argmax(-1)[out.mask_SN])
  other = roll(DENSE, given._replace(keys_S=given.keys_S[::-1]), slots=5, temperature=0)
  jax.tree.map(np.testing.assert_array_equal, other, out)


def test_samples_of_a_prompt_differ():
  keys_S = sequence_keys(0, 1, jnp.zeros(24, int), jnp.arange(24))
  given = Prompts(jnp.ones((24, PROMPT), jnp.int32), jnp.full(24, 3, jnp.int32), keys_S)
  out = roll(DENSE, given, slots=5, top_p=0.99)
  assert len({tuple(row[:length]) for row, length in
              zip(out.tokens_SN, out.lengths_S, strict=True)}) > 12


def test_keys_depend_on_seed_step_prompt_and_sample_only():
  data = lambda *args: [tuple(key) for key in np.asarray(jax.random.key_data(
      sequence_keys(*args))).tolist()]
  prompt_S, sample_S = np.array(list(itertools.product(range(4), range(3)))).T
  keys = [key for seed in (0, 1) for step in (0, 1, 2) for key in
          data(seed, step, jnp.asarray(prompt_S), jnp.asarray(sample_S))]
  assert len(set(keys)) == len(keys) == 2 * 3 * 12
  order = np.random.default_rng(0).permutation(12)
  shuffled = data(1, 2, jnp.asarray(prompt_S[order]), jnp.asarray(sample_S[order]))
  assert shuffled == [keys[-12:][i] for i in order]
  assert data(1, 2, jnp.array([3]), jnp.array([2])) == keys[-1:]


@pytest.mark.parametrize(("rows", "message"), [
    ([], "no prompt"), ([[1], []], "prompt 1 is empty"),
    ([[1], [2] * 6], "prompt 1 has 6 tokens, more than the 5 allowed: raise max_prompt_length")])
def test_prompts_that_cannot_be_completed_are_refused(rows, message):
  with pytest.raises(ValueError, match=message):
    pad_prompts([np.array(row, int) for row in rows], PROMPT, prompts().keys_S[:len(rows)])


@pytest.mark.parametrize(("changed", "message"), [
    ({"max_new_tokens": 12}, "longer than the model's context of 16"),
    ({"max_new_tokens": 0}, "max_new_tokens >= 1"), ({"temperature": -1.0}, "temperature >= 0"),
    ({"top_p": 0.0}, "0 < top_p <= 1"), ({"slots": 0}, "slots=0 must be positive")])
def test_impossible_rollouts_are_refused(changed, message):
  with pytest.raises(ValueError, match=message):
    rollout(model.Transformer(MLA), {}, prompts(),
            **{"max_new_tokens": NEW, "stop_token": STOP} | changed)
