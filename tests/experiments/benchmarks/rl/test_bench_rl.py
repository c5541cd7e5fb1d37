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
from train import chat
from train.templates import get_template
from train.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[4]
# The interpreter that runs the peers: it needs torch, and transformers or TRL.
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
    pytest.skip(f"{PYTHON} lacks {module}: set PEER_PYTHON to an interpreter that has it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A two-layer Llama with a ChatML vocabulary of bytes, as a Hugging Face folder."""
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
def ours(folder):
  return OwnTrainer(Bench(model=str(folder), **SHAPE))


def run(folder: pathlib.Path, out: pathlib.Path, **changed) -> dict:
  values = {"model": folder, "minutes": 0.001, **SHAPE, **changed}
  bench_rl.main(Options("bench_rl", out=out, settings=tuple(
      f"bench.{name}='{value}'" if name == "task" else f"bench.{name}={value}"
      for name, value in values.items())))
  return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(("text", "reward"), [
    ("7", 1), ("3+4=7.", 1), ("7, or 8", 0), ("-7", 0), ("seven", 0), ("", 0), ("17", 0),
    ("7 7", 1), ("07", 1)])
def test_the_reward_is_1_if_the_last_number_of_the_completion_is_the_answer(text, reward):
  assert sums.rewards([text], ["7"]) == [reward]


def test_rewards_compare_the_sign_of_negative_answers():
  assert sums.rewards(["3-4=-1", "3-4=1"], ["-1", "-1"]) == [1, 0]


def test_chat_markers_are_single_tokens_and_eos_is_the_end_of_a_turn(folder):
  path = folder / "tokenizer.json"
  tokenizer, plain = chat.ChatTokenizer.load(path), Tokenizer.load(path)
  prompt = get_template("chatml_number").render("1+2")
  ids = tokenizer.encode(prompt)
  assert [MARKS[i] for i in ids if i < 3] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
  assert tokenizer.decode(ids) == prompt
  assert tokenizer.decode([tokenizer.eos]) == "<|im_end|>" and plain.eos == 0
  assert min(plain.encode(prompt)) >= 3


def test_a_vocabulary_without_chat_markers_is_refused():
  with pytest.raises(ValueError, match=re.escape("no <|im_end|>")):
    chat.ChatTokenizer.bytes()


@pytest.mark.parametrize(("fields", "message"), [
    ({"peer": "verl"}, "must be none, trl or transformers"),
    ({"peer_generation": ()}, "peer_generation"), ({"peer_generation": ("vllm",)}, "continuous"),
    ({"repeats": 0}, "repeats=0 must be positive"), ({"minutes": -1}, "minutes"),
    ({"warm_up_rounds": 1}, "at least 2"), ({"goal": 2}, "goal"),
    ({"eval_problems": 1}, "at least 2"), ({"compute": "fp8"}, "bfloat16"),
    ({"num_generations": 1}, "nothing to compare"), ({"micro_batch_size": 7}, "must divide")])
def test_impossible_settings_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Bench(**fields)


def test_a_model_must_be_named():
  with pytest.raises(ValueError, match=re.escape("bench.model=DIR")):
    bench_rl.main(Options("bench_rl"))


def test_tokens_are_counted_up_to_and_including_the_end_of_a_turn(ours):
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


def embedding(ours: OwnTrainer) -> np.ndarray:
  return np.array(ours._state.train.variables["params"]["embedding"]["embedding"])


@pytest.fixture
def rewarded(monkeypatch):
  """Replaces the rewards, which are all 0 for a random model, by alternating ones."""
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: [
      float(i % 2) for i in range(len(completions))])


def test_a_step_changes_the_weights_and_a_reset_restores_them(ours, rewarded):
  ours.reset()
  initial = embedding(ours)
  ours.steps(1)
  assert (embedding(ours) != initial).any()
  ours.reset()
  np.testing.assert_array_equal(embedding(ours), initial)


def test_ours_is_given_the_problems_of_its_peers_in_their_order_and_resets_do_not_restart_them(
    ours, monkeypatch):
  drawn, rewards = [], sums.rewards
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: (
      drawn.append(answers), rewards(completions, answers))[1])
  monkeypatch.setattr(ours, "_step", 0)
  peers = [row["answer"] for row in ours.for_peers()["train"]]
  ours.reset()
  ours.steps(2)
  ours.reset()
  ours.steps(1)
  assert np.concatenate(drawn).tolist() == np.repeat(peers[:6], 4).tolist()
  assert len(set(peers[:6])) > 2


