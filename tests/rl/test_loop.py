"""The loop: what it samples, learns from and records; and interrupted runs that end the same."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

import model
from experiments import settings
from rl import loop, rewards
from rl.config import CustomReward, ObjectiveConfig, RewardConfig, RLConfig, SamplingConfig
from rl.documents import DocumentsConfig, write_documents
from rl.loading import TOKENIZER, as_dict, load_model
from rl.loop import train
from rl.mtp import split_mtp
from rl.objective import SPECS
from rl.sampler import Sampler
from rl.step import init_rl_state
from rl.tasks import get_task
from rl.tasks.generated import half_of
from tests.rl import small
from tests.train import small as train_small
from train.checkpoint import read_newest
from train.config_io import from_dict, to_dict
from train.run_folder import MetricsFile, RunFolder

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("time", "tokens_per_second", "seconds/rollout", "seconds/reward", "seconds/update",
         "seconds/step")


@pytest.fixture
def learned(monkeypatch):
  """Returns a list that collects the arguments and result of each call of `experience`."""
  calls, real = [], loop.experience

  def recording(*args, **kwargs):
    calls.append((args, real(*args, **kwargs)))
    return calls[-1][1]

  monkeypatch.setattr(loop, "experience", recording)
  return calls


def rows(folder: pathlib.Path, name: str) -> list[dict]:
  return [{key: value for key, value in row.items() if key not in TIMES}
          for row in MetricsFile(folder / name).read()]


def saved(cfg: RLConfig, folder: pathlib.Path):
  shapes = jax.eval_shape(lambda v: init_rl_state(v, cfg), small.variables())
  return read_newest(folder / "checkpoints", shapes)


def check_same_run(cfg: RLConfig, folder: pathlib.Path, reference: pathlib.Path) -> None:
  for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl"):
    assert rows(folder, name) == rows(reference, name)
  ours, theirs = saved(cfg, folder), saved(cfg, reference)
  assert ours.step == theirs.step == cfg.loop.steps
  assert ours.extra == theirs.extra
  train_small.assert_same_bits(ours.arrays, theirs.arrays)


def interrupt(processes: dict, folders: dict, count: int) -> None:
  """Sends each process its signal once it has a checkpoint and has recorded `count` steps."""
  waiting = set(processes)
  while waiting:
    for number in list(waiting):
      assert processes[number].poll() is None, processes[number].communicate()
      folder = folders[number]
      if len(rows(folder, "metrics.jsonl")) >= count and any(folder.glob("checkpoints/step_*")):
        processes[number].send_signal(number)
        waiting.remove(number)
    time.sleep(0.002)


@pytest.mark.long("interrupts runs in processes of their own")
def test_a_run_that_is_terminated_or_killed_resumes_and_ends_with_the_same_bits(tmp_path, task):
  env = os.environ | {"JAX_PLATFORMS": "cpu",
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  cfg = small.config(task, loop=small.RUN)
  small.run(cfg, tmp_path / "reference")  # first, to fill the compilation cache for the others
  folders = {number: tmp_path / number.name for number in (signal.SIGTERM, signal.SIGKILL)}
  processes = {number: subprocess.Popen(
      [sys.executable, str(ROOT / "tests" / "rl" / "small.py"), task, str(folder)], env=env,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for number, folder in folders.items()}
  interrupt(processes, folders, cfg.loop.checkpoint_every + 2)
  for number, process in processes.items():
    output, errors = process.communicate()
    steps = [int(path.name[5:]) for path in folders[number].glob("checkpoints/step_*")]
    recorded = len(rows(folders[number], "metrics.jsonl"))
    assert recorded < cfg.loop.steps
    if number == signal.SIGTERM:
      assert output == "stopped\n" and process.returncode == 0, errors
      assert max(steps) == recorded
    else:
      assert process.returncode == -number and max(steps) % cfg.loop.checkpoint_every == 0
    assert small.run(cfg, folders[number]).status == "finished"
    check_same_run(cfg, folders[number], tmp_path / "reference")


def test_a_run_stopped_after_every_step_equals_an_uninterrupted_run(tmp_path, task):
  cfg = small.config(task, objective={"refresh_every": 2, "resample": 2},
                     loop={"eval_every": 3})
  small.run(cfg, tmp_path / "whole")
  for step in range(1, 4):
    result = small.run(cfg, tmp_path / "parts", max_seconds=1e-9)
    assert (result.status, result.steps) == ("stopped", step)
    assert saved(cfg, tmp_path / "parts").step == step
  result = small.run(cfg, tmp_path / "parts", max_seconds=1e-9)
  assert result.status == "finished"
  check_same_run(cfg, tmp_path / "parts", tmp_path / "whole")
  assert [row["step"] for row in result.rows] == [1, 2, 3, 4]
  assert [row["step"] for row in result.evaluations] == [0, 3, 4]
  again = small.run(cfg, tmp_path / "parts")
  assert (again.status, again.steps, len(again.rows)) == ("finished", 4, 4)
  train_small.assert_same_bits(again.state, result.state)


def test_each_epoch_has_every_question_once_and_later_ones_are_shuffled_by_the_seed():
  epoch = lambda number, seed=0: [
      loop.epoch_index(place, 50, seed) for place in range(50 * number, 50 * number + 50)]
  assert epoch(0) == list(range(50)) == epoch(0, seed=1)
  for number in (1, 2):
    assert sorted(epoch(number)) == list(range(50 * number, 50 * number + 50))
  orders = [[index % 50 for index in epoch(*args)] for args in ((0,), (1,), (2,), (1, 1))]
  assert len({tuple(order) for order in orders}) == 4
  assert epoch(1) == epoch(1)
  assert [loop.epoch_index(place, None, 0) for place in (0, 70)] == [0, 70]


def test_a_run_of_several_epochs_that_is_stopped_equals_an_uninterrupted_one(tmp_path, learned):
  of = lambda split: [i for i in range(60) if half_of(str(i)) == split]
  chosen = of("train")[:8] + of("heldout")[:2]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(f'{{"question": "{i}", "answer": 1}}\n' for i in chosen))
  cfg = small.config(f"file:{path}", sampling={"long_prompts": "skip"}, loop={"steps": 6})
  small.run(cfg, tmp_path / "whole")
  prompts = [tuple(prompt) for args, _ in learned for prompt in args[0][::4]]
  epochs = [prompts[start:start + 8] for start in (0, 8, 16)]
  assert [len(set(epoch)) for epoch in epochs] == [8] * 3
  # Within a step, questions are sorted by whether they have a signal.
  assert set(epochs[0][:4]) != set(epochs[1][:4]) or set(epochs[0][:4]) != set(epochs[2][:4])
  for _ in range(6):
    small.run(cfg, tmp_path / "parts", max_seconds=1e-9)
  check_same_run(cfg, tmp_path / "parts", tmp_path / "whole")


def test_another_seed_gives_another_run(tmp_path, task):
  one, other = (small.run(small.config(task, loop={"seed": seed, "steps": 1}), tmp_path / str(seed))
                for seed in (0, 1))
  assert train_small.max_rel_diff(one.state.train.params, other.state.train.params) > 1e-4


def test_a_learnable_task_is_learned(tmp_path, task):
  cfg = small.config(
      task, optimizer={"learning_rate": 0.02}, objective={"resample": 4},
      loop={"steps": 40, "eval_problems": 4, "eval_samples": 4})
  result = small.run(cfg, tmp_path / "run")
  before, after = (row["pass@1"][0] for row in result.evaluations)
  print(f"pass@1 {before:.2f} -> {after:.2f}")
  assert before < 0.5 and after > 0.9
  assert np.mean([row["reward"] for row in result.rows[-5:]]) > result.rows[0]["reward"] + 0.3


@pytest.mark.parametrize(("every", "refreshed"), [(0, 0), (2, 2), (3, 3)])
def test_the_reference_changes_at_the_configured_interval_only(tmp_path, task, every, refreshed):
  objective = {"refresh_every": every}
  result = small.run(small.config(task, objective=objective, loop={"steps": 3}), tmp_path / "run")
  before = init_rl_state(small.variables(), small.config(task)).train.variables
  if refreshed:
    before = small.run(small.config(task, objective=objective, loop={"steps": refreshed}),
                       tmp_path / "shorter").state.train.variables
  train_small.assert_same_bits(result.state.reference, before)
  moved = train_small.max_rel_diff(result.state.train.params, result.state.reference["params"])
  assert (moved == 0) == (refreshed == 3)


@pytest.mark.parametrize("mask", [False, True])
def test_truncated_completions_are_masked_entirely_if_configured(tmp_path, task, learned, mask):
  cfg = small.config(task, objective={"mask_truncated": mask}, loop={"steps": 2},
                     optimizer={"learning_rate": 1e-4})  # at a higher rate, all would soon end
  result = small.run(cfg, tmp_path / "run")
  eos = small.tokenizer().eos
  for row, ((_, tokens_SN, lengths_S, *_), made) in zip(result.rows, learned, strict=True):
    ended_S = tokens_SN[np.arange(len(lengths_S)), lengths_S - 1] == eos
    assert 0 < ended_S.sum() < len(ended_S)
    np.testing.assert_array_equal(made.mask.sum(1), lengths_S * (ended_S | (not mask)))
    assert row["completions/clipped_ratio"] == pytest.approx(1 - ended_S.mean())
    count = ended_S.sum() if mask else len(ended_S)
    assert row["completions/learned"] == row["loss/denominator"] == count


@pytest.mark.parametrize("counts", [False, True])
def test_rewards_of_masked_completions_count_in_the_baseline_if_configured(
    tmp_path, task, learned, counts):
  cfg = small.config(task, rewards={"accuracy": 1, "overlong": 1}, loop={"steps": 1},
                     objective={"mask_truncated": True, "truncated_in_baseline": counts})
  result = small.run(cfg, tmp_path / "run")
  (args, _), eos, advantages = learned[0], small.tokenizer().eos, []
  _, tokens_SN, lengths_S, _, advantage_S, _ = args
  ended_S = tokens_SN[np.arange(16), lengths_S - 1] == eos
  assert 0 < ended_S.sum() < 16
  assert advantage_S[~ended_S].any() == counts
  for group in range(4):
    rows = np.arange(4 * group, 4 * group + 4)
    counted = rows if counts else rows[ended_S[rows]]
    values = advantage_S[counted]
    assert abs(values.sum()) < 1e-5 and (not values.any() or np.isclose(np.mean(values**2), 1))
    advantages += [not values.any()]
  assert result.rows[0]["groups/equal"] == sum(advantages)


def test_groups_with_equal_rewards_are_replaced_by_those_of_later_problems(
    tmp_path, task, learned):
  cfg = small.config(task, objective={"resample": 8}, loop={"steps": 3})
  result = small.run(cfg, tmp_path / "run")
  assert sum(row["groups/equal"] for row in result.rows) > 0
  for row, (_, made) in zip(result.rows, learned, strict=True):
    assert row["groups/sampled"] - row["groups/equal"] >= cfg.sampling.num_prompts
    by_group = made.advantage.reshape(cfg.sampling.num_prompts, -1)
    assert (by_group.max(1) > 0).all() and (by_group.min(1) < 0).all()
  sampled = sum(row["groups/sampled"] for row in result.rows)
  assert sampled > 3 * cfg.sampling.num_prompts
  assert saved(cfg, tmp_path / "run").extra == {"position": sampled}


def test_a_rollout_is_full_even_if_no_group_has_a_signal(tmp_path, task, learned):
  cfg = small.config(task, rewards={"accuracy": 0, "format": 1}, objective={"resample": 2},
                     loop={"steps": 1})
  result = small.run(cfg, tmp_path / "run")
  assert result.rows[0]["groups/equal"] == result.rows[0]["groups/sampled"] == 8
  assert len(learned[0][1].advantage) == cfg.sampling.num_sequences
  assert not learned[0][1].advantage.any()


@pytest.mark.parametrize("sampler", ["policy", "initial"])
def test_rft_learns_only_correct_completions_of_the_configured_sampler(
    tmp_path, task, learned, sampler):
  cfg = small.config(task, objective={"name": "rft", "sampler": sampler},
                     optimizer={"learning_rate": 0.05}, loop={"steps": 2})
  small.run(cfg, tmp_path / "run")
  tokenizer = small.tokenizer()
  expected_sampler = Sampler(loop.Transformer(small.MODEL), cfg, tokenizer)
  for step, ((_, tokens_SN, lengths_S, *_), made) in enumerate(learned, 1):
    texts = [tokenizer.decode(row[:length])
             for row, length in zip(tokens_SN, lengths_S, strict=True)]
    correct_S = [text.removesuffix("<｜end▁of▁sentence｜>").endswith(small.CORRECT)
                 and text.count("<answer>") == 1 for text in texts]
    assert 0 < sum(correct_S) < len(correct_S)
    np.testing.assert_array_equal(made.mask.any(1), correct_S)
    assert (made.advantage == 1).all()
    initial = expected_sampler.sample(
        small.variables(), "train", range(4 * step - 4, 4 * step), 4, step=step)
    # Sorted, since groups without a signal come last in what is learned.
    same = sorted(initial.tokens_SN.tolist()) == sorted(tokens_SN.tolist())
    assert same == (sampler == "initial" or step == 1)


def test_rows_whose_answer_cannot_be_parsed_are_counted_and_never_sampled(tmp_path, learned):
  spec = small.write_task(tmp_path, bad=20)
  assert get_task(spec).excluded == {"with an unparsable answer": 20}
  result = small.run(small.config(spec, loop={"steps": 2}), tmp_path / "run")
  tokenizer = small.tokenizer()
  assert not any("?" in tokenizer.decode(prompt) for args, _ in learned for prompt in args[0])
  assert all(row["rewards/accuracy/unjudged"] == 0 for row in result.rows)


def broken(prompts, completions, **columns):
  raise KeyError("no such column")


@pytest.mark.parametrize(("reward", "message"), [
    (broken, "step 1: reward 'format' failed .*KeyError"),
    (lambda prompts, completions, **columns: [0.0], "reward 'format' returned 1 values for 16"),
    (lambda prompts, completions, **columns: [float("nan")] * 16, "reward 'format' must return")])
def test_a_failing_reward_is_named(tmp_path, task, monkeypatch, reward, message):
  # An evaluation keeps its own format reward: it calls `rewards.well_formed` directly.
  monkeypatch.setattr(loop, "reward_function", lambda *_: rewards.combine({"format": reward}))
  with pytest.raises(ValueError, match=message):
    small.run(small.config(task), tmp_path / "run")


def test_prompts_contexts_and_splits_that_do_not_fit_are_refused(tmp_path, task):
  with pytest.raises(ValueError, match="more than the 3 allowed: raise max_prompt_length"):
    small.run(small.config(task, sampling={"max_prompt_length": 3}), tmp_path / "prompt")
  short = dataclasses.replace(small.MODEL, max_seq_len=12)
  with pytest.raises(ValueError, match="longer than the model's context of 12"):
    train(small.config(task), short, small.variables(), small.tokenizer(),
          RunFolder(tmp_path / "context"), show=False)
  with pytest.raises(ValueError, match=r"split 'heldout' has \d problems, not 50"):
    small.run(small.config(task, loop={"eval_problems": 50}), tmp_path / "heldout")


def write_long(folder, count=4):
  """Writes 60 short questions and `count` long ones; returns the task's spec and their lines."""
  spec = small.write_task(folder)
  with open(folder / "task.jsonl", "a") as file:
    file.writelines(f'{{"question": "{i} is far too long", "answer": 1}}\n' for i in range(count))
  return spec


