"""Reports of small synthetic results: the numbers that they state, and parts that are absent."""

import dataclasses
import math

import matplotlib.image
import pytest

from experiments import stats
from experiments.reports import run_report, study_report

PROVENANCE = {
    "command": "python -m experiments.run --experiment=train", "commit": "abc123", "dirty": True,
    "versions": {"jax": "0.11.2"}, "device": "1 x cpu", "cpu": "Some CPU", "cores": 2}
COST = {"device_seconds": 100.0, "flops": 5e12, "tokens": 40000, "joules": None}


def a_run() -> dict:
  loads = [[1.0, 3.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]
  evaluations = [
      {"step": step, "bits_per_byte": {"bible": bits, "python": bits + 1},
       "loss": {"bible": 2 * bits, "python": 2 * bits + 2}, "mtp_acceptance": 0.4,
       "loads": {"bible": loads, "python": loads[::-1]}, "max_violation": 0.5}
      for step, bits in ((0, 7.5), (10, 4.0), (20, 2.25))]
  return {
      "provenance": PROVENANCE, "status": "finished", "skipped_steps": 3, "cost": COST,
      "config": {"model": {"d_model": 64}, "data": {"sources": [{"path": "builtin:bible"}]},
                 "optimizer": {"learning_rate": 0.00123456}, "init": None},
      "data": {"domains": {"bible": {"documents": 1234, "bytes": 99000, "tokens": 5},
                           "python": {"documents": 7, "bytes": 8, "tokens": 9}}, "bad_rows": 17},
      "evaluations": evaluations,
      "baselines": {"gzip -9": {"bible": 3.0, "python": 2.0}, "n-gram": {"bible": 1.0}},
      "samples": [{"prompt": "In the", "text": " beginning ```` was"}]}


def some_rows() -> list[dict]:
  return [{"step": step, "loss": 5 - step / 10, "learning_rate": 1e-3, "max_violation": 0.5,
           "tokens_per_second": 100.0 + step, "utilisation": 0.125} for step in range(21)]


def a_comparison(name: str, values: list[float], claim: stats.Claim, **fields) -> dict:
  pair = stats.paired(values, 0)
  return {"name": name, "metric": "bits per byte", "arm": "loss-free", "paired":
          dataclasses.asdict(pair), "claim": dataclasses.asdict(claim),
          "verdict": stats.judge(pair, claim)} | fields


def a_study() -> dict:
  losses = {("loss-free", 0): 2.0, ("loss-free", 1): 2.2, ("auxiliary", 0): 2.5}
  runs = [{"arm": arm, "learning_rate": 0.003, "seed": seed, "status": "finished",
           "metrics": {"bits per byte": bits}} for (arm, seed), bits in losses.items()]
  runs.append({"arm": "auxiliary", "learning_rate": 0.01, "seed": 1, "status": "diverged",
               "metrics": {"bits per byte": 99.0}})
  return {
      "name": "balance", "claim": "Loss-free balancing loses less", "source": "arXiv:2408.15664",
      "arms": ["loss-free", {"name": "auxiliary", "weight": 0.01}], "runs": runs,
      "comparisons": [
          a_comparison("better", [-0.3, -0.31, -0.29], stats.Claim("sign", -1, paper=-0.05),
                       baseline="auxiliary", paper="−0.05 at 1B"),
          a_comparison("balanced", [0.5], stats.Claim("threshold", -1, threshold=1.0)),
      ],
      "noise": {"bits per byte": 0.0125}, "detectable": {"bits per byte": 0.034},
      "panels": [{"name": "loss", "caption": "Loss", "label": "difference (nats per token)",
                  "curves": {"loss-free": [[0, 1, 2, 3], [0.0, -0.2, -0.3, -0.3]]}}],
      "outcomes": {"bits per byte": {"auxiliary": [2.5], "loss-free": [2.0, 2.2]},
                   "not claimed": {"auxiliary": [2.5]}},
      "total_cost": COST, "provenance": PROVENANCE}


def figures(path) -> set[str]:
  """Returns the names of the report's figures, after checking that they are files and not blank."""
  names = {part.split(")")[0] for part in path.read_text().split("](")[1:]}
  assert names == {png.name for png in path.parent.glob("*.png")}
  for name in names:
    assert (matplotlib.image.imread(path.parent / name)[..., :3] < 0.95).mean() > 0.005
  return names


@pytest.fixture(scope="module", name="run_report")
def fixture_of_run_report(tmp_path_factory):
  return run_report.write_run_report(tmp_path_factory.mktemp("run"), a_run(), some_rows())


def without_figures(results: dict) -> dict:
  evaluations = [{"step": e["step"], "max_violation": 0.5} for e in results.get("evaluations", [])]
  return results | {"evaluations": evaluations, "panels": [], "comparisons": []}


def test_a_run_report_states_the_numbers_of_the_run(run_report):
  text = run_report.read_text()
  for stated in (
      "20 steps on 40,000 tokens ran on 1 x cpu (Some CPU, 2 cores) in 1.7 min",
      "**finished**", "3 steps were skipped",
      "bible and python, went from 8.000 to **2.750**", "best baseline, gzip -9, takes 2.500",
      "| domain | step 0 | step 20 | gzip -9 | n-gram |",
      "| bible | 7.500 | 2.250 | 3.000 | 1.000 |",
      "| python | 8.500 | 3.250 | 2.000 | – |", "| mean | 8.000 | 2.750 | 2.500 | – |",
      "| 10 | 4.5 | 9 | 0.4 | 0.5 |",
      "| FLOP | 5e+12 |", "| tokens per second, mean | 400 |", "| GFLOP/s, mean | 50.0 |",
      "| tokens per second, median step | 110 |", "| utilisation, median step | 12.5% |",
      "| energy | not measured |", "| bible | 1,234 | 99,000 | 5 |", "| bad_rows | 17 |",
      "| data.sources.0.path | builtin:bible |", "| optimizer.learning_rate | 0.00123456 |",
      "| init | none |", "abc123 with uncommitted changes", PROVENANCE["command"]):
    assert stated in text, stated
  assert run_report.name == "report.md" and text.index("went from") < text.index("\n## ")


def test_a_run_report_shows_every_figure(run_report):
  assert figures(run_report) == {
      "validation.png", "loss.png", "learning_rate.png", "loads.png", "max_violation.png"}


def test_a_sample_cannot_end_its_own_code_block(run_report):
  text = run_report.read_text()
  assert "\n`````text\nIn the▸ beginning ```` was\n`````\n" in text


@pytest.mark.parametrize("part", sorted(a_run()))
def test_every_part_of_a_run_may_be_absent(part, tmp_path):
  run = without_figures(a_run())
  del run[part]
  sections = run_report.write_run_report(tmp_path, run, []).read_text().count("\n## ")
  heading = part in ("evaluations", "samples", "cost", "data", "provenance", "config")
  assert sections == 6 - heading


def test_a_run_without_results_has_a_report_without_sections_and_figures(tmp_path):
  path = run_report.write_run_report(tmp_path, {"status": "interrupted"}, [])
  assert "No training step ran on an unknown device; status: **interrupted**." in path.read_text()
  assert "\n## " not in path.read_text() and not figures(path)


def test_a_model_without_experts_has_no_heat_map(tmp_path):
  evaluation = {"step": 0, "loss": {"bible": 2.0}, "loads": {"bible": []}, "max_violation": None}
  path = run_report.write_run_report(tmp_path, {"evaluations": [evaluation]}, [])
  assert "## Evaluations" in path.read_text() and not figures(path)


def test_a_single_evaluation_is_not_reported_as_a_change(tmp_path):
  run = a_run() | {"evaluations": a_run()["evaluations"][:1]}
  text = run_report.write_run_report(tmp_path, run, []).read_text()
  assert "was **8.000**" in text and "went from" not in text
  assert "| domain | step 0 | gzip -9 | n-gram |" in text


def test_a_study_report_states_the_verdicts_first_and_the_numbers_of_the_study(tmp_path):
  path = study_report.write_study_report(tmp_path, a_study())
  text = path.read_text()
  interval = "−0.325 to −0.275"  # 0.3 -+ 4.3027 * 0.01 / sqrt(3)
  for stated in (
      "> Loss-free balancing loses less (arXiv:2408.15664)",
      "Of 2 comparisons: 1 reproduced, 1 unresolved.",
      "| better | bits per byte | loss-free − auxiliary | below 0 | −0.05 at 1B | −0.3 | "
      f"{interval} | 3 of 3 < 0 | 0.031 | **reproduced** |",
      "| balanced | bits per byte | loss-free | below 1 | – | 0.5 | −∞ to ∞ | 1 | ∞ | "
      "**unresolved** |",
      "| loss-free | 0.003 | 0, 1 | 2.10 ± 0.14 |", "| auxiliary | 0.003 | 0 | 2.5 |",
      "- **auxiliary**: weight 0.01", "| bits per byte | 0.0125 | 0.034 |",
      "1 of 4, left out", "| auxiliary | 0.01 | 1 | diverged |",
      PROVENANCE["command"]):
    assert stated in text, stated
  assert "99" not in text
  assert text.index("## Verdicts") < min(text.index(f"## {name}") for name in (
      "Loss", "Arms", "Noise", "Failed runs", "Cost of all runs", "How to run it again"))
  assert figures(path) == {"forest.png", "loss.png", "metrics.png"}
  assert "not claimed" not in text


@pytest.mark.parametrize("part", sorted(a_study().keys() - {"name"}))
def test_every_part_of_a_study_may_be_absent(part, tmp_path):
  study = without_figures(a_study())
  del study[part]
  path = study_report.write_study_report(tmp_path, study)
  assert path.read_text().startswith("# Study balance\n")


def test_null_bounds_are_shown_as_infinite(tmp_path):
  study = a_study() | {"panels": []}
  for comparison in study["comparisons"]:
    comparison["paired"] = {key: value if math.isfinite(value) else None
                            for key, value in comparison["paired"].items()}
  assert "−∞ to ∞" in study_report.write_study_report(tmp_path, study).read_text()


def test_a_study_report_says_if_all_runs_finished(tmp_path):
  study = without_figures(a_study()) | {"runs": a_study()["runs"][:3]}
  assert "None: all 3 finished." in study_report.write_study_report(tmp_path, study).read_text()


def test_a_vertical_bar_in_a_name_does_not_split_its_table_cell(tmp_path):
  run = {"data": {"domains": {"a|b": {"documents": 2}}}}
  assert "| a\\|b | 2 |" in run_report.write_run_report(tmp_path, run, []).read_text()
