"""The store of finished runs, which studies share."""

import dataclasses
import json
from typing import ClassVar

import pytest

import model
from experiments.options import Options
from experiments.stats import Claim
from experiments.studies import runner as studies_runner
from experiments.studies import store as run_store
from experiments.studies.judging import rules
from experiments.studies.runner import Runner, execute
from experiments.studies.runs import Score, Task
from experiments.studies.study import Arm, Comparison, Scale, Study
from experiments.studies.text.text_runs import TextRuns
from train.config import DataConfig, RunConfig, Source
from train.loop import TrainingError

RATES = (1e-3, 2e-3, 4e-3)


class Quick(TextRuns):
  """Trains nothing: the loss is a function of the configuration."""

  score: ClassVar = Score("validation_loss", -1)
  trained: ClassVar[list[str]] = []

  def prepare(self):
    self.trained.append("prepared")

  def program(self, task):
    return task

  def train(self, tasks, folder, max_seconds):
    found = []
    for task in tasks:
      cfg = self._assigned(task)
      self.trained.append(task.name)
      if cfg.optimizer.beta1 == 0.5:
        raise TrainingError("not finite")
      loss = 3 + abs(cfg.optimizer.learning_rate - 2e-3) + 0.01 * cfg.train.seed % 7
      found.append({"metrics": {"validation_loss": loss}, "flops": 1.0, "curve": [[1, loss]],
                    "validation_curve": []})
    return found


@pytest.fixture(autouse=True)
def trained(monkeypatch):
  monkeypatch.setattr(Quick, "trained", found := [])
  return found


def a_study(cache, arms=("plain", "new"), name="invented", seeds=2, **data):
  cfg = RunConfig(model=model.get_config("nano"), data=DataConfig(
      cache_dir=str(cache), sources=(Source(str(text(cache))),), tokenizer="bytes", **data))
  settings = {"plain": ("optimizer.beta1=0.8",), "new": ("optimizer.beta1=0.7",),
              "third": ("optimizer.beta1=0.6",), "failing": ("optimizer.beta1=0.5",)}
  scale = Scale(cfg, RATES, seeds=seeds, minutes=3, hardware="one H200")
  return Study(name, "new is better", "nowhere", tuple(Arm(arm, settings[arm]) for arm in arms),
               arms[0], (Comparison("lower", "validation_loss", arms[1], arms[0],
                                    Claim("sign", sign=-1)),), {"tiny": scale}, kind=Quick)


def text(cache):
  path = cache / "text.txt"
  if not path.exists():
    path.write_text("In the beginning")
  return path


def options(folder, **others):
  return Options("invented", out=folder, **({"reuse_runs": True} | others))


def test_a_lost_folder_is_made_again_without_training(tmp_path, trained):
  first = execute(a_study(tmp_path), "tiny", options(tmp_path / "a"))
  assert len(trained) == 1 + 2 * 3 + 3 * 2  # and the baseline again
  del trained[:]
  second = execute(a_study(tmp_path), "tiny", options(tmp_path / "b"))
  assert trained == []
  same = ("runs", "comparisons", "best_learning_rates", "measured_by", "again", "missing")
  assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_studies_share_the_runs_that_are_equal_and_train_the_others(tmp_path, trained):
  execute(a_study(tmp_path), "tiny", options(tmp_path / "a"))
  del trained[:]
  other = a_study(tmp_path, arms=("third", "new"), name="other")
  found = execute(other, "tiny", options(tmp_path / "b"))
  assert {name.partition("-")[0] for name in trained} == {"prepared", "third", "third_again"}
  assert [run["metrics"] for run in found["runs"] if run["arm"] == "new"]
  assert len(found["runs"]) == 2 * 3 + 3 * 2


@pytest.mark.parametrize("change", [
    "seeds", "a setting", "the text", "the code", "the flags", "what measures", "not asked for"])