def test_prompts_that_are_too_long_are_refused_before_the_first_step_by_line(tmp_path):
  spec = write_long(tmp_path)
  line = r"line 6[1-4] of \S+task.jsonl"
  with pytest.raises(ValueError, match=rf"[1-4] of \d\d questions of the split 'train' .*{line}.*"
                                       rf"the prompt of {line} has 23 tokens, more than the 10 "
                                       "allowed: raise max_prompt_length, or set "
                                       "long_prompts=skip"):
    small.run(small.config(spec), tmp_path / "run")
  assert not rows(tmp_path / "run", "evaluations.jsonl")


def test_prompts_that_are_too_long_are_skipped_and_counted_if_configured(tmp_path, learned):
  spec = write_long(tmp_path)
  cfg = small.config(spec, sampling={"long_prompts": "skip"}, loop={"steps": 20})
  long = sum("long" in get_task(spec).problem("train", i).question
             for i in range(get_task(spec).size("train")))
  result = small.run(cfg, tmp_path / "run")
  assert long and [row["prompts/skipped"] for row in result.rows] == [long] * 20
  seen = [small.tokenizer().decode(prompt) for args, _ in learned for prompt in args[0][::4]]
  fitting = get_task(spec).size("train") - long
  assert len(set(seen[:fitting])) == fitting == 56
  assert len(set(seen[56:])) == 24 and set(seen[56:]) < set(seen[:56])
  assert not any("long" in prompt for prompt in seen)


