"""Every file format gives the same documents; what cannot be read is counted and named."""

import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from train.config import Source
from train.sources import PIECE_BYTES, Document, Tally, fingerprint, read

TEXTS = ["one\nline", "zwölf Boxkämpfer", "文本 \U0001f40b"]
ROWS = [{"text": text, "domain": "prose", "language": "de"} for text in TEXTS]


def write_jsonl(path, rows, opener=open):
  with opener(path, "wb") as file:
    for row in rows:
      file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")


def write_parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def write_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": lambda path, rows: write_jsonl(path, rows, gzip.open),
    "rows.jsonl.xz": lambda path, rows: write_jsonl(path, rows, lzma.open),
    "rows.parquet": write_parquet,
    "rows.arrayrecord": lambda path, rows: write_records(
        path, [json.dumps(row).encode() for row in rows]),
}


def documents(path, **fields):
  return list(read(Source(str(path), **fields)))


def refused(path, match, max_bad_fraction=0.01, **fields):
  """Reads a source as training does; returns the message of the error that this raises."""
  source = Source(str(path), **fields)
  with pytest.raises(ValueError, match=match) as error:
    tally = Tally()
    list(read(source, tally))
    tally.check(source.path, max_bad_fraction)
  assert str(path) in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_file_format_give_the_same_documents(name, tmp_path):
  WRITERS[name](tmp_path / name, ROWS)
  assert documents(tmp_path / name) == [Document(text, "", "prose", "de") for text in TEXTS]
  renamed = documents(tmp_path / name, domain="mine", language="fr")
  assert {(one.domain, one.language) for one in renamed} == {("mine", "fr")}


@pytest.mark.parametrize("name", WRITERS)
def test_the_fields_of_text_and_prompt_are_configurable(name, tmp_path):
  WRITERS[name](tmp_path / name, [{"q": "2 + 2?", "a": "4"}, {"q": "", "a": "5"}])
  assert documents(tmp_path / name, text_field="a", prompt_field="q") == [
      Document("4", "2 + 2?", "rows", "en"), Document("5", "", "rows", "en")]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
