"""R1-Zero from one command: base, RL, controls, report; then the checkpoint is evaluated."""

import json
import pathlib

import pytest

from experiments import evaluate, r1_zero, rl_report
from experiments.options import Options
from train.run_folder import MetricsFile

TINY = (
    "base.model.num_layers=1", "base.model.num_dense_layers=0", "base.model.d_model=32",
    "base.train.steps=2", "base.data.heldout_bytes=500", "documents.count=300", "rl.loop.steps=2",
    "rl.loop.eval_problems=2", "rl.loop.eval_samples=2", "problems=4", "samples=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("r1_zero") / "run"
  cache = f"base.data.cache_dir={out.parent}"
  r1_zero.main(Options("r1_zero", out=out, settings=(*TINY, cache), arms=("grpo", "random")))
  return out


def test_arms_share_a_base_and_report_before_and_after(folder):
  results = {path.parent.name: json.loads(path.read_text())
             for path in folder.glob("*/results.json")}
  assert set(results) == {"grpo-seed0", "random-seed0"}
  assert results["grpo-seed0"]["base"] == results["random-seed0"]["base"]
  assert set(results["grpo-seed0"]["base"]["temperatures"]) == {"0.0", "0.3", "0.6"}
  for run in results.values():
    assert run["after"]["heldout"]["problems"] == 4
    low, high = run["after"]["heldout"]["format"][1:]
    assert 0 <= low <= high <= 1
  report = (folder / "report.md").read_text()
  assert "grpo-seed0" in report and "random-seed0" in report and "base-seed0" in report
  assert (folder / "rollouts.png").stat().st_size > 5000


def test_rewards_are_the_arms_own(folder):
  first = {arm: MetricsFile(folder / f"{arm}-seed0" / "metrics.jsonl").read()[0]
           for arm in ("grpo", "random")}
  assert {"rewards/accuracy/mean", "rewards/format/mean"} <= first["grpo"].keys()
  assert "rewards/random/mean" in first["random"]
  assert "rewards/accuracy/mean" not in first["random"]
  assert {"reward", "reward_std", "kl", "entropy", "clip_ratio/region", "grad_norm",
          "completions/mean_length", "completions/clipped_ratio"} <= first["grpo"].keys()


def test_a_finished_folder_is_not_trained_again(folder):
  before = (folder / "grpo-seed0" / "metrics.jsonl").read_bytes()
  cache = f"base.data.cache_dir={folder.parent}"
  r1_zero.main(Options("r1_zero", out=folder, settings=(*TINY, cache), arms=("grpo",)))
  assert (folder / "grpo-seed0" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_rl_can_be_evaluated(folder, capsys, tmp_path):
  evaluate.main(Options("evaluate", out=tmp_path, settings=(
      f"checkpoint={folder / 'grpo-seed0'}", "problems=3", "samples=2", "ks=2", "slots=3",
      "max_completion_length=8", "task=arithmetic:terms=2,digits=1")))
  assert "pass@2" in capsys.readouterr().out
  result = json.loads((tmp_path / "results.json").read_text())
  assert result["problems"] == 3 and result["config"]["samples"] == 2


def test_a_folder_refuses_other_settings_and_a_base_other_documents(folder):
  cache = f"base.data.cache_dir={folder.parent}"
  with pytest.raises(ValueError, match=r"rl\.optimizer\.learning_rate"):
    r1_zero.main(Options("r1_zero", out=folder, arms=("grpo",), settings=(
        *TINY, cache, "rl.optimizer.learning_rate=0.5")))
  with pytest.raises(ValueError, match=r"asked\.documents\.noise\.step_error"):
    r1_zero.main(Options("r1_zero", out=folder, arms=("format_only",), settings=(
        *TINY, cache, "documents.noise.step_error=0.9")))


def test_settings_that_would_change_nothing_are_refused(tmp_path):
  init = "init=somewhere"
  with pytest.raises(ValueError, match=r"documents\.count would change a base"):
    r1_zero.main(Options("r1_zero", out=tmp_path, settings=(init, "documents.count=7")))
  with pytest.raises(ValueError, match="--arms=reflection"):
    r1_zero.main(Options("r1_zero", out=tmp_path, settings=(init,), arms=("reflection",)))
  with pytest.raises(ValueError, match="samples=0"):
    r1_zero.main(Options("r1_zero", out=tmp_path, settings=("samples=0",)))


def test_figures_that_there_are_none_of_are_dashes():
  assert [rl_report._cell(found) for found in (None, [None, None, None])] == ["–", "–"]
