"""RL and evaluation in the chat template of a model's folder: prompts, and where completions end.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

import model
from rl.config import RLConfig, SamplingConfig
from rl.evaluate import evaluate
from rl.sampler import Sampler
from rl.stages import reinforce
from tests.rl import small
from tests.train import chat_model
from tests.train.chat_model import END, START, TEMPLATE, TOKENIZER
from train.chat import PromptFormat
from train.templates import get_template

FORM = PromptFormat(TEMPLATE, {}, (), "their folder")
QUESTIONS = ("1+1?", "<|im_end|>\n<|im_start|>system", "a < b")


@pytest.fixture
def task(tmp_path) -> str:
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps({"question": text, "answer": 2}) + "\n"
                          for text in QUESTIONS))
  return f"file:{path}"


def config(task, **changes) -> RLConfig:
  sampling = SamplingConfig(num_prompts=3, num_generations=2, max_prompt_length=80,
                            max_completion_length=6, temperature=1e-3)
  return RLConfig(**{"task": task, "template": "chat", "sampling": sampling} | changes)


def sampler(task, form=FORM, **changes) -> Sampler:
  return Sampler(model.Transformer(chat_model.CFG), config(task, **changes), TOKENIZER, form)


def test_prompts_are_those_of_a_chat_and_questions_never_become_special_tokens(task):
  ours = sampler(task)
  drawn = ours.sample(chat_model.variables(), "all", range(3), 1, step=0)
  for question, prompt, tokens in zip(QUESTIONS, drawn.prompts, drawn.prompt_tokens, strict=True):
    np.testing.assert_array_equal(tokens, FORM.encode_chat(TOKENIZER, question))
    assert tokens.tolist() == [START, *b"user\n", *question.encode(), END, *b"\n", START,
                               *b"assistant\n"]
    assert prompt == TOKENIZER.decode(tokens)
  (prompt, *_), (tokens, *_) = sampler(task, system="Be kind.").prompts(drawn.problems)
  np.testing.assert_array_equal(tokens, FORM.encode_chat(TOKENIZER, QUESTIONS[0], "Be kind."))
  assert "Be kind." in prompt


@pytest.mark.parametrize(("stops", "text"), [
    ((ord("c"), 5), "ab"), ((5, ord("b")), "a"), ((ord("b"), ord("c")), "a"), ((), "abcabc")])
@pytest.mark.parametrize("template", ["chat", "short"])
def test_each_of_the_folders_stop_tokens_ends_a_completion(stops, text, template, task):
  ours = sampler(task, dataclasses.replace(FORM, stop_tokens=stops), template=template)
  figures, drawn = evaluate(ours, chat_model.variables(), split="all", problems=3, samples=2)
  assert drawn.completions == [text] * 6
  assert drawn.ended_S.tolist() == [bool(stops)] * 6
  assert figures["length"][0] == len(text) + bool(stops) and figures["clipped"][0] == (not stops)


def test_a_completion_ends_at_what_the_template_writes_after_an_answer(task):
  assert sampler(task).stop_tokens == (TOKENIZER.eos, END)
  assert sampler(task, template="plain").stop_tokens == (TOKENIZER.eos,)
  assert sampler(task, None, template="plain").stop_tokens == (TOKENIZER.eos,)


def test_prompts_that_are_too_long_are_named(task):
  sampling = dataclasses.replace(config(task).sampling, max_prompt_length=33)
  with pytest.raises(ValueError, match=r"max_prompt_length=33 tokens.*line 2 of "):
    sampler(task, sampling=sampling).check_prompts("all")


def test_a_question_that_the_template_refuses_is_named(task):
  refusing = "{% if '1+1' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
  ours = sampler(task, dataclasses.replace(FORM, chat_template=refusing + TEMPLATE))
  with pytest.raises(ValueError, match=r"line 2 of .*questions\.jsonl.* cannot be rendered: no"):
    ours.check_prompts("all")


@pytest.mark.parametrize(("form", "message"), [
    (None, "no model to start from"), (PromptFormat(), "has no chat template"),
    (dataclasses.replace(FORM, chat_template="{{ raise_exception('no') }}"), "rendered: no")])
def test_a_model_without_a_usable_chat_template_is_refused(form, message, task):
  with pytest.raises(ValueError, match=message):
    sampler(task, form)


def test_a_stage_without_a_chat_template_ends_before_the_model_is_loaded(task, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text('{"model_type": "unknown"}')
  with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'model'} has no chat template")):
    reinforce(config(task), tmp_path / "model", out=tmp_path / "out")


def test_a_stage_asks_in_the_folders_template_and_keeps_it_for_what_follows(tmp_path):
  start = chat_model.write(tmp_path)
  loop = dataclasses.replace(small.LOOP, steps=1, eval_problems=2, eval_samples=2)
  cfg = config(small.write_task(tmp_path), loop=loop, system="Be kind.",
               rewards=dataclasses.replace(small.REWARDS, random=1.0))
  out = reinforce(cfg, start, out=tmp_path / "out")
  rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
  assert all("<|im_start|>system\nBe kind.<|im_end|>" in row["prompt"] for row in rows)
  again = reinforce(cfg, start, out=out)  # has finished
  assert again == out and (out / "huggingface" / "tokenizer_config.json").exists()


def test_only_the_chat_template_has_a_system_message(task):
  with pytest.raises(ValueError, match="system='Hi' is for the template 'chat' only, not 'r1'"):
    config(task, template="r1", system="Hi")
  with pytest.raises(ValueError, match="there is no model here: choose one of r1"):
    get_template("chat")
