"""Tokenised stores are exact, complete and built once; held-out documents are never trained on."""

import json
import threading

import numpy as np
import pytest

from train import tokens
from train.config import Source
from train.sources import Document, Tally, read
from train.tokenizer import Tokenizer
from train.tokens import heldout_masks, open_bpe, open_store

BYTES = Tokenizer.bytes()
ROWS = [{"text": f"Text {i} — " + "word " * (i % 7), "prompt": "Say it: " * (i % 2),
         "domain": f"d{i % 3}", "language": "de" if i % 2 else "en"} for i in range(40)]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return Source(str(path), prompt_field="prompt")


def open_bytes(source, cache, tokenizer=BYTES, max_bad_fraction=0.01):
  return open_store(source, tokenizer, cache, max_bad_fraction)


def assert_equal(one, other):
  for name in (*tokens._ARRAYS, "tokens", "domain_names", "language_names"):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
  assert one.tally == other.tally


def folders(cache):
  return sorted(path.name for path in cache.iterdir())


def test_a_store_decodes_to_its_documents(source, tmp_path):
  store = open_bytes(source, tmp_path / "cache")
  assert store.tokens.dtype == np.uint16
  for n, row in enumerate(ROWS):
    ids = store.tokens[store.offsets[n]:store.offsets[n + 1]]
    prompt = ids[:store.prompt_tokens_N[n]]
    assert BYTES.decode(prompt) == row["prompt"]
    assert BYTES.decode(ids[len(prompt):]) == row["text"]
    assert store.bytes_N[n] == len(row["text"].encode())
    assert store.domain_names[store.domains_N[n]] == row["domain"]
    assert store.language_names[store.languages_N[n]] == row["language"]
  assert store.tally == Tally(good=len(ROWS))


def test_a_store_does_not_depend_on_the_chunk_size(source, tmp_path, monkeypatch):
  whole = open_bytes(source, tmp_path / "one")
  monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 50)
  assert_equal(open_bytes(source, tmp_path / "two"), whole)


def test_a_large_vocabulary_is_stored_in_four_bytes(source, tmp_path):
  spec = json.loads(BYTES._json)
  added = "ABCDEFGHIJ" * 3
  spec["model"]["vocab"] |= {f"{a}{b}{c}": 260 + i for i, (a, b, c) in enumerate(
      (a, b, c) for a in set(added) for b in set(added) for c in set(added))} | {"Z" * 5: 70_000}
  store = open_bytes(source, tmp_path / "cache", Tokenizer(json.dumps(spec)))
  assert store.tokens.dtype == np.uint32


def test_a_cached_store_is_opened_without_reading_the_source(source, tmp_path, monkeypatch):
  cache = tmp_path / "cache"
  first = open_bytes(source, cache)
  monkeypatch.setattr(tokens.sources, "read", None)
  assert_equal(open_bytes(source, cache), first)
  assert len(folders(cache)) == 1


