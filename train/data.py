"""Turns tokens into training rows: fill-in-the-middle (FIM), packing, mixing, and batches.

Rows have a global index. Row i is the same whatever the batch size, the number of hosts and the
position at which reading starts, so that a position in the data is a single integer.

Letters: N documents, F documents rearranged for FIM, R rows of an epoch or of a domain, T = seq_len
tokens predicted by a row, L = T + 1 tokens of a row, B rows of a batch, S seeds.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np
from absl import logging

from train.chat import ChatTemplate, PromptFormat, require_chat
from train.config import DataConfig, TrainConfig
from train.templates import CHAT
from train.tokenizer import Tokenizer
from train.tokens import Store, heldout_masks, open_bpe, open_store

Rows = dict[str, np.ndarray]

# Uses of random bits. The use is part of the key from which the bits are made.
_DOCUMENTS, _ROWS, _FIM, _CUTS = range(4)
_ENDLESS = 2**48  # the number of rows reported to grain; in fact there is always a next epoch


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Validation rows of a domain.

  They hold held-out documents in the order of their hashes, up to `DataConfig.heldout_bytes`. Each
  is whole, appears once, is not rearranged for FIM and is followed by eos. Every token is predicted
  once.

  Attributes:
    tokens: int32 [R, L], as in `TrainingRows`.
    loss_mask: bool [R, T], as in `TrainingRows`.
    segments: int32 [R, T], as in `TrainingRows`.
    num_bytes: UTF-8 bytes of the documents' texts, prompts not included. Bits per byte are the
      rows' summed loss in nats / ln 2 / num_bytes.
    num_documents: number of documents in the rows.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  segments: np.ndarray
  num_bytes: int
  num_documents: int


@dataclasses.dataclass(frozen=True)
class Data:
  """The training and validation data of a run.

  Attributes:
    cfg: the configuration from which the data was loaded.
    tokenizer: the tokenizer that encoded all documents.
    domains: names of the domains; "domain" of a row is an index into them.
    heldout: validation rows by domain name, for the domains that have held-out documents.
    stores: tokenised documents of each source, in the order of `cfg.sources`.
    training_documents: int64 [N] for each store, indices of the documents that are not held out.
  """

  cfg: DataConfig
  tokenizer: Tokenizer
  domains: tuple[str, ...]
  heldout: dict[str, HeldOut]
  stores: tuple[Store, ...]
  training_documents: tuple[np.ndarray, ...]

  def train(self, seed: int) -> "TrainingRows":
    """Returns the training rows in the order that `seed` >= 0 determines."""
    return TrainingRows(self, seed)

  def batches(self, seeds: Sequence[int], start: int, sizes: Iterable[int], **sharing
              ) -> Iterator[Rows]:
    """Returns batches of the rows of one seed or, with a leading axis of seeds, of several.

    Args:
      seeds: determine the order of the rows.
      start: index of the first row.
      sizes: rows of each batch, over all processes.
      **sharing: further keyword arguments of `train.data.batches`.
    """
    rows = [self.train(seed) for seed in seeds]
    return batches(rows if len(rows) > 1 else rows[0], start, sizes, **sharing)

  def epochs(self, train: TrainConfig) -> dict[str, float]:
    """Returns how many times a run reads each source, by its path.

    It is counted for full batches, although batches may ramp up.
    """
    counts = self.train(train.seed).epochs(train.steps * train.batch_size)
    return {source.path: count for source, count in zip(self.cfg.sources, counts, strict=True)}

  def fingerprints(self) -> dict[str, str]:
    """Returns a hash of the content of each source, by its path."""
    return {source.path: store.fingerprint
            for source, store in zip(self.cfg.sources, self.stores, strict=True)}

  def summary(self) -> dict:
    """Returns counts for reports.

    Of each source: documents, bytes, tokens and unusable rows. Of each domain: distinct documents,
    their bytes and their tokens, for training and held out.
    """
    return {
        "tokenizer": {"name": self.cfg.tokenizer, "vocab_size": self.tokenizer.vocab_size,
                      "content_hash": self.tokenizer.content_hash},
        "sources": [self._source_summary(i) for i in range(len(self.stores))],
        "domains": {name: self._domain_summary(i) for i, name in enumerate(self.domains)},
    }

  def _source_summary(self, index: int) -> dict:
    store, source = self.stores[index], self.cfg.sources[index]
    languages = np.bincount(store.languages_N, store.bytes_N)
    return {
        "path": source.path, "weight": source.weight, "documents": store.tally.good,
        "training_documents": len(self.training_documents[index]),
        "bytes": int(store.bytes_N.sum()), "tokens": len(store.tokens),
        "bytes_by_language": dict(zip(store.language_names, map(int, languages), strict=True)),
        "bad": dict(store.tally.bad),
        "bad_examples": [one for few in store.tally.examples.values() for one in few],
    }

  def _domain_summary(self, domain: int) -> dict:
    columns = []
    for store, documents_N in zip(self.stores, self.training_documents, strict=True):
      mine = documents_N[_domain_ids(self.domains, store)[store.domains_N[documents_N]] == domain]
      columns.append(np.stack([store.hashes_N[mine], store.bytes_N[mine].astype(np.uint64),
                               store.lengths_N[mine].astype(np.uint64) + np.uint64(1)]))
    hashes_N, bytes_N, tokens_N = np.concatenate(columns, axis=1)
    _, first = np.unique(hashes_N, return_index=True)
    heldout = self.heldout.get(self.domains[domain])
    return {
        "training_documents": len(first), "training_bytes": int(bytes_N[first].sum()),
        "training_tokens": int(tokens_N[first].sum()),
        "heldout_documents": heldout.num_documents if heldout else 0,
        "heldout_bytes": heldout.num_bytes if heldout else 0,
        "heldout_tokens": int(heldout.loss_mask.sum()) if heldout else 0,
    }


def load(cfg: DataConfig, form: PromptFormat | None = None) -> Data:
  """Reads, tokenises (once; see `DataConfig.cache_dir`) and splits the sources that `cfg` names.

  Args:
    cfg: the sources, and how they are turned into training sequences.
    form: how the model from which training starts is prompted, for the template "chat".

  Raises:
    ValueError: if a source, the tokenizer or too many documents are unusable, if a source has no
      document left for training, if too many rows hold no token to learn, if `fim_rate` needs
      tokens that the tokenizer does not have, or if the template is the model's own chat template,
      and there is none or it does not work.
  """
  if cfg.template == CHAT:
    require_chat(form)
  tokenizer = _tokenizer(cfg)
  template = cfg.template
  if template == CHAT:
    template = ChatTemplate(form, tokenizer, cfg.system)
    template.conversation([{"role": "user", "content": "1+1"},
                           {"role": "assistant", "content": "2"}])
  if cfg.fim_rate and None in (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end):
    raise ValueError(f"data.fim_rate={cfg.fim_rate:g} needs fill-in-the-middle tokens, which "
                     f"tokenizer {cfg.tokenizer} does not have: set data.fim_rate=0")
  stores = tuple(
      open_store(source, tokenizer, cfg.cache_folder, cfg.max_bad_fraction, template)
      for source in cfg.sources)
  domains = tuple(dict.fromkeys(name for store in stores for name in store.domain_names))
  domains_by_store = [_domain_ids(domains, store)[store.domains_N] for store in stores]
  held = heldout_masks([store.hashes_N for store in stores], domains_by_store, cfg.heldout_fraction)
  for source, held_N in zip(cfg.sources, held, strict=True):
    if held_N.all():
      raise ValueError(f"data source {source.path}: all of its {len(held_N)} documents are held "
                       "out: add documents, or lower data.heldout_fraction")
  heldout = {}
  for domain, name in enumerate(domains):
    chosen = [(s, n) for s, held_N in enumerate(held)
              for n in np.flatnonzero(held_N & (domains_by_store[s] == domain))]
    if chosen:
      heldout[name] = _heldout(cfg, tokenizer, stores, chosen)
  training_documents = tuple(np.flatnonzero(~held_N) for held_N in held)
  loaded = Data(cfg, tokenizer, domains, heldout, stores, training_documents)
  _check_learned(loaded)
  return loaded


def _check_learned(data: Data) -> None:
  """Warns of rows in which no token is learned, and raises ValueError if there are too many."""
  for index, source in enumerate(data.cfg.sources):
    rows = _SourceRows(data, index, seed=0)
    if not (empty := rows.num_without_learned()):
      continue
    longest = int(data.stores[index].prompt_tokens_N.max())
    message = (f"data source {source.path}: {empty} of {rows.rows_per_epoch} rows of "
               f"data.seq_len={data.cfg.seq_len} tokens hold nothing to learn, as prompts have up "
               f"to {longest} tokens")
    if empty > data.cfg.max_bad_fraction * rows.rows_per_epoch:
      raise ValueError(
          f"{message}; that is more than data.max_bad_fraction={data.cfg.max_bad_fraction:g} "
          "allows. Raise data.seq_len, shorten the prompts, or raise data.max_bad_fraction")
    logging.warning("%s", message)


def _domain_ids(domains: Sequence[str], store: Store) -> np.ndarray:
  """Returns the index in `domains` of each of the store's domain_names, int32."""
  return np.array([domains.index(name) for name in store.domain_names], np.int32)


