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
from experiments.benchmarks.rl import bench_rl, sums
from experiments.benchmarks.rl.contenders import Bench, OwnTrainer, PeerTrainer
from experiments.benchmarks.rl.report import sections, summary
from experiments.options import Options
from experiments.reports import results
from rl.tasks.generated import half_of
from rl.templates import get_template
from train import chat
from train.tokenizer import Tokenizer

# An interpreter with torch and TRL, where that is not this one.
ROOT = pathlib.Path(__file__).parents[4]
PYTHON = os.environ.get("PEER_PYTHON", sys.executable)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {
    "task": "arithmetic:terms=2,digits=1,operators=+", "num_prompts": 2, "num_generations": 4,
    "max_prompt_length": 64, "max_completion_length": 4, "micro_batch_size": 4, "steps_timed": 1,
    "warm_up_rounds": 2, "repeats": 2, "eval_problems": 4, "eval_samples": 2, "eval_every": 1,
    "compute": "float32"}


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
  return OwnTrainer(Bench(model=str(folder), **SHAPE))


def run(folder: pathlib.Path, out: pathlib.Path, **changed) -> dict:
  given = {"model": folder, "minutes": 0.001, **SHAPE, **changed}
  bench_rl.main(Options("bench_rl", out=out, settings=tuple(
      f"bench.{name}='{value}'" if name == "task" else f"bench.{name}={value}"
      for name, value in given.items())))
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
    ({"warm_up_rounds": 1}, "at least 2"), ({"goal": 2}, "goal"),
    ({"eval_problems": 1}, "at least 2"), ({"compute": "fp8"}, "bfloat16"),
    ({"num_generations": 1}, "nothing to compare"), ({"micro_batch_size": 7}, "must divide")])
def test_impossible_settings_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Bench(**wrong)


def test_a_model_must_be_named():
  with pytest.raises(ValueError, match=re.escape("bench.model=DIR")):
    bench_rl.main(Options("bench_rl"))


def test_tokens_counted_are_those_up_to_the_end_of_a_turn(ours):
  ours.reset()
  first = 2 * ours._step
  drawn = ours.sampler.sample(
      ours._initial, "train", range(first, first + 2), 4, step=ours._step)
  row, = ours.steps(1)
  stop = ours.sampler.tokenizer.eos
  lengths = [min(4, list(tokens).index(stop) + 1 if stop in tokens else 4)
             for tokens in drawn.tokens_SN]
  assert row["tokens"] == sum(lengths)
  assert row["seconds"] == pytest.approx(row["rollout"] + row["reward"] + row["update"])


def table(ours: OwnTrainer) -> np.ndarray:
  return np.array(ours._state.train.variables["params"]["embedding"]["embedding"])


@pytest.fixture
def rewarded(monkeypatch):
  """Rewards of a random model are all 0: this gives it some to learn from."""
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: [
      float(i % 2) for i in range(len(completions))])


def test_a_reset_goes_back_to_the_first_weights(ours, rewarded):
  ours.reset()
  first = table(ours)
  ours.steps(1)
  ours.reset()
  np.testing.assert_array_equal(table(ours), first)


def test_all_contenders_are_asked_the_same_problems_in_the_same_order_round_after_round(
    ours, monkeypatch):
  asked, judge = [], sums.rewards
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: (
      asked.append(answers), judge(completions, answers))[1])
  monkeypatch.setattr(ours, "_step", 0)
  peers = [row["answer"] for row in ours.for_peers()["train"]]
  ours.reset()
  ours.steps(2)
  ours.reset()
  ours.steps(1)
  assert np.concatenate(asked).tolist() == np.repeat(peers[:6], 4).tolist()
  assert len(set(peers[:6])) > 2


