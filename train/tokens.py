"""Documents of a source, tokenised once and kept on disk, and which of them are held out.

Letters: N documents of a store, U distinct documents. Stores are memory-mapped, so that they may be
larger than memory. A cache entry is a folder, written aside and renamed: it is whole or not there.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from train import sources
from train.config import Source
from train.tokenizer import Tokenizer

FORMAT = 1  # of stores and of what a tokenizer is trained on: raise it when either changes

_CHUNK_CHARACTERS = 2**20
_SAMPLE_BYTES = 4 * 10**6
# What a missing, truncated or scrambled entry can raise while it is read.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError)


@dataclasses.dataclass(frozen=True)
class Store:
  """A source's documents as tokens, in the source's order.

  Attributes:
    tokens: all documents' ids (uint16 or uint32), end to end, prompts first, no eos.
    offsets: int64 [N + 1]; document n is tokens[offsets[n]:offsets[n + 1]].
    prompt_tokens_N: how many of a document's tokens are its prompt's.
    bytes_N: UTF-8 bytes of each text, without its prompt.
    hashes_N: uint64, of prompt and text.
    domains_N, languages_N: indices into the names.
    domain_names, language_names: in order of first appearance.
    tally: what was read, and what could not be.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  prompt_tokens_N: np.ndarray
  bytes_N: np.ndarray
  hashes_N: np.ndarray
  domains_N: np.ndarray
  languages_N: np.ndarray
  domain_names: tuple[str, ...]
  language_names: tuple[str, ...]
  tally: sources.Tally

  @property
  def lengths_N(self) -> np.ndarray:
    """Tokens of each document, its prompt included."""
    return np.diff(self.offsets)


_ARRAYS = ("offsets", "prompt_tokens_N", "bytes_N", "hashes_N", "domains_N", "languages_N")


def open_store(source: Source, tokenizer: Tokenizer, cache: pathlib.Path, max_bad_fraction: float
               ) -> Store:
  """The tokens of `source`, from `cache` where they are there.

  Raises:
    ValueError: if the source is unusable (`sources.read`, `Tally.check`), or the cache cannot be
      written.
  """
  key = _key(sources.fingerprint(source), tokenizer.content_hash)
  store = _cached(
      cache / f"tokens-{key}", _read_store,
      lambda folder: _write_store(folder, source, tokenizer, max_bad_fraction))
  store.tally.check(source.path, max_bad_fraction)
  return store


def open_bpe(all_sources: Sequence[Source], vocab_size: int, heldout_fraction: float,
             cache: pathlib.Path, max_bad_fraction: float) -> Tokenizer:
  """A BPE trained on at most 4 MB of `all_sources`' training documents, from `cache` if there.

  Raises:
    ValueError: as `open_store`.
  """
  def train(folder: pathlib.Path) -> None:
    texts = _training_sample(all_sources, heldout_fraction, max_bad_fraction)
    Tokenizer.train_bpe(texts, vocab_size).save(folder / "tokenizer.json")

  key = _key(*map(sources.fingerprint, all_sources), vocab_size, heldout_fraction)
  return _cached(cache / f"bpe-{key}", lambda folder: Tokenizer.load(folder / "tokenizer.json"),
                 train)


