"""What a language model's bits per byte are compared with, on the same bytes.

gzip knows nothing but the held-out bytes; the n-gram model learns from the training bytes that the
language model saw. N counts positions, G distinct n-grams and C distinct contexts.
"""

import gzip
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def gzip_bits_per_byte(heldout: bytes) -> float:
  """Bits of `gzip -9` of all of `heldout` at once, header included, per byte of it.

  Raises:
    ValueError: there are no bytes.
  """
  _require_bytes("heldout", heldout)
  return 8 * len(gzip.compress(heldout, 9)) / len(heldout)


class _Level(NamedTuple):
  """N-grams of one length and the contexts, a byte shorter, that they begin with; keys sorted."""

  grams_G: np.ndarray
  probability_G: np.ndarray  # without what the next shorter context adds
  contexts_C: np.ndarray
  backoff_C: np.ndarray  # share of the next shorter context


class NGram:
  """Interpolated modified Kneser-Ney over bytes (Chen and Goodman, TR-10-98, section 3).

  A byte is predicted from the `order - 1` bytes before it, and where a document has fewer, from
  those. The shortest context falls back on 1/256 for every byte, so that the 256 probabilities
  after any context are positive and sum to 1.

  Attributes:
    order: bytes of an n-gram, the predicted one included; 1..8, as many as a uint64 holds.
  """

  def __init__(self, order: int = 5):
    if not 1 <= order <= 8:
      raise ValueError(f"NGram.order={order} must lie in 1..8, as many bytes as a uint64 holds")
    self.order = order
    self._levels: list[_Level] = []

  def fit(self, train: bytes | Sequence[bytes]) -> "NGram":
    """Learns from `train`, a document or several, and forgets what it knew; returns itself.

    Raises:
      ValueError: there are no bytes.
    """
    documents = [train] if isinstance(train, bytes) else train
    _require_bytes("train", b"".join(documents))
    order = min(self.order, max(map(len, documents)))
    packed_N, length_N = _pack(documents, order)
    distinct = [np.unique(_last(packed_N[length_N >= length], length), return_counts=True)
                for length in range(1, order + 1)]
    # Below the highest order a gram counts the bytes it was seen after, not how often it was seen.
    follows = [np.unique(_last(longer_G, length), return_counts=True)
               for length, (longer_G, _) in enumerate(distinct[1:], start=1)]
    self._levels = [_discounted(*counted) for counted in (*follows, distinct[-1])]
    return self

  def next_byte(self, context: bytes) -> np.ndarray:
    """Probabilities (256,) of the byte after `context`, of which the last `order - 1` bytes count.

    Raises:
      ValueError: `fit` was not called.
    """
    packed_N, length_N = _pack([context + b"\0"], self.order)
    return self._probability(packed_N[-1] + np.arange(256, dtype=np.uint64),
                             np.full(256, length_N[-1]))

  def bits_per_byte(self, heldout: bytes) -> float:
    """Mean of -log2 of the probability of every byte of `heldout`, taken as one document.

    Raises:
      ValueError: there are no bytes, or `fit` was not called.
    """
    _require_bytes("heldout", heldout)
    return float(-np.log2(self._probability(*_pack([heldout], self.order))).mean())

  def _probability(self, packed_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Probability of each last byte given those before it, of `length_N` bytes in all."""
    if not self._levels:
      raise ValueError("NGram has seen no training bytes: call fit first")
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
  """At every position the last `order` bytes, the newest lowest, and how many are the document's.
  """
  bytes_N = np.frombuffer(b"".join(documents), np.uint8)
  packed_N = np.zeros(bytes_N.size, np.uint64)
  for back in range(min(order, bytes_N.size)):
    packed_N[back:] |= bytes_N[:bytes_N.size - back].astype(np.uint64) << np.uint64(8 * back)
  sizes = np.array([len(document) for document in documents])
  begins_N = np.repeat(np.cumsum(sizes) - sizes, sizes)
  return packed_N, np.minimum(np.arange(bytes_N.size) - begins_N + 1, order)


def _last(packed_N: np.ndarray, length: int) -> np.ndarray:
  return packed_N & np.uint64(2**(8 * length) - 1)


def _discounted(grams_G: np.ndarray, counts_G: np.ndarray) -> _Level:
  """Takes from every count what lower orders get to distribute, and normalizes by context."""
  discount_G = _discounts(counts_G)[np.minimum(counts_G, 3)]
  contexts_G = grams_G >> np.uint64(8)
  contexts_C, first_C, grams_C = np.unique(contexts_G, return_index=True, return_counts=True)
  totals_C = np.add.reduceat(counts_G, first_C)
  return _Level(grams_G, (counts_G - discount_G) / np.repeat(totals_C, grams_C),
                contexts_C, np.add.reduceat(discount_G, first_C) / totals_C)


def _discounts(counts_G: np.ndarray) -> np.ndarray:
  """Discounts (4,) of counts 0, 1, 2, and 3 or more, estimated from counts of counts 1..4."""
  num = np.bincount(np.minimum(counts_G, 5), minlength=5)[1:5].astype(float)
  if num.all():
    steps = np.arange(1, 4)
    estimate = steps - (steps + 1) * num[0] / (num[0] + 2 * num[1]) * num[1:] / num[:-1]
    if (estimate > 0).all():
      return np.array([0, *estimate])
  return np.array([0, 0.5, 1, 1.5])  # too few grams to tell; KenLM's choice then


def _look_up(keys: np.ndarray, values: np.ndarray, wanted_N: np.ndarray,
             missing: float) -> np.ndarray:
  place_N = np.minimum(np.searchsorted(keys, wanted_N), keys.size - 1)
  return np.where(keys[place_N] == wanted_N, values[place_N], missing)
