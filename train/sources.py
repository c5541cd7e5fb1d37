"""Reads documents from files. Those that cannot be used are counted and reported.

Everything is streamed: at most one block of a text file, one line of JSONL, or one batch of Parquet
rows or ArrayRecord records is in memory.
"""

import collections
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module

from train import corpora
from train.chat import ChatTemplate
from train.config import Source
from train.templates import Template, get_template

PIECE_BYTES = 64 * 1024  # longest document that is made of a text file
ENDINGS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet", ".arrayrecord")
BUILTIN = "builtin:"
BOM = b"\xef\xbb\xbf"  # the byte-order mark with which some programs begin files in UTF-8

_OPEN_JSONL = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
_ROWS_AT_ONCE = 256
_EXAMPLES = 3  # reported per kind of unusable document


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A document as it is read from a source.

  Attributes:
    text: the text that is trained on.
    prompt: text before it that is not trained on; "" for none.
    domain: name of the domain under which the document is evaluated.
    language: name of its language.
    tokens: the prompt's and the text's token ids, int32, where a chat template decides which
      special tokens they have; None where both are plain text.
  """

  text: str
  prompt: str
  domain: str
  language: str
  tokens: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass
class Tally:
  """Counts of the usable and the unusable documents of a source.

  Attributes:
    good: number of usable documents.
    bad: number of unusable documents by the kind of defect.
    examples: the first few of each kind of defect, as `file:line: reason`.
  """

  good: int = 0
  bad: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def add_bad(self, where: str, bad: "BadRowError") -> None:
    """Counts an unusable document at `where`, a `file:line`."""
    self.bad[bad.kind] += 1
    examples = self.examples.setdefault(bad.kind, [])
    if len(examples) < _EXAMPLES:
      examples.append(f"{where}: {bad.reason}")

  @property
  def kinds(self) -> str:
    """The kinds of defects with their counts, as text."""
    return ", ".join(f"{count} {kind}" for kind, count in self.bad.most_common())

  @property
  def first_examples(self) -> str:
    """The examples as text; they must not be empty."""
    return "For example " + "; ".join(
        example for few in self.examples.values() for example in few)

  def check(self, path: str, max_bad_fraction: float) -> None:
    """Checks that a source has documents, and that not too many of them are unusable.

    Args:
      path: the source's path, for messages.
      max_bad_fraction: the largest tolerated fraction of unusable documents.

    Raises:
      ValueError: if there are no documents, none that are usable, or too many that are not; the
        message gives counts and examples.
    """
    num_bad = self.bad.total()
    total = self.good + num_bad
    if not total:
      raise ValueError(f"{path} holds no documents: every file is empty")
    if self.good and num_bad <= max_bad_fraction * total:
      return
    raise ValueError(
        f"{path}: {num_bad} of {total} documents are unusable ({self.kinds}), more than "
        f"data.max_bad_fraction={max_bad_fraction:g} allows. {self.first_examples}. Repair them, "
        "check the source's text_field and prompt_field, or raise data.max_bad_fraction")


class BadRowError(Exception):
  """A row cannot be used. It is counted under `kind`; `reason` describes it in more detail."""

  def __init__(self, kind: str, reason: str | None = None):
    super().__init__(kind)
    self.kind, self.reason = kind, reason or kind


def read(source: Source, tally: Tally | None = None, template: str | ChatTemplate = "plain",
         ) -> Iterator[Document]:
  """Yields the usable documents of `source` in a fixed order, and counts all of them in `tally`.

  `template` is the name of the template of prompts, or the chat template of a model's folder.

  A text file is one document; a longer one than 64 KiB is split into pieces of at most that size,
  at line ends where possible. Empty pieces are skipped. Each JSONL line, Parquet row and
  ArrayRecord record is one document; a record is a JSON object like a JSONL line, or plain text.

  Raises:
    ValueError: if there is nothing to read at the path, or if a file cannot be opened or
      decompressed. Whether too many documents are unusable is checked by `Tally.check`, afterwards.
  """
  tally = Tally() if tally is None else tally
  domain, language = source.domain or default_domain(source.path), source.language or "en"
  style = template if isinstance(template, ChatTemplate) else get_template(template)
  for where, row in _rows(source):
    try:
      if isinstance(row, BadRowError):
        raise row
      prompt, text, *tokens = _texts(row, source, style)
      document = Document(
          text, prompt,
          source.domain or _label(row, "domain") or domain,
          source.language or _label(row, "language") or language, tuple(tokens) or None)
    except BadRowError as bad:
      tally.add_bad(where, bad)
      continue
    tally.good += 1
    yield document


def files(source: Source) -> list[pathlib.Path]:
  """Returns the files that determine what `read` yields, in the order in which it reads them.

  Raises:
    ValueError: if there are none.
  """
  if source.path.startswith(BUILTIN):
    return corpora.files(source.path.removeprefix(BUILTIN))
  path = pathlib.Path(source.path).expanduser()
  if path.is_file():
    found = [path]
  elif path.is_dir():
    found = sorted(path.rglob("*"))
  else:
    found = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
    if not found:
      raise ValueError(f"data source {source.path}: there is no such file or folder, and no file "
                       "matches it as a glob")
  usable = [file for file in found if _ending(file) and file.is_file()]
  if not usable:
    raise ValueError(f"data source {source.path}: nothing there ends in {', '.join(ENDINGS)}")
  return usable


def fingerprint(source: Source, template: str | ChatTemplate = "plain") -> str:
  """Returns a hash of the files' contents and of all settings that determine what `read` yields."""
  total = hashlib.blake2b(digest_size=16)
  *settings, messages_field = dataclasses.astuple(
      dataclasses.replace(source, path=default_domain(source.path), weight=1.0))
  total.update(json.dumps(settings).encode())
  if source.prompt_field or messages_field:
    style = template.key if isinstance(template, ChatTemplate) else get_template(template).text
    total.update(json.dumps([messages_field, style]).encode()
                 if messages_field or template != "plain" else b"")
  for path in files(source):
    try:
      with open(path, "rb") as file:
        total.update(f"{_ending(path)}:".encode())
        total.update(hashlib.file_digest(file, "blake2b").digest())
    except OSError as error:
      raise ValueError(f"{path} cannot be read: {error}") from error
  return total.hexdigest()


