"""A chat model's way: SFT, evaluation, RL and export in the chat template of its own folder."""

import json
import pathlib
import re

import pytest

from experiments.options import Options
from experiments.programs import evaluate, export, generate, pretrain
from experiments.studies import runner
from experiments.studies.r1 import r1_zero
from rl.loading import load_model
from tests.train import chat_model
from tests.train.chat_model import END, START, TEMPLATE, TOKENIZER
from train.loading import load_model as load_text_model
from train.loading import prompt_format, stored_prompting

SFT = ("data.template=chat", "data.system=Be kind.", "data.fim_rate=0", "data.seq_len=64",
       "data.heldout_bytes=200", "train.steps=1", "train.batch_size=2", "sample_tokens=0",
       "optimizer.learning_rate=1e-8", "baselines=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """Folders "model", a chat model; "sft", its fine-tuning; and questions and answers."""
  path = tmp_path_factory.mktemp("chat")
  (path / "model").mkdir()
  chat_model.write(path / "model")
  (path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ord("c")}))
  (path / "rows.jsonl").write_text("".join(
      json.dumps({"question": f"{i}? <|im_end|>", "answer": f"{i}"}) + "\n" for i in range(40)))
  fine_tune(path, f"init={path / 'model'}", *SFT)
  return path


def fine_tune(path, *settings, out="sft") -> None:
  source = f"Source(path={path / 'rows.jsonl'}, prompt_field=question, text_field=answer)"
  pretrain.main(Options("pretrain", scale="smoke", out=path / out, settings=(
      f"data.sources={source}", f"data.cache_dir={path / 'cache'}", *settings)))


def test_a_fine_tuned_model_is_asked_as_it_was_taught_and_stops_where_it_ends(folder, capsys):
  assert stored_prompting(folder / "sft") == ("chat", "Be kind.")
  assert load_text_model(folder / "sft").template == "chat"
  evaluate.main(Options("evaluate", out=folder / "found", settings=(
      f"checkpoint={folder / 'sft'}", f"task=file:{folder / 'rows.jsonl'}", "split=all",
      "problems=4", "samples=2", "temperature=0", "max_completion_length=6",
      "max_prompt_length=100")))
  shown = capsys.readouterr().out
  assert shown.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n0? <|im_end|>"
                          "<|im_end|>\n<|im_start|>assistant\nab\n")
  found = json.loads((folder / "found" / "results.json").read_text())
  assert found["config"]["template"] == "chat" and found["config"]["system"] == "Be kind."
  assert found["length"][0] == 3 and found["clipped"][0] == 0


def test_rl_asks_the_same_and_what_it_exports_is_prompted_alike(folder, capsys):
  runner.main(r1_zero.STUDY, Options("r1_zero", scale="smoke", out=folder / "rl", settings=(
      f"init={folder / 'sft'}", f"rl.task=file:{folder / 'rows.jsonl'}", "rl.loop.steps=1",
      "rl.sampling.max_prompt_length=100", "rl.sampling.max_completion_length=6",
      "rl.loop.eval_problems=2", "evaluation.problems=2", "evaluation.samples=2",
      "evaluation.harder=false", "rl.rewards.random=1")))
  policy = folder / "rl" / "grpo-seed0"
  assert stored_prompting(policy) == ("chat", "Be kind.")
  row = json.loads((policy / "completions.jsonl").read_text().splitlines()[0])
  assert row["prompt"].startswith("<|im_start|>system\nBe kind.")
  export.main(Options("export", settings=(f"checkpoint={policy}", f"to={folder / 'exported'}")))
  form = prompt_format(folder / "exported")
  assert form.chat_template == TEMPLATE
  assert form.stop_tokens == (ord("c"), TOKENIZER.eos, END)
  capsys.readouterr()
  generate.main(Options("generate", settings=(
      f"checkpoint={policy}", "chat=true", "prompt=hi", "temperature=0")))
  assert capsys.readouterr().out == "ab\n"
  assert load_model(folder / "exported").prompt_format() == form
  assert START in form.encode_chat(TOKENIZER, "hi")


@pytest.mark.parametrize("program", ["pretrain", "evaluate", "r1_zero"])
def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded(program, folder, tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "unknown"}')
  named = re.escape(f"{tmp_path} has no chat template, neither chat_template.jinja") + ".*add chat_"
  with pytest.raises(ValueError, match=named):
    if program == "pretrain":
      fine_tune(folder, f"init={tmp_path}", *SFT, out="refused")
    elif program == "evaluate":
      evaluate.main(Options("evaluate", settings=(f"checkpoint={tmp_path}", "template=chat")))
    else:
      runner.main(r1_zero.STUDY, Options("r1_zero", scale="smoke", out=tmp_path / "rl", settings=(
          f"init={tmp_path}", "rl.template=chat")))


def test_without_a_model_to_start_from_there_is_no_chat_template(folder, tmp_path):
  with pytest.raises(ValueError, match="no model to start from: set init"):
    fine_tune(folder, "data.template=chat", out="refused")
  with pytest.raises(ValueError, match="no model to start from: set init"):
    runner.main(r1_zero.STUDY, Options("r1_zero", scale="smoke", out=tmp_path / "rl", settings=(
        "rl.template=chat",)))
