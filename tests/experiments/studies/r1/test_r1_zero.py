"""r1_zero: one command pretrains a base, runs RL and its controls, and judges the claims."""

import json
import pathlib

import pytest

from experiments.options import Options
from experiments.programs import evaluate
from experiments.studies import rl_tables, runner
from experiments.studies.r1.r1_zero import STUDY
from train.run_folder import MetricsFile

BASE = ("base.model.num_layers=1", "base.model.num_dense_layers=0", "base.model.d_model=32",
        "base.model.moe=none", "base.model.mtp=none", "base.model.rope.layout=half",
        "base.model.attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16)",
        "base.train.steps=2", "base.data.heldout_bytes=500", "documents.count=300")
SHORT = ("rl.loop.steps=2", "rl.loop.eval_problems=2", "rl.loop.eval_samples=2",
         "evaluation.problems=4", "evaluation.samples=2")


def run(out, *settings, base=BASE, **options):
  overrides = (*base, *SHORT, f"base.data.cache_dir={out.parent}", *settings)
  runner.main(STUDY, Options("r1_zero", out=out, settings=overrides, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("r1_zero") / "run"
  run(out, arms=("grpo", "random"))
  return out


@pytest.fixture(scope="module")
def runs(folder) -> dict:
  return {run["arm"]: run for run in json.loads((folder / "results.json").read_text())["runs"]}


def test_arms_share_a_base_and_report_metrics_before_and_after_rl(folder, runs):
  assert set(runs) == {"grpo", "random"}
  assert runs["grpo"]["before"] == runs["random"]["before"]
  assert set(runs["grpo"]["before"]["temperatures"]) == {"0.0", "0.3", "0.6"}
  for found in runs.values():
    assert found["learning_rate"] is None and found["status"] == "finished"
    assert found["after"]["heldout"]["problems"] == 4
    low, high = found["after"]["heldout"]["format"][1:]
    assert 0 <= low <= high <= 1
    gain = found["metrics"]["pass@1_gain"]
    assert gain == found["metrics"]["pass@1"] - found["before"]["metrics"]["pass@1"]
  report = (folder / "report.md").read_text()
  for part in ("grpo, seed 0", "random, seed 0", "base-seed0", "reference answer", "greedy",
               "step back"):
    assert part in report
  assert (folder / "curves.png").stat().st_size > 5000


def test_claims_are_judged_and_a_single_seed_leaves_them_unresolved(folder):
  comparisons = json.loads((folder / "results.json").read_text())["comparisons"]
  assert {c["name"] for c in comparisons} == {
      c.name for c in STUDY.comparisons if {c.arm, c.baseline or c.arm} <= {"grpo", "random"}}
  assert {c["verdict"] for c in comparisons} == {"unresolved"}


def test_each_arm_records_the_components_of_its_own_reward(folder):
  first = {arm: MetricsFile(folder / f"{arm}-seed0" / "metrics.jsonl").read()[0]
           for arm in ("grpo", "random")}
  assert {"rewards/accuracy/mean", "rewards/format/mean"} <= first["grpo"].keys()
  assert "rewards/random/mean" in first["random"]
  assert "rewards/accuracy/mean" not in first["random"]
  assert {"reward", "reward_std", "kl", "entropy", "clip_ratio/region", "grad_norm",
          "completions/mean_length", "completions/clipped_ratio"} <= first["grpo"].keys()


def test_a_finished_run_is_not_trained_again(folder):
  before = (folder / "grpo-seed0" / "metrics.jsonl").read_bytes()
  run(folder, arms=("grpo",))
  assert (folder / "grpo-seed0" / "metrics.jsonl").read_bytes() == before


def test_the_checkpoint_of_an_rl_run_can_be_evaluated(folder, capsys, tmp_path):
  evaluate.main(Options("evaluate", out=tmp_path, settings=(
      f"checkpoint={folder / 'grpo-seed0'}", "problems=3", "samples=2", "ks=2", "slots=3",
      "max_completion_length=8", "task=arithmetic:terms=2,digits=1")))
  assert "pass@2" in capsys.readouterr().out
  result = json.loads((tmp_path / "results.json").read_text())
  assert result["problems"] == 3 and result["config"]["samples"] == 2


def test_with_init_rl_starts_from_that_model_and_pretrains_no_base(folder, tmp_path):
  run(tmp_path / "run", f"init={folder / 'grpo-seed0'}", base=())
  (found,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
  assert found["base"] == {"name": "init-seed0", "cost": None}
  assert not list(tmp_path.rglob("documents.jsonl"))


def test_a_study_folder_refuses_other_settings_and_a_base_folder_other_documents(folder):
  with pytest.raises(ValueError, match=r"rl\.optimizer\.learning_rate"):
    run(folder, "rl.optimizer.learning_rate=0.5", arms=("grpo",))
  (folder / "config.json").unlink()  # the study's; the base has its own
  with pytest.raises(ValueError, match=r"requested\.documents\.noise\.step_error"):
    run(folder, "documents.noise.step_error=0.9", arms=("format_only",))


def test_settings_without_effect_and_invalid_settings_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"documents\.count.* would change a base"):
    runner.main(STUDY, Options("r1_zero", out=tmp_path, settings=(
        "init=somewhere", "documents.count=7")))
  with pytest.raises(ValueError, match="--arms=reflection would change a base"):
    runner.main(STUDY, Options("r1_zero", out=tmp_path, settings=("init=somewhere",),
                               arms=("reflection",)))
  with pytest.raises(ValueError, match="samples=0"):
    runner.main(STUDY, Options("r1_zero", out=tmp_path, settings=("evaluation.samples=0",)))


def test_missing_estimates_are_shown_as_dashes():
  assert [rl_tables._cell(found) for found in (None, [None, None, None])] == ["–", "–"]
