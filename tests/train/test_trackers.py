"""Trackers are given the numbers of each row, continue their runs, and never end a run."""

import sys
import types

import numpy as np
import pytest

from rl.config import LoopConfig
from train.config import TrainConfig
from train.trackers import Trackers, check_installed

ROWS = [{"step": step, "loss": step / 4, "time": 1e9, "note": "x", "loads": [1, 2],
         "pass@1": np.float32(0.5)} for step in (1, 2)]
CONFIG = {"train": {"steps": 2}, "data": {"sources": ["a"]}}


@pytest.fixture
def calls(monkeypatch):
  """Installs modules that record what is called, and returns the list of calls."""
  calls = []

  def recorder(name, result=None):
    def call(*args, **kwargs):
      calls.append((name, args, kwargs))
      return result
    return call

  run = types.SimpleNamespace(log=recorder("wandb.log"), finish=recorder("wandb.finish"))
  wandb = types.SimpleNamespace(init=recorder("wandb.init", run))
  started = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
  mlflow = types.SimpleNamespace(start_run=recorder("mlflow.start_run", started), **{
      name: recorder(f"mlflow.{name}") for name in ("log_params", "log_metrics", "end_run")})
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  monkeypatch.setitem(sys.modules, "mlflow", mlflow)
  monkeypatch.delenv("WANDB_PROJECT", raising=False)
  return calls


def log(folder, *names):
  trackers = Trackers(names, folder, [], CONFIG)
  for row in ROWS:
    trackers.append(row)
  trackers.close()


def test_weights_and_biases_are_given_numbers_by_step_and_resume_the_run(tmp_path, calls):
  log(tmp_path, "wandb")
  identity = calls[0][2]["id"]
  assert len(identity) > 7 and identity.isalnum()
  init = {"dir": str(tmp_path), "id": identity, "resume": "allow", "name": tmp_path.name,
          "config": CONFIG, "project": "deepseek-jax"}
  assert calls == [
      ("wandb.init", (), init),
      *(("wandb.log", ({"loss": row["loss"], "pass@1": 0.5},), {"step": row["step"]})
        for row in ROWS), ("wandb.finish", (), {})]
  log(tmp_path, "wandb")
  assert calls[4][2]["id"] == identity
  assert not list(tmp_path.glob("events/*"))


def test_the_project_of_the_environment_is_kept(tmp_path, calls, monkeypatch):
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  log(tmp_path, "wandb")
  assert calls[0][2]["project"] == "mine"


def test_mlflow_is_given_valid_names_and_its_run_is_resumed_without_its_parameters(tmp_path, calls):
  log(tmp_path, "mlflow")
  assert calls[0] == ("mlflow.start_run", (), {"run_id": None, "run_name": tmp_path.name})
  assert calls[1] == ("mlflow.log_params", ({"train.steps": "2", "data.sources.0": "a"},), {})
  assert calls[2] == ("mlflow.log_metrics", ({"loss": 0.25, "pass_1": 0.5},), {"step": 1})
  calls.clear()
  log(tmp_path, "mlflow")
  assert [name for name, *_ in calls] == [
      "mlflow.start_run", *["mlflow.log_metrics"] * 2, "mlflow.end_run"]
  assert calls[0][2] == {"run_id": "m1", "run_name": None}


def test_a_tracker_that_fails_is_given_up_with_a_warning_and_the_others_go_on(
    tmp_path, calls, caplog):
  def fail(*args, **kwargs):
    raise ConnectionError("no route")

  sys.modules["mlflow"].log_metrics = fail
  log(tmp_path, "tensorboard", "mlflow", "wandb")
  assert [name for name, *_ in calls].count("wandb.log") == 2
  assert caplog.text.count("log_to=mlflow failed") == 1 and "no route" in caplog.text
  assert list(tmp_path.glob("events/*"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_saying_how_to_install_it(monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  with pytest.raises(ValueError, match=rf"pip install 'deepseek-jax\[{name}\]'"):
    check_installed(["tensorboard", name])


@pytest.mark.parametrize("make", [TrainConfig, LoopConfig])
def test_unknown_trackers_are_refused(make):
  assert make(log_to=()).log_to == ()
  with pytest.raises(ValueError, match=r"log_to: there is no tracker 'wandbb'; did you mean 'wan"):
    make(log_to=("wandbb",))
  with pytest.raises(ValueError, match="name each tracker once"):
    make(log_to=("wandb", "wandb"))
