"""Compression baselines: the n-gram model is a proper Kneser-Ney model, and gzip is `gzip -9`."""

import collections
import gzip

import numpy as np
import pytest

from experiments.programs.baselines import NGram, gzip_bits_per_byte

ORDERS = (1, 2, 3, 5, 8)
RNG = np.random.default_rng(0)
TEXT = bytes(RNG.choice(list(b"aabbcd "), 4000)) + b"to be, or not to be: that is to be " * 9


def reference_next_byte(documents: list[bytes], order: int, context: bytes) -> np.ndarray:
  """Returns the next-byte probabilities of the model as defined, computed with dictionaries."""
  windows = lambda length: [document[i:i + length] for document in documents
                            for i in range(len(document) - length + 1)]
  probability = np.full(256, 1 / 256)
  for length in range(1, order + 1):
    if length - 1 > len(context):
      break
    counts = collections.Counter(
        windows(length) if length == order else (gram[1:] for gram in set(windows(length + 1))))
    n1, n2, n3, n4 = (sum(count == n for count in counts.values()) for n in (1, 2, 3, 4))
    discounts = (0.5, 1, 1.5)
    if n1 * n2 * n3 * n4:
      y = n1 / (n1 + 2 * n2)
      estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
      discounts = estimate if min(estimate) > 0 else discounts
    history = context[len(context) - length + 1:]
    after = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
    if not after:
      continue
    freed = {byte: discounts[min(count, 3) - 1] for byte, count in after.items()}
    probability *= sum(freed.values()) / sum(after.values())
    for byte, count in after.items():
      probability[byte] += (count - freed[byte]) / sum(after.values())
  return probability


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("context", [b"", b"t", b"to b", b"that is to be to be", b"\xff\0zzzz\0"])
def test_probabilities_after_any_context_are_positive_and_sum_to_one(order, context):
  probability = NGram(order).fit(TEXT).next_byte(context)
  assert probability.shape == (256,) and (probability > 0).all()
  assert abs(probability.sum() - 1) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("documents", [[TEXT], [b"to be", b"", b"o", b"not to be", TEXT[:500]],
                                       [b"aaaa"]], ids=["one", "several", "repeated"])
def test_probabilities_equal_the_definition_of_modified_kneser_ney(order, documents):
  model = NGram(order).fit(documents)
  longest = max(map(len, documents))
  for context in (b"", b"a", b"to", b"not to b", b"is to be ", b"zq a"):
    expected = reference_next_byte(documents, min(order, longest), context)
    np.testing.assert_allclose(model.next_byte(context), expected, rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_bits_per_byte_is_the_mean_negative_log2_probability_given_all_preceding_bytes(order):
  model, heldout = NGram(order).fit(TEXT), b"that is not \xfe what a cab is to be"
  each = [-np.log2(model.next_byte(heldout[:i])[byte]) for i, byte in enumerate(heldout)]
  assert model.bits_per_byte(heldout) == pytest.approx(np.mean(each), rel=1e-12)


def test_longer_contexts_predict_words_better_and_random_bytes_cost_more_than_8_bits():
  words = RNG.choice([b"alpha ", b"beta ", b"gamma ", b"delta "], 4000).tolist()
  train, heldout = b"".join(words[:3000]), b"".join(words[3000:])
  bits = [NGram(order).fit(train).bits_per_byte(heldout) for order in (1, 2, 3)]
  assert bits[0] > bits[1] > bits[2] > 2 / 6  # two bits choose a word of at most six bytes
  assert NGram().fit(RNG.bytes(20000)).bits_per_byte(RNG.bytes(20000)) > 8


def test_ngrams_do_not_cross_documents():
  separate, joined = NGram(2).fit([b"xy", b"zw"] * 50), NGram(2).fit(b"xyzw" * 50)
  assert separate.next_byte(b"y")[ord("z")] == separate.next_byte(b"")[ord("z")]
  assert joined.next_byte(b"y")[ord("z")] > joined.next_byte(b"")[ord("z")]


def test_fitting_again_discards_the_previous_counts():
  refitted, once = NGram().fit(b"something else").fit(TEXT), NGram().fit(TEXT)
  assert refitted.bits_per_byte(b"not to be") == once.bits_per_byte(b"not to be")


def test_gzip_compresses_all_bytes_at_once_at_the_highest_level():
  heldout = TEXT * 3
  assert gzip_bits_per_byte(heldout) == 8 * len(gzip.compress(heldout, 9)) / len(heldout)
  assert gzip_bits_per_byte(heldout) < gzip_bits_per_byte(TEXT)
  assert 8 < gzip_bits_per_byte(RNG.bytes(10000)) < 8.1


@pytest.mark.parametrize(("misuse", "message"), [
    (lambda: NGram(9), "order=9 must lie in 1..8"),
    (lambda: NGram(0), "order=0 must lie in 1..8"),
    (lambda: NGram().fit([]), "train is empty"),
    (lambda: NGram().fit([b"", b""]), "train is empty"),
    (lambda: NGram().fit(b"a").bits_per_byte(b""), "heldout is empty"),
    (lambda: NGram().bits_per_byte(b"a"), "call fit first"),
    (lambda: NGram().next_byte(b"a"), "call fit first"),
    (lambda: gzip_bits_per_byte(b""), "heldout is empty"),
])
def test_misuse_is_refused_with_the_reason(misuse, message):
  with pytest.raises(ValueError, match=message):
    misuse()