def _tokenizer(cfg: DataConfig) -> Tokenizer:
  if cfg.tokenizer == "bytes":
    return Tokenizer.bytes()
  if cfg.tokenizer == "deepseek":
    return Tokenizer.deepseek()
  if cfg.tokenizer == "bpe":
    return open_bpe(cfg.sources, cfg.bpe_vocab_size, cfg.heldout_fraction,
                    cfg.cache_folder, cfg.max_bad_fraction, cfg.template)
  try:
    return Tokenizer.load(cfg.tokenizer)
  except ValueError as error:
    raise ValueError(f"{error}; data.tokenizer may also be bytes, bpe or deepseek") from error


def _heldout(cfg: DataConfig, tokenizer: Tokenizer, stores: Sequence[Store],
             chosen: Sequence[tuple[int, int]]) -> HeldOut:
  """Returns the validation rows of the `chosen` (index of the store, index of the document).

  They have at most `cfg.heldout_bytes` of text (0 for no limit), but at least one document.
  """
  # Keyed by hash, so that copies of a document count once.
  by_hash = {stores[s].hashes_N[n]: (stores[s], n) for s, n in chosen}
  eos = np.array([tokenizer.eos])
  tokens, mask, segments, num_bytes = [eos], [], [], 0
  for number, (_, (store, n)) in enumerate(sorted(by_hash.items())):
    if number and cfg.heldout_bytes and num_bytes + store.bytes_N[n] > cfg.heldout_bytes:
      break
    num_bytes += int(store.bytes_N[n])
    start, end = store.offsets[n], store.offsets[n + 1]
    tokens += [store.tokens[start:end], eos]
    mask.append(np.arange(end - start + 1) >= store.prompt_tokens_N[n])
    segments.append(np.full(end - start + 1, number + 1))
  num_tokens = sum(map(len, mask))
  num_rows = -(-num_tokens // cfg.seq_len)

  def padded(parts, value, dtype):
    rest = num_rows * cfg.seq_len - num_tokens
    return np.concatenate([*parts, np.full(rest, value)]).astype(dtype)

  windows = np.lib.stride_tricks.sliding_window_view(
      padded(tokens, tokenizer.pad, np.int32), cfg.seq_len + 1)[::cfg.seq_len]
  segments_RT = padded(segments, 0, np.int32).reshape(num_rows, -1)
  return HeldOut(
      windows.copy(), padded(mask, False, bool).reshape(num_rows, -1),
      np.where(segments_RT > 0, segments_RT - segments_RT[:, :1] + 1, 0), num_bytes, len(segments))


class TrainingRows:
  """The endless sequence of training rows of one seed: `rows[i]` exists for every i >= 0.

  A row is a dict of
    tokens: int32 [T + 1]; the model reads the first T and predicts the last T;
    loss_mask: bool [T], which predictions are trained on: not those of prompts and padding;
    segments: int32 [T], the number, from 1, of the document that each *prediction* belongs to; 0 is
      padding. An eos that is read thus belongs to the document after it, so that no document's loss
      depends on its neighbours if attention does not cross segments;
    domain: int32 scalar, the domain of most of the row's predictions.

  Sources are mixed by weight. Each source yields one epoch after another. In an epoch its documents
  come in a new order, a fraction `fim_rate` of them rearranged for FIM, each followed by eos; this
  stream is cut into rows, which are then shuffled. Consecutive rows of the stream overlap by one
  token, so that every token is predicted exactly once per epoch.
  """

  def __init__(self, data: Data, seed: int):
    self._sources = [_SourceRows(data, index, seed) for index in range(len(data.stores))]
    self._weights = [source.weight for source in data.cfg.sources]
    self._mixed = grain.MapDataset.mix(
        [grain.MapDataset.source(source) for source in self._sources], self._weights)

  def __len__(self) -> int:
    return len(self._mixed)

  def __getitem__(self, index: int) -> Rows:
    return self._mixed[index]

  def epochs(self, position: int) -> list[float]:
    """Returns how many epochs of each of the config's sources the rows before `position` hold."""
    return [position * weight / sum(self._weights) / source.rows_per_epoch
            for weight, source in zip(self._weights, self._sources, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Epoch:
  """The layout of one epoch's token stream.

  Attributes:
    documents_N: int64 [N], indices of the store's documents, in the order of the stream.
    bounds: int64 [N + 1], the positions in the stream at which the documents begin, and its end.
    cuts_N2: int64 [N, 2], the positions in each document at which its middle begins and ends,
      (-1, -1) if the document is not rearranged for FIM.
    rows_R: int64 [R], indices of the stream's rows, in the order in which they are given.
  """

  documents_N: np.ndarray
  bounds: np.ndarray
  cuts_N2: np.ndarray
  rows_R: np.ndarray


class _SourceRows:
  """The packed rows of all epochs of one source, with random access for grain."""

  def __init__(self, data: Data, index: int, seed: int):
    self._store, self._documents_N = data.stores[index], data.training_documents[index]
    self._domain_ids = _domain_ids(data.domains, self._store)
    self._tokenizer, self._seq_len = data.tokenizer, data.cfg.seq_len
    self._key = (seed, index)
    self._may_fim_N = np.flatnonzero(self._store.prompt_tokens_N[self._documents_N] == 0)
    # An exact number, not a coin toss per document, so that all epochs have equally many rows.
    self._num_fim = round(data.cfg.fim_rate * len(self._may_fim_N))
    num_tokens = (int(self._store.lengths_N[self._documents_N].sum())
                  + len(self._documents_N) + 3 * self._num_fim)
    self.rows_per_epoch = -(-num_tokens // self._seq_len)
    self._epoch = functools.lru_cache(maxsize=2)(self._plan)  # prefetching may be an epoch ahead

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Rows:
    epoch, place = divmod(int(index), self.rows_per_epoch)
    plan = self._epoch(epoch)
    return self._row(plan, int(plan.rows_R[place]) * self._seq_len)

  def num_without_learned(self) -> int:
    """Returns the number of rows of the first epoch in which no token is learned."""
    plan = self._epoch(0)
    prompts_N = self._store.prompt_tokens_N[plan.documents_N]
    learned_N = np.diff(plan.bounds) - prompts_N
    before_N = np.cumsum(learned_N) - learned_N
    edges = np.minimum(np.arange(self.rows_per_epoch + 1) * self._seq_len, plan.bounds[-1])
    # The document in which the token before each edge lies, and the learned tokens up to there.
    n = np.clip(np.searchsorted(plan.bounds, edges, "left") - 1, 0, None)
    learned = before_N[n] + np.maximum(edges - plan.bounds[n] - prompts_N[n], 0)
    return int((np.diff(learned) == 0).sum())

  def _plan(self, epoch: int) -> _Epoch:
    key, documents_N = (*self._key, epoch), self._documents_N
    chosen = self._may_fim_N[_shuffled(len(self._may_fim_N), *key, _FIM)[:self._num_fim]]
    lengths_N = self._store.lengths_N[documents_N]
    cuts_N2 = np.full((len(documents_N), 2), -1)
    # Two cuts at random (V3 section 4.1): at any token boundary, the document's ends included.
    bits_F2 = _bits(2 * len(chosen), *key, _CUTS).reshape(-1, 2)
    cuts_N2[chosen] = np.sort(bits_F2 % (lengths_N[chosen, None] + 1).astype(np.uint64), axis=1)
    order = _shuffled(len(documents_N), *key, _DOCUMENTS)
    spans_N = (lengths_N + 1 + 3 * (cuts_N2[:, 0] >= 0))[order]
    return _Epoch(documents_N[order], np.concatenate([[0], np.cumsum(spans_N)]), cuts_N2[order],
                  _shuffled(self.rows_per_epoch, *key, _ROWS))

  def _row(self, plan: _Epoch, begin: int) -> Rows:
    """Returns the row whose first prediction is the token at position `begin` of the stream."""
    seq_len, store = self._seq_len, self._store
    end = min(begin + seq_len, int(plan.bounds[-1]))
    tokens_L = np.full(seq_len + 1, self._tokenizer.pad, np.int32)
    tokens_L[0] = self._tokenizer.eos  # the token before a row that begins with a document
    mask_T, segments_T = np.zeros(seq_len, bool), np.zeros(seq_len, np.int32)
    by_domain = np.zeros(len(self._domain_ids), np.int64)
    first = int(np.searchsorted(plan.bounds, begin, "right")) - 1
    at, number = begin, 0
    while at < end:
      n = plan.documents_N[first + number]
      start, stop = int(plan.bounds[first + number]), min(int(plan.bounds[first + number + 1]), end)
      since = max(at - 1, start)  # a row also holds the token before its first prediction
      _copy(self._pieces(n, plan.cuts_N2[first + number]), since - start,
            tokens_L[since - begin + 1:stop - begin + 1])
      mask_T[max(at, start + int(store.prompt_tokens_N[n])) - begin:stop - begin] = True
      number += 1
      segments_T[at - begin:stop - begin] = number
      by_domain[store.domains_N[n]] += stop - at
      at = stop
    return {"tokens": tokens_L, "loss_mask": mask_T, "segments": segments_T,
            "domain": self._domain_ids[by_domain.argmax()]}

  def _pieces(self, n: int, cuts: np.ndarray) -> list[np.ndarray]:
    """Returns document n and its eos, as views of its tokens in the order of the stream."""
    tokenizer, store = self._tokenizer, self._store
    tokens = store.tokens[store.offsets[n]:store.offsets[n + 1]]
    one, two = cuts
    if one < 0:
      return [tokens, np.array([tokenizer.eos])]
    # PSM: prefix, suffix, middle (V3 section 4.1).
    return [np.array([tokenizer.fim_begin]), tokens[:one], np.array([tokenizer.fim_hole]),
            tokens[two:], np.array([tokenizer.fim_end]), tokens[one:two],
            np.array([tokenizer.eos])]


def _copy(pieces: Sequence[np.ndarray], begin: int, out: np.ndarray) -> None:
  """Fills `out` with the concatenated pieces from position `begin` on."""
  filled = 0
  for piece in pieces:
    part = piece[begin:begin + len(out) - filled]
    out[filled:filled + len(part)] = part
    filled += len(part)
    begin = max(0, begin - len(piece))


def _bits(count: int, *key: int) -> np.ndarray:
  """Returns random bits, uint64 [count], as a function of `key`.

  Philox' raw bits, because NumPy guarantees that they never change, unlike a Generator's values.
  """
  return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _shuffled(count: int, *key: int) -> np.ndarray:
  """Returns a random permutation of 0..count - 1 as a function of `key`."""
  return np.argsort(_bits(count, *key), kind="stable")


class _Batches:
  """This process' part of every batch, with random access by step for grain."""

  def __init__(self, rows: Sequence[TrainingRows], start: int, sizes: Sequence[int], process: int,
               num_processes: int):
    self._rows, self._sizes = rows, np.array(sizes) // num_processes
    self._begins = start + np.cumsum(sizes) - sizes + process * self._sizes

  def __len__(self) -> int:
    return len(self._sizes)

  def __getitem__(self, step: int) -> Rows:
    begin, size = int(self._begins[step]), int(self._sizes[step])
    return _stack([_stack([rows[i] for i in range(begin, begin + size)]) for rows in self._rows])


def _stack(rows: Sequence[Rows]) -> Rows:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    rows: TrainingRows | Sequence[TrainingRows], start: int, sizes: Iterable[int], *,
    process: int = 0, num_processes: int = 1, prefetch: int = 4) -> Iterator[Rows]:
  """Returns batches of consecutive rows, read ahead by grain's threads.

  Args:
    rows: the rows of one seed, or a sequence with the rows of several seeds.
    start: index of the first row; after s batches the position is start + sum(sizes[:s]).
    sizes: number of rows of each batch, over all processes.
    process, num_processes: which part of each batch to return: process p of num_processes gets the
      p-th block of consecutive rows.
    prefetch: number of batches that are read ahead.

  Returns:
    An iterator over len(sizes) dicts with the stacked arrays of rows: [B / num_processes, ...] or,
    for a sequence of S seeds, [S, B / num_processes, ...].

  Raises:
    ValueError: if a size is not positive or does not divide among the processes.
  """
  sizes = list(sizes)
  if bad := [size for size in sizes if size <= 0 or size % num_processes]:
    raise ValueError(f"a batch of {bad[0]} rows does not divide among {num_processes} processes: "
                     "choose a batch size that is a positive multiple of their number")
  single = isinstance(rows, TrainingRows)
  source = _Batches([rows] if single else rows, start, sizes, process, num_processes)
  dataset = grain.MapDataset.source(source).to_iter_dataset(
      grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch))
  return ({name: array[0] if single else array for name, array in batch.items()}
          for batch in dataset)