def test_problems_begin_again_after_whole_rollouts(ours, monkeypatch):
  asked, judge = [], sums.rewards
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: (
      asked.append(answers), judge(completions, answers))[1])
  peers = [row["answer"] for row in ours.for_peers()["train"]]
  monkeypatch.setattr(ours, "_step", len(peers) // 2 - 1)
  ours.steps(2)
  assert np.concatenate(asked).tolist() == np.repeat([*peers[-2:], *peers[:2]], 4).tolist()
  assert Bench(num_prompts=96).num_problems == 42 * 96
  assert Bench(num_prompts=5120).num_problems == 5120


def test_steps_change_the_policy(ours, rewarded):
  ours.reset()
  before = table(ours)
  ours.steps(1)
  assert np.abs(table(ours) - before).max() > 0


def test_rates_are_medians_over_rounds_of_tokens_over_a_phases_seconds():
  step = lambda seconds, tokens: {"rollout": seconds / 2, "reward": seconds / 4,
                                  "update": seconds / 4, "seconds": seconds, "tokens": tokens,
                                  "mean_reward": 0.5}
  found = bench_rl.medians([[step(1.0, 10), step(3.0, 30)], [step(1.0, 50)], [step(1.0, 20)]])
  assert found["by_round"] == [10, 50, 20]
  assert found["tokens_per_second"] == {"rollout": 40, "reward": 80, "update": 80, "step": 20}
  assert found["seconds"]["step"] == 1.0 and found["mean_reward"] == 0.5


def test_rounds_are_steady_when_the_last_two_agree_within_a_tenth_of_the_faster():
  assert not bench_rl.steady([100])
  assert bench_rl.steady([1, 90, 100]) and bench_rl.steady([1, 100, 90])
  assert not bench_rl.steady([100, 100, 89]) and not bench_rl.steady([100, 100, 112])


class Paced:
  """A contender that takes so many seconds for a step of 100 tokens, round by round."""

  masters = "float32"

  def __init__(self, name: str, *seconds: float):
    self.name, self._seconds, self.resets = name, iter(seconds), 0

  def reset(self) -> None:
    self.resets += 1

  def steps(self, count: int) -> list[dict[str, float]]:
    return [{"seconds": next(self._seconds), "tokens": 100}] * count


def test_the_warm_up_lasts_for_all_until_the_slowest_to_settle_is_steady():
  contenders, result = [Paced("ours", 2, 1, 1, 1), Paced("peer", 9, 3, 2, 2)], {"failed": {}}
  bench_rl.warm_up(Bench(), contenders, result)
  assert result["warm_up"] == {
      "ours": {"by_round": [50, 100, 100, 100], "steady": True},
      "peer": {"by_round": [pytest.approx(100 / 9), pytest.approx(100 / 3), 50, 50],
               "steady": True}}
  assert [paced.resets for paced in contenders] == [4, 4]


def test_a_warm_up_without_end_is_cut_off_and_noted():
  result = {"failed": {}}
  contenders = [Paced("ours", 1, 2, 1), Paced("peer", 1, 1, 1)]
  bench_rl.warm_up(Bench(warm_up_rounds=3), contenders, result)
  assert [side["steady"] for side in result["warm_up"].values()] == [False, True]
  assert len(result["warm_up"]["ours"]["by_round"]) == 3


def test_problems_that_ask_the_same_count_as_one():
  rates = bench_rl.by_question([1.0, 0.0, 0.5, 0.0], ["1+2", "3+4", "1+2", "5+6"])
  assert sorted(rates) == [0, 0, 0.75]


@pytest.mark.parametrize("answer", ["7", "-7", "07"])
def test_integers_can_be_judged_by(answer):
  assert sums.is_number(answer) and sums.rewards([answer], [answer]) == [1]


@pytest.mark.parametrize("answer", ["1.5", "", "(1+2)", "7 7", "1_0"])
def test_other_answers_cannot(answer):
  assert not sums.is_number(answer)


def test_a_task_whose_answers_are_no_integers_is_refused_before_the_model_is_loaded(tmp_path):
  with pytest.raises(ValueError, match="must be an integer: name a task of sums"):
    run(tmp_path / "no model", tmp_path / "out", task="countdown")


def test_held_out_problems_that_all_ask_the_same_are_refused(tmp_path):
  questions = [f"0+{i}" for i in range(100)]
  picked = [next(q for q in questions if half_of(q) == split) for split in ("train", "heldout")]
  (tmp_path / "same.jsonl").write_text("".join(
      json.dumps({"question": question, "answer": "2"}) + "\n" for question in picked))
  with pytest.raises(ValueError, match="ask the same"):
    run(tmp_path / "no model", tmp_path / "out", task=f"file:{tmp_path}/same.jsonl")


def test_a_file_in_the_place_of_the_folder_is_noticed_before_anything_runs(tmp_path):
  (tmp_path / "out").write_text("")
  with pytest.raises(FileExistsError):
    run(tmp_path / "no model", tmp_path / "out")


@pytest.fixture
def committed(tmp_path) -> pathlib.Path:
  """The raw results that are committed; they are older than the warm-up."""
  with results.raw(results.ROOT / "bench/bench_rl/gpu") as folder:
    shutil.copy(folder / "results.json", tmp_path)
  return tmp_path


def report(folder: pathlib.Path) -> str:
  result = json.loads((folder / "results.json").read_text())
  return results.write_report(folder, result, summary, sections).read_text()


def test_a_report_has_the_last_and_the_fastest_round_beside_the_median(committed):
  text = report(committed)
  line = next(line for line in text.splitlines() if line.startswith("- 5.06 times"))
  # 41,819 / 8257 of rounds 2, and 42,483 / 10,562 of rounds 3.
  assert "trl (generate)" in line and line.count("4.02") == 2
  assert "the first timed round was not warm" in text and "over 64 held-out problems" in text


def test_a_report_says_what_was_not_measured(committed):
  text = report(committed)
  assert "other ways of sampling: compiled (" in text and "vLLM, with which TRL can sample" in text


@pytest.mark.parametrize(("steady", "found"), [
    (True, "2 warm-up rounds came first, until the last two of every contender agree within 10 %: "
           "reached by all"), (False, "not reached by trl (generate).")])
def test_a_report_says_whether_the_warm_up_was_long_enough(committed, steady, found):
  path = committed / "results.json"
  result = json.loads(path.read_text()) | {"heldout_questions": 13, "warm_up": {
      "ours": {"by_round": [1, 1], "steady": True},
      "trl (generate)": {"by_round": [1, 2], "steady": steady}}}
  path.write_text(json.dumps(result))
  text = report(committed)
  assert found in text and "round was not warm" not in text
  assert "over the 13 distinct questions of 64 held-out problems" in text


def test_alone_it_times_trains_and_reports(folder, tmp_path, quick_compiles):
  result = run(folder, tmp_path)
  assert set(result["contenders"]) == {"ours"}
  assert len(result["contenders"]["ours"]["by_round"]) == 2
  assert len(result["warm_up"]["ours"]["by_round"]) == 2
  assert 2 <= result["heldout_questions"] <= 4
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


def test_a_peer_that_cannot_run_is_excluded_and_ours_continues(folder, tmp_path, quick_compiles):
  without = tmp_path / "python"
  without.write_text("#!/bin/sh\necho lacks torch >&2\nexit 1\n")
  without.chmod(0o755)
  result = run(folder, tmp_path / "out", peer="transformers", peer_python=without, minutes=0)
  assert list(result["failed"]) == ["transformers"] and set(result["contenders"]) == {"ours"}
  assert "the peer stopped" in (tmp_path / "out" / "report.md").read_text()


def test_without_torch_a_peer_says_what_it_lacks(tmp_path):
  config = tmp_path / "peer.json"
  config.write_text("{}")
  code = ("import runpy, sys; sys.modules.update(torch=None, transformers=None, trl=None); "
          "runpy.run_module('experiments.benchmarks.peers.grpo', run_name='__main__', "
          "alter_sys=True)")
  done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True,
                        stdin=subprocess.DEVNULL, cwd=ROOT)
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
  trainer = PeerTrainer(bench, "generate", path)
  trainer.ready(ours.cfg.param_count())
  yield trainer
  trainer.quit()


def test_a_peer_samples_as_many_completions_and_times_its_phases(peer):
  rows = peer.steps(2)
  assert len(rows) == 2 and peer.masters == "float32"
  for row in rows:
    assert 8 <= row["tokens"] <= 8 * 4
    assert min(row["rollout"], row["reward"], row["update"]) > 0
    assert row["seconds"] == pytest.approx(row["rollout"] + row["reward"] + row["update"])


def test_a_peer_evaluates_and_goes_back_to_the_start(peer):
  peer.reset()
  rates = peer.evaluate()
  assert len(rates) == 4 and all(0 <= rate <= 1 for rate in rates)
  assert len(peer.steps(1)) == 1
