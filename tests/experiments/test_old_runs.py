"""Run folders of an earlier version, with its names of settings, resume and load.

The fixture holds two runs that were stopped after their first step, one of `pretrain` and one of
`r1_zero`, and the metrics of the same runs without the stop, made by commit cef6033 with

    --experiment=pretrain --scale=smoke PRETRAIN, and --experiment=r1_zero --scale=smoke RL,

where settings had their names of then: optimizer.clip, data.heldout_share, train.fsdp, problems.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest

from experiments.options import Options
from experiments.programs import pretrain
from experiments.studies import runner
from experiments.studies.r1 import r1_zero
from rl.loading import load_model
from train.run_folder import MetricsFile

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "old_runs.tar.xz"
SMALL = ("model.d_model=16", "model.num_layers=1", "model.num_dense_layers=0",
         "model.moe.num_experts=4", "model.moe.expert_dim=8")
PRETRAIN = (*SMALL, "model.mtp=none", "train.steps=6", "train.checkpoint_every=2",
            "train.batch_size=2", "data.sources=builtin:arithmetic", "data.seq_len=32",
            "data.heldout_bytes=2000", "sample_tokens=0", "optimizer.max_grad_norm=0.5",
            "data.heldout_fraction=0.02", "mesh.fsdp=1")
RL = (*(f"base.{setting}" for setting in SMALL), "base.train.steps=6", "documents.count=300",
      "base.data.heldout_bytes=1000", "evaluation.problems=4", "evaluation.samples=4",
      "rl.loop.steps=3", "rl.loop.checkpoint_every=1", "rl.loop.eval_every=3", "rl.mesh.data=1")
# Of a step; times differ, and what is called "skipped" is exact.
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "reward", "entropy",
            "completions/mean_length", "max_violation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("old")
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(path, filter="data")
  base = path / "r1" / "base-seed0" / "config.json"
  base.write_text(base.read_text().replace("FOLDER", str(path)))  # where its documents were
  return path


def assert_same_metrics(ours: list[dict], theirs: list[dict]) -> None:
  assert [row["step"] for row in ours] == [row["step"] for row in theirs]
  for a, b in zip(ours, theirs, strict=True):
    names = [name for name in COMPARED if name in b]
    assert len(names) >= 4
    # Another CPU rounds differently.
    np.testing.assert_allclose([a[name] for name in names], [b[name] for name in names],
                               rtol=1e-4, atol=1e-6)


def test_an_old_pretraining_run_resumes_to_the_metrics_of_an_uninterrupted_one(folder):
  old = json.loads((folder / "pretrain" / "config.json").read_text())["config"]
  assert "clip" in old["optimizer"] and "fsdp" in old["train"]  # the names of then
  assert len(MetricsFile(folder / "pretrain" / "metrics.jsonl").read()) == 1
  pretrain.main(Options("pretrain", scale="smoke", out=folder / "pretrain", settings=PRETRAIN))
  assert_same_metrics(MetricsFile(folder / "pretrain" / "metrics.jsonl").read(),
                      MetricsFile(folder / "uninterrupted" / "pretrain.jsonl").read())
  assert load_model(folder / "pretrain").cfg.d_model == 16


def test_an_old_run_still_refuses_another_configuration(folder):
  other = [setting.replace("max_grad_norm=0.5", "max_grad_norm=1") for setting in PRETRAIN]
  with pytest.raises(ValueError, match=r"optimizer\.max_grad_norm: 0\.5 in the folder, 1\.0 now"):
    pretrain.main(Options("pretrain", scale="smoke", out=folder / "pretrain",
                          settings=tuple(other)))


def test_an_old_rl_run_resumes_on_its_base_to_the_metrics_of_an_uninterrupted_one(folder):
  made = (folder / "r1" / "base-seed0" / "metrics.jsonl").read_bytes()
  runner.main(r1_zero.STUDY, Options("r1_zero", scale="smoke", out=folder / "r1", settings=RL))
  assert (folder / "r1" / "base-seed0" / "metrics.jsonl").read_bytes() == made  # was not retrained
  run = folder / "r1" / "grpo-seed0"
  assert_same_metrics(MetricsFile(run / "metrics.jsonl").read(),
                      MetricsFile(folder / "uninterrupted" / "r1.jsonl").read())
  estimates = lambda path: [row["pass@1"] for row in MetricsFile(path).read()]
  assert estimates(run / "evaluations.jsonl") == estimates(
      folder / "uninterrupted" / "r1_evaluations.jsonl")
  assert load_model(run).cfg.d_model == 16