def test_long_questions_of_a_task_without_end_are_replaced(task):
  cfg = RLConfig(task="arithmetic:terms=4,digits=2", sampling=dataclasses.replace(
      small.SAMPLING, max_prompt_length=12, long_prompts="skip"))
  sampler = Sampler(loop.Transformer(small.MODEL), cfg, small.tokenizer())
  drawn = sampler.sample(small.variables(), "train", range(20), 1, step=1)
  assert max(map(len, drawn.prompt_tokens)) <= 12 and sampler.skipped["train"] > 0
  again = Sampler(loop.Transformer(small.MODEL), cfg, small.tokenizer())
  assert again.sample(small.variables(), "train", range(20), 1, step=1).prompts == drawn.prompts
  strict = dataclasses.replace(cfg, sampling=dataclasses.replace(
      cfg.sampling, long_prompts="error"))
  with pytest.raises(ValueError, match=r"prompt of problem arithmetic.*more than the 12 allowed"):
    Sampler(loop.Transformer(small.MODEL), strict, small.tokenizer()).sample(
        small.variables(), "train", range(20), 1, step=1)


@pytest.mark.parametrize(("values", "warnings"), [
    ([0] * 16, 1), ([None] * 16, 1), ([0] * 15 + [0.5], 0), ([-1] * 16, 0)])
