"""Training tokens are predicted once per epoch, in a seeded order; held-out tokens never are."""

import collections
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from train import data
from train.config import DataConfig, Source
from train.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
SEQ_LEN = 32


def text(domain, i):
  return f"{domain}{i}: " + "abcdefghij"[i % 7:] * (i * 7 % 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  for name, count in (("one", 60), ("two", 25)):
    (path / f"{name}.jsonl").write_text("".join(
        json.dumps({"text": text(name, i)}) + "\n" for i in range(count)))
  (path / "sft.jsonl").write_text("".join(
      json.dumps({"text": f"answer {i}", "q": f"question {i}? "}) + "\n" for i in range(40)))
  return path


def config(folder, *names, **fields):
  sources = tuple(Source(str(folder / f"{name}.jsonl")) for name in names)
  fields = {"sources": sources, "tokenizer": "bytes", "seq_len": SEQ_LEN, "fim_rate": 0.0,
            "heldout_fraction": 0.2, "cache_dir": str(folder / "cache")} | fields
  return DataConfig(**fields)


def epoch_of(rows, epoch=0):
  """Returns the first source's rows of an epoch in stream order, with their shuffling undone."""
  source = rows._sources[0]
  order = np.argsort(source._epoch(epoch).rows_R)
  return [rows[epoch * source.rows_per_epoch + int(index)] for index in order]


def stream(rows):
  """Returns the tokens that rows in stream order predict, without padding."""
  return np.concatenate([row["tokens"][1:][row["segments"] > 0] for row in rows])


def documents(ids):
  """Splits token ids into documents, each of which ends with eos."""
  ends = np.flatnonzero(ids == BYTES.eos)
  assert ends[-1] == len(ids) - 1
  return [part[part != BYTES.eos] for part in np.split(ids, ends[:-1] + 1)]


def heldout_texts(loaded):
  return {name: [BYTES.decode(part) for part in documents(np.concatenate(
      [row[1:][mask] for row, mask in zip(held.tokens, held.segments > 0, strict=True)]))]
          for name, held in loaded.heldout.items()}


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def single(folder):
  return data.load(config(folder, "one"))


@pytest.fixture(scope="module")
def mixed(folder):
  return data.load(config(folder, "one", "two", fim_rate=0.3))


def test_every_training_token_is_predicted_once_per_epoch(single):
  held = set(heldout_texts(single)["one"])
  training = sorted(text("one", i) for i in range(60) if text("one", i) not in held)
  assert 0 < len(held) < 30
  orders = []
  for epoch in range(3):
    rows = epoch_of(single.train(0), epoch)
    found = [BYTES.decode(ids) for ids in documents(stream(rows))]
    assert sorted(found) == training
    for before, after in itertools.pairwise(rows):
      assert before["tokens"][-1] == after["tokens"][0]
    assert all(row["loss_mask"].all() for row in rows[:-1])
    np.testing.assert_array_equal(rows[-1]["loss_mask"], rows[-1]["segments"] > 0)
    assert rows[0]["tokens"][0] == BYTES.eos
    orders.append(found)
  assert orders[0] != orders[1] != orders[2]


def test_rows_are_a_function_of_seed_and_index(single, folder):
  again = data.load(config(folder, "one"))
  for i in (0, 5, 1, 400):
    assert_same(single.train(3)[i], again.train(3)[i])
  assert any(not np.array_equal(single.train(3)[i]["tokens"], single.train(4)[i]["tokens"])
             for i in range(5))


def test_rows_have_the_documented_shapes_and_dtypes(mixed):
  row = mixed.train(0)[7]
  assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
      "tokens": ((SEQ_LEN + 1,), np.int32), "loss_mask": ((SEQ_LEN,), bool),
      "segments": ((SEQ_LEN,), np.int32), "domain": ((), np.int32)}


