"""Rewards measure what their names say, and report what they cannot judge."""

import importlib.util
import math
import threading

import numpy as np
import pytest

from rl import rewards
from rl.config import RewardConfig
from rl.tasks import get_task

NO_SANDBOX = importlib.util.find_spec("rl.sandbox") is None


def answered(text):
  return f"<think>so</think>\n<answer>{text}</answer>"


def accuracy(given, gold, reward=rewards.accuracy):
  return reward(["?"], [given], answer=[gold])[0]


@pytest.mark.parametrize(("given", "gold", "reward"), [
    ("7", "7", 1), ("7.0", "7", 1), ("1,234", "1234", 1), ("$18", "18", 1), ("8", "7", 0),
    ("\\frac{1}{2}", "0.5", 1), ("1+x^2", "x^2+1", 1), ("(2,1)", "(1,2)", 0), ("0.33", "1/3", 0),
    ("7 or 8", "7", 0), ("٧", "7", 0), ("", "7", 0)])
def test_accuracy_compares_answers_mathematically(given, gold, reward):
  assert accuracy(answered(given), gold) == reward


@pytest.mark.parametrize("gold", ["", "??", "2x+", "hello", "no idea", "9^{9^{9^{9}}}", "10000!"])
def test_completions_are_not_judged_if_the_gold_answer_cannot_be_parsed(gold):
  for given in (answered(gold), answered("7"), "nothing"):
    assert accuracy(given, gold) is None


@pytest.mark.parametrize("given", ["9^{9^{9^{9}}}", "9**9**9", "99999999!", "(" * 3000,
                                   "\\int_0^1 e^{e^{x^x}} dx", "((9^{99})^{99})^{99}"])
def test_hostile_expressions_are_incorrect_and_do_not_hang(given):
  verdicts = []
  thread = threading.Thread(  # a thread, which no signal can interrupt
      target=lambda: verdicts.append(accuracy(answered(given), "12")), daemon=True)
  thread.start()
  thread.join(10)
  assert verdicts == [0]


def test_answers_are_compared_outside_the_main_thread_too():
  verdicts = []
  thread = threading.Thread(target=lambda: verdicts.extend(
      accuracy(answered(given), "\\frac{x}{2}") for given in ("x/2", "x/3")))
  thread.start()
  thread.join(10)
  assert verdicts == [1, 0]


@pytest.mark.parametrize("completion", [
    answered("7") + " or not", answered("7") + answered("7"), "7", "<answer>7</answer><answer>7",
    "<answer>8</answer><answer>7</answer>"])
def test_accuracy_is_strict_where_lenient_accuracy_is_not(completion):
  assert accuracy(completion, "7") == 0
  assert accuracy(completion, "7", rewards.lenient_accuracy) == 1


def test_accuracy_uses_the_task_of_each_row():
  problem = get_task("countdown").problem("train", 0)
  rows = [problem.row(), {"answer": "7", "task": None, "target": None, "numbers": None}]
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  completions = [answered(problem.answer), answered("7")]
  assert rewards.accuracy(["?"] * 2, completions, **columns) == [1, 1]
  assert rewards.accuracy(["?"] * 2, completions[::-1], **columns) == [0, 0]


def test_the_format_reward_accounts_for_prompts_that_open_the_think_block():
  completions = [answered("7"), answered("7").removeprefix("<think>"), answered("7") + "."]
  assert rewards.well_formed(["Q", "Q\n<think>\n", "Q"], completions) == [1, 1, 0]
  assert rewards.well_formed(["Q<think>", "Q", "Q"], completions) == [0, 0, 0]


@pytest.mark.parametrize(("text", "english", "chinese"), [
    ("first add two", 1, 0), ("先加二", 0, 1), ("add 先 two 加", 1 / 2, 1 / 2),
    ("3+4=7 add x", 1, 0), ("设 x = 3, $\\frac{1}{2}$", 0, 1), ("3+4=7", 0, 0), ("", 0, 0),
    ("I don't", 1, 0), ("сложим two", 1 / 2, 0), ("add加", 1 / 2, 1 / 2)])