def test_a_run_without_any_reward_warns_once_and_says_what_to_look_at(
    tmp_path, task, monkeypatch, caplog, values, warnings):
  reward = lambda prompts, completions, **columns: list(values)
  monkeypatch.setattr(loop, "reward_function", lambda *_: rewards.combine({"mine": reward}))
  with caplog.at_level("WARNING"):
    small.run(small.config(task, loop={"steps": 7}), tmp_path / "run")
  found = [record.getMessage() for record in caplog.records
           if "nothing is learned" in record.getMessage()]
  assert len(found) == warnings
  assert all("in the last 5 steps" in text and "mine" in text and "completions.jsonl" in text
             for text in found)


def test_a_reward_of_the_users_own_is_given_the_columns_of_the_file(tmp_path, monkeypatch):
  (tmp_path / "own_rewards.py").write_text(
      "def level(prompts, completions, *, level, question, **columns):\n"
      "  assert len(level) == len(question) == len(columns['num_tokens'])\n"
      "  return [x / 4 if f'Q: {text}\\n' in prompt else None\n"
      "          for x, text, prompt in zip(level, question, prompts)]\n")
  monkeypatch.syspath_prepend(tmp_path)
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(f'{{"question": "{i}", "answer": 1, "level": 3}}\n' for i in range(60)))
  cfg = small.config(f"file:{path}", loop={"steps": 1}, rewards={
      "accuracy": 0, "custom": (CustomReward("own_rewards:level", 2.0),)})
  row = small.run(cfg, tmp_path / "run").rows[0]
  assert row["rewards/level/mean"] == 0.75 and row["reward"] == 1.5
  with pytest.raises(ValueError, match="'lost:level': the module 'lost' cannot be imported"):
    small.run(small.config(f"file:{path}", rewards={"custom": (CustomReward("lost:level"),)}),
              tmp_path / "other")