def test_changed_documents_and_another_tokenizer_get_their_own_cache_entries(source, tmp_path):
  cache = tmp_path / "cache"
  open_bytes(source, cache)
  open_bytes(source, cache, Tokenizer.train_bpe(["some words"], 512))
  with open(source.path, "a") as file:
    file.write(json.dumps({"text": "more", "prompt": ""}) + "\n")
  assert len(open_bytes(source, cache).offsets) == len(ROWS) + 2
  assert len(folders(cache)) == 3


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "offsets.npy", "hashes_N.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_a_damaged_cache_entry_is_rebuilt(name, damage, source, tmp_path):
  cache = tmp_path / "cache"
  first = open_bytes(source, cache)
  path, = cache.glob(f"*/{name}")
  whole = path.read_bytes()
  path.unlink()
  if damage != "missing":
    half = whole[:len(whole) // 2]
    path.write_bytes({"empty": b"", "truncated": half, "garbage": b"[0]"}[damage])
  assert_equal(open_bytes(source, cache), first)
  assert path.read_bytes() == whole
  assert len(folders(cache)) == 1


def test_concurrent_builders_all_get_the_same_store(source, tmp_path):
  stores = []
  threads = [threading.Thread(target=lambda: stores.append(open_bytes(source, tmp_path / "cache")))
             for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(stores) == 4 and len(folders(tmp_path / "cache")) == 1
  for store in stores:
    assert_equal(store, stores[0])


def test_bad_rows_are_counted_in_the_cached_store_too(source, tmp_path):
  with open(source.path, "a") as file:
    file.write("broken\n")
  cache = tmp_path / "cache"
  with pytest.raises(ValueError, match="1 of 41 documents are unusable"):
    open_bytes(source, cache)
  assert not folders(cache)
  for _ in range(2):
    assert open_bytes(source, cache, max_bad_fraction=0.1).tally.bad == {"broken JSON": 1}
  with pytest.raises(ValueError, match="1 of 41 documents are unusable"):
    open_bytes(source, cache)


def test_a_cache_directory_that_cannot_be_written_is_an_error(source, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"cannot be written.*set data.cache_dir"):
    open_bytes(source, tmp_path / "file")


def test_bpe_is_trained_once_on_training_documents_of_all_sources(source, tmp_path, monkeypatch):
  (tmp_path / "other.txt").write_text("zebra zebra zebra\n" * 500)
  both = [source, Source(str(tmp_path / "other.txt"))]
  cache = tmp_path / "cache"
  bpe = open_bpe(both, 512, 0.5, cache, 0.01)
  assert len(bpe.encode(" zebra")) == 1 and len(bpe.encode(" word")) == 1
  sample = list(tokens._training_sample(both, 0.5, 0.01))
  hashes = [np.array([tokens._hash(one) for one in read(one_source)], np.uint64)
            for one_source in both]
  domains = [np.arange(len(ROWS)) % 3, np.array([3])]
  held, _ = heldout_masks(hashes, domains, 0.5)
  assert sample[:-1] == [row["prompt"] + row["text"]
                         for row, is_held in zip(ROWS, held, strict=True) if not is_held]
  monkeypatch.setattr(tokens.sources, "read", None)
  assert open_bpe(both, 512, 0.5, cache, 0.01).content_hash == bpe.content_hash
  broken, = cache.glob("bpe-*/tokenizer.json")
  broken.write_text("{}")
  monkeypatch.undo()
  assert open_bpe(both, 512, 0.5, cache, 0.01).content_hash == bpe.content_hash


def test_the_bpe_training_sample_is_bounded_and_covers_every_source(source, tmp_path, monkeypatch):
  (tmp_path / "long.txt").write_text("line\n" * 50_000)
  monkeypatch.setattr(tokens, "_SAMPLE_BYTES", 1000)
  sample = list(tokens._training_sample([source, Source(str(tmp_path / "long.txt"))], 0.1, 0.01))
  assert sum(map(len, sample)) < 1200
  assert any("Text" in text for text in sample) and any("line" in text for text in sample)


def random_hashes(count, seed=0):
  return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64)


def test_the_held_out_fraction_is_the_requested_one():
  held, = heldout_masks([random_hashes(10_000)], [np.zeros(10_000, int)], 0.07)
  assert abs(held.mean() - 0.07) < 4 * np.sqrt(0.07 * 0.93 / 10_000)
  assert not heldout_masks([random_hashes(50)], [np.zeros(50, int)], 0.0)[0].any()


def test_copies_of_a_document_are_in_the_same_split_even_across_sources():
  hashes = random_hashes(500)
  one, two = heldout_masks([hashes, hashes[::-1]], [np.arange(500) % 3, np.zeros(500, int)], 0.3)
  np.testing.assert_array_equal(one, two[::-1])


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5])
def test_every_domain_of_two_different_documents_is_in_both_splits(fraction):
  for seed in range(50):
    hashes = random_hashes(14, seed)
    domains = np.array([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4])
    hashes[13] = hashes[12]  # domain 4 is one document, twice
    held, = heldout_masks([hashes], [domains], fraction)
    for domain in (0, 1, 3):
      assert 0 < held[domains == domain].sum() < (domains == domain).sum()
    assert not held[(domains == 2) | (domains == 4)].any()


def test_a_documents_hash_covers_its_prompt_and_text_only():
  documents = [Document("a", "", "d", "en"), Document("", "a", "d", "en"),
               Document("a", "b", "d", "en")]
  assert len(set(map(tokens._hash, documents))) == 3
  assert tokens._hash(documents[0]) == tokens._hash(Document("a", "", "other", "de"))