def test_problems_restart_after_a_whole_number_of_rollouts(ours, monkeypatch):
  drawn, rewards = [], sums.rewards
  monkeypatch.setattr(sums, "rewards", lambda completions, answers: (
      drawn.append(answers), rewards(completions, answers))[1])
  peers = [row["answer"] for row in ours.for_peers()["train"]]
  monkeypatch.setattr(ours, "_step", len(peers) // 2 - 1)
  ours.steps(2)
  assert np.concatenate(drawn).tolist() == np.repeat([*peers[-2:], *peers[:2]], 4).tolist()
  assert Bench(num_prompts=96).num_problems == 42 * 96
  assert Bench(num_prompts=5120).num_problems == 5120


def test_rates_are_medians_over_rounds_of_each_phases_tokens_per_second():
  step = lambda seconds, tokens: {"rollout": seconds / 2, "reward": seconds / 4,
                                  "update": seconds / 4, "seconds": seconds, "tokens": tokens,
                                  "mean_reward": 0.5}
  found = bench_rl.medians([[step(1.0, 10), step(3.0, 30)], [step(1.0, 50)], [step(1.0, 20)]])
  assert found["by_round"] == [10, 50, 20]
  assert found["tokens_per_second"] == {"rollout": 40, "reward": 80, "update": 80, "step": 20}
  assert found["seconds"]["step"] == 1.0 and found["mean_reward"] == 0.5


def test_rounds_are_steady_if_the_last_two_agree_within_a_tenth_of_the_faster():
  assert not bench_rl.steady([100])
  assert bench_rl.steady([1, 90, 100]) and bench_rl.steady([1, 100, 90])
  assert not bench_rl.steady([100, 100, 89]) and not bench_rl.steady([100, 100, 112])


class Paced:
  """A contender whose steps of 100 tokens take the given seconds, one value for each round."""

  masters = "float32"

  def __init__(self, name: str, *seconds: float):
    self.name, self._seconds, self.resets = name, iter(seconds), 0

  def reset(self) -> None:
    self.resets += 1

  def steps(self, count: int) -> list[dict[str, float]]:
    return [{"seconds": next(self._seconds), "tokens": 100}] * count


def test_the_warm_up_lasts_until_every_contender_is_steady():
  contenders, result = [Paced("ours", 2, 1, 1, 1), Paced("peer", 9, 3, 2, 2)], {"failed": {}}
  bench_rl.warm_up(Bench(), contenders, result)
  assert result["warm_up"] == {
      "ours": {"by_round": [50, 100, 100, 100], "steady": True},
      "peer": {"by_round": [pytest.approx(100 / 9), pytest.approx(100 / 3), 50, 50],
               "steady": True}}
  assert [paced.resets for paced in contenders] == [4, 4]


def test_a_warm_up_that_is_not_steady_ends_after_the_allowed_rounds_and_is_recorded_so():
  result = {"failed": {}}
  contenders = [Paced("ours", 1, 2, 1), Paced("peer", 1, 1, 1)]
  bench_rl.warm_up(Bench(warm_up_rounds=3), contenders, result)
  assert [found["steady"] for found in result["warm_up"].values()] == [False, True]
  assert len(result["warm_up"]["ours"]["by_round"]) == 3


def test_problems_with_the_same_question_are_averaged_into_one():
  rates = bench_rl.by_question([1.0, 0.0, 0.5, 0.0], ["1+2", "3+4", "1+2", "5+6"])
  assert sorted(rates) == [0, 0, 0.75]


@pytest.mark.parametrize("answer", ["7", "-7", "07"])
def test_integer_answers_can_be_judged(answer):
  assert sums.is_number(answer) and sums.rewards([answer], [answer]) == [1]


@pytest.mark.parametrize("answer", ["1.5", "", "(1+2)", "7 7", "1_0"])
def test_answers_that_are_not_integers_cannot_be_judged(answer):
  assert not sums.is_number(answer)


def test_a_task_whose_answers_are_not_integers_is_refused_before_the_model_is_loaded(tmp_path):
  with pytest.raises(ValueError, match="must be an integer: choose a task"):
    run(tmp_path / "no model", tmp_path / "out", task="countdown")


def test_held_out_problems_that_all_ask_the_same_question_are_refused(tmp_path):
  questions = [f"0+{i}" for i in range(100)]
  picked = [next(q for q in questions if half_of(q) == split) for split in ("train", "heldout")]
  (tmp_path / "same.jsonl").write_text("".join(
      json.dumps({"question": question, "answer": "2"}) + "\n" for question in picked))
  with pytest.raises(ValueError, match="ask the same"):
    run(tmp_path / "no model", tmp_path / "out", task=f"file:{tmp_path}/same.jsonl")


def test_an_output_path_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path):
  path = tmp_path / "out"
  path.write_text("")
  with pytest.raises(ValueError, match=re.escape(f"{path} is a file")):
    run(tmp_path / "no model", path)


