"""Several runs of a study train at a time, each in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from experiments.options import Options
from experiments.reports import provenance
from experiments.studies import runner, training
from experiments.studies.v3.load_balancing import STUDY


def options(folder, **others):
  return Options("load_balancing", out=folder, arms=("loss_free",), seeds="2", **others)


def metrics(result):
  return {(run["arm"], run["learning_rate"], run["seed"]): run["metrics"] for run in result["runs"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return metrics(runner.execute(STUDY, "smoke", options(tmp_path_factory.mktemp("alone"))))


def test_runs_of_several_processes_are_those_of_one(alone, tmp_path, capfd):
  found = runner.execute(STUDY, "smoke", options(tmp_path, processes=2))
  assert metrics(found) == alone and not found["missing"]
  assert not list(tmp_path.rglob("lock*")) or capfd.readouterr().out
  (part,) = (tmp_path / "parts").iterdir()
  assert len(json.loads(part.read_text())["runs"]) == len(alone)


def test_a_signal_stops_all_processes_and_the_same_command_goes_on(alone, tmp_path):
  command = [sys.executable, "-m", "experiments.run", "--experiment=load_balancing",
             "--scale=smoke", "--arms=loss_free", "--seeds=2", "--processes=2", f"--out={tmp_path}"]
  environment = os.environ | {"DEEPSEEK_JAX_RESTART": "0"}
  process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
  while "seed" not in process.stderr.readline():
    pass
  while not list((tmp_path / "parts").glob("*.json")):
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  parts = list((tmp_path / "parts").glob("*.json"))
  before = [run for part in parts for run in json.loads(part.read_text())["runs"]]
  assert 0 < len(before) < len(alone)
  found = runner.execute(STUDY, "smoke", options(tmp_path, processes=2))
  assert metrics(found) == alone


class Pool:
  """Stands for workers of which the first fails, while another goes on until it is told to stop."""

  def __init__(self, *args):
    self.futures, self.told = [], False

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    pass

  def submit(self, task):
    future = Future()
    self.futures.append((future, task["group"]))
    if len(self.futures) == 2:
      self.futures[0][0].set_exception(ValueError("out of memory"))
    return future

  def stop(self):
    assert not self.told
    self.told = True
    future, group = self.futures[1]
    run = group[0] | {"status": "finished", "cost": {}, "metrics": {"validation_loss": 1.0}}
    future.set_result({"provenance": provenance.describe(), "measured_by": None, "runs": [run]})


def test_the_failure_of_a_process_leaves_the_others_time_to_finish(tmp_path, monkeypatch):
  monkeypatch.setattr(runner, "Workers", Pool)
  with pytest.raises(ValueError, match=r"loss_free-lr0\.001-seed1000: out of memory"):
    runner.execute(STUDY, "smoke", options(tmp_path, processes=2))
  (part,) = (tmp_path / "parts").iterdir()
  assert [run["learning_rate"] for run in json.loads(part.read_text())["runs"]] == [0.003]


def test_a_study_that_other_processes_do_not_find_is_refused(tmp_path):
  unknown = dataclasses.replace(STUDY, name="unknown")
  with pytest.raises(ValueError, match="--processes: other processes find no study 'unknown'"):
    training.command_line(unknown, "smoke", options(tmp_path), ["loss_free"], tmp_path)