def test_a_file_of_texts_trains_by_a_reward_of_the_users_own(tmp_path, monkeypatch, learned):
  (tmp_path / "text_rewards.py").write_text(
      "def style(prompts, completions, *, answer, style, **columns):\n"
      "  assert set(answer) <= {'a poem about trees', ''} and set(style) == {'haiku'}\n"
      "  return [float('1' in text) for text in completions]\n")
  monkeypatch.syspath_prepend(tmp_path)
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(
      f'{{"question": "{i}", "answer": "a poem about trees", "style": "haiku"}}\n' if i % 2 else
      f'{{"question": "{i}", "style": "haiku"}}\n' for i in range(60)))
  own = {"custom": (CustomReward("text_rewards:style"),)}
  cfg = small.config(f"file:{path}", loop={"steps": 1}, rewards={"accuracy": 0, **own})
  result = small.run(cfg, tmp_path / "run")
  assert 0 < result.rows[0]["rewards/style/mean"] < 1 and result.rows[0]["reward"] > 0
  assert result.evaluations[-1]["unjudged"] == 6
  with pytest.raises(ValueError, match=r"no usable row.*set rewards\.accuracy=0"):
    small.run(small.config(f"file:{path}", rewards=own), tmp_path / "strict")


def test_an_objective_is_changed_by_settings_and_trains(tmp_path, task):
  objective = {"name": "dapo", "importance": True, "dual_clip": True, "dual_clip_ratio": 2.0,
               "aggregation": "sequence_mean", "beta": 0.1, "kl": "k2", "kl_level": "sequence"}
  cfg = small.config(task, objective=objective, loop={"steps": 1})
  row = small.run(cfg, tmp_path / "run").rows[0]
  assert {"importance/mean", "clip_ratio/dual", "kl_loss"} <= row.keys()
  plain = small.run(small.config(task, objective={"name": "dapo"}, loop={"steps": 1}),
                    tmp_path / "plain").rows[0]
  assert not {"importance/mean", "clip_ratio/dual", "kl_loss"} & plain.keys()