def test_only_runs_that_are_equal_in_everything_are_taken(tmp_path, monkeypatch, trained, change):
  task = Task("plain", 1e-3, 0)
  runner = Runner(a_study(tmp_path), "tiny", options(tmp_path / "a"))
  runner._run_all([task])
  assert runner.store.find(task)["runs"][0]["metrics"]
  study, how = a_study(tmp_path), {}
  if change == "seeds":
    task = dataclasses.replace(task, seed=1)
  elif change == "a setting":
    study = a_study(tmp_path, seq_len=64)
  elif change == "the text":
    text(tmp_path).write_text("In the end")
  elif change == "the code":
    monkeypatch.setattr(run_store, "code_hash", lambda packages: "another")
  elif change == "the flags":
    environment = run_store.environment() | {"xla_flags": "--xla_gpu_deterministic_ops=true"}
    monkeypatch.setattr(run_store, "environment", lambda: environment)
  elif change == "what measures":
    monkeypatch.setattr(Quick, "measuring", (rules,))
  else:
    how = {"reuse_runs": False}
  other = Runner(study, "tiny", options(tmp_path / "b", **how))
  assert (other.store.find(task) if other.store else None) is None


def test_a_run_that_failed_is_tried_again(tmp_path, trained):
  study = a_study(tmp_path, arms=("plain", "failing"))
  execute(study, "tiny", options(tmp_path / "a"))
  del trained[:]
  execute(study, "tiny", options(tmp_path / "b"))
  assert {name.partition("-")[0] for name in trained} == {"prepared", "failing"}


def without_runs(text):
  return json.dumps(json.loads(text) | {"runs": []})


def with_a_metric_as_text(text):
  part = json.loads(text)
  part["runs"][0]["metrics"]["validation_loss"] = "low"
  return json.dumps(part)


@pytest.mark.parametrize("damage", [
    lambda text: text[:50], without_runs, with_a_metric_as_text])
def test_a_damaged_file_of_the_store_is_replaced(tmp_path, trained, damage):
  execute(a_study(tmp_path), "tiny", options(tmp_path / "a"))
  for path in (tmp_path / "runs").glob("*.json"):
    path.write_text(damage(path.read_text()))
  del trained[:]
  execute(a_study(tmp_path), "tiny", options(tmp_path / "b"))
  assert len(trained) == 13
  assert all(json.loads(path.read_text())["runs"] for path in (tmp_path / "runs").glob("*.json"))


def test_a_store_that_cannot_be_written_or_read_is_done_without(tmp_path, trained, capsys):
  (tmp_path / "runs").write_text("a file where the store's folder should be")
  found = execute(a_study(tmp_path), "tiny", options(tmp_path / "a"))
  assert len(found["runs"]) == 12 and len(trained) == 13
  assert capsys.readouterr().err.count("cannot be written to") == 1


def test_runs_that_train_in_batches_are_not_stored(tmp_path):
  study = a_study(tmp_path)
  scale = dataclasses.replace(study.scales["tiny"], vmapped_runs=2)
  assert Runner(dataclasses.replace(study, scales={"tiny": scale}), "tiny",
                options(tmp_path / "a")).store is None


def test_runs_with_a_tokenizer_from_a_file_and_runs_that_keep_their_folder_are_not_stored(
    tmp_path, trained):
  named = a_study(tmp_path)
  scale = named.scales["tiny"]
  cfg = dataclasses.replace(scale.config, data=dataclasses.replace(
      scale.config.data, tokenizer="tokenizer.json"))
  other = dataclasses.replace(named, scales={"tiny": dataclasses.replace(scale, config=cfg)})
  runner = Runner(other, "tiny", options(tmp_path / "a"))
  assert runner.runs.identifies(Task("plain", 1e-3, 0)) is None
  kept = dataclasses.replace(named, keep_runs=True)
  assert Runner(kept, "tiny", options(tmp_path / "b")).store is None


def test_what_is_still_to_train_is_listed_without_training_or_leaving_a_folder(tmp_path, trained):
  say = lambda study, folder: studies_runner.left(
      study, options(tmp_path / folder, scale="tiny"))
  assert say(a_study(tmp_path), "a").startswith(
      "--scale=tiny: 12 runs to train, about 36 device-minutes on one H200; 0 finished")
  assert not (tmp_path / "a").exists()
  execute(a_study(tmp_path), "tiny", options(tmp_path / "b"))
  del trained[:]
  assert say(a_study(tmp_path, seeds=3), "c").startswith(
      "--scale=tiny: 3 runs to train, about 9 device-minutes on one H200; 12 finished")
  assert trained == []


def test_the_code_is_hashed_without_its_comments(tmp_path):
  path = tmp_path / "a.py"
  digest = lambda text: path.write_text(text) and rules.files_hash(tmp_path, [path])
  assert digest("x = ") != digest("x = 1")
  assert digest("x = 1  # one\n") == digest('"""Says so."""\nx = (1)\n') != digest("x = 2\n")
