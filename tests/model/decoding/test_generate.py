"""Sampling treats every prompt independently of its batch, and stops where it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model import mla
from model.decoding import engine
from model.decoding.engine import prefill
from model.decoding.sampling import Limits, sample_token, sampling_logits

CFG = tiny.MQA  # compiles quickly; test_cache.py tests the caches of all attentions
TRANSFORMER = model.Transformer(CFG)
LENGTHS = jnp.array([5, 2, 7])


def prompts():
  return tiny.tokens(CFG, 3, 7)


def test_greedy_continuations_equal_the_uncached_argmax_in_every_row():
  v = tiny.variables(CFG)
  out = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=6, temperature=0)
  run = tiny.apply(CFG)
  for row, length in enumerate(LENGTHS.tolist()):
    text = jnp.concatenate([prompts()[row, :length], out.tokens_BN[row]])[None]
    # Padded to one shape, to compile once: later tokens cannot change the logits of earlier ones.
    logits = run(v, jnp.pad(text, ((0, 0), (0, 13 - text.shape[1])))).logits_BTV[0]
    predicted = logits[length - 1:length + 5]
    np.testing.assert_array_equal(out.tokens_BN[row], predicted.argmax(-1))
    np.testing.assert_allclose(
        out.logprobs_BN[row], jax.nn.log_softmax(predicted).max(-1), atol=1e-5)


def test_a_rows_samples_do_not_depend_on_the_rest_of_its_batch():
  v, kwargs = tiny.variables(CFG), {"max_new_tokens": 6, "key": jax.random.key(3)}
  batched = model.generate(TRANSFORMER, v, prompts(), LENGTHS, **kwargs)
  first = model.generate(TRANSFORMER, v, prompts()[:1], LENGTHS[:1], **kwargs)
  np.testing.assert_array_equal(first.tokens_BN[0], batched.tokens_BN[0])
  other = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=6,
                         key=jax.random.key(4))
  assert (other.tokens_BN != batched.tokens_BN).any()


def test_a_stop_token_ends_its_row_and_is_included():
  v = tiny.variables(CFG)
  free = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=6, temperature=0)
  stop = int(free.tokens_BN[0, 2])
  out = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=6, temperature=0,
                       stop_token=stop)
  for row in range(3):
    tokens = free.tokens_BN[row].tolist()
    length = tokens.index(stop) + 1 if stop in tokens else 6
    assert int(out.lengths_B[row]) == length
    np.testing.assert_array_equal(out.tokens_BN[row, :length], free.tokens_BN[row, :length])
    assert (out.tokens_BN[row, length:] == stop).all()
    assert (out.logprobs_BN[row, length:] == 0).all()


def test_streaming_yields_the_same_tokens_one_by_one():
  v, prompt, length = tiny.variables(CFG), prompts()[0], 5
  kwargs = {"max_new_tokens": 6, "key": jax.random.key(3), "temperature": 0.7, "top_p": 0.9}
  whole = model.generate(TRANSFORMER, v, prompts()[:1], LENGTHS[:1], **kwargs)
  want = whole.tokens_BN[0].tolist()
  assert list(model.stream(TRANSFORMER, v, prompt[:length], **kwargs)) == want
  stop = want[2]
  until = want[:want.index(stop) + 1]
  assert list(model.stream(TRANSFORMER, v, prompt[:length], stop_token=stop, **kwargs)) == until


def test_sampling_applies_the_temperature_before_the_nucleus():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
  kept = lambda **kw: jnp.isfinite(sampling_logits(logits, **kw))[0].tolist()
  assert kept(temperature=1.0, top_p=0.7) == [True, True, False, False]
  assert kept(temperature=1.0, top_p=0.76) == [True, True, True, False]
  assert kept(temperature=1.0, top_p=1.0) == [True] * 4
  assert kept(temperature=0.2, top_p=0.7) == [True, False, False, False]
  np.testing.assert_allclose(jax.nn.softmax(sampling_logits(logits, 2.0, 1.0)),
                             jax.nn.softmax(logits / 2), rtol=1e-6)


def test_several_stop_tokens_end_rows_each_by_its_own():
  v, kwargs = tiny.variables(CFG), {"max_new_tokens": 6, "temperature": 0}
  free = np.asarray(model.generate(TRANSFORMER, v, prompts(), LENGTHS, **kwargs).tokens_BN)
  stops = [int(free[0, 1]), int(free[1, 3])]
  for given in (stops, tuple(stops), np.array(stops), jnp.array(stops), set(stops)):
    out = model.generate(TRANSFORMER, v, prompts(), LENGTHS, stop_token=given, **kwargs)
    for row, tokens in enumerate(free.tolist()):
      at = next((i for i, token in enumerate(tokens) if token in stops), 5)
      assert int(out.lengths_B[row]) == at + 1
      want = tokens[:at + 1] + [tokens[at]] * (5 - at)
      np.testing.assert_array_equal(out.tokens_BN[row], want)
  for row, length in enumerate(LENGTHS.tolist()):
    streamed = list(model.stream(TRANSFORMER, v, prompts()[row, :length], stop_token=stops,
                                 **kwargs))
    assert streamed == out.tokens_BN[row, :int(out.lengths_B[row])].tolist()


@pytest.mark.parametrize("stop", [[], (), None])
def test_no_stop_tokens_end_no_row(stop):
  out = model.generate(TRANSFORMER, tiny.variables(CFG), prompts(), LENGTHS, max_new_tokens=6,
                       temperature=0, stop_token=stop)
  np.testing.assert_array_equal(out.lengths_B, [6, 6, 6])


@pytest.mark.parametrize("kwargs", [
    {"temperature": 1e-38}, {"temperature": 1e-50}, {"temperature": 1e-9}, {"top_p": 1e-40},
    {"top_p": 1e-300}, {"temperature": 1e-38, "top_p": 0.5}, {"temperature": 2.0, "top_p": 1e-12}])
def test_a_tiny_temperature_or_nucleus_leaves_the_most_likely_token(kwargs):
  logits = jnp.array([[1.0, 3.0, -5.0, 2.9], [40.0, -1e4, 39.9, 0.0]])
  tokens, logprobs = sample_token(
      logits, jax.random.split(jax.random.key(0), 2),
      **({"temperature": 1.0, "top_p": 1.0} | kwargs), greedy=False)
  assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0, 0]
  v = tiny.variables(CFG)
  sampled, greedy = (
      model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=4, **how)
      for how in (kwargs | {"key": jax.random.key(1)}, {"temperature": 0}))
  np.testing.assert_array_equal(sampled.tokens_BN, greedy.tokens_BN)


def test_only_the_most_likely_tokens_and_those_not_far_below_them_are_sampled():
  probabilities = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
  logits = jnp.log(probabilities)
  kept = lambda **how: jnp.isfinite(sampling_logits(
      logits, **({"temperature": 1.0, "top_p": 1.0} | how))).tolist()
  every = [True] * 4
  assert kept(top_k=2) == [[True, True, False, False], every]  # all that tie for the last place
  assert kept(top_k=0) == kept(top_k=9) == kept(min_p=0.0) == [every, every]
  assert kept(min_p=0.6) == [[True, True, False, False], every]
  assert kept(min_p=1.0) == kept(top_k=1) == [[True, False, False, False], every]
  assert kept(top_k=3, min_p=0.6, top_p=0.35) == [[True, False, False, False], [True] * 4]
  assert kept(min_p=0.6, temperature=2.0) == [[True, True, True, False], every]


def test_streams_and_drafts_sample_within_the_same_limits():
  cfg = dataclasses.replace(tiny.PLAIN_MLA, num_layers=1, mtp=model.MTPConfig(depth=1))
  net, v = model.Transformer(cfg), tiny.variables(cfg)
  how = {"max_new_tokens": 6, "key": jax.random.key(2), "temperature": 3.0, "top_k": 3,
         "min_p": 0.1}
  want = model.generate(net, v, prompts()[:1, :5], LENGTHS[:1], **how)
  drafted = model.speculate(net, v, prompts()[:1, :5], LENGTHS[:1], drafts=1, **how)
  np.testing.assert_array_equal(drafted.generated.tokens_BN, want.tokens_BN)
  for drafts in (0, 1):
    assert list(model.stream(net, v, prompts()[0, :5], drafts=drafts, **how)) == (
        want.tokens_BN[0].tolist())
  free = model.generate(net, v, prompts()[:1, :5], LENGTHS[:1],
                        **how | {"top_k": 0, "min_p": 0.0})
  assert (free.tokens_BN != want.tokens_BN).any()


def test_a_vanishing_temperature_without_a_nucleus_leaves_the_most_likely_token():
  tokens, logprobs = sample_token(jnp.array([[1.0, 3.0, 2.9]]), jax.random.key(0)[None],
                                  1e-38, 1.0, greedy=False, nucleus=False)
  assert tokens.tolist() == [1] and logprobs.tolist() == [0]


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": -1.0}, "temperature=-1.0 should be a number >= 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": np.ones(3)}, "temperature="),
    ({"top_p": 0.0}, "0 < top_p <= 1"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_p": float("nan")}, "top_p=nan"),
    ({"top_k": -1}, "top_k=-1 should be an integer >= 0"),
    ({"top_k": 1.5}, "top_k=1.5"),
    ({"min_p": 1.5}, "0 <= min_p <= 1"),
    ({"min_p": float("nan")}, "min_p=nan"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 should be an integer >= 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
    ({"key": None}, "needs a key"),
    ({"stop_token": -1}, "stop_token=-1"),
    ({"stop_token": [3, -1]}, r"stop_token=\[3, -1\]"),
    ({"stop_token": "</s>"}, "stop_token='</s>'"),
    ({"stop_token": 1.5}, "stop_token=1.5"),
    ({"stop_token": True}, "stop_token=True"),
])
def test_invalid_arguments_are_refused(change, message):
  kwargs = {"max_new_tokens": 2, "key": jax.random.key(0)} | change
  with pytest.raises(ValueError, match=message):
    model.generate(TRANSFORMER, {}, prompts(), LENGTHS, **kwargs)
  with pytest.raises(ValueError, match=message):
    model.stream(TRANSFORMER, {}, prompts()[0], **kwargs)


def at(row: int, column: int, value: int) -> jax.Array:
  return prompts().at[row, column].set(value)


INVALID_PROMPTS = {
    "length 0": (prompts, [5, 0, 7], "row 1: the prompt's length is 0, and must lie in 1..7"),
    "negative length": (prompts, [5, 2, -3], "row 2: the prompt's length is -3"),
    "length past the width": (prompts, [8, 2, 7], "row 0: the prompt's length is 8"),
    "huge length": (prompts, [5, 2, 2**40], "row 2: the prompt's length"),
    "lengths of other rows": (prompts, [5, 2], r"\(3, 7\) and \(2,\)"),
    "lengths that are not integers": (prompts, [5.0, 2.0, 7.0], "lengths should be integers"),
    "token past the vocabulary": (
        lambda: at(2, 6, 99999), [5, 2, 7], "row 2: token 6 of the prompt is 99999.* 0..36"),
    "first token past the vocabulary": (lambda: at(0, 0, 37), [5, 2, 7], "row 0: token 0 .* is 37"),
    "negative token": (lambda: at(1, 1, -100), [5, 2, 7], "row 1: token 1 of the prompt is -100"),
    "token that wraps in int32": (
        lambda: np.array(prompts(), np.int64) + 2**32, [5, 2, 7], "row 0: token 0"),
    "tokens that are not integers": (
        lambda: prompts().astype(float), [5, 2, 7], "prompts should be integers"),
    "no tokens": (lambda: prompts()[:, :0], [5, 2, 7], r"\(3, 0\)"),
    "a single row": (lambda: prompts()[0], [5], r"\(7,\)"),
}


@pytest.mark.parametrize("name", INVALID_PROMPTS)
def test_invalid_prompts_are_refused_naming_the_row(name):
  make, lengths, message = INVALID_PROMPTS[name]
  with pytest.raises(ValueError, match=message):
    model.generate(TRANSFORMER, {}, make(), lengths, max_new_tokens=2, temperature=0)
  with pytest.raises(ValueError, match=message):
    prefill(TRANSFORMER, {}, make(), lengths, model.init_cache(CFG, 3, 9))


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "shape"), ([[1, 2]], r"\(1, 2\)"), ([1, 99999], "token 1 of the prompt is 99999"),
    ([-100], "is -100"), ([1.5], "prompts should be integers")])
def test_a_stream_refuses_an_invalid_prompt_when_it_is_made(prompt, message):
  with pytest.raises(ValueError, match=message):
    model.stream(TRANSFORMER, {}, prompt, max_new_tokens=2, temperature=0)


def test_values_past_a_prompts_length_are_ignored():
  v, kwargs = tiny.variables(CFG), {"max_new_tokens": 3, "temperature": 0}
  padded = jnp.where(jnp.arange(7) < LENGTHS[:, None], prompts(), -100)
  ours = model.generate(TRANSFORMER, v, padded, LENGTHS, **kwargs)
  np.testing.assert_array_equal(
      ours.tokens_BN, model.generate(TRANSFORMER, v, prompts(), LENGTHS, **kwargs).tokens_BN)


def test_generation_within_a_jitted_function_checks_what_is_not_traced():
  v = tiny.variables(CFG)

  @jax.jit
  def run(tokens_BT, lengths_B, temperature, top_p, stop):
    return model.generate(
        TRANSFORMER, v, tokens_BT, lengths_B, max_new_tokens=4, key=jax.random.key(5),
        temperature=temperature, top_p=top_p, stop_token=stop)

  eager = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=4,
                         key=jax.random.key(5), temperature=0.7, top_p=0.9, stop_token=3)
  jitted = run(prompts(), LENGTHS, 0.7, 0.9, 3)
  np.testing.assert_array_equal(jitted.tokens_BN, eager.tokens_BN)
  greedy = model.generate(TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=4, temperature=0)
  np.testing.assert_array_equal(
      run(prompts(), LENGTHS, 0.0, 1.0, jnp.zeros(0, int)).tokens_BN, greedy.tokens_BN)
  with pytest.raises(ValueError, match="row 1: the prompt's length is 0"):
    jax.jit(lambda tokens: model.generate(
        TRANSFORMER, v, tokens, np.array([5, 0, 7]), max_new_tokens=4, temperature=0))(prompts())


def test_prefill_appends_the_next_part_of_every_row():
  v, tokens = tiny.variables(CFG), tiny.tokens(CFG, 2, 9)
  whole, _ = prefill(TRANSFORMER, v, tokens, jnp.array([9, 8]), model.init_cache(CFG, 2, 12))
  _, output = prefill(TRANSFORMER, v, tokens[:, :5], jnp.array([5, 3]),
                      model.init_cache(CFG, 2, 12))
  rest = jnp.stack([jnp.pad(tokens[0, 5:], (0, 1)), tokens[1, 3:8]])
  logits, output = prefill(TRANSFORMER, v, rest, jnp.array([4, 5]), output.cache)
  np.testing.assert_allclose(logits, whole, atol=1e-4 * float(jnp.abs(whole).max()))
  np.testing.assert_array_equal(output.cache.lengths_B, [9, 8])


def test_a_cache_without_room_is_refused():
  v, tokens = tiny.variables(CFG), tiny.tokens(CFG, 2, 20)
  small = model.init_cache(CFG, 2, 8)
  for run in (
      lambda: prefill(TRANSFORMER, v, tokens, jnp.array([20, 20]), small),
      lambda: jax.jit(lambda n: prefill(TRANSFORMER, v, tokens, n, small))(jnp.array([8, 8])),
      lambda: TRANSFORMER.apply(v, tokens, cache=small),
  ):
    with pytest.raises(ValueError, match=r"2 row\(s\) of 20 token\(s\) .* 2 row\(s\) of 8 slot"):
      run()
  with pytest.raises(ValueError, match=r"1 row\(s\) of 4"):
    prefill(TRANSFORMER, v, tokens[:1, :4], jnp.array([4]), small)
  used = small.with_lengths(jnp.array([2, 5]))
  with pytest.raises(ValueError, match="row 1: the cache holds 5 tokens, and its 8 slots"):
    prefill(TRANSFORMER, v, tokens[:, :6], jnp.array([6, 4]), used)


def test_text_past_the_models_context_is_announced(recwarn):
  short = model.Transformer(dataclasses.replace(CFG, max_seq_len=9))
  v, kwargs = tiny.variables(CFG), {"temperature": 0}
  model.generate(short, v, prompts(), LENGTHS, max_new_tokens=2, **kwargs)
  model.stream(short, v, prompts()[0], max_new_tokens=2, **kwargs)
  assert not [w for w in recwarn if "context" in str(w.message)]
  with pytest.warns(UserWarning, match=r"7 tokens and 3 new .* context of 9 \(max_seq_len\)"):
    model.generate(short, v, prompts(), LENGTHS, max_new_tokens=3, **kwargs)
  with pytest.warns(UserWarning, match="7 tokens and 4 new"):
    model.stream(short, v, prompts()[0], max_new_tokens=4, **kwargs)


def test_a_row_whose_logits_are_nan_ends_and_the_others_do_not():
  """The embedding of one token is NaN: so are the logits of rows that read it, experts or not."""
  cfg = dataclasses.replace(tiny.V3, num_layers=2, mtp=None)
  net, v, tokens = model.Transformer(cfg), tiny.variables(cfg), tiny.tokens(cfg, 3, 7)
  how = {"max_new_tokens": 6, "temperature": 0}
  want = np.asarray(model.generate(net, v, tokens, LENGTHS, **how).tokens_BN)
  bad = next(t for t in want[0, :5].tolist() if t not in np.asarray(tokens))
  embedding = v["params"]["embedding"]
  broken = embedding | {"embedding": embedding["embedding"].at[bad].set(jnp.nan)}
  out = model.generate(net, {"params": v["params"] | {"embedding": broken}} | {
      name: rest for name, rest in v.items() if name != "params"}, tokens, LENGTHS, **how)
  assert out.status_B[0] == model.Status.INVALID
  for row, text in enumerate(want.tolist()):
    length = text.index(bad) + 1 if bad in text[:5] else 6
    assert out.lengths_B[row] == length
    assert out.tokens_BN[row, :length].tolist() == text[:length]
    assert out.status_B[row] == (model.Status.LENGTH if length == 6 else model.Status.INVALID)
  assert model.Status.LENGTH in out.status_B.tolist() and not np.isnan(out.logprobs_BN).any()


def test_the_reason_for_which_each_row_ended_is_returned():
  v = tiny.variables(CFG)
  how = {"max_new_tokens": 6, "temperature": 0}
  tokens = np.asarray(model.generate(TRANSFORMER, v, prompts(), LENGTHS, **how).tokens_BN)
  stop = int(tokens[1, 3])
  out = model.generate(TRANSFORMER, v, prompts(), LENGTHS, stop_token=stop, **how)
  for row, text in enumerate(tokens.tolist()):
    stopped = stop in text
    assert out.status_B[row] == (model.Status.STOP if stopped else model.Status.LENGTH)
    assert out.lengths_B[row] == (text.index(stop) + 1 if stopped else 6)
  text = model.stream(TRANSFORMER, v, prompts()[1, :LENGTHS[1]], stop_token=stop, **how)
  found = []
  while True:
    try:
      found.append(next(text))
    except StopIteration as end:
      assert end.value is model.Status.STOP and found[-1] == stop
      break


@pytest.mark.parametrize("drafts", [0, 2])
def test_without_a_loop_over_layers_the_same_text_comes_out(monkeypatch, drafts):
  cfg = dataclasses.replace(tiny.V3, num_layers=4, num_dense_layers=2)
  net, v = model.Transformer(cfg), tiny.variables(cfg)
  kwargs = {"max_new_tokens": 5, "key": jax.random.key(3)}
  if drafts:
    kwargs["drafts"] = drafts
  run = lambda: (model.speculate if drafts else model.generate)(
      net, v, tiny.tokens(cfg, 3, 7), LENGTHS, **kwargs)
  looped = run()
  monkeypatch.setattr(engine, "_unrolls", lambda cfg: True)
  jax.clear_caches()
  apart = run()
  jax.tree.map(np.testing.assert_array_equal, *(
      getattr(each, "generated", each)._replace(logprobs_BN=None) for each in (looped, apart)))
  by_layer = net.clone(unroll=4)
  v, net = {**v, "params": by_layer.by_layer(v["params"])}, by_layer  # what is apart stays so
  again = run()
  jax.clear_caches()
  np.testing.assert_array_equal(getattr(again, "generated", again).tokens_BN,
                                getattr(apart, "generated", apart).tokens_BN)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("drafts", [0, 2])
def test_attention_that_reads_the_cache_in_place_gives_the_same_text(monkeypatch, drafts, apart):
  cfg = dataclasses.replace(tiny.V3, num_layers=3)
  monkeypatch.setattr(engine, "_unrolls", lambda cfg: apart)
  seen = []
  kernel = mla.mla_decode
  monkeypatch.setattr(mla, "mla_decode", lambda q, cache, *args, **options: (
      seen.append((q.shape[1], len(cache))) or kernel(q, cache, *args, **options)))
  run = lambda **fields: (model.speculate if drafts else model.generate)(
      model.Transformer(cfg, **fields), tiny.variables(cfg), tiny.tokens(cfg, 3, 7), LENGTHS,
      max_new_tokens=6, temperature=0, **({"drafts": drafts} if drafts else {}))
  jax.clear_caches()
  plain, ours = (getattr(x, "generated", x) for x in (run(), run(attend="mla_decode")))
  jax.clear_caches()
  np.testing.assert_array_equal(ours.tokens_BN, plain.tokens_BN)
  np.testing.assert_allclose(ours.logprobs_BN, plain.logprobs_BN, atol=1e-4)
  # The trunk's layers apart or together, and the modules' cache.
  assert {(1 + drafts, 1 if apart else 3)} <= set(seen)


@pytest.mark.parametrize("limits", [{"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {"top_p": 0.5}])
def test_the_vocabulary_is_sorted_only_if_the_limits_may_exclude_a_token(limits):
  v, key = tiny.variables(CFG), jax.random.key(0)
  program = str(jax.make_jaxpr(lambda v: model.generate(
      TRANSFORMER, v, prompts(), LENGTHS, max_new_tokens=2, key=key, **limits))(v))
  assert (" sort[" in program) == (limits["top_p"] < 1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
@pytest.mark.parametrize("cfg", [tiny.PLAIN_MLA, tiny.MQA])
def test_prompts_read_in_chunks_are_continued_in_the_same_way(cfg, chunk):
  net, v, texts = model.Transformer(cfg), tiny.variables(cfg), tiny.tokens(cfg, 3, 7)
  kwargs = {"max_new_tokens": 4, "temperature": 0}
  whole = model.generate(net, v, texts, LENGTHS, **kwargs)
  parts = model.generate(net, v, texts, LENGTHS, prefill_chunk=chunk, **kwargs)
  np.testing.assert_array_equal(parts.tokens_BN, whole.tokens_BN)
  np.testing.assert_allclose(parts.logprobs_BN, whole.logprobs_BN, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, -1, 2.0])
def test_impossible_chunks_are_refused(chunk):
  with pytest.raises(ValueError, match="prefill_chunk="):
    model.generate(TRANSFORMER, tiny.variables(CFG), prompts(), LENGTHS, max_new_tokens=1,
                   temperature=0, prefill_chunk=chunk)


@pytest.mark.parametrize("apart", [False, True])
def test_rows_that_share_a_prefix_are_continued_as_if_each_had_read_it(apart):
  cfg = tiny.PLAIN_MLA
  net, v, texts = model.Transformer(cfg), tiny.variables(cfg), tiny.tokens(cfg, 4, 9)
  texts = texts.at[:, :5].set(texts[jnp.array([0, 1, 1, 0]), :5])  # two prefixes of 5 tokens
  keys_B = engine.row_keys(jax.random.key(0), 4)
  sampling = engine.Sampling(0.0, Limits(), jnp.zeros(0, jnp.int32), 3, True)
  slots = engine.num_slots(9, sampling)
  begin = jax.jit(functools.partial(engine.begin, net, v, sampling))
  rows, new = begin(texts, jnp.array([9, 7, 8, 6]), keys_B)
  _, read = jax.jit(lambda texts, cache: engine.prefill(
      net, v, texts, jnp.array([5, 5]), cache))(texts[:2, :5], model.init_cache(cfg, 2, 5))
  cache = read.cache.apart() if apart else read.cache
  forked = engine.fork(cache, jnp.array([0, 1, 1, 0]), slots)
  if apart:
    assert forked.is_apart
    forked = forked.replace(entries={
        name: jnp.concatenate(each) for name, each in forked.entries.items()})
  rows_of_prefix, new_of_prefix = begin(
      texts[:, 5:], jnp.array([4, 2, 3, 1]), keys_B, prefix=forked)
  np.testing.assert_array_equal(new_of_prefix.tokens_BP, new.tokens_BP)
  np.testing.assert_array_equal(rows_of_prefix.cache.lengths_B, rows.cache.lengths_B)
  step = jax.jit(functools.partial(engine.step, net, v, sampling))
  for _ in range(2):
    (rows, new), (rows_of_prefix, new_of_prefix) = step(rows), step(rows_of_prefix)
    np.testing.assert_array_equal(new_of_prefix.tokens_BP, new.tokens_BP)
    np.testing.assert_allclose(new_of_prefix.logprobs_BP, new.logprobs_BP, rtol=0, atol=1e-4)
