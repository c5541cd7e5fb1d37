"""bench_rl: a tiny Llama is trained by this project and, where it is installed, by TRL."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import model
from experiments import bench_rl, chat, sums
from experiments.bench_rl_sides import Bench, Ours, Peer
from experiments.options import Options
from rl.templates import get_template
from train.tokenizer import Tokenizer

# An interpreter with torch and TRL, where that is not this one.
PYTHON = os.environ.get("PEER_PYTHON", sys.executable)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {
    "task": "arithmetic:terms=2,digits=1,operators=+", "num_prompts": 2, "num_generations": 4,
    "max_prompt_length": 64, "max_completion_length": 4, "micro_batch_size": 4, "steps_timed": 1,
    "repeats": 2, "eval_problems": 2, "eval_samples": 2, "eval_every": 1, "compute": "float32"}


def needs(module: str) -> None:
  found = (importlib.util.find_spec(module) if sys.executable == PYTHON else
           subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0)
  if not found:
    pytest.skip(f"{PYTHON} lacks {module}: name an interpreter that has it as PEER_PYTHON")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A Llama of two layers with a ChatML vocabulary of bytes, as a Hugging Face folder."""
  path = tmp_path_factory.mktemp("llama")
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  plain = tokenizers.Tokenizer(
      models.BPE(vocab={char: len(MARKS) + i for i, char in enumerate(alphabet)}
                 | {mark: i for i, mark in enumerate(MARKS)}, merges=[]))
  plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  plain.decoder = decoders.ByteLevel()
  plain.add_special_tokens(list(MARKS))
  cfg = model.ModelConfig(
      vocab_size=plain.get_vocab_size(), d_model=24, num_layers=2, ffn_dim=32,
      attention=model.GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
      moe=None, num_dense_layers=0, mtp=None, rope=model.RopeConfig(1e4, "half"),
      tie_embeddings=True, max_seq_len=128)
  model.hf.save(path / "model", cfg, tiny.variables(cfg))
  Tokenizer(plain.to_str()).save(path / "model" / "tokenizer.json")
  return path / "model"


@pytest.fixture(scope="module")
def ours(folder, quick_compiles):
  return Ours(Bench(model=str(folder), **SHAPE))


def run(folder: pathlib.Path, out: pathlib.Path, **changed) -> dict:
  told = {"model": folder, "minutes": 0.001, **SHAPE, **changed}
  bench_rl.main(Options("bench_rl", out=out, settings=tuple(
      f"bench.{name}='{value}'" if name == "task" else f"bench.{name}={value}"
      for name, value in told.items())))
  return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(("text", "reward"), [
    ("7", 1), ("3+4=7.", 1), ("7, or 8", 0), ("-7", 0), ("seven", 0), ("", 0), ("17", 0),
    ("7 7", 1), ("07", 1)])
def test_the_last_number_decides(text, reward):
  assert sums.rewards([text], ["7"]) == [reward]


def test_negative_answers_can_be_given():
  assert sums.rewards(["3-4=-1", "3-4=1"], ["-1", "-1"]) == [1, 0]


def test_marks_of_a_chat_prompt_are_single_tokens_and_the_turns_end_stops(folder):
  path = folder / "tokenizer.json"
  talker, plain = chat.ChatTokenizer.load(path), Tokenizer.load(path)
  prompt = get_template("chat").render("1+2")
  ids = talker.encode(prompt)
  assert [MARKS[i] for i in ids if i < 3] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
  assert talker.decode(ids) == prompt
  assert talker.decode([talker.eos]) == "<|im_end|>" and plain.eos == 0
  assert min(plain.encode(prompt)) >= 3


def test_a_vocabulary_without_turns_is_refused():
  with pytest.raises(ValueError, match=re.escape("no <|im_end|>")):
    chat.ChatTokenizer.bytes()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"peer": "verl"}, "must be none, trl or transformers"),
    ({"peer_generation": ()}, "peer_generation"), ({"peer_generation": ("vllm",)}, "continuous"),
    ({"repeats": 0}, "repeats=0 must be positive"), ({"minutes": -1}, "minutes"),
    ({"goal": 2}, "goal"), ({"eval_problems": 1}, "at least 2"), ({"compute": "fp8"}, "bfloat16"),
    ({"num_generations": 1}, "nothing to compare"), ({"micro_batch_size": 7}, "must divide")])
def test_impossible_settings_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Bench(**wrong)


def test_a_model_must_be_named():
  with pytest.raises(ValueError, match=re.escape("bench.model=DIR")):
    bench_rl.main(Options("bench_rl"))


def test_tokens_counted_are_those_up_to_the_end_of_a_turn(ours):
  ours.reset()
  drawn = ours.sampler.sample(ours._initial, "train", range(2), 4, step=0)
  row, = ours.go(1)
  stop = ours.sampler.tokenizer.eos
  lengths = [min(4, list(tokens).index(stop) + 1 if stop in tokens else 4)
             for tokens in drawn.tokens_SN]
  assert row["tokens"] == sum(lengths)
  assert row["seconds"] == pytest.approx(row["rollout"] + row["reward"] + row["update"])