def test_language_consistency_is_the_fraction_of_words_in_the_language(text, english, chinese):
  completion = f"<think>{text}</think><answer>seven 七</answer>"
  got = rewards.language_consistency(["?"] * 3, [completion] * 3, language=["en", "zh", None])
  assert got == [english, chinese, None]


def test_unfinished_reasoning_has_a_language_consistency_of_zero():
  assert rewards.language_consistency(["?"], ["<think>add"], language=["en"]) == [0]


def test_an_unknown_language_is_an_error():
  with pytest.raises(ValueError, match="'fr'"):
    rewards.language_consistency(["?"], [answered("7")], language=["fr"])


def test_overlong_is_dapos_equation_13():
  reward = rewards.overlong(max_tokens=100, cache_tokens=20)
  tokens = [0, 80, 85, 90, 100, 101, 1000]
  got = reward(["?"] * 7, ["x" * 5000] * 7, num_tokens=tokens)
  np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -1, -1, -1])


def test_length_rewards_count_tokens_not_characters():
  prompts, tokens = ["?"] * 2, [5, 10]
  for reward in (rewards.brevity(20), rewards.overlong(12, 10)):
    short, long = (reward(prompts, [text] * 2, num_tokens=tokens) for text in ("a", "a" * 999))
    assert short == long and short[0] > short[1]
  assert rewards.brevity(20)(prompts, ["a"] * 2, num_tokens=[5, 30]) == [0.75, 0]


@pytest.mark.parametrize(("max_tokens", "cache"), [(100, 0), (100, 101)])
def test_overlong_needs_a_valid_penalty_interval(max_tokens, cache):
  with pytest.raises(ValueError, match="cache_tokens"):
    rewards.overlong(max_tokens, cache)


@pytest.mark.skipif(NO_SANDBOX, reason="rl.sandbox does not exist")
def test_programs_are_rewarded_for_passing_their_tests():
  tests = "assert f(2) == 4\nassert f(3) == 9"
  programs = ["def f(x): return x * x", "```python\ndef f(x):\n  return x * x\n```",
              "def f(x): return 4", "def f(x: return", "def f(x): return x * x"]
  completions = [answered(program) for program in programs]
  got = rewards.unit_tests()(["?"] * 5, completions, tests=[tests] * 4 + [None])
  assert got == [1, 1, 0, 0, None]
  assert rewards.unit_tests()(["?"], [programs[0]], tests=[tests]) == [0]


def constant(*values):
  return lambda prompts, completions, **columns: list(values)


def test_combined_rewards_are_weighted_sums_or_none_if_any_is_none():
  score = rewards.combine({"a": constant(1, 0, None), "b": constant(0.5, None, 1)},
                          {"a": 2, "b": -1})
  scored = score(["?"] * 3, [""] * 3)
  assert scored.rewards == [1.5, None, None]
  assert scored.metrics() == {"rewards/a/mean": 0.5, "rewards/a/unjudged": 1,
                              "rewards/b/mean": 0.75, "rewards/b/unjudged": 1}


def test_accuracy_and_format_have_equal_weights_by_default():
  score = rewards.combine({"accuracy": rewards.accuracy, "format": rewards.well_formed})
  scored = score(["?"] * 3, [answered("7"), "<answer>7</answer>", "7"], answer=["7"] * 3)
  assert scored.rewards == [2, 1, 0]


def test_unparsable_gold_answers_are_counted():
  scored = rewards.combine({"accuracy": rewards.accuracy})(["?"], [answered("7")], answer=["??"])
  metrics = scored.metrics()
  assert metrics["rewards/accuracy/unjudged"] == 1
  assert math.isnan(metrics["rewards/accuracy/mean"])


def fails(prompts, completions, **columns):
  raise KeyError("target")


@pytest.mark.parametrize(("function", "message"), [
    (fails, "KeyError: 'target'"), (constant(1), "1 values for 2"), (constant(1, math.nan), "nan"),
    (constant(1, math.inf), "row 1 is inf"), (constant(1, 1e308), r"row 1 is 1e\+308"),
    (constant(1e39, 0), r"row 0 is 1e\+39"), (constant(0, 10**400), "row 1 is an integer of 1329"),
    (constant(0, 10**5000), "row 1 is an integer of"), (constant(1, "1"), "'1'"),
    (lambda *_, **__: None, "NoneType"),
    (lambda prompts, completions: [0, 0], "TypeError")])
