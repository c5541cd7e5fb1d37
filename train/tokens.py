"""The documents of a source, tokenised once and cached on disk, and which of them are held out.

Stores are memory-mapped, so that they may be larger than memory. A cache entry is a folder, which
is written under another name and then renamed, so that it is either complete or absent.

Letters: N documents of a store, U distinct documents.
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
from train.chat import ChatTemplate
from train.config import Source
from train.tokenizer import Tokenizer

# Version of the stores' format and of the choice of what a BPE is trained on, part of cache keys.
# Raise it when either changes.
FORMAT = 1

_CHUNK_CHARACTERS = 2**20  # text that is tokenised at a time
_SAMPLE_BYTES = 4 * 10**6  # text on which a BPE is trained
# What reading a missing, truncated or corrupted cache entry can raise.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError)


@dataclasses.dataclass(frozen=True)
class Store:
  """The documents of a source as tokens, in the source's order.

  Attributes:
    tokens: concatenated ids of all documents, uint16 or uint32; each document is its prompt's and
      its text's tokens, without eos.
    offsets: int64 [N + 1]; document n is tokens[offsets[n]:offsets[n + 1]].
    prompt_tokens_N: int64, number of tokens of each document's prompt.
    bytes_N: int64, number of UTF-8 bytes of each text, without its prompt.
    hashes_N: uint64, hash of each document's prompt and text.
    domains_N, languages_N: int32, index of each document's domain in `domain_names`, and of its
      language in `language_names`.
    domain_names, language_names: distinct names in the order of their first appearance.
    tally: counts of the documents that were read and of those that are unusable.
    fingerprint: hash of the source's content, see `sources.fingerprint`.
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
  fingerprint: str = ""

  @property
  def lengths_N(self) -> np.ndarray:
    """The number of tokens of each document, its prompt included."""
    return np.diff(self.offsets)


_ARRAYS = ("offsets", "prompt_tokens_N", "bytes_N", "hashes_N", "domains_N", "languages_N")


def open_store(source: Source, tokenizer: Tokenizer, cache: pathlib.Path, max_bad_fraction: float,
               template: str | ChatTemplate = "plain") -> Store:
  """Returns the tokens of `source`, from the cache or, if they are not there, made and cached.

  Args:
    source: the documents.
    tokenizer: encodes them.
    cache: the cache folder.
    max_bad_fraction: the largest tolerated fraction of unusable documents.
    template: name of the template of prompts, or the chat template of a model's folder.

  Raises:
    ValueError: if the source is unusable (`sources.read`, `Tally.check`), or if the cache cannot be
      written.
  """
  fingerprint = sources.fingerprint(source, template)
  key = _key(fingerprint, tokenizer.content_hash)
  store = _cached(
      cache / f"tokens-{key}", _read_store,
      lambda folder: _write_store(folder, source, tokenizer, max_bad_fraction, template))
  store.tally.check(source.path, max_bad_fraction)
  return dataclasses.replace(store, fingerprint=fingerprint)


def open_bpe(all_sources: Sequence[Source], vocab_size: int, heldout_fraction: float,
             cache: pathlib.Path, max_bad_fraction: float, template: str = "plain") -> Tokenizer:
  """Returns a BPE trained on at most 4 MB of training documents, from the cache if it is there.

  Args:
    all_sources: the sources, each of which contributes about the same number of bytes.
    vocab_size: largest vocabulary, special tokens included.
    heldout_fraction: fraction of the documents that are held out, and not used here either.
    cache: the cache folder.
    max_bad_fraction: the largest tolerated fraction of unusable documents of a source.
    template: name of the template of prompts.

  Raises:
    ValueError: if a source is unusable, or if the cache cannot be written.
  """
  def train(folder: pathlib.Path) -> None:
    texts = _training_sample(all_sources, heldout_fraction, max_bad_fraction, template)
    Tokenizer.train_bpe(texts, vocab_size).save(folder / "tokenizer.json")

  fingerprints = [sources.fingerprint(source, template) for source in all_sources]
  key = _key(*fingerprints, vocab_size, heldout_fraction)
  return _cached(cache / f"bpe-{key}", lambda folder: Tokenizer.load(folder / "tokenizer.json"),
                 train)


