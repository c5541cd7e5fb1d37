"""The baselines are what they say: proper, Kneser-Ney's, and blind to what they must not see."""

import collections
import gzip

import numpy as np
import pytest

from experiments.programs.baselines import NGram, gzip_bits_per_byte

ORDERS = (1, 2, 3, 5, 8)
RNG = np.random.default_rng(0)
TEXT = bytes(RNG.choice(list(b"aabbcd "), 4000)) + b"to be, or not to be: that is to be " * 9


def by_the_book(documents: list[bytes], order: int, context: bytes) -> np.ndarray:
  """The same model from its definition, with dictionaries: probabilities of the next byte."""
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
def test_after_any_context_probabilities_are_positive_and_sum_to_one(order, context):
  probability = NGram(order).fit(TEXT).next_byte(context)
  assert probability.shape == (256,) and (probability > 0).all()
  assert abs(probability.sum() - 1) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("documents", [[TEXT], [b"to be", b"", b"o", b"not to be", TEXT[:500]],
                                       [b"aaaa"]], ids=["one", "several", "repeated"])
def test_it_is_kneser_ney_as_defined(order, documents):
  model = NGram(order).fit(documents)
  longest = max(map(len, documents))
  for context in (b"", b"a", b"to", b"not to b", b"is to be ", b"zq a"):
    expected = by_the_book(documents, min(order, longest), context)
    np.testing.assert_allclose(model.next_byte(context), expected, rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_bits_are_those_of_each_byte_after_all_that_precede_it(order):
  model, heldout = NGram(order).fit(TEXT), b"that is not \xfe what a cab is to be"
  each = [-np.log2(model.next_byte(heldout[:i])[byte]) for i, byte in enumerate(heldout)]
  assert model.bits_per_byte(heldout) == pytest.approx(np.mean(each), rel=1e-12)


def test_longer_contexts_predict_structure_better_and_noise_no_better():
  words = RNG.choice([b"alpha ", b"beta ", b"gamma ", b"delta "], 4000).tolist()
  train, heldout = b"".join(words[:3000]), b"".join(words[3000:])
  bits = [NGram(order).fit(train).bits_per_byte(heldout) for order in (1, 2, 3)]
  assert bits[0] > bits[1] > bits[2] > 2 / 6  # two bits choose a word of at most six bytes
  assert NGram().fit(RNG.bytes(20000)).bits_per_byte(RNG.bytes(20000)) > 8


def test_ngrams_do_not_cross_documents():
  apart, joined = NGram(2).fit([b"xy", b"zw"] * 50), NGram(2).fit(b"xyzw" * 50)
  assert apart.next_byte(b"y")[ord("z")] == apart.next_byte(b"")[ord("z")]
  assert joined.next_byte(b"y")[ord("z")] > joined.next_byte(b"")[ord("z")]


def test_fitting_again_forgets():
  again, once = NGram().fit(b"something else").fit(TEXT), NGram().fit(TEXT)
  assert again.bits_per_byte(b"not to be") == once.bits_per_byte(b"not to be")


def test_gzip_is_the_whole_file_at_its_best():
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
def test_misuse_is_said(misuse, message):
  with pytest.raises(ValueError, match=message):
    misuse()
