"""The majority's rate for fewer samples than were drawn."""

import numpy as np
import pytest

from rl.evaluate import Verdicts, judge, majority_at, verdicts
from rl.sampler import Samples
from rl.tasks import get_task


def samples_of(answers) -> Samples:
  """Completions with these answers, two problems of four samples side by side."""
  problems = [get_task("arithmetic").problem("heldout", i) for i in (0, 1) for _ in range(4)]
  texts = [f"<answer>{problem.answer if right else -9999}</answer>"
           for problem, right in zip(problems, answers, strict=True)]
  full = np.full(8, 3)
  return Samples(problems, [""] * 8, [np.ones(1, int)] * 8, texts, np.zeros((8, 3), int), full,
                 np.zeros((8, 3)), np.ones(8, bool))


def test_the_majority_of_k_is_over_groups_of_a_problems_samples():
  drawn = samples_of([1, 0, 0, 0, 1, 1, 1, 0])
  found = majority_at(drawn, (1, 2, 4), verdicts(drawn, 4))
  assert found[1] == pytest.approx(4 / 8)
  assert found[2] == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)  # a tie is half of a vote
  assert found[4] == pytest.approx((0 + 1) / 2)
  assert found[4] == judge(drawn, 4)["cons@4"][0] and found[1] == judge(drawn, 4)["pass@1"][0]


def test_verdicts_that_are_known_are_not_asked_for_again():
  drawn, judged = samples_of([0] * 8), np.ones((2, 4), bool)
  assert verdicts(drawn, 4).judged_PN.all() and not verdicts(drawn, 4).correct_PN.any()
  known = Verdicts(np.array([[True] * 4, [False] * 4]), judged)
  assert judge(drawn, 4, accuracy=known)["pass@1"][0] == 1 / 2
