"""Majority-vote accuracy for fewer samples than were drawn."""

import numpy as np
import pytest

from rl.evaluate import Verdicts, judge, majority_at, verdicts
from rl.sampler import Samples
from rl.tasks import get_task, gym
from rl.tasks.problem import Problem


def samples_of(answers) -> Samples:
  """Returns four samples of each of two problems; `answers` says which of them are correct."""
  problems = [get_task("arithmetic").problem("heldout", i) for i in (0, 1) for _ in range(4)]
  texts = [f"<answer>{problem.answer if correct else -9999}</answer>"
           for problem, correct in zip(problems, answers, strict=True)]
  full = np.full(8, 3)
  return Samples(problems, [""] * 8, [np.ones(1, int)] * 8, texts, np.zeros((8, 3), int), full,
                 np.zeros((8, 3)), np.ones(8, bool))


def test_the_majority_of_k_is_taken_over_groups_of_k_samples_of_a_problem():
  drawn = samples_of([1, 0, 0, 0, 1, 1, 1, 0])
  found = majority_at(drawn, (1, 2, 4), verdicts(drawn, 4))
  assert found[1] == pytest.approx(4 / 8)
  assert found[2] == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)  # a tie counts half
  assert found[4] == pytest.approx((0 + 1) / 2)
  assert found[4] == judge(drawn, 4)["cons@4"][0] and found[1] == judge(drawn, 4)["pass@1"][0]


def test_known_verdicts_are_not_computed_again():
  drawn, judged = samples_of([0] * 8), np.ones((2, 4), bool)
  assert verdicts(drawn, 4).judged_PN.all() and not verdicts(drawn, 4).correct_PN.any()
  known = Verdicts(np.array([[True] * 4, [False] * 4]), judged)
  assert judge(drawn, 4, accuracy=known)["pass@1"][0] == 1 / 2


def judged(problem: Problem, *answers: str) -> dict:
  """Returns the metrics of a problem's samples with these answers."""
  count = len(answers)
  return judge(Samples(
      [problem] * count, [""] * count, [np.ones(1, int)] * count,
      [f"<answer>{answer}</answer>" for answer in answers], np.zeros((count, 3), int),
      np.full(count, 3), np.zeros((count, 3)), np.ones(count, bool)), count)


def countdown() -> Problem:
  return Problem("", "make 3 from 1 2 6", "6/2", "countdown", {"target": 3, "numbers": [1, 2, 6]})


@pytest.mark.parametrize(("answers", "expected"), [
    (("6/2", "3"), 1 / 2), (("6/2", "3", "3"), 0), (("6/2", " 6 / 2 ", "3"), 1),
    (("6/2", "1+2", "3"), 2 / 3), (("6/2", "2+6", "2+6"), 0)])
def test_expressions_of_equal_value_are_not_one_answer_to_countdown(answers, expected):
  metrics = judged(countdown(), *answers)
  assert metrics[f"cons@{len(answers)}"][0] == pytest.approx(expected)
  assert metrics["lenient_cons"][0] == pytest.approx(expected)


@pytest.mark.parametrize(("gold", "answers", "expected"), [
    ("90^\\circ", ("90", "90.", "80"), 1), ("90^\\circ", ("90", "80", "80.0"), 0),
    ("\\frac{1}{3}", ("0.333333", "0.3333336", "1/3", "2", "2.", "2.0"), 1 / 2),
    ("x^2", ("1+x", "x+1", "x^2"), 0), ("x^2", ("x+1", "x+2", "x^2", "x \\cdot x"), 1),
    ("7", ("1/2", "0.5", "7"), 0), ("7", ("so", "so", "7"), 0)])
@pytest.mark.parametrize("task", ["", "file"])
def test_answers_are_one_if_the_checker_takes_them_for_the_same(
    tmp_path, gold, answers, expected, task):
  spec = ""
  if task:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?", "answer": 1}')
    spec = f"file:{path}"
  metrics = judged(Problem("", "?", gold, spec), *answers)
  assert metrics[f"cons@{len(answers)}"][0] == pytest.approx(expected)


class Exact:
  """A scorer of reasoning-gym's that compares texts, and one that ignores the reference."""

  def __init__(self, solutions=()):
    self.solutions = solutions

  def score_answer(self, answer, entry):
    return float(answer in self.solutions if self.solutions else answer == entry["answer"])


@pytest.mark.parametrize(("solutions", "answers", "expected"), [
    ((), ("2", "2.0"), 1 / 2), ((), ("2", "2.0", "2.0"), 0), ((), ("3", "3.0", "2", "2"), 1),
    (("2", "1+1"), ("2", "1+1", "3"), 1), (("2", "1+1"), ("2", "3", "3", "4"), 0)])
def test_scorers_of_reasoning_gym_decide_which_answers_are_one(
    monkeypatch, solutions, answers, expected):
  task, scorer = object.__new__(gym.Gym), Exact(solutions)
  # The scorer is run here, as its own process would have to import reasoning-gym.
  monkeypatch.setattr(gym.Gym, "_accepts", lambda self, *given: scorer.score_answer(*given) == 1)
  for module in ("rl.evaluate", "rl.rewards"):
    monkeypatch.setattr(f"{module}.get_task", lambda spec: task)
  problem = Problem("", "?", "2", "gym:gcd", {"gym_entry": {"answer": "2"}})
  assert judged(problem, *answers)[f"cons@{len(answers)}"][0] == pytest.approx(expected)