def heldout_masks(
    hashes: Sequence[np.ndarray], domains: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
  """Which documents are kept from training.

  A document's hash decides, so that its copies stay together and nothing else matters, except that
  a domain of two or more different documents has at least one on either side. A domain of one is
  for training.

  Args:
    hashes: uint64 [N] of each store.
    domains: int [N] of each store, one numbering for all.
    share: of documents held out, 0..0.5; 0 for none at all.

  Returns:
    bool [N] for each store.
  """
  unique_U, inverse = np.unique(np.concatenate(hashes), return_inverse=True)
  domain = np.concatenate(domains)
  held_U = unique_U < np.uint64(int(share * 2**64))
  for name in np.unique(domain) if share else ():
    mine = np.unique(inverse[domain == name])
    if not held_U[mine].any():
      held_U[mine[0]] = True
    if held_U[mine].all():
      held_U[mine[-1]] = False
  return np.split(held_U[inverse], np.cumsum([len(one) for one in hashes])[:-1])


def _hash(document: sources.Document) -> int:
  content = f"{document.prompt}\0{document.text}".encode()
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _key(*parts) -> str:
  return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def _cached[T](folder: pathlib.Path, read: Callable[[pathlib.Path], T],
               write: Callable[[pathlib.Path], None]) -> T:
  """`read(folder)`, written first if it is not there or cannot be read."""
  try:
    return read(folder)
  except _UNREADABLE:
    is_broken = folder.exists()
    logging.info("Preparing %s, once", folder)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as beside:
      fresh, broken = pathlib.Path(beside, "fresh"), pathlib.Path(beside, "broken")
      fresh.mkdir()
      write(fresh)
      # Read before others can see it: what is mapped stays, whatever becomes of the folder.
      result = read(fresh)
      if is_broken:
        with contextlib.suppress(FileNotFoundError):
          folder.rename(broken)
      try:
        fresh.rename(folder)
      except OSError:
        if not folder.exists():  # not just another process that was faster
          raise
      return result
  except OSError as error:
    raise ValueError(f"the cache folder {folder.parent} cannot be written: {error}. Make room "
                     "there, or set data.cache_dir") from error


class _Names:
  """Numbers names in order of first appearance."""

  def __init__(self):
    self.ids: dict[str, int] = {}

  def __call__(self, name: str) -> int:
    return self.ids.setdefault(name, len(self.ids))


def _write_store(folder: pathlib.Path, source: Source, tokenizer: Tokenizer,
                 max_bad_fraction: float) -> None:
  tally, domains, languages = sources.Tally(), _Names(), _Names()
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  offsets, columns = [0], []
  with open(folder / "tokens.bin", "wb") as file:
    for chunk in _chunks(sources.read(source, tally)):
      prompts = tokenizer.encode_batch([document.prompt for document in chunk])
      texts = tokenizer.encode_batch([document.text for document in chunk])
      for document, prompt, text in zip(chunk, prompts, texts, strict=True):
        file.write(prompt.astype(dtype).tobytes() + text.astype(dtype).tobytes())
        offsets.append(offsets[-1] + len(prompt) + len(text))
        columns.append((len(prompt), len(document.text.encode()), _hash(document),
                        domains(document.domain), languages(document.language)))
  tally.check(source.path, max_bad_fraction)
  dtypes = (np.int64, np.int64, np.int64, np.uint64, np.int32, np.int32)
  for name, column, kind in zip(_ARRAYS, (offsets, *zip(*columns, strict=True)), dtypes,
                                strict=True):
    np.save(folder / f"{name}.npy", np.array(column, kind))
  (folder / "meta.json").write_text(json.dumps({
      "dtype": np.dtype(dtype).name, "num_documents": len(columns), "num_tokens": offsets[-1],
      "domain_names": list(domains.ids), "language_names": list(languages.ids),
      "tally": vars(tally)}))


def _chunks(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
  chunk, size = [], 0
  for document in documents:
    chunk.append(document)
    size += len(document.text) + len(document.prompt)
    if size >= _CHUNK_CHARACTERS:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _read_store(folder: pathlib.Path) -> Store:
  meta = json.loads((folder / "meta.json").read_text())
  arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
  num_tokens, tally = meta["num_tokens"], meta["tally"]
  tokens = np.memmap(folder / "tokens.bin", meta["dtype"], mode="r", shape=(num_tokens,))
  lengths = {len(array) - (name == "offsets") for name, array in arrays.items()}
  if lengths != {meta["num_documents"]} or arrays["offsets"][-1] != num_tokens:
    raise ValueError("arrays of different documents")
  return Store(
      # A plain array: slices of a memmap are several times slower.
      tokens=np.asarray(tokens), **arrays, domain_names=tuple(meta["domain_names"]),
      language_names=tuple(meta["language_names"]),
      tally=sources.Tally(tally["good"], sources.collections.Counter(tally["bad"]),
                          tally["examples"]))


def _training_sample(
    all_sources: Sequence[Source], heldout_fraction: float, max_bad_fraction: float,
) -> Iterator[str]:
  """Training documents of every source, the same ones each time, about equally many bytes."""
  names, hashes, domains, sizes = _Names(), [], [], []
  for source in all_sources:
    tally = sources.Tally()
    columns = [(_hash(document), names(document.domain),
                len((document.prompt + document.text).encode()))
               for document in sources.read(source, tally)]
    tally.check(source.path, max_bad_fraction)
    hash_N, domain_N, size_N = zip(*columns, strict=True)
    hashes.append(np.array(hash_N, np.uint64))
    domains.append(np.array(domain_N))
    sizes.append(np.array(size_N))
  held = heldout_masks(hashes, domains, heldout_fraction)
  limit = _SAMPLE_BYTES // len(all_sources)
  for source, hash_N, size_N, held_N in zip(all_sources, hashes, sizes, held, strict=True):
    order = np.argsort(hash_N)[::-1]  # the low hashes are held out
    order = order[~held_N[order]]
    before = np.cumsum(size_N[order]) - size_N[order]
    chosen = set(order[before < limit].tolist())
    for index, document in enumerate(sources.read(source)):
      if index in chosen:
        yield (document.prompt + document.text)[:limit]
