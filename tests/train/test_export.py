"""Exports are complete Hugging Face folders, and never replace what is not theirs."""

import dataclasses
import json

import pytest
import tiny
from safetensors import SafetensorError

from train import export as exporting
from train.export import check_target, export
from train.loading import TOKENIZER, LoadedModel, load_model
from train.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
CFG = dataclasses.replace(tiny.V3, num_layers=2, vocab_size=BYTES.vocab_size)


@pytest.fixture(scope="module")
def start() -> LoadedModel:
  return LoadedModel(CFG, tiny.variables(CFG), None, "short")


def read(folder, name):
  return json.loads((folder / name).read_text())


def test_a_model_of_this_project_gets_its_special_tokens_and_chat_template(tmp_path, start):
  export(tmp_path / "out", start, BYTES)
  config, generation, tokenizer = (read(tmp_path / "out", name) for name in (
      "config.json", "generation_config.json", "tokenizer_config.json"))
  ids = {"bos_token_id": None, "eos_token_id": BYTES.eos, "pad_token_id": BYTES.pad}
  assert generation == ids and config.items() >= ids.items()
  assert tokenizer["eos_token"] == tokenizer["pad_token"] == BYTES.decode([BYTES.eos])
  assert tokenizer["model_max_length"] == CFG.max_seq_len
  assert "Q: " in tokenizer["chat_template"]
  assert load_model(tmp_path / "out").cfg.param_count(mtp=True) == CFG.param_count(mtp=True)


@pytest.mark.parametrize("error", [
    SafetensorError("No space left on device (os error 28)"),
    OSError(28, "No space left on device")])
def test_a_folder_that_could_not_be_written_is_removed(tmp_path, start, monkeypatch, error):
  def full(folder, *_):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    raise error

  monkeypatch.setattr(exporting.model.hf, "save", full)
  with pytest.raises(ValueError, match=r"out \(No space left on device.*\): free space"):
    export(tmp_path / "out", start, BYTES)
  assert not (tmp_path / "out").exists()
  (tmp_path / "old").mkdir()
  with pytest.raises(ValueError, match="free space"):
    export(tmp_path / "old", start, BYTES)
  assert (tmp_path / "old").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, start):
  small = dataclasses.replace(start, cfg=dataclasses.replace(CFG, vocab_size=BYTES.vocab_size - 1))
  with pytest.raises(ValueError, match=f"{BYTES.vocab_size} tokens, more than the model's vocab"):
    export(tmp_path / "out", small, BYTES)
  assert not (tmp_path / "out").exists()


def test_a_target_that_links_to_itself_is_refused_by_its_setting(tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  with pytest.raises(ValueError, match=r"^to=.*loop is a symbolic link to nothing: give a folder"):
    check_target(tmp_path / "loop", "a", setting="to")


def test_the_chat_template_writes_what_sft_reads(start):
  jinja2 = pytest.importorskip("jinja2")
  template = exporting.get_template("short")
  turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
           {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]
  render = jinja2.Environment().from_string(template.jinja()).render
  prompt, answer = template.conversation([*turns, {"role": "assistant", "content": "4"}])
  assert render(messages=turns, add_generation_prompt=True) == prompt
  assert render(messages=[*turns, {"role": "assistant", "content": "4"}]) == prompt + answer


def test_files_of_the_folder_that_training_began_from_come_back_as_they_were(tmp_path, start):
  source = tmp_path / "source"
  export(source, start, BYTES)
  given = {"generation_config.json": '{"eos_token_id": [256, 257], "temperature": 0.6}',
           "tokenizer_config.json": '{"chat_template": "theirs", "eos_token": "x"}',
           "special_tokens_map.json": "{}"}
  for name, text in given.items():
    (source / name).write_text(text)
  config = read(source, "config.json") | {"eos_token_id": [256, 257], "bos_token_id": 9}
  (source / "config.json").write_text(json.dumps(config))
  tokenizer = (source / TOKENIZER).read_text().replace(": ", ":  ")  # formatted in their own way
  (source / TOKENIZER).write_text(tokenizer)

  loaded = load_model(source)
  export(tmp_path / "out", loaded, loaded.tokenizer())
  for name, text in given.items() | {(TOKENIZER, tokenizer)}:
    assert (tmp_path / "out" / name).read_text() == text
  written = read(tmp_path / "out", "config.json")
  assert (written["eos_token_id"], written["bos_token_id"]) == ([256, 257], 9)

  # Another tokenizer makes all of them obsolete.
  other = Tokenizer.train_bpe(["some text"], 300)
  cfg = dataclasses.replace(CFG, vocab_size=other.vocab_size)
  export(tmp_path / "other",
         dataclasses.replace(loaded, cfg=cfg, variables=tiny.variables(cfg)), other)
  assert read(tmp_path / "other", "config.json")["eos_token_id"] == other.eos
  assert "theirs" not in (tmp_path / "other" / "tokenizer_config.json").read_text()


def test_only_an_export_of_the_same_run_is_replaced(tmp_path, start):
  folder = tmp_path / "deep" / "out"
  check_target(folder, "a")
  assert not folder.parent.exists()
  export(folder, start, BYTES, run="a")
  check_target(folder, "a")
  export(folder, start, BYTES, run="a")
  with pytest.raises(ValueError, match="holds the export of another run"):
    check_target(folder, "b")
  check_target(folder, "b", overwrite=True)
  (folder / "thesis.tex").write_text("precious")
  with pytest.raises(ValueError, match=r"other files, such as thesis\.tex"):
    check_target(folder, "a")


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "config.json"])
def test_folders_with_other_files_are_refused(tmp_path, name):
  (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match=f"other files, such as {name}"):
    check_target(tmp_path, "a")
  with pytest.raises(ValueError, match="is a file"):
    check_target(tmp_path / name, "a")