def test_a_text_file_is_one_document(name, tmp_path):
  (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\n\ntwo")
  assert documents(tmp_path / name) == [Document("one\r\n\ntwo", "", "a", "en")]


def test_plain_text_records_are_documents(tmp_path):
  write_records(tmp_path / "r.arrayrecord", [b"plain", b"{not JSON", b'{"text": "row"}'])
  assert [one.text for one in documents(tmp_path / "r.arrayrecord")] == [
      "plain", "{not JSON", "row"]


@pytest.mark.parametrize("text, at_line_ends", [
    ("a line of the text\n" * 20_000, True), ("文" * 100_000, False), ("x" * PIECE_BYTES, False)])
def test_long_texts_are_cut_into_pieces_that_concatenate_to_the_text(text, at_line_ends, tmp_path):
  (tmp_path / "long.txt").write_text(text)
  pieces = [one.text for one in documents(tmp_path / "long.txt")]
  assert "".join(pieces) == text
  assert all(len(piece.encode()) <= PIECE_BYTES for piece in pieces)
  assert len(pieces) <= len(text.encode()) // (PIECE_BYTES - 100) + 1
  assert not at_line_ends or all(piece.endswith("\n") for piece in pieces)


def test_a_folder_and_a_glob_are_read_as_their_files_in_sorted_order(tmp_path):
  for name in ("b/two.txt", "a/one.txt", "a/skip.bin", "c.md", "empty.py"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("" if name == "empty.py" else name)
  assert [one.text for one in documents(tmp_path)] == ["a/one.txt", "b/two.txt", "c.md"]
  found = documents(tmp_path / "**" / "*.txt")
  assert [one.text for one in found] == ["a/one.txt", "b/two.txt"]
  assert found[0].domain == documents(tmp_path)[0].domain == tmp_path.name


BAD_ROWS = {
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "invalid UTF-8",
    b'{"text": "cut': "broken JSON",
    b"[" * 100_000: "broken JSON",
    b'["text"]': "not a JSON object",
    b'{"body": "x"}': "without 'text'",
    b'{"text": null}': "without 'text'",
    b'{"text": " \\n"}': "with 'text' empty",
    b'{"text": 3}': "with 'text' not a string",
}


@pytest.mark.parametrize("line, kind", BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
def test_a_bad_line_is_counted_named_and_skipped(line, kind, tmp_path):
  path = tmp_path / "rows.jsonl"
  write_jsonl(path, [ROWS[0], line, b"", ROWS[1]])
  tally = Tally()
  assert [one.text for one in read(Source(str(path)), tally)] == TEXTS[:2]
  assert tally.good == 2 and tally.bad == {kind: 1}
  assert tally.examples[kind][0].startswith(f"{path}:2: ")
  tally.check(str(path), max_bad_fraction=0.34)
  message = refused(path, "1 of 3 documents are unusable", max_bad_fraction=0.33)
  assert kind in message and f"{path}:2: " in message and "max_bad_fraction" in message


def test_bad_rows_of_parquet_are_skipped_one_by_one(tmp_path):
  path = tmp_path / "rows.parquet"
  texts = pyarrow.array([b"good", b"\xff", None, b""]).cast(pyarrow.binary()).view(pyarrow.string())
  pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
  tally = Tally()
  assert [one.text for one in read(Source(str(path)), tally)] == ["good"]
  assert tally.bad == {"invalid UTF-8": 1, "without 'text'": 1, "with 'text' empty": 1}
  refused(path, "has no column body; it has text", text_field="body")


def test_invalid_text_files_and_records_are_bad_documents(tmp_path):
  (tmp_path / "bad.txt").write_bytes(b"a\xffb")
  assert "bad.txt:1: invalid UTF-8" in refused(tmp_path / "bad.txt", "1 of 1 documents")
  write_records(tmp_path / "bad.arrayrecord", [b"\xff", b'{"body": 1}'])
  refused(tmp_path / "bad.arrayrecord", "2 of 2 documents", max_bad_fraction=1.0)


def test_only_a_few_examples_of_bad_rows_are_kept(tmp_path):
  write_jsonl(tmp_path / "rows.jsonl", [b"{"] * 50)
  assert refused(tmp_path / "rows.jsonl", "50 of 50").count("rows.jsonl:") <= 4


def test_a_source_with_nothing_to_read_is_an_error(tmp_path):
  refused(tmp_path / "missing.txt", "no such file or folder")
  refused(tmp_path / "*.txt", "no file matches")
  refused(tmp_path, "nothing there ends in .txt")
  (tmp_path / "text.pdf").write_text("x")
  refused(tmp_path / "text.pdf", "nothing there ends in .txt")
  (tmp_path / "empty.jsonl").write_text("\n")
  refused(tmp_path / "empty.jsonl", "holds no documents")
  refused("builtin:koran", "there is no builtin:koran; there are builtin:bible")


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "rows.jsonl"])
def test_damaged_files_are_named(name, tmp_path):
  WRITERS[name](tmp_path / name, ROWS)
  whole = (tmp_path / name).read_bytes()
  for damaged in (whole[:len(whole) // 2], b"garbage" * 9):
    (tmp_path / name).write_bytes(damaged)
    refused(tmp_path / name, "leave it out")


def test_the_fingerprint_covers_the_contents_and_how_they_are_read(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  source = Source(str(tmp_path / "a.txt"))
  first = fingerprint(source)
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "a.txt").write_text("text")
  assert fingerprint(Source(str(tmp_path / "elsewhere" / "a.txt"), weight=3)) == first
  assert fingerprint(Source(source.path, text_field="body")) != first
  (tmp_path / "a.txt").write_text("Text")
  assert fingerprint(source) != first


def test_questions_and_conversations_are_written_in_the_template(tmp_path):
  rows = [{"question": "1+1?", "answer": "2"}, {"question": "", "answer": "no question"}]
  path = tmp_path / "qa.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  source = Source(str(path), text_field="answer", prompt_field="question")
  read_as = lambda source, name: [(d.prompt, d.text) for d in read(source, template=name)]
  assert read_as(source, "short") == [("Q: 1+1?\nA:", " 2"), ("", "no question")]
  assert read_as(source, "plain") == [("1+1?", "2"), ("", "no question")]
  assert fingerprint(source) == fingerprint(source, "plain") != fingerprint(source, "short")

  turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
  rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": "hello"}, {}]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  source, tally = Source(str(path), messages_field="messages"), Tally()
  assert [(d.prompt, d.text) for d in read(source, tally, "short")] == [("Q: 1+1?\nA:", " 2")]
  assert dict(tally.bad) == {"with unusable 'messages'": 1, "without a list 'messages'": 2}
  table = pyarrow.table({"messages": [turns]})
  pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
  source = Source(str(tmp_path / "chat.parquet"), messages_field="messages")
  assert read_as(source, "short") == [("Q: 1+1?\nA:", " 2")]


def test_without_prompts_the_template_does_not_matter(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("hello")
  assert fingerprint(Source(str(path)), "short") == fingerprint(Source(str(path)))


def test_a_domain_with_control_characters_is_unusable(tmp_path):
  write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "domain": "a\x1b[2J"}, {"text": "x"}])
  tally = Tally()
  assert len(list(read(Source(str(tmp_path)), tally))) == 1
  assert dict(tally.bad) == {"with control characters in 'domain'": 1}