def heldout_masks(
    hashes: Sequence[np.ndarray], domains: Sequence[np.ndarray], fraction: float,
) -> list[np.ndarray]:
  """Returns which documents are held out of training.

  Only the hash of a document decides, so that all of its copies are treated alike. As an exception,
  a domain of two or more different documents has at least one for training and at least one held
  out. The only document of a domain is for training.

  Args:
    hashes: hashes of the documents of each store, uint64 [N].
    domains: domains of the documents of each store, int [N], numbered alike in all stores.
    fraction: expected fraction of the documents that is held out, 0..0.5; 0 holds out none at all.

  Returns:
    For each store bool [N], True for held-out documents.
  """
  unique_U, inverse = np.unique(np.concatenate(hashes), return_inverse=True)
  domain = np.concatenate(domains)
  held_U = unique_U < np.uint64(int(fraction * 2**64))
  for name in np.unique(domain) if fraction else ():
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
  """Returns `read(folder)`, after writing the folder if it is absent or unreadable."""
  try:
    return read(folder)
  except _UNREADABLE:
    is_broken = folder.exists()
    logging.info("Preparing %s, which is done only once", folder)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as scratch:
      fresh, broken = pathlib.Path(scratch, "fresh"), pathlib.Path(scratch, "broken")
      fresh.mkdir()
      write(fresh)
      # Read before other processes can see it, because what is mapped then stays valid, whatever
      # they do with the folder.
      result = read(fresh)
      if is_broken:
        with contextlib.suppress(FileNotFoundError):
          folder.rename(broken)
      try:
        fresh.rename(folder)
      except OSError:
        if not folder.exists():  # else another process has written the same entry first
          raise
      return result
  except OSError as error:
    raise ValueError(f"the cache folder {folder.parent} cannot be written: {error}. Free space "
                     "there, or set data.cache_dir") from error


class _Names:
  """Numbers names in the order of their first appearance."""

  def __init__(self):
    self.ids: dict[str, int] = {}

  def __call__(self, name: str) -> int:
    return self.ids.setdefault(name, len(self.ids))


def _write_store(folder: pathlib.Path, source: Source, tokenizer: Tokenizer,
                 max_bad_fraction: float, template: str | ChatTemplate) -> None:
  tally, domains, languages = sources.Tally(), _Names(), _Names()
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  offsets, columns = [0], []
  with open(folder / "tokens.bin", "wb") as file:
    for chunk in _chunks(sources.read(source, tally, template)):
      for document, (prompt, text) in zip(chunk, _encoded(chunk, tokenizer), strict=True):
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


def _encoded(chunk: list[sources.Document], tokenizer: Tokenizer,
             ) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns the tokens of each document's prompt and text."""
  plain = [document for document in chunk if document.tokens is None]
  pairs = zip(tokenizer.encode_batch([document.prompt for document in plain]),
              tokenizer.encode_batch([document.text for document in plain]), strict=True)
  return [next(pairs) if document.tokens is None else document.tokens for document in chunk]


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
    raise ValueError("the arrays have different numbers of documents")
  return Store(
      # A plain array, because slicing a memmap is several times slower.
      tokens=np.asarray(tokens), **arrays, domain_names=tuple(meta["domain_names"]),
      language_names=tuple(meta["language_names"]),
      tally=sources.Tally(tally["good"], sources.collections.Counter(tally["bad"]),
                          tally["examples"]))


def _training_sample(
    all_sources: Sequence[Source], heldout_fraction: float, max_bad_fraction: float,
    template: str = "plain") -> Iterator[str]:
  """Yields training documents, of every source about equally many bytes.

  Their hashes decide which ones, so that the sample is always the same.
  """
  names, hashes, domains, sizes = _Names(), [], [], []
  for source in all_sources:
    tally = sources.Tally()
    columns = [(_hash(document), names(document.domain),
                len((document.prompt + document.text).encode()))
               for document in sources.read(source, tally, template)]
    tally.check(source.path, max_bad_fraction)
    hash_N, domain_N, size_N = zip(*columns, strict=True)
    hashes.append(np.array(hash_N, np.uint64))
    domains.append(np.array(domain_N))
    sizes.append(np.array(size_N))
  held = heldout_masks(hashes, domains, heldout_fraction)
  limit = _SAMPLE_BYTES // len(all_sources)
  for source, hash_N, size_N, held_N in zip(all_sources, hashes, sizes, held, strict=True):
    order = np.argsort(hash_N)[::-1]  # from the highest hash, because the lowest are held out
    order = order[~held_N[order]]
    before = np.cumsum(size_N[order]) - size_N[order]
    chosen = set(order[before < limit].tolist())
    for index, document in enumerate(sources.read(source, template=template)):
      if index in chosen:
        yield (document.prompt + document.text)[:limit]
