"""What only the report of an RL study shows: panels of curves, and bases."""

import matplotlib.image

from experiments.reports import plots, study_report

COST = {"device_seconds": 100.0, "flops": 5e12, "tokens": 40000, "joules": None}
OVER_STEPS = {"held-out pass@1": {"new": [[0, 5], [0.25, 0.5]], "old": [[0, 5], [0.25, None]]}}
OVER_K = {"pass@K": {"base": [[1, 2, 4, 8, 16, 32, 64], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]]}}


def test_the_report_of_an_rl_study_shows_its_panels_and_bases(tmp_path):
  path = study_report.write_study_report(tmp_path, {
      "name": "invented", "panels": [
          {"name": "curves", "caption": "Over steps", "curves": OVER_STEPS},
          {"name": "by_k", "caption": "Over K", "ratios": "K (samples)", "curves": OVER_K}],
      "bases": [{"name": "f00d-seed0", "arms": ["new", "old"], "cost": COST,
                 "metrics": {"pass@1": 0.25, "length_pays": -3.0, "cons@k": None}}]})
  text = path.read_text()
  assert "| f00d-seed0 | new, old | 1.7 min | 0.25 | −3 | – |" in text
  assert "## Loss" not in text
  for name in ("curves", "by_k"):
    assert f"]({name}.png)" in text
    assert (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] < 0.95).mean() > 0.005


def test_axes_of_panels_are_labelled_and_spaced_by_what_they_show(tmp_path):
  steps = plots.panels(OVER_STEPS, tmp_path / "steps.png").axes[0]
  k = plots.panels(OVER_K, tmp_path / "k.png", ratios="K (samples)").axes[0]
  assert (steps.get_xlabel(), steps.get_ylabel()) == ("step", "held-out pass@1")
  assert (k.get_xlabel(), k.get_ylabel(), k.get_xscale()) == ("K (samples)", "pass@K", "log")


def test_the_report_of_a_study_without_finished_runs_shows_neither_panels_nor_bases(tmp_path):
  empty = {"name": "curves", "caption": "Over steps", "curves": {}}
  path = study_report.write_study_report(
      tmp_path, {"name": "invented", "panels": [empty], "bases": []})
  assert path.read_text() == "# Study invented\n\n> No claim stated\n"
