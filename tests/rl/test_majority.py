"""The majority's rate for fewer samples than were drawn."""

import numpy as np
import pytest

from rl.evaluate import judge, majority_at
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
  found = majority_at(drawn, 4, (1, 2, 4))
  assert found[1] == pytest.approx(4 / 8)
  assert found[2] == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)  # a tie is half of a vote
  assert found[4] == pytest.approx((0 + 1) / 2)
  assert found[4] == judge(drawn, 4)["cons@4"][0] and found[1] == judge(drawn, 4)["pass@1"][0]
