"""Baselines for the bits per byte of a language model, on the same bytes: gzip and n-grams.

gzip uses the held-out bytes alone; the n-gram model is trained on the bytes that the language model
was trained on.

Shape letters:  N positions  G distinct n-grams  C distinct contexts
"""

import gzip
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def gzip_bits_per_byte(heldout: bytes) -> float:
  """Returns the size of `heldout` compressed by `gzip -9`, header included, in bits per byte.

  Raises:
    ValueError: if there are no bytes.
  """
  _require_bytes("heldout", heldout)
  return 8 * len(gzip.compress(heldout, 9)) / len(heldout)


class _Level(NamedTuple):
  """The n-grams of one length, and their contexts, which are one byte shorter.

  Attributes:
    grams_G: the n-grams, packed into uint64 and sorted.
    probability_G: probability of an n-gram's last byte after its context, without the part that the
      next shorter context contributes.
    contexts_C: the contexts, packed into uint64 and sorted.
    backoff_C: weight of the next shorter context in the interpolation.
  """

  grams_G: np.ndarray
  probability_G: np.ndarray
  contexts_C: np.ndarray
  backoff_C: np.ndarray


class NGram:
  """Interpolated modified Kneser-Ney over bytes (Chen and Goodman, TR-10-98, section 3).

  A byte is predicted from the `order - 1` bytes before it, or from fewer at the beginning of a
  document. The empty context is interpolated with 1/256 for every byte, so that the 256
  probabilities after any context are positive and sum to 1.

  Attributes:
    order: length of an n-gram in bytes, the predicted one included; 1..8, as a uint64 holds 8.
  """

  def __init__(self, order: int = 5):
    if not 1 <= order <= 8:
      raise ValueError(f"NGram.order={order} must lie in 1..8, as n-grams are packed into uint64")
    self.order = order
    self._levels: list[_Level] = []

  def fit(self, train: bytes | Sequence[bytes]) -> "NGram":
    """Trains the model from scratch on `train`, one document or several, and returns it.

    Raises:
      ValueError: if there are no bytes.
    """
    documents = [train] if isinstance(train, bytes) else train
    _require_bytes("train", b"".join(documents))
    order = min(self.order, max(map(len, documents)))
    packed_N, length_N = _pack(documents, order)
    distinct = [np.unique(_last(packed_N[length_N >= length], length), return_counts=True)
                for length in range(1, order + 1)]
    # Kneser-Ney: below the highest order, the count of an n-gram is the number of distinct bytes
    # that precede it, not the number of its occurrences.
    follows = [np.unique(_last(longer_G, length), return_counts=True)
               for length, (longer_G, _) in enumerate(distinct[1:], start=1)]
    self._levels = [_discounted(*counted) for counted in (*follows, distinct[-1])]
    return self

  def next_byte(self, context: bytes) -> np.ndarray:
    """Returns the probabilities (256,) of the byte after `context`.

    Only the last `order - 1` bytes of the context matter.

    Raises:
      ValueError: if `fit` has not been called.
    """
    packed_N, length_N = _pack([context + b"\0"], self.order)
    return self._probability(packed_N[-1] + np.arange(256, dtype=np.uint64),
                             np.full(256, length_N[-1]))

  def bits_per_byte(self, heldout: bytes) -> float:
    """Returns the mean of -log2(probability) over the bytes of `heldout`, as one document.

    Raises:
      ValueError: if there are no bytes, or `fit` has not been called.
    """
    _require_bytes("heldout", heldout)
    return float(-np.log2(self._probability(*_pack([heldout], self.order))).mean())

  def _probability(self, packed_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Returns the probability of the last byte of each n-gram, given the bytes before it.

    Args:
      packed_N: n-grams of up to `order` bytes, packed into uint64 with the last byte lowest.
      length_N: how many bytes of each n-gram to use, the last byte included.
    """
    if not self._levels:
      raise ValueError("NGram is not trained yet: call fit first")
    probability_N = np.full(packed_N.shape, 1 / 256)
    for length, level in enumerate(self._levels, start=1):
      reaches_N = length_N >= length
      grams = _last(packed_N[reaches_N], length)
      backoff = _look_up(level.contexts_C, level.backoff_C, grams >> np.uint64(8), 1.0)
      seen = _look_up(level.grams_G, level.probability_G, grams, 0.0)
      probability_N[reaches_N] = seen + backoff * probability_N[reaches_N]
    return probability_N


def _require_bytes(name: str, content: bytes) -> None:
  if not content:
    raise ValueError(f"{name} is empty: bits per byte need at least one byte")


def _pack(documents: Sequence[bytes], order: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs the `order` bytes up to each position into a uint64, with the last byte lowest.

  Returns:
    The packed bytes of every position of all documents, and how many of them, at most `order`, are
    of the position's own document.
  """
  bytes_N = np.frombuffer(b"".join(documents), np.uint8)
  packed_N = np.zeros(bytes_N.size, np.uint64)
  for offset in range(min(order, bytes_N.size)):
    packed_N[offset:] |= bytes_N[:bytes_N.size - offset].astype(np.uint64) << np.uint64(8 * offset)
  sizes = np.array([len(document) for document in documents])
  starts_N = np.repeat(np.cumsum(sizes) - sizes, sizes)
  return packed_N, np.minimum(np.arange(bytes_N.size) - starts_N + 1, order)


def _last(packed_N: np.ndarray, length: int) -> np.ndarray:
  """Returns the last `length` bytes of packed n-grams."""
  return packed_N & np.uint64(2**(8 * length) - 1)


def _discounted(grams_G: np.ndarray, counts_G: np.ndarray) -> _Level:
  """Returns n-grams with discounted counts, normalised by context.

  What the discounts remove becomes the weight of the next shorter context.
  """
  discount_G = _discounts(counts_G)[np.minimum(counts_G, 3)]
  contexts_G = grams_G >> np.uint64(8)
  contexts_C, first_C, grams_C = np.unique(contexts_G, return_index=True, return_counts=True)
  totals_C = np.add.reduceat(counts_G, first_C)
  return _Level(grams_G, (counts_G - discount_G) / np.repeat(totals_C, grams_C),
                contexts_C, np.add.reduceat(discount_G, first_C) / totals_C)


def _discounts(counts_G: np.ndarray) -> np.ndarray:
  """Returns the discounts (4,) of counts 0, 1, 2, and 3 or more.

  They are estimated from how many n-grams have a count of 1, 2, 3 and 4.
  """
  num = np.bincount(np.minimum(counts_G, 5), minlength=5)[1:5].astype(float)
  if num.all():
    steps = np.arange(1, 4)
    estimate = steps - (steps + 1) * num[0] / (num[0] + 2 * num[1]) * num[1:] / num[:-1]
    if (estimate > 0).all():
      return np.array([0, *estimate])
  return np.array([0, 0.5, 1, 1.5])  # KenLM's defaults, for too few n-grams to estimate


def _look_up(keys: np.ndarray, values: np.ndarray, queries_N: np.ndarray,
             missing: float) -> np.ndarray:
  """Returns the values of `queries_N` among the sorted `keys`, and `missing` for absent ones."""
  index_N = np.minimum(np.searchsorted(keys, queries_N), keys.size - 1)
  return np.where(keys[index_N] == queries_N, values[index_N], missing)