def test_a_bad_reward_function_is_named(function, message):
  with pytest.raises(ValueError, match=r"reward 'mine'.*" + message):
    rewards.combine({"mine": function})(["?"] * 2, [""] * 2, answer=["7"] * 2)


def test_the_weighted_reward_must_not_be_too_large_either():
  with pytest.raises(ValueError, match=r"reward 'mine'.*weight 1e\+16 none above 1e\+20; row 1"):
    rewards.combine({"mine": constant(1, 1e6)}, {"mine": 1e16})(["?"] * 2, [""] * 2)


def test_booleans_and_numbers_of_numpy_are_rewards():
  values = constant(True, np.bool_(True), np.float32(0.5), np.int64(3), None, np.False_)
  assert rewards.combine({"a": values})(["?"] * 6, [""] * 6).rewards == [1, 1, 0.5, 3, None, 0]


def test_a_missing_column_is_named():
  def mine(prompts, completions, *, level, answer, **columns):
    return [0.0]

  with pytest.raises(ValueError, match=r"reward 'mine' needs the column level, .*they have answer"):
    rewards.combine({"mine": mine})(["?"], [""], answer=["7"])
  with pytest.raises(ValueError, match="reward 'language' needs the column language"):
    rewards.combine({"language": rewards.language_consistency})(["?"], [""], answer=["7"])


def test_a_reward_of_the_users_own_is_loaded_by_its_name(tmp_path, monkeypatch):
  (tmp_path / "my_rewards.py").write_text(
      "def by_level(prompts, completions, *, level, **columns):\n  return [x / 2 for x in level]\n")
  monkeypatch.syspath_prepend(tmp_path)
  assert rewards.load("my_rewards:by_level")(["?"], [""], level=[3]) == [1.5]
  with pytest.raises(ValueError, match=r"my_rewards.py\) has no function 'by_size'"):
    rewards.load("my_rewards:by_size")
  with pytest.raises(ValueError, match=r"'no_rewards' cannot be imported .*PYTHONPATH"):
    rewards.load("no_rewards:by_size")
  (tmp_path / "my_folder").mkdir()
  for name in ("my_folder:f", "sys:nothing", "builtins:nothing"):
    with pytest.raises(ValueError, match=r"\(which has no file\) has no function"):
      rewards.load(name)


@pytest.mark.parametrize(("source", "message"), [
    (b"import sys; sys.exit(3)", r"calls sys.exit\(3\) \(at .*broken_rewards.py:1\)"),
    (b"\n1/0", r"ZeroDivisionError: .*broken_rewards.py:2"), (b"def x(:", "SyntaxError"),
    (b"x = '\0'", "null bytes")])
def test_a_module_that_fails_or_exits_when_imported_is_an_error(
    tmp_path, monkeypatch, source, message):
  (tmp_path / "broken_rewards.py").write_bytes(source)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=rf"'broken_rewards' cannot be imported: .*{message}"):
    rewards.load("broken_rewards:f")


def test_a_reward_that_ends_the_program_is_an_error():
  def leaves(prompts, completions, **columns):
    raise SystemExit(0)

  with pytest.raises(ValueError, match=r"'leaves' failed on a batch of 2 .*sys.exit\(0\) \(at "):
    rewards.combine({"leaves": leaves})(["?"] * 2, [""] * 2)


def test_weights_above_the_largest_reward_are_refused_by_the_configuration():
  with pytest.raises(ValueError, match="add up to 1e\\+300"):
    RewardConfig(accuracy=1e300)


def test_columns_must_be_as_long_as_the_prompts():
  score = rewards.combine({"a": constant(1, 1)})
  with pytest.raises(ValueError, match="answer has 1 rows, but there are 2"):
    score(["?"] * 2, [""] * 2, answer=["7"])


@pytest.mark.parametrize(("weights", "message"), [
    ({"b": 1}, "name the same"), ({"a": math.nan}, "finite")])
def test_weights_must_be_finite_and_name_the_rewards(weights, message):
  with pytest.raises(ValueError, match=message):
    rewards.combine({"a": constant(1)}, weights)
