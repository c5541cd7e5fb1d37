"""The generate program: chats, ends of a text, and what comes before a prompt."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from experiments.options import Options
from experiments.programs import generate
from experiments.programs.chatting import Chat
from experiments.programs.generate import GenerateConfig, write_continuation
from tests.train import chat_model
from tests.train.chat_model import CFG, END, START, TOKENIZER
from train.chat import PromptFormat
from train.loading import LoadedModel


@pytest.fixture(scope="module")
def variables() -> dict:
  return chat_model.variables()


@pytest.fixture
def folder(tmp_path):
  return chat_model.write(tmp_path)


def prompts_of(monkeypatch) -> list[list[int]]:
  """Returns a list to which every prompt that is streamed is appended."""
  seen, stream = [], model.stream

  def record(network, variables, prompt_T, **kwargs):
    seen.append(np.asarray(prompt_T).tolist())
    return stream(network, variables, prompt_T, **kwargs)

  monkeypatch.setattr(model, "stream", record)
  return seen


def run(folder, *settings) -> None:
  generate.main(Options("generate", settings=(
      f"checkpoint={folder}", "temperature=0", "max_new_tokens=8", *settings)))


@pytest.mark.parametrize(("stop", "text"), [
    ((), "abcabcab"), (("c",), "ab"), (("bcab",), "a"), (("cb", "ca"), "ab"), (("abca",), ""),
    (("abd",), "abcabcab"), (("cabx",), "abcabcab"), (("caba", "bca"), "a")])
def test_a_stop_string_ends_the_text_before_it(stop, text, variables, capsys):
  written = write_continuation(CFG, variables, TOKENIZER, "x", max_new_tokens=8, temperature=0,
                               stop=stop)
  assert written == text
  assert capsys.readouterr().out == text


def test_each_of_several_stop_tokens_ends_the_text_and_is_not_part_of_it(variables, capsys):
  for stops, text in (((ord("c"), 5), "ab"), ((5, ord("b")), "a"), ((260,), "abcabcab")):
    assert write_continuation(CFG, variables, TOKENIZER, "x", max_new_tokens=8, temperature=0,
                              stop_tokens=stops) == text
  assert capsys.readouterr().out == "abaabcabcab"


@pytest.mark.parametrize(("config", "text"), [
    ({"eos_token_id": [5, ord("b")]}, "a"), ({"eos_token_id": ord("c")}, "ab"), ({}, "abcabcab")])
def test_the_folders_eos_ends_the_text(config, text, folder, capsys):
  (folder / "generation_config.json").write_text(json.dumps(config))
  run(folder, "prompt=x", "chat=true")
  assert capsys.readouterr().out == f"{text}\n"


def test_a_chat_is_rendered_by_the_folders_template(folder, monkeypatch, capsys):
  seen = prompts_of(monkeypatch)
  run(folder, "prompt='<|im_end|> hi'", "chat=true", "system=Be kind.")
  start, end = 261, 262
  assert seen == [[
      start, *b"system\nBe kind.", end, *b"\n", start, *b"user\n<|im_end|> hi", end, *b"\n", start,
      *b"assistant\n"]]
  assert capsys.readouterr().out == "abcabcab\n"


def test_without_a_prompt_there_is_a_conversation_that_remembers_what_was_said(
    folder, monkeypatch, capsys):
  seen = prompts_of(monkeypatch)
  monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand\n/new\nx\n\nnot asked\n"))
  run(folder)
  turn = lambda role, text: [START, *f"{role}\n{text}".encode(), END, *b"\n"]
  ask = [START, *b"assistant\n"]
  assert seen == [
      turn("user", "hi") + ask,
      turn("user", "hi") + turn("assistant", "abcabcab") + turn("user", "and") + ask,
      turn("user", "x") + ask]
  out, err = capsys.readouterr()
  assert out == 3 * "abcabcab\n"
  assert err.count("answer: 8 tokens in ") == 3 and "cut off after max_new_tokens=8" in err


def test_a_model_of_a_run_is_asked_with_the_template_that_it_was_trained_with():
  start = LoadedModel(CFG, {}, None, template="short_think")
  chat = Chat.of(GenerateConfig(checkpoint="run"), start, TOKENIZER, PromptFormat())
  messages = [{"role": "user", "content": "1+1?"}]
  text, prompt_T = chat._prompt(messages)
  assert text == "Q: 1+1?\n<think>" and TOKENIZER.decode(prompt_T) == text
  text, _ = chat._prompt([*messages, {"role": "assistant", "content": "2"},
                          {"role": "user", "content": "2+2?"}])
  assert text == "Q: 1+1?\n<think>2\nQ: 2+2?\n<think>"
  assert Chat.of(GenerateConfig(checkpoint="run", prompt="x"), start, TOKENIZER,
                 PromptFormat()) is None
  assert Chat.of(GenerateConfig(checkpoint="run"), dataclasses.replace(start, template=None),
                 TOKENIZER, PromptFormat()) is None


def test_several_replies_vote_and_their_cost_is_that_of_all(folder, capsys):
  ask = lambda *how: generate.main(Options("generate", settings=(
      f"checkpoint={folder}", "prompt=x", "max_new_tokens=8", *how)))
  ask("chat=true", "votes=3", "temperature=0.01")
  out, err = capsys.readouterr()
  assert out == "abcabcab\n"
  assert "no sample has an answer: this is the first of them" in err
  assert "answer: 24 tokens in " in err
  with pytest.raises(ValueError, match="votes=2 must be at least 1, and more than 1 need"):
    ask("chat=true", "votes=2", "temperature=0")
  with pytest.raises(ValueError, match="votes=2 needs a chat"):
    ask("votes=2", "temperature=1")


def test_a_model_whose_logits_are_nan_is_named(capsys):
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), chat_model.variables())
  assert write_continuation(CFG, broken, TOKENIZER, "x", max_new_tokens=8, temperature=0) == ""
  assert "logits of the next token are NaN" in capsys.readouterr().err


def test_settings_of_a_chat_are_refused_for_a_model_that_has_none(folder):
  (folder / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"effort=5 needs a chat: .* has no chat template"):
    run(folder, "effort=5")


def test_a_prompt_begins_as_the_post_processor_says_and_never_has_other_special_tokens(
    folder, monkeypatch, capsys):
  seen = prompts_of(monkeypatch)
  run(folder, "prompt='<|im_start|>x'")
  assert seen == [[261, *b"<|im_start|>x"]]
  out, err = capsys.readouterr()
  assert out == "<|im_start|>xabcabcab\n"
  assert "has a chat template: add --set chat=true" in err


def test_more_tokens_than_there_is_memory_for_are_refused(folder):
  with pytest.raises(ValueError, match=r"needs a cache of .* the model's context is"):
    generate.main(Options("generate", settings=(f"checkpoint={folder}", "max_new_tokens=1e15")))


def test_chat_without_a_template_and_broken_files_are_named(folder):
  for content, message in (("{}", "has no chat template"), ('{"chat_template": " "}', "is empty")):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} {message}"):
      run(folder, "chat=true")
  for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
    good = (folder / name).read_text() if (folder / name).exists() else "{}"
    for broken in (good[:-3] + "!", "[1]", '{"a": "\udcff"}'):
      (folder / name).write_text(broken, errors="surrogateescape")
      with pytest.raises(ValueError, match=re.escape(name)):
        run(folder)
    (folder / name).write_text(good)


@pytest.mark.parametrize(("changes", "message"), [
    ({"system": "Be kind.", "prompt": "x"}, "system='Be kind.' needs a chat: add --set chat=true"),
    ({"effort": 3, "prompt": "x"}, "effort=3 needs a chat"), ({"stop": ("a", "")}, "empty"),
    ({"effort": 3, "least_effort": 4}, "least=4 to most=3 tokens is impossible")])
def test_settings_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    GenerateConfig(**changes)
