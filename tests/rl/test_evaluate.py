"""Metrics of hand-made completions, and how completions are sampled for an evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from experiments.studies.rl_evaluation import EvaluationConfig, Evaluator
from experiments.studies.rl_metrics import by_problem
from rl import evaluate as evaluation
from rl import sampler as sampler_module
from rl.config import RewardConfig
from rl.evaluate import evaluate, judge
from rl.rollout import sequence_keys
from rl.sampler import Sampler, Samples, join, reward_function
from rl.tasks.problem import Problem
from tests.rl import small


class RecordingSampler(Sampler):
  """Records the step that it is called with."""

  def sample(self, *args, **kwargs):
    self.step = kwargs["step"]
    return super().sample(*args, **kwargs)


@pytest.fixture(scope="module")
def sampler(task):
  return RecordingSampler(model.Transformer(small.MODEL), small.config(task), small.tokenizer())


def samples(answers: list[str], completions: list[list[str]], lengths=5, ended=True) -> Samples:
  """Returns samples with these completions, a list for each problem, whose answers are given."""
  flat = [text for row in completions for text in row]
  problem_of_row = np.repeat(np.arange(len(answers)), len(completions[0]))
  problems = [Problem(str(i), f"{i}", answer, "") for i, answer in enumerate(answers)]
  count = len(flat)
  return Samples(
      [problems[i] for i in problem_of_row], ["Q: ?\nA:"] * count, [np.array([1])] * count, flat,
      np.zeros((count, 9), int), np.broadcast_to(lengths, count), np.zeros((count, 9)),
      np.broadcast_to(ended, count))


GOOD, BARE, OTHER = "<think>x</think><answer>7</answer>", "<answer>7</answer>", "the answer is 7"
BAD = "<think>x</think><answer>8</answer>"


def test_metrics_are_means_over_problems():
  drawn = samples(["7", "7"], [[GOOD, GOOD, BAD, OTHER], [BARE, BAD, BAD, "nothing"]],
                  lengths=[1, 2, 3, 4, 5, 6, 7, 8], ended=[True] * 6 + [False] * 2)
  found = judge(drawn, 4, (1, 2))
  estimates = {name: value[0] for name, value in found.items() if isinstance(value, list)}
  assert estimates.pop("reflection") == 0
  assert estimates == pytest.approx({
      "pass@1": (2 / 4 + 1 / 4) / 2, "pass@2": (5 / 6 + 1 / 2) / 2, "cons@4": (1 + 0) / 2,
      "lenient_pass@1": (3 / 4 + 1 / 4) / 2, "lenient_cons": (1 + 0) / 2,
      "format": (3 / 4 + 2 / 4) / 2, "length": (2.5 + 6.5) / 2, "clipped": (0 + 2 / 4) / 2})
  assert (found["unjudged"], found["problems"], found["samples"]) == (0, 2, 4)


def test_a_tie_of_votes_counts_half():
  assert judge(samples(["7"], [[GOOD, BAD]]), 2)["cons@2"] == [0.5, 0.5, 0.5]


def test_unjudged_samples_are_counted_and_excluded():
  found = judge(samples(["7", "who knows"], [[GOOD, BAD], [GOOD, "who knows"]]), 2)
  assert found["unjudged"] == 2
  assert found["pass@1"] == [0.5, 0.5, 0.5]
  nothing = judge(samples(["who knows"], [[GOOD, BAD]]), 2)
  assert np.isnan(nothing["pass@1"]).all() and nothing["format"] == [1, 1, 1]


def test_intervals_are_over_problems_and_have_no_width_if_all_rates_are_equal():
  some = judge(samples(["7"] * 40, [[GOOD, GOOD]] * 10 + [[BAD, BAD]] * 30), 2)["pass@1"]
  # The success rate of 40 trials with probability 1/4 has a standard deviation of 0.068.
  assert some[0] == 0.25
  assert 0.25 - 2.5 * 0.068 < some[1] < 0.25 - 0.068 and 0.25 + 0.068 < some[2] < 0.25 + 2.5 * 0.068
  assert judge(samples(["7"] * 40, [[GOOD, BAD]] * 40), 2)["pass@1"] == [0.5, 0.5, 0.5]


def test_format_accuracy_accounts_for_a_prompt_that_opens_the_think_block():
  drawn = samples(["7"], [["x</think><answer>7</answer>"]])
  drawn.prompts[0] = "Q: ?\n<think>"
  assert judge(drawn, 1)["format"] == [1, 1, 1]


def test_more_problems_than_a_split_has_are_refused(sampler):
  with pytest.raises(ValueError, match=r"split 'heldout' has \d+ problems, not 61"):
    evaluate(sampler, small.variables(), split="heldout", problems=61, samples=1)
  with pytest.raises(ValueError, match="no split 'test'"):
    evaluate(sampler, small.variables(), split="test", problems=1, samples=1)


def test_runs_of_other_seeds_are_asked_other_problems_as_far_as_there_are_some(sampler):
  of_seed = lambda seed, problems: [problem.id for problem in Evaluator(
      EvaluationConfig(problems=problems, samples=1), sampler, seed)._split(
          small.variables(), "heldout", None)[1].problems]
  size = sampler.size("heldout")
  half = size // 2
  assert not {*of_seed(0, half)} & {*of_seed(1, half)}
  assert of_seed(0, size) == of_seed(3, size)  # a finite set has no others
  assert of_seed(2, 3) == of_seed(2, 3)


def test_rates_of_problems_are_kept_where_all_seeds_have_the_same_ones(sampler):
  evaluate_on = lambda problems: Evaluator(EvaluationConfig(problems=problems, samples=2), sampler)(
      small.variables())
  whole = evaluate_on(sampler.size("heldout"))
  for name, rate_P in whole["by_problem"].items():
    assert np.mean(rate_P) == pytest.approx(whole["metrics"][name]), name
  assert "pass@1" in whole["by_problem"]
  assert "by_problem" not in evaluate_on(3)
  before, after = ({"by_problem": {"pass@1": rates}} for rates in ([0.0, 0.5], [0.5, 0.25]))
  assert by_problem(before, after) == {
      "by_problem": {"pass@1": [0.5, 0.25], "pass@1_gain": [0.5, -0.25]}}
  assert before == after == {} == by_problem(before, after)


def test_evaluations_are_reproducible_and_use_keys_that_training_never_uses(sampler):
  ask = lambda: evaluate(sampler, small.variables(), split="all", problems=3, samples=4)[1]
  once = ask()
  assert once.completions == ask().completions
  trained = sampler.sample(small.variables(), "all", range(3), 4, step=1)
  assert trained.completions != once.completions
  sampler.step = None
  ask()
  assert sampler.step == evaluation._STEP > 10**9  # a step that no run reaches
  prompts_S, samples_S = jnp.repeat(jnp.arange(16), 4), jnp.tile(jnp.arange(4), 16)
  keys = lambda step: {tuple(row) for row in np.asarray(jax.random.key_data(
      sequence_keys(0, step, prompts_S, samples_S))).tolist()}
  at_evaluation = keys(sampler.step)
  assert not any(at_evaluation & keys(step) for step in range(200))


def test_a_completion_depends_on_its_problem_and_sample_not_on_how_many_are_drawn(sampler):
  capacity = small.SAMPLING.num_sequences
  drawn = sampler.sample(small.variables(), "train", range(5), 4, step=1)
  assert len(drawn) == 20 > capacity and len(drawn) % capacity
  assert [problem.id for problem in drawn.problems] == [
      sampler.task.problem("train", i // 4).id for i in range(20)]
  for i in (0, 3, 4):
    alone = sampler.sample(small.variables(), "train", [i], 4, step=1)
    assert alone.completions == drawn.completions[4 * i:4 * i + 4]
  assert len(set(drawn.completions)) > 5
  assert sampler.sample(
      small.variables(), "train", range(5), 4, step=2).completions != drawn.completions


def test_a_model_whose_logits_are_nan_is_refused(sampler):
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), small.variables())
  with pytest.raises(ValueError, match="of 12 of 12 completions are NaN"):
    sampler.sample(broken, "train", range(3), 4, step=1)


def test_the_text_of_a_completion_is_its_tokens_decoded_without_eos(sampler):
  drawn = sampler.sample(small.variables(), "train", range(4), 4, step=1)
  tokenizer = small.tokenizer()
  for i, completion in enumerate(drawn.completions):
    tokens = drawn.tokens_SN[i, :drawn.lengths_S[i]]
    assert (tokens[-1] == tokenizer.eos) == drawn.ended_S[i]
    assert completion == tokenizer.decode(tokens[tokens != tokenizer.eos])
  assert drawn.prompts[0] == f"Q: {drawn.problems[0].question}\nA:"
  np.testing.assert_array_equal(drawn.prompt_tokens[0], tokenizer.encode(drawn.prompts[0]))


def test_rows_and_join_keep_the_fields_of_each_sample_aligned():
  drawn = samples(["7", "8"], [[GOOD, BAD], [BARE, OTHER]], lengths=np.arange(4))
  whole = join([drawn.rows(np.array([2, 3])), drawn.rows(np.array([1]))])
  assert whole.completions == [BARE, OTHER, BAD]
  assert [problem.id for problem in whole.problems] == ["1", "1", "0"]
  columns = whole.columns()
  assert columns["answer"] == ["8", "8", "7"] and columns["num_tokens"] == [2, 3, 1]
  assert columns["row"] == [0, 1, 2]


def test_rewards_are_weighted_and_the_random_reward_is_reproducible():
  drawn = samples(["7"] * 8, [[GOOD, BAD, BARE, OTHER]] * 8)
  cfg = RewardConfig(accuracy=2, format=0.5, random=1, overlong_tokens=3)
  score = lambda: reward_function(cfg, 8)(drawn.prompts, drawn.completions, **drawn.columns())
  scored = score()
  assert scored == score()
  assert {reward - coin for reward, coin in zip(
      scored.rewards, scored.by_name["random"], strict=True)} == {2.5, 0.5, 2.0, 0.0}
  assert 8 < sum(scored.by_name["random"]) < 24  # of 32; a fair coin is outside once in 143 times
  assert set(scored.by_name) == {"accuracy", "format", "random"}


def test_votes_for_the_same_number_are_pooled_however_it_is_written():
  answer = "<think>x</think><answer>{}</answer>".format
  drawn = samples(["7", "7"], [[answer(text) for text in ("7", "7.0", " 7 ", "8", "8")]] * 2)
  assert judge(drawn, 5)["cons@5"][0] == 1.0


def test_long_prompts_are_read_once_for_all_samples_of_a_problem(task, monkeypatch):
  cfg = small.config(task)
  draw = lambda: Sampler(model.Transformer(small.MODEL), cfg, small.tokenizer()).sample(
      small.variables(), "heldout", range(4), cfg.sampling.num_generations, step=1)
  seen, rollout = [], sampler_module.rollout

  def recorded(*args, **kwargs):
    seen.append(kwargs["group"])
    return rollout(*args, **kwargs)

  monkeypatch.setattr(sampler_module, "rollout", recorded)
  want = draw()
  monkeypatch.setattr(sampler_module, "_LONG", 1)
  found = draw()
  assert seen[0] == 1 and seen[-1] == cfg.sampling.num_generations > 1
  assert found.completions == want.completions