def all_rows(rows, start, sizes, **kwargs):
  return [row for batch in data.batches(rows, start, sizes, **kwargs)
          for row in np.concatenate([batch["tokens"], batch["segments"]], axis=1)]


def test_batch_size_processes_and_start_position_do_not_change_the_stream(mixed):
  rows = mixed.train(1)
  expected = [np.concatenate([rows[i]["tokens"], rows[i]["segments"]]) for i in range(120)]
  np.testing.assert_array_equal(all_rows(rows, 0, [4] * 30), expected)
  np.testing.assert_array_equal(all_rows(rows, 0, [2, 2, 8, 108]), expected)
  for position in (1, 37, 119):
    np.testing.assert_array_equal(
        all_rows(mixed.train(1), position, iter([1] * (120 - position))), expected[position:])
  readers = [data.batches(rows, 20, [4, 8, 88], process=p, num_processes=4) for p in range(4)]
  whole = [np.concatenate(parts) for batch in zip(*readers, strict=True)
           for parts in [[part["tokens"] for part in batch]]]
  np.testing.assert_array_equal(np.concatenate(whole), np.array(expected)[20:, :SEQ_LEN + 1])


def test_batches_of_several_seeds_are_stacked(mixed):
  both = next(mixed.batches([1, 2], 8, [4]))
  assert both["tokens"].shape == (2, 4, SEQ_LEN + 1) and both["domain"].shape == (2, 4)
  for run, seed in enumerate((1, 2)):
    assert_same({name: array[run] for name, array in both.items()},
                next(mixed.batches([seed], 8, [4])))


def test_iteration_ends_after_the_last_batch(mixed):
  assert len(list(mixed.batches([0], 3, [2, 2]))) == 2
  assert list(mixed.batches([0], 3, [])) == []


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(mixed):
  with pytest.raises(ValueError, match="batch of 3 rows does not divide among 2 processes"):
    data.batches(mixed.train(0), 0, [4, 3], process=0, num_processes=2)


def test_sources_are_mixed_by_weight_whatever_their_size(folder):
  sources = tuple(Source(str(folder / f"{name}.jsonl"), weight=weight)
                  for name, weight in (("one", 1), ("two", 3)))
  loaded = data.load(config(folder, sources=sources))
  rows = loaded.train(0)
  counts = np.cumsum([rows[i]["domain"] for i in range(400)])  # domain 1 is "two"
  assert loaded.domains == ("one", "two")
  assert np.abs(counts - 0.75 * np.arange(1, 401)).max() <= 1
  one, two = rows.epochs(400)
  assert math.isclose(one, 100 / rows._sources[0].rows_per_epoch)
  assert math.isclose(two, 300 / rows._sources[1].rows_per_epoch)


def test_fim_rearranges_its_fraction_of_documents_differently_each_epoch(folder):
  loaded = data.load(config(folder, "one", fim_rate=0.5))
  held = set(heldout_texts(loaded)["one"])
  training = sorted(text("one", i) for i in range(60) if text("one", i) not in held)
  layouts = []
  for epoch in range(3):
    found, cut = [], {}
    for ids in documents(stream(epoch_of(loaded.train(0), epoch))):
      if BYTES.fim_begin in ids:
        begin, hole, end = (int(np.flatnonzero(ids == one).item())
                            for one in (BYTES.fim_begin, BYTES.fim_hole, BYTES.fim_end))
        assert begin == 0 < hole < end
        prefix, suffix, middle = ids[1:hole], ids[hole + 1:end], ids[end + 1:]
        found.append(BYTES.decode(np.concatenate([prefix, middle, suffix])))
        cut[found[-1]] = (len(prefix), len(suffix))
      else:
        assert BYTES.fim_hole not in ids and BYTES.fim_end not in ids
        found.append(BYTES.decode(ids))
    assert sorted(found) == training
    assert len(cut) == round(0.5 * len(training))
    layouts.append(cut)
  assert layouts[0] != layouts[1] != layouts[2]


