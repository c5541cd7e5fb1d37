"""Run folders: what a refused run leaves, and what is said of damaged and finished ones."""

import json
import shutil

import pytest

from experiments.options import Options
from experiments.programs import export, pretrain
from rl.loading import load_model
from train.tokenizer import Tokenizer

SETTINGS = ("model.d_model=16", "model.num_layers=1", "model.num_dense_layers=0",
            "model.moe.num_experts=4", "model.moe.expert_dim=8", "model.mtp=none",
            "train.steps=2", "train.checkpoint_every=1", "train.batch_size=2",
            "data.sources=builtin:arithmetic", "data.seq_len=32", "data.heldout_bytes=2000",
            "sample_tokens=0", "baselines=false")


def run(folder, *settings) -> None:
  pretrain.main(Options("pretrain", scale="smoke", out=folder, settings=(*SETTINGS, *settings)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The folder of a finished run."""
  folder = tmp_path_factory.mktemp("pretrain") / "run"
  run(folder)
  return folder


@pytest.fixture
def finished(made, tmp_path):
  return shutil.copytree(made, tmp_path / "run")


@pytest.mark.parametrize(("setting", "message"), [
    ("mesh.data=2", "device"), ("train.attend=cudnn", "cuDNN"),
    ("data.heldout_fraction=0", "held out"), ("export=/proc/x", "export=/proc/x cannot be written"),
    ("export=OUT/config.json", "is a file: give a folder"), ("export=OUT", "export=.*holds other")])
def test_a_refused_run_leaves_nothing(setting, message, tmp_path):
  out = tmp_path / "parent" / "run"
  with pytest.raises(ValueError, match=message):
    run(out, setting.replace("OUT", str(out)))
  assert list(tmp_path.iterdir()) == []


def test_a_report_that_was_interrupted_is_written_by_the_same_command(
    tmp_path, monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pretrain, "write_run_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / "run")
  assert not (tmp_path / "run" / "results.json").exists()
  run(tmp_path / "run")
  assert (tmp_path / "run" / "report.md").exists()
  assert "report: " in capsys.readouterr().out


def test_a_missing_report_of_a_finished_run_is_written_again(finished, capsys):
  content = (finished / "report.md").read_text()
  (finished / "report.md").unlink()
  run(finished)
  assert (finished / "report.md").read_text() == content
  printed = capsys.readouterr()
  assert "is finished" in printed.out and "warning" not in printed.err


@pytest.mark.parametrize(("name", "message"), [
    ("checkpoints", "has no checkpoints any more"), ("config.json", "config.json is missing")])
def test_parts_of_a_finished_run_that_are_gone_are_named(finished, name, message, capsys):
  (shutil.rmtree if name == "checkpoints" else type(finished).unlink)(finished / name)
  run(finished)
  printed = capsys.readouterr()
  assert "is finished" in printed.out and message in printed.err


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "null", '{"status": "finished"}', '{"status": "finished", "config": 3}',
    '{"status": "finished", "config": {"train": 3}}'])
def test_damaged_results_are_an_error_that_names_the_file(finished, content):
  (finished / "results.json").write_text(content)
  with pytest.raises(ValueError, match=r"results\.json "):
    run(finished)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "null", '{"config": {}}', '{"config": 3, "seeds": [0]}',
    '{"config": {"train": 3}, "seeds": [0]}', '{"rl": {}}', '{"rl": 3}', '{"requested": 3}'])
def test_a_damaged_configuration_is_an_error_that_names_the_folder(finished, content):
  (finished / "config.json").write_text(content)
  with pytest.raises(ValueError, match=str(finished)):
    run(finished)
  with pytest.raises(ValueError, match=str(finished / "config.json")):
    load_model(finished)


def test_an_older_checkpoint_is_loaded_with_a_warning_if_the_newest_is_damaged(finished, capsys):
  (finished / "checkpoints" / "step_00000002" / "manifest.json").write_text("{}")
  load_model(finished)
  warning = capsys.readouterr().err
  assert "step_00000002: manifest.json is damaged" in warning and "step 1 is used" in warning


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_exported(finished, tmp_path):
  larger = json.loads((finished / "tokenizer.json").read_text())
  larger["added_tokens"].append({**larger["added_tokens"][-1], "content": "<more>",
                                 "id": Tokenizer.bytes().vocab_size})
  (tmp_path / "larger.json").write_text(json.dumps(larger))
  vocabulary = load_model(finished).cfg.vocab_size
  with pytest.raises(ValueError, match=rf"has {vocabulary + 1} tokens, 1 more than the model's "
                                       rf"vocabulary of {vocabulary}"):
    export.main(Options("export", settings=(
        f"checkpoint={finished}", f"to={tmp_path / 'to'}",
        f"tokenizer={tmp_path / 'larger.json'}")))
  assert not (tmp_path / "to").exists()