def default_domain(path: str) -> str:
  """Returns the stem of a path or, for a glob, that of its last component without wildcards."""
  parts = pathlib.PurePath(path.removeprefix(BUILTIN)).parts
  name = next((part for part in reversed(parts) if not glob.has_magic(part)), "text")
  return name.split(".")[0] or name


def _ending(path: pathlib.Path) -> str | None:
  name = path.name.lower()
  return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _rows(source: Source) -> Iterator[tuple[str, "dict | BadRowError"]]:
  """Yields `file:line` with a row's fields, or with a BadRowError that says why it has none."""
  if source.path == BUILTIN + "arithmetic":
    for i, text in enumerate(corpora.arithmetic()):
      yield f"{source.path}:{i}", {source.text_field: text}
    return
  readers = {".parquet": _parquet_rows, ".arrayrecord": _record_rows}
  readers |= dict.fromkeys(_OPEN_JSONL, _jsonl_rows)
  for path in files(source):
    reader = readers.get(_ending(path), _text_rows)
    try:
      yield from ((f"{path}:{line}", row) for line, row in reader(path, source))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
      raise ValueError(f"{path} cannot be read: {error}. Replace it, or leave it out") from error


def _text_rows(path: pathlib.Path, source: Source) -> Iterator[tuple[int, "dict | BadRowError"]]:
  line, rest = 1, b""
  with open(path, "rb") as file:
    while block := rest + file.read(PIECE_BYTES - len(rest)):
      cut = len(block) if len(block) < PIECE_BYTES else _cut(block)
      piece, rest = block[:cut], block[cut:]
      row = _parsed(_decode, piece.removeprefix(BOM) if line == 1 else piece)
      if isinstance(row, BadRowError):
        yield line, row
      elif row.strip():
        yield line, {source.text_field: row} | ({source.prompt_field: ""}
                                                if source.prompt_field else {})
      line += piece.count(b"\n")


def _cut(block: bytes) -> int:
  """Returns where to cut a block: after its last line end or, without one, between characters."""
  if cut := block.rfind(b"\n") + 1:
    return cut
  cut = len(block) - 1
  while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
    cut -= 1
  return cut


def _jsonl_rows(path: pathlib.Path, source: Source) -> Iterator[tuple[int, "dict | BadRowError"]]:
  del source
  with _OPEN_JSONL[_ending(path)](path, "rb") as file:
    for number, line in enumerate(file, 1):
      if number == 1:
        line = line.removeprefix(BOM)
      if line.strip():
        yield number, _parsed(parse_row, line)