SIXTEEN = SamplingConfig(num_prompts=4, num_generations=4)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RLConfig(task="aritmetic"), "no task 'aritmetic'; did you mean 'arithmetic'"),
    (lambda: ObjectiveConfig(name="xyz"), r"'xyz' does not exist\. The objectives are"),
    (lambda: RLConfig(task="file:nowhere.jsonl"), "there is no such file"),
    (lambda: RLConfig(template="sort"), "no template 'sort'; did you mean 'short'"),
    (lambda: ObjectiveConfig(name="grpo_1"), "'grpo_1' does not exist; did you mean 'grpo_r1'"),
    (lambda: ObjectiveConfig(name="zzz"), r"'zzz' does not exist\. The objectives are: grpo"),
    (lambda: ObjectiveConfig(entropy_weight=-0.1), "entropy_weight=-0.1 must lie in 0..inf"),
    (lambda: ObjectiveConfig(mtp_learning_rate=0), "mtp_learning_rate=0 must be positive, or none"),
    (lambda: ObjectiveConfig(sampler="initial"), "is for name='rft'"),
    (lambda: ObjectiveConfig(epsilon=-0.1), "epsilon=-0.1"),
    (lambda: ObjectiveConfig(aggregation="mean"), "aggregation='mean' must be one of"),
    (lambda: ObjectiveConfig(aggregation="token_mean"), "or kl_level='token'"),
    (lambda: ObjectiveConfig(name="dapo", kl="k2"), "kl=k2 would have no effect: there is no KL"),
    (lambda: ObjectiveConfig(name="ppo", kl="k3"), "PPO's reward has the KL by k1"),
    (lambda: ObjectiveConfig(name="rloo", dual_clip=True), "needs surrogate='clip'"),
    (lambda: ObjectiveConfig(name="rft", importance=True), "no policy ratio"),
    (lambda: ObjectiveConfig(dual_clip_ratio=2.0), "it is for dual_clip=True"),
    (lambda: ObjectiveConfig(importance_cap=2.0), "it is for importance=True"),
    (lambda: ObjectiveConfig(dual_clip=True, dual_clip_ratio=1.0), "must be above 1"),
    (lambda: ObjectiveConfig(truncated_in_baseline=False), "is for mask_truncated=True"),
    (lambda: ObjectiveConfig(name="ppo", mask_truncated=True, truncated_in_baseline=False),
     "ppo compares no rewards within a group"),
    (lambda: CustomReward("brevity"), "must have the form module:function"),
    (lambda: CustomReward("my-rewards:brevity"), "must have the form module:function"),
    (lambda: RewardConfig(custom=(CustomReward("a:format"),)), "format is the name of more"),
    (lambda: RewardConfig(custom=(CustomReward("a:x"), CustomReward("b:x"))), "x is the name"),
    (lambda: RewardConfig(accuracy=0, format=0), "nothing is rewarded"),
    (lambda: SamplingConfig(slots=0), "slots=0 must be positive"),
    (lambda: SamplingConfig(temperature=0), "temperature=0 must be positive"),
    (lambda: RLConfig(sampling=SamplingConfig(num_generations=1)),
     "num_generations=1 leaves nothing to compare"),
    (lambda: RLConfig(sampling=SIXTEEN, objective=ObjectiveConfig(minibatches=3)),
     "minibatches=3 must divide the 16 sequences"),
    (lambda: RLConfig(sampling=SIXTEEN,
                      objective=ObjectiveConfig(minibatches=2, micro_batch_size=3)),
     "micro_batch_size=3 must divide the 8 sequences"),
    (lambda: RLConfig(rewards=RewardConfig(accuracy=0), objective=ObjectiveConfig(name="rft")),
     "rewards.accuracy")])
