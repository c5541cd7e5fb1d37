"""A study's metrics of an RL run, from hand-written rows and samples."""

import numpy as np
import pytest

from experiments.studies.rl_metrics import length_pays, metrics_of_rows, powers_of_two
from experiments.studies.runs import binned_curve


def test_length_pays_is_the_mean_difference_of_lengths_within_problems():
  correct_PN = np.array([[True, False, False], [True, True, False], [True, True, True],
                       [False, False, False]])
  length_PN = np.array([[10, 4, 6], [7, 9, 14], [100, 100, 100], [1, 1, 1]])
  assert length_pays(correct_PN, length_PN) == pytest.approx(((10 - 5) + (8 - 14)) / 2)
  assert length_pays(correct_PN[2:], length_PN[2:]) is None


def test_metrics_of_rows_are_means_maxima_medians_and_the_slope_of_the_length():
  rows = [{"step": step, "completions/mean_length": 5 + 0.25 * step, "seconds/step": step,
           "kl": step, "clip_ratio/region": step / 10, "sampling_gap": 1e-7} for step in (1, 2, 4)]
  found = metrics_of_rows(rows)
  assert found["length_slope"] == pytest.approx(0.25)
  assert found["kl"] == pytest.approx(7 / 3) and found["seconds_per_step"] == 2
  assert found["clip_ratio"] == pytest.approx(0.7 / 3)
  assert found["gap"] == pytest.approx(1e-7)
  assert found["max_clip_ratio"] == pytest.approx(0.4)
  assert "routing_agreement" not in found
  assert "length_slope" not in metrics_of_rows(rows[:1])


def test_every_step_that_has_a_value_counts_in_one_bin_of_a_curve():
  rows = [{"step": step, "reward": float(step) if step != 4 else None} for step in range(1, 8)]
  assert binned_curve(rows, lambda row: row["reward"], most=3) == [[2, 1.5], [5, 4.0], [7, 6.5]]
  assert binned_curve([], lambda row: row["reward"]) == []


def test_powers_of_two_go_up_to_the_number_of_samples():
  assert powers_of_two(1) == (1,) and powers_of_two(64) == (1, 2, 4, 8, 16, 32, 64)
