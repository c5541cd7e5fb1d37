"""Sampling treats every prompt independently of its batch, and stops where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.decoding.generate import sampling_logits

CFG = tiny.PLAIN_MLA
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


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": -1.0}, "temperature >= 0"),
    ({"top_p": 0.0}, "0 < top_p"),
    ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ({"key": None}, "needs a key"),
])
def test_invalid_arguments_are_refused(change, message):
  kwargs = {"max_new_tokens": 2, "key": jax.random.key(0)} | change
  with pytest.raises(ValueError, match=message):
    model.generate(TRANSFORMER, {}, prompts(), LENGTHS, **kwargs)