def test_impossible_configurations_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_one_generation_is_enough_for_rft():
  RLConfig(sampling=SamplingConfig(num_generations=1), objective=ObjectiveConfig(name="rft"))


def test_objectives_default_to_the_values_of_their_papers():
  assert ObjectiveConfig(name="dr_grpo").spec(48).max_length == 48
  assert ObjectiveConfig(name="dr_grpo").group_baseline == "mean"
  assert ObjectiveConfig().group_baseline == "mean_std"
  assert ObjectiveConfig(name="rloo").group_baseline == "leave_one_out"
  assert ObjectiveConfig(name="rloo", baseline="mean").group_baseline == "mean"
  spec = ObjectiveConfig(name="dapo", beta=0.1, epsilon=0.3).spec(48)
  assert (spec.kl_in, spec.beta, spec.epsilon, spec.epsilon_high) == ("loss", 0.1, 0.3, 0.28)
  for name, plain in SPECS.items():
    own = ObjectiveConfig(name=name).spec(48)
    assert own == (plain.replace(max_length=48) if name == "dr_grpo" else plain)
  changed = ObjectiveConfig(name="grpo", aggregation="constant_length", kl="k1").spec(48)
  assert changed == SPECS["grpo"].replace(aggregation="constant_length", max_length=48, kl="k1")
  assert ObjectiveConfig(name="reinforce", aggregation="constant_length").spec(48).max_length == 1
  assert ObjectiveConfig(name="dr_grpo", aggregation="token_mean").spec(48) == (
      SPECS["dr_grpo"].replace(aggregation="token_mean"))