def test_prompts_are_inputs_but_not_learned(folder):
  source = Source(str(folder / "sft.jsonl"), prompt_field="q")
  loaded = data.load(config(folder, sources=(source,), fim_rate=1.0, template="plain"))
  rows = epoch_of(loaded.train(0))
  whole = [BYTES.decode(ids) for ids in documents(stream(rows))]
  assert all(one.startswith("question ") and "answer " in one for one in whole)
  learned = np.concatenate([row["tokens"][1:][row["loss_mask"]] for row in rows])
  assert [BYTES.decode(ids) for ids in documents(learned)] == [
      one[one.index("answer"):] for one in whole]
  held = loaded.heldout["sft"]
  learned = [BYTES.decode(ids) for ids in documents(held.tokens[:, 1:][held.loss_mask])]
  assert all(one.startswith("answer ") for one in learned)
  assert held.num_bytes == sum(map(len, learned)) == held.loss_mask.sum() - len(learned)


@pytest.mark.parametrize("seq_len", [3, 5, 8, 64])
def test_rows_without_a_learned_token_are_counted(folder, seq_len, caplog):
  source = Source(str(folder / "sft.jsonl"), prompt_field="q")
  make = lambda allowed: config(folder, sources=(source,), seq_len=seq_len, fim_rate=0,
                                max_bad_fraction=allowed)
  loaded = data.load(make(1.0))
  rows = loaded.train(0)
  num_rows = rows._sources[0].rows_per_epoch
  empty = sum(not rows[i]["loss_mask"].any() for i in range(num_rows))
  assert rows._sources[0].num_without_learned() == empty
  assert (empty > 0) == (f"{empty} of {num_rows} rows" in caplog.text)
  if empty:
    with pytest.raises(ValueError, match="hold nothing to learn, as prompts have up to"):
      data.load(make(0.01))


def test_segments_number_the_documents_that_predictions_belong_to(mixed):
  rows = mixed.train(0)
  for i in range(60):
    row = rows[i]
    segments, real = row["segments"], row["segments"] > 0
    begins = row["tokens"][:-1] == BYTES.eos  # an input eos begins the next document
    expected = np.cumsum(begins) + (0 if begins[0] else 1)
    np.testing.assert_array_equal(segments, np.where(real, expected, 0))
    assert (np.diff(real.astype(int)) <= 0).all()
    assert (row["tokens"][1:][~real] == BYTES.pad).all()


def test_no_held_out_document_is_trained_on(folder):
  copies = folder / "copies.jsonl"
  copies.write_text((folder / "one.jsonl").read_text() * 2)
  loaded = data.load(config(folder, "one", "copies"))
  held = {one for texts in heldout_texts(loaded).values() for one in texts}
  assert held
  rows = loaded.train(0)
  for source in rows._sources:
    alone = [source[i] for i in np.argsort(source._epoch(0).rows_R)]
    trained = [BYTES.decode(ids) for ids in documents(stream(alone))]
    assert trained and not held.intersection(trained)


def test_held_out_documents_are_predicted_once_completely_and_without_copies(folder):
  loaded = data.load(config(folder, "one", "two"))
  for name, texts in heldout_texts(loaded).items():
    held = loaded.heldout[name]
    assert len(set(texts)) == len(texts) == held.num_documents
    assert held.num_bytes == sum(len(one.encode()) for one in texts)
    assert held.loss_mask.sum() == held.num_bytes + len(texts)
    assert held.tokens.shape == (len(held.loss_mask), SEQ_LEN + 1)
    assert held.tokens[0, 0] == BYTES.eos
    np.testing.assert_array_equal(held.tokens[1:, 0], held.tokens[:-1, -1])
    assert held.segments[0, 0] == 1 and held.segments[:, 0].max() == 1