@pytest.fixture
def committed(tmp_path) -> pathlib.Path:
  """A copy of the committed raw results, which were measured before warm-up rounds were added."""
  with results.raw(results.ROOT / "bench/bench_rl/gpu") as folder:
    shutil.copy(folder / "results.json", tmp_path)
  return tmp_path


def report(folder: pathlib.Path) -> str:
  result = json.loads((folder / "results.json").read_text())
  return results.write_report(folder, result, summary, sections).read_text()


def test_the_report_compares_medians_last_rounds_and_fastest_rounds(committed):
  text = report(committed)
  line = next(line for line in text.splitlines() if line.startswith("- 5.06 times"))
  # The median rounds give 41,819 / 8257; the last, which are the fastest, 42,483 / 10,562.
  assert "trl (generate)" in line and line.count("4.02") == 2
  assert "the first timed round was not warm" in text and "over 64 held-out problems" in text


def test_the_report_says_what_was_not_measured(committed):
  text = report(committed)
  assert "other sampling methods: compiled (" in text and "vLLM, which TRL can also use" in text


@pytest.mark.parametrize(("steady", "found"), [
    (True, "2 untimed warm-up rounds came first. A steady pace, at which the last two rounds agree "
           "to within 10 %, was reached by all"), (False, "not reached by trl (generate).")])
def test_the_report_says_whether_the_warm_up_became_steady(committed, steady, found):
  path = committed / "results.json"
  result = json.loads(path.read_text()) | {"heldout_questions": 13, "warm_up": {
      "ours": {"by_round": [1, 1], "steady": True},
      "trl (generate)": {"by_round": [1, 2], "steady": steady}}}
  path.write_text(json.dumps(result))
  text = report(committed)
  assert found in text and "round was not warm" not in text
  assert "over the 13 distinct questions of 64 held-out problems" in text


def test_without_a_peer_ours_is_timed_trained_and_reported(folder, tmp_path):
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


def test_training_ends_when_the_goal_is_reached(folder, tmp_path):
  training = run(folder, tmp_path, goal=0)["training"]["ours"]
  assert training["seconds_to_goal"] == 0 and training["steps"] == []


def test_a_peer_that_cannot_run_is_excluded_and_ours_continues(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(bench_rl, "require_packages", lambda *args: None)
  without = tmp_path / "python"
  without.write_text("#!/bin/sh\necho lacks torch >&2\nexit 1\n")
  without.chmod(0o755)
  result = run(folder, tmp_path / "out", peer="transformers", peer_python=without, minutes=0)
  assert list(result["failed"]) == ["transformers"] and set(result["contenders"]) == {"ours"}
  assert "the peer stopped" in (tmp_path / "out" / "report.md").read_text()


def test_a_peer_without_torch_exits_with_a_message_and_no_traceback(tmp_path):
  config = tmp_path / "peer.json"
  config.write_text("{}")
  code = ("import runpy, sys; sys.modules.update(torch=None, transformers=None, trl=None); "
          "runpy.run_module('experiments.benchmarks.peers.grpo', run_name='__main__', "
          "alter_sys=True)")
  done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True,
                        stdin=subprocess.DEVNULL, cwd=ROOT)
  assert done.returncode != 0 and not done.stdout
  assert "lacks torch: run this with an interpreter" in done.stderr
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


def test_a_peer_samples_the_configured_completions_and_times_its_phases(peer):
  rows = peer.steps(2)
  assert len(rows) == 2 and peer.masters == "float32"
  for row in rows:
    assert 8 <= row["tokens"] <= 8 * 4
    assert min(row["rollout"], row["reward"], row["update"]) > 0
    assert row["seconds"] == pytest.approx(row["rollout"] + row["reward"] + row["update"])


def test_a_peer_evaluates_and_trains_after_a_reset(peer):
  peer.reset()
  rates = peer.evaluate()
  assert len(rates) == 4 and all(0 <= rate <= 1 for rate in rates)
  assert len(peer.steps(1)) == 1