def test_a_reset_goes_back_to_the_first_weights(ours):
  ours.reset()
  before = ours.evaluate()
  first = ours.go(2)
  ours.reset()
  again = ours.go(2)
  pick = lambda rows: [(row["tokens"], row["mean_reward"]) for row in rows]
  assert pick(first) == pick(again)
  ours.reset()
  assert ours.evaluate() == before


def test_steps_change_the_policy(ours, monkeypatch):
  # Rewards of a random model are all 0: give it some to learn from.
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: [
      float(i % 2) for i in range(len(completions))])
  ours.reset()
  table = lambda: np.array(ours._state.train.variables["params"]["embedding"]["embedding"])
  before = table()
  ours.go(1)
  assert np.abs(table() - before).max() > 0


def test_rates_are_medians_over_rounds_of_tokens_over_a_phases_seconds():
  step = lambda seconds, tokens: {"rollout": seconds / 2, "reward": seconds / 4,
                                  "update": seconds / 4, "seconds": seconds, "tokens": tokens,
                                  "mean_reward": 0.5}
  found = bench_rl.summary([[step(1.0, 10), step(3.0, 30)], [step(1.0, 50)], [step(1.0, 20)]])
  assert found["by_round"] == [10, 50, 20]
  assert found["tokens_per_second"] == {"rollout": 40, "reward": 80, "update": 80, "step": 20}
  assert found["seconds"]["step"] == 1.0 and found["mean_reward"] == 0.5


def test_alone_it_times_trains_and_reports(folder, tmp_path, quick_compiles):
  result = run(folder, tmp_path)
  assert set(result["sides"]) == {"ours"} and len(result["sides"]["ours"]["by_round"]) == 2
  training = result["training"]["ours"]
  assert [one["step"] for one in training["evaluations"]] == list(
      range(len(training["steps"]) + 1))
  assert training["steps"][-1]["time"] == pytest.approx(
      sum(step["seconds"] for step in training["steps"]))
  assert training["steps"][-1]["time"] >= 0.06 and "seconds_to_goal" not in training
  assert "No peer was measured" in (tmp_path / "report.md").read_text()
  assert (tmp_path / "training.png").stat().st_size > 5000


def test_training_ends_at_the_goal(folder, tmp_path, quick_compiles):
  training = run(folder, tmp_path, goal=0)["training"]["ours"]
  assert training["seconds_to_goal"] == 0 and training["steps"] == []


def test_a_peer_that_cannot_run_is_left_out_and_ours_goes_on(folder, tmp_path, quick_compiles):
  without = tmp_path / "python"
  without.write_text("#!/bin/sh\necho lacks torch >&2\nexit 1\n")
  without.chmod(0o755)
  result = run(folder, tmp_path / "out", peer="transformers", peer_python=without, minutes=0)
  assert list(result["failed"]) == ["transformers"] and set(result["sides"]) == {"ours"}
  assert "transformers stopped" in (tmp_path / "out" / "report.md").read_text()


def test_without_torch_a_peer_says_what_it_lacks(tmp_path):
  config = tmp_path / "peer.json"
  config.write_text("{}")
  code = ("import runpy, sys; sys.modules.update(torch=None, transformers=None, trl=None); "
          "runpy.run_module('experiments.peers.grpo', run_name='__main__', alter_sys=True)")
  done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True,
                        stdin=subprocess.DEVNULL, cwd=pathlib.Path(bench_rl.__file__).parents[1])
  assert done.returncode != 0 and not done.stdout
  assert "lacks torch: run this by an interpreter" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.fixture(scope="module", params=["transformers", "trl"])
def peer(request, ours, tmp_path_factory):
  needs(request.param)
  needs("torch")
  path = tmp_path_factory.mktemp("peer") / "peer.json"
  path.write_text(json.dumps(ours.for_peers()))
  bench = Bench(model=ours.bench.model, peer=request.param, peer_python=shutil.which(PYTHON),
                **SHAPE)
  side = Peer(bench, "generate", path)
  side.ready(ours.cfg.param_count())
  yield side
  side.quit()


def test_a_peer_samples_as_many_completions_and_times_its_phases(peer):
  rows = peer.go(2)
  assert len(rows) == 2 and peer.masters == "float32"
  for row in rows:
    assert 8 <= row["tokens"] <= 8 * 4
    assert min(row["rollout"], row["reward"], row["update"]) > 0
    assert row["seconds"] == pytest.approx(row["rollout"] + row["reward"] + row["update"])


def test_a_peer_evaluates_and_goes_back_to_the_start(peer):
  peer.reset()
  rates = peer.evaluate()
  assert len(rates) == 2 and all(0 <= rate <= 1 for rate in rates)
  assert len(peer.go(1)) == 1
