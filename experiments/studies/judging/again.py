"""Judges committed studies again, when the rules have changed."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.options import Options
from experiments.reports.study_report import PILOT_SEED, SWEEP_SEED
from experiments.studies.runner import Runner
from experiments.studies.study import Study
from train.run_folder import read_run_json


def judge_again(study: Study, folder: pathlib.Path, origin: Mapping[str, Any]) -> dict:
  """Judges a finished study's runs by the rules of today, without training any.

  The learning rates are those that were swept then.

  Args:
    study: the study as it is declared today.
    folder: its output folder, whose results.json is replaced, with its summary and report.
    origin: the provenance in its summary, which is kept.

  Returns:
    The content of results.json.

  Raises:
    ValueError: if the folder is not that of this study.
  """
  before = read_run_json(
      folder / "results.json", name=str, scale=str, definition=dict, provenance=dict)
  if before["name"] != study.name:
    raise ValueError(f"{folder} holds results of {before['name']}, not of {study.name}")
  name = before["scale"]
  if name not in study.scales:
    raise ValueError(f"{study.name} has no scale {name!r} any more, at which {folder} ran")
  scale = dataclasses.replace(
      study.scales[name], learning_rates=tuple(before["definition"]["learning_rates"]))
  study = dataclasses.replace(study, scales=study.scales | {name: scale})
  runner = Runner(study, name, Options(study.name, out=folder), trains=False)
  runner.seeds = range(0)  # nothing more is asked for, however many seeds the scale has today
  recorded = {task.arm for task in runner.finished()}
  runner.arms = [arm for arm in runner.arms if arm in recorded]
  compared = [task.seed for task in runner.finished() if task.seed < SWEEP_SEED]
  runner.pilot = bool(compared) and min(compared) >= PILOT_SEED
  try:
    trained = {key: before["definition"][key] for key in ("arms", "learning_rates")}
    kept = {"provenance": before["provenance"] | origin, "missing": before.get("missing", []),
            "definition": study.definition(name) | trained}
    return runner.write(runner.outcome() | kept)
  finally:
    runner.out.close()