def test_custom_rewards_are_written_and_read_back():
  cfg = RLConfig(rewards=RewardConfig(custom=(CustomReward("a.b:x", 0.5), CustomReward("c:y"))))
  assert cfg.rewards.weights() == {"accuracy": 1, "format": 1, "x": 0.5, "y": 1}
  assert from_dict(RLConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg
  old = to_dict(cfg)
  del old["rewards"]["custom"], old["sampling"]["long_prompts"], old["objective"]["dual_clip"]
  assert from_dict(RLConfig, old) == RLConfig()
  text = "rewards.custom=a.b:x,CustomReward(function=c:y,weight=0.5)"
  assert settings.apply(RLConfig(), [text]).rewards.custom == (
      CustomReward("a.b:x"), CustomReward("c:y", 0.5))


def write_config(path, cfg):
  """Writes what a run writes first, which is all that one killed before a checkpoint leaves."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps(as_dict(cfg, small.MODEL)))


def test_a_runs_folder_can_be_loaded(tmp_path, task):
  cfg = small.config(task, loop={"steps": 3, "checkpoint_every": 1})
  path = tmp_path / "run"
  write_config(path, cfg)
  small.tokenizer().save(path / TOKENIZER)
  with pytest.raises(ValueError, match="has no checkpoint yet"):
    load_model(str(path))
  result = small.run(cfg, path)
  found = load_model(str(path))
  assert found.cfg == small.MODEL
  assert found.tokenizer().content_hash == small.tokenizer().content_hash
  train_small.assert_same_bits(found.variables, result.state.train.variables)
  with pytest.raises(ValueError, match="is not a folder"):
    load_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize("experts", [False, True])
def test_mtp_modules_are_kept_as_they_are_and_loaded_with_the_policy(tmp_path, task, experts):
  base = train_small.MOE if experts else small.MODEL
  cfg = dataclasses.replace(base, vocab_size=small.MODEL.vocab_size, max_seq_len=32,
                            mtp=model.MTPConfig(depth=1))
  start = tiny.variables(cfg)
  run_cfg = small.config(task, loop={"steps": 2}, objective={"beta": 0.1},
                         optimizer={"weight_decay": 0.5})
  path = tmp_path / "run"
  folder = RunFolder(path)
  folder.check_config(as_dict(run_cfg, cfg))
  train(run_cfg, cfg, start, small.tokenizer(), folder, show=False)
  folder.close()
  loaded = load_model(path)
  assert loaded.cfg == cfg
  assert jax.tree.structure(loaded.variables["params"]) == jax.tree.structure(start["params"])
  for collection, kept in split_mtp(start)[1].items():
    train_small.assert_same_bits(split_mtp(loaded.variables)[1][collection], kept)
  assert not np.array_equal(loaded.variables["params"]["norm"]["scale"],
                            start["params"]["norm"]["scale"])


def test_a_runs_folder_can_be_loaded_when_the_file_of_its_task_is_gone(tmp_path):
  spec = small.write_task(tmp_path)
  cfg = small.config(spec, loop={"steps": 1})
  write_config(tmp_path / "run", cfg)
  result = small.run(cfg, tmp_path / "run")
  (tmp_path / "task.jsonl").unlink()
  get_task.cache_clear()  # as in a process that has not seen the file
  with pytest.raises(ValueError, match="there is no such file"):
    get_task(spec)
  found = load_model(str(tmp_path / "run"))
  train_small.assert_same_bits(found.variables, result.state.train.variables)


def test_documents_are_those_of_the_task_and_are_written_only_once(tmp_path):
  write = lambda name, seed=0: write_documents(
      tmp_path / name, "arithmetic:terms=2,digits=1", "short", DocumentsConfig(20), seed)
  source = write("a.jsonl")
  assert (source.domain, source.prompt_field) == ("arithmetic", "prompt")
  text = (tmp_path / "a.jsonl").read_text()
  documents = [json.loads(line) for line in text.splitlines()]
  assert len(documents) == 20
  assert all(row["prompt"].startswith("Q: ") and row["text"] for row in documents)
  write("a.jsonl", seed=1)
  assert (tmp_path / "a.jsonl").read_text() == text
  write("b.jsonl"), write("c.jsonl", seed=1)
  assert (tmp_path / "b.jsonl").read_text() == text != (tmp_path / "c.jsonl").read_text()
  with pytest.raises(ValueError, match="has no worked solutions"):
    write_documents(tmp_path / "d.jsonl", small.write_task(tmp_path), "short",
                    DocumentsConfig(1), 0)
