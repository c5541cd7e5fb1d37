"""Majority-vote accuracy for fewer samples than were drawn."""

import numpy as np
import pytest

from rl.evaluate import Verdicts, judge, majority_at, verdicts
from rl.sampler import Samples
from rl.tasks import get_task


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