def _parquet_rows(path: pathlib.Path, source: Source) -> Iterator[tuple[int, dict]]:
  with pyarrow.parquet.ParquetFile(path) as file:
    names = file.schema_arrow.names
    needed = ([source.messages_field] if source.messages_field else
              [source.text_field, *([source.prompt_field] if source.prompt_field else [])])
    if missing := set(needed) - set(names):
      raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has "
                       f"{', '.join(names)}: set the source's text_field and prompt_field, or its "
                       "messages_field")
    columns = [name for name in dict.fromkeys([*needed, "domain", "language"]) if name in names]
    number = 1
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
      # As bytes, so that invalid UTF-8 in one row does not make its whole batch unreadable.
      for row in batch.cast(pyarrow.schema(map(_as_bytes, batch.schema))).to_pylist():
        yield number, row
        number += 1


def _as_bytes(field: pyarrow.Field) -> pyarrow.Field:
  binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
  return field.with_type(binary.get(field.type, field.type))


def _record_rows(path: pathlib.Path, source: Source) -> Iterator[tuple[int, "dict | BadRowError"]]:
  reader = array_record_module.ArrayRecordReader(str(path))
  total = reader.num_records()
  # A damaged file opens without an error, has no records, and cannot be closed.
  if not reader.ok() or (not total and path.stat().st_size):
    raise OSError("it is not an intact ArrayRecord file")
  for first in range(0, total, _ROWS_AT_ONCE):
    try:
      records = reader.read(first, min(first + _ROWS_AT_ONCE, total))
    except RuntimeError as error:
      raise OSError(str(error)) from error
    for number, record in enumerate(records, first):
      yield number, _parsed(_parse_record, record, source.text_field)
  reader.close()


def _parsed(parse, *args):
  """Returns the result of `parse(*args)`, or the BadRowError that it raised."""
  try:
    return parse(*args)
  except BadRowError as bad:
    return bad


def parse_row(line: bytes) -> dict:
  """Returns the row of a JSONL line.

  Raises:
    BadRowError: if the line is no JSON object, or not in UTF-8.
  """
  text = _decode(line)
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise BadRowError("broken JSON", f"broken JSON: {error}") from error
  if not isinstance(row, dict):
    raise BadRowError("not a JSON object", f"a JSON {type(row).__name__}, not an object")
  return row


def _parse_record(record: bytes, text_field: str) -> dict:
  if record.lstrip()[:1] == b"{":
    try:
      return parse_row(record)
    except BadRowError:
      pass  # plain text may begin with a brace, too
  return {text_field: record}


def _texts(row: dict, source: Source, template: Template | ChatTemplate) -> tuple:
  """Returns the prompt of a row, "" for none, its text and, from a chat template, their tokens."""
  if name := source.messages_field:
    messages = row.get(name)
    if not isinstance(messages, list):
      raise BadRowError(f"without a list {name!r}", f"{name!r} is {type(messages).__name__}")
    prompt, text, *tokens = _conversation(messages, template, repr(name))
    row = {"prompt": prompt, "text": text}
    return _field(row, "prompt", may_be_empty=True), _field(row, "text"), *tokens
  text = _field(row, source.text_field)
  if not source.prompt_field:
    return "", text
  question = _field(row, source.prompt_field, may_be_empty=True)
  if not question:
    return "", text
  if isinstance(template, Template):
    return template.render(question), template.answer(text)
  return _conversation([{"role": "user", "content": question},
                        {"role": "assistant", "content": text}], template, "question or answer")


def _conversation(messages: list, template: Template | ChatTemplate, what: str) -> tuple:
  try:
    return template.conversation(messages)
  except UnicodeEncodeError as error:
    raise BadRowError("invalid UTF-8", str(error)) from error
  except ValueError as error:
    raise BadRowError(f"with unusable {what}", str(error)) from error


def _field(row: dict, name: str, may_be_empty: bool = False) -> str:
  if name not in row:
    raise BadRowError(f"without {name!r}", f"there is no {name!r} among {list(row)[:9]}")
  if row[name] is None:
    raise BadRowError(f"without {name!r}", f"{name!r} is null")
  value = row[name]
  if isinstance(value, bytes):
    value = _decode(value)
  if not isinstance(value, str):
    raise BadRowError(f"with {name!r} not a string", f"{name!r} is {type(value).__name__}")
  if not value.strip() and not may_be_empty:
    raise BadRowError(f"with {name!r} empty")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can express a lone surrogate
    raise BadRowError("invalid UTF-8", str(error)) from error
  return value


def _label(row: dict, name: str) -> str | None:
  value = row.get(name)
  if isinstance(value, bytes):
    value = value.decode(errors="replace")
  if not isinstance(value, str) or not value:
    return None
  if not value.isprintable():  # terminals and reports show it
    raise BadRowError(f"with control characters in {name!r}", f"{name!r} is {value!r:.80}")
  return value


def _decode(data: bytes) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise BadRowError("invalid UTF-8", f"invalid UTF-8: {error}") from error