def test_the_split_and_its_byte_counts_are_the_same_for_every_tokenizer(folder):
  by_bytes = data.load(config(folder, "one", "two"))
  by_bpe = data.load(config(folder, "one", "two", tokenizer="bpe", bpe_vocab_size=512))
  for name, held in by_bytes.heldout.items():
    other = by_bpe.heldout[name]
    assert (held.num_bytes, held.num_documents) == (other.num_bytes, other.num_documents)
    assert other.loss_mask.sum() < held.loss_mask.sum()
    decode = lambda loaded, rows: loaded.tokenizer.decode(rows.tokens[:, 1:][rows.loss_mask])
    assert decode(by_bytes, held) == decode(by_bpe, other)


def test_held_out_bytes_are_limited_to_whole_documents(folder):
  full = data.load(config(folder, "one")).heldout["one"]
  some = data.load(config(folder, "one", heldout_bytes=100)).heldout["one"]
  assert 0 < some.num_bytes <= 100 < full.num_bytes
  assert data.load(config(folder, "one", heldout_bytes=1)).heldout["one"].num_documents == 1
  assert data.load(config(folder, "one", heldout_fraction=0)).heldout == {}


def test_rows_of_one_source_can_have_different_domains(folder, tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"text": "ab"[i % 2] * 200 + str(i), "domain": "ab"[i % 2]})
                          + "\n" for i in range(40)))
  loaded = data.load(config(folder, sources=(Source(str(path)),)))
  assert loaded.domains == ("a", "b") and set(loaded.heldout) == {"a", "b"}
  rows = loaded.train(0)
  for row in (rows[i] for i in range(100)):
    count = collections.Counter(BYTES.decode(row["tokens"][1:]))
    # Some characters of a row may be digits.
    assert count["ab"[row["domain"]]] >= count["ab"[1 - row["domain"]]] - 8


def test_the_summary_counts_documents_tokens_and_bytes(single, folder):
  loaded = data.load(config(folder, "one", "two"))
  summary = json.loads(json.dumps(loaded.summary()))
  one = summary["domains"]["one"]
  training = documents(stream(epoch_of(single.train(0))))
  assert one["training_documents"] == len(training)
  assert one["training_bytes"] == sum(map(len, training))
  assert one["training_tokens"] == one["training_bytes"] + len(training)
  assert one["heldout_bytes"] == loaded.heldout["one"].num_bytes
  assert summary["sources"][0]["documents"] == 60 and summary["sources"][0]["bad"] == {}
  assert summary["sources"][0]["bytes"] == one["training_bytes"] + one["heldout_bytes"]


def test_unusable_data_is_refused(folder, tmp_path):
  with pytest.raises(ValueError, match="no such file"):
    data.load(config(folder, "missing"))
  (tmp_path / "tokenizer.json").write_text(
      BYTES._json.replace("<｜fim▁hole｜>", "<｜other▁hole｜>"))
  cfg = config(folder, "one", tokenizer=str(tmp_path / "tokenizer.json"))
  data.load(cfg)
  with pytest.raises(ValueError, match=r"set data.fim_rate=0"):
    data.load(dataclasses.replace(cfg, fim_rate=0.1))


def test_a_document_longer_than_many_rows_is_split_without_loss(folder, tmp_path):
  (tmp_path / "long.txt").write_text("0123456789" * 100)
  loaded = data.load(config(folder, sources=(Source(str(tmp_path / "long.txt")),), fim_rate=1.0))
  assert loaded.heldout == {}
  rows = epoch_of(loaded.train(0))
  ids, = documents(stream(rows))
  assert len(ids) == 1003 and len(rows) == math.ceil(1004 / SEQ_LEN)


@pytest.mark.long("tokenises all three corpora, 20 MB")
def test_the_default_corpora_hold_out_over_a_megabyte(tmp_path):
  loaded = data.load(DataConfig(cache_dir=str(tmp_path)))
  assert loaded.domains == ("bible", "python", "arithmetic")
  assert sum(held.num_bytes for held in loaded.heldout.values()) > 1e6
