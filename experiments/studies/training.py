"""Trains groups of a study's runs.

As a worker process (`experiments.workers`) with the arguments of `command_line`, this module trains
the "group" of each task for at most "seconds", and answers what `train_group` returns.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

from experiments import catalogue, settings, workers
from experiments.options import Options
from experiments.reports import provenance
from experiments.reports.study_report import FINISHED
from experiments.studies.checks import apply_arm, require_effect
from experiments.studies.judging import rules
from experiments.studies.runs import Runs, Task, group_folder
from experiments.studies.study import Study
from model.checks import require
from train import cost
from train.loop import TrainingError
from train.run_folder import RunFolder

MODULE = "experiments.studies.training"  # its name as a worker process is another


def runs_of(study: Study, scale_name: str, options: Options, arms: Collection[str],
            folder: pathlib.Path) -> Runs:
  """Returns what trains the runs of some arms, and of the one that repeats the baseline.

  Args:
    study: the study.
    scale_name: name of one of its scales.
    options: the flags of the command line, for its settings.
    arms: names of the arms.
    folder: the study's folder.

  Raises:
    ValueError: if a setting is invalid or has no effect.
  """
  scale, again = study.scales[scale_name], study.again()
  base = settings.apply(scale.config, options.settings, named=study.kind.named)
  configs = {arm.name: apply_arm(study, scale, options.settings, arm)
             for arm in (*study.arms, again) if arm.name in arms}
  require_effect(study, scale, options.settings,
                 {name: cfg for name, cfg in configs.items() if name != again.name})
  return study.kind(base, configs, settings.assigned(options.settings), folder)


def train_group(study: Study, runs: Runs, tasks: Sequence[Task], out: pathlib.Path,
                seconds: float | None) -> dict[str, Any] | None:
  """Trains runs that share a program, each alone or all as one vmapped batch.

  Args:
    study: the study.
    runs: what trains them, `prepare`d.
    tasks: the runs.
    out: the study's folder, in which the group has a folder of its own.
    seconds: save and stop after this time; None for no limit.

  Returns:
    The content of a part: "provenance", "measured_by" and "runs". None if the runs were stopped
    before their end.
  """
  folder = RunFolder(group_folder(out, tasks, study.keep_runs))
  try:
    found, status = runs.train(tasks, folder, seconds), FINISHED
  except TrainingError as error:
    found, status = [{"metrics": {}} for _ in tasks], f"failed: {error}"
  finally:
    folder.close()
  if found is None:
    return None
  spent = cost.total(folder.path)
  per_run = {key: None if value is None else value / len(tasks) for key, value in spent.items()}
  return {"provenance": provenance.describe(),
          "measured_by": rules.syntax_hash(study.kind.measuring),
          "runs": [{**dataclasses.asdict(task), "status": status, "cost": per_run, **result}
                   for task, result in zip(tasks, found, strict=True)]}


def command_line(study: Study, scale_name: str, options: Options, arms: Collection[str],
                 folder: pathlib.Path) -> list[str]:
  """Returns the arguments of this module as a worker process; they are those of `runs_of`.

  Raises:
    ValueError: if another process does not find the study by its name.
  """
  known = catalogue.experiments().get(study.name)
  require(known is not None and known.load().STUDY is study,
          f"--processes: other processes find no study {study.name!r} in the catalogue")
  return [json.dumps({"study": study.name, "scale": scale_name, "arms": sorted(arms),
                      "settings": options.settings, "folder": str(folder)})]


def _main(arguments: str) -> None:
  what = json.loads(arguments)
  study, folder = catalogue.find(what["study"]).load().STUDY, pathlib.Path(what["folder"])
  options = Options(study.name, settings=tuple(what["settings"]))
  runs = runs_of(study, what["scale"], options, what["arms"], folder)
  tasks = workers.tasks()  # from here on, what is printed is no answer
  runs.prepare()
  for task in tasks:
    group = [Task(**each) for each in task["group"]]
    workers.answer(train_group(study, runs, group, folder, task["seconds"]))


if __name__ == "__main__":
  _main(sys.argv[1])
