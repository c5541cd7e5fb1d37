"""The power that is printed before a study runs follows from the committed deviation."""

import json

import pytest

from experiments import stats
from experiments.reports import results
from experiments.studies.judging.planning import expected_power
from experiments.studies.v3 import load_balancing

STUDY = load_balancing.STUDY


def test_the_power_of_claims_follows_from_the_committed_deviation():
  with results.raw(results.ROOT / "v3" / "load_balancing" / "gpu") as folder:
    outcomes = json.loads((folder / "results.json").read_text())["comparisons"]
  std, = (outcome["paired"]["std"] for outcome in outcomes
          if outcome["name"].startswith("a batch-wise loss costs no quality"))
  claim, = (c.claim for c in STUDY.comparisons if c.name == "a batch-wise loss costs no quality")
  found = stats.power(claim, std, 12, family=len(STUDY.comparisons))
  line, = (line for line in expected_power(STUDY, "gpu", STUDY.arms_to_run(), 12)
           if line.startswith("a batch-wise loss costs no quality"))
  assert f": {found.probability:.0%} with 12 seeds" in line and f"needs {found.seeds}" in line


def test_claims_whose_arms_do_not_run_are_neither_shown_nor_corrected_for():
  lines = expected_power(STUDY, "gpu", ("loss_free", "batch_1e-2"), 8)
  assert [line.partition(":")[0] for line in lines] == [
      "the bias keeps MaxVio below 0.3", "a batch-wise loss costs no quality"]


@pytest.mark.parametrize("scale", ["smoke", "absent"])
def test_without_a_committed_result_nothing_is_known(scale):
  assert expected_power(STUDY, scale, STUDY.arms_to_run(), 8) == []
