"""Executes a study: sweeps learning rates, trains its arms on paired seeds, judges its claims.

There are two phases. First learning rates are swept on seeds of their own, every arm's or only the
baseline's; then each arm trains at the best one on the seeds that are compared. Runs that one
program can train go together as a vmapped batch. What is finished is in `parts/`, one small file an
invocation: to merge the folders of several machines, copy these files together.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from experiments import settings
from experiments.options import Options
from experiments.reports import provenance, results
from experiments.reports.study_report import FINISHED, write_study_report
from experiments.reports.summary import study_summary
from experiments.stats import noise
from experiments.studies.comparing import SWEEP_SEED, compare, compared_runs, finite
from experiments.studies.runs import Task
from experiments.studies.study import Study
from train import cost
from train.config_io import renamed_setting, upgrade
from train.loop import TrainingError
from train.run_folder import RunFolder, write_json_atomic


def main(study: Study, options: Options) -> None:
  """Runs what is missing of a study, and judges what is there."""
  options.require_supported("a", "b", "profile")
  execute(study, options.scale_of(study.scales), options)


def execute(study: Study, scale_name: str, options: Options) -> dict:
  """`main` for a study made on the spot; returns what results.json holds."""
  runner = Runner(study, scale_name, options)
  try:
    finished = runner.run()
    judged = runner.judge()
    if not finished:
      print("stopped and saved; rerun the same command to resume")
    return judged
  finally:
    runner.out.close()


class Runner:
  """A study at one scale in one folder."""

  def __init__(self, study: Study, scale_name: str, options: Options):
    self.study, self.scale, self.scale_name = study, study.scales[scale_name], scale_name
    known = {arm.name: arm for arm in study.arms}
    unknown = set(options.arms) - known.keys()
    if unknown:
      raise ValueError(f"--arms={','.join(sorted(unknown))} does not exist; {study.name} has "
                       + ", ".join(known))
    base = settings.apply(self.scale.config, options.settings, named=study.kind.named)
    # Every arm's settings are tried before anything runs.
    configs = {arm.name: settings.apply(
        self.scale.config, (*options.settings, *arm.settings), named=study.kind.named)
        for arm in study.arms}
    self.arms = list(options.arms or study.arms_to_run())
    self.seeds = options.seed_range(self.scale.seeds)
    if self.seeds.stop > SWEEP_SEED:
      raise ValueError(f"--seeds={options.seeds}: seeds from {SWEEP_SEED} on sweep learning rates")
    folder = options.folder(f"{study.name}-{scale_name}")
    needed = {*self.arms, *(study.swept_arms(self.scale) if study.one_rate else ())}
    self.runs = study.kind(base, {arm: cfg for arm, cfg in configs.items() if arm in needed},
                           settings.assigned(options.settings), folder)
    self.out = RunFolder(folder)
    try:
      self.out.check_config({
          "study": study.name, "scale": scale_name, "settings": sorted(options.settings),
          "definition": study.definition(scale_name), **self.runs.identity()}, self._upgrade)
    except ValueError:
      self.out.close()
      raise
    self.deadline = (time.monotonic() + 60 * options.max_minutes if options.max_minutes else None)
    self.parts = self.out.path / "parts"
    self.parts.mkdir(exist_ok=True)
    self.part = self.parts / f"{time.time_ns()}-{os.getpid()}.json"
    self.own_runs: list[dict] = []

  def _upgrade(self, stored: dict) -> dict:
    """What an earlier version wrote, who recorded arms and a hash of sources, not a definition."""
    config = type(self.scale.config)

    def rename(setting: str) -> str:
      name, equals, value = setting.partition("=")
      return f"{renamed_setting(config, name) or name}{equals}{value}"

    upgraded = upgrade(stored, {"config": config})
    if "source_hash" in upgraded:
      del upgraded["source_hash"]
      arms = {arm: list(map(rename, of_arm)) for arm, of_arm in upgraded.pop("arms").items()}
      upgraded["definition"] = self.study.definition(self.scale_name) | {"arms": arms}
    return upgraded | {"settings": sorted(map(rename, upgraded["settings"]))}

  def finished(self) -> dict[Task, dict]:
    """All runs of all parts, the failed ones too."""
    runs = [run for path in sorted(self.parts.glob("*.json"))
            for run in json.loads(path.read_text())["runs"]]
    return {Task(run["arm"], run["learning_rate"], run["seed"]): run for run in runs}

  def run(self) -> bool:
    """Runs what no part has; False if time ran out."""
    self.runs.prepare()
    if not self.scale.learning_rates:
      return self._run_all([Task(arm, None, seed) for seed in self.seeds for arm in self.arms])
    swept = self.study.swept_arms(self.scale) if self.study.one_rate else self.arms
    sweep = [Task(arm, rate, SWEEP_SEED + i) for arm in swept
             for rate in self.scale.learning_rates for i in range(self.scale.sweep_seeds)]
    if not self._run_all(sweep):
      return False
    best = self.best_learning_rates(self.finished())
    return self._run_all([Task(arm, best[arm], seed) for arm in self.arms for seed in self.seeds
                          if arm in best])

  def best_learning_rates(self, runs: dict[Task, dict]) -> dict[str, float]:
    """Of the arms whose sweep is complete, and in which a run finished."""
    return {arm: rate for arm, (rate, _) in self._swept(runs).items()}

  def _swept(self, runs: dict[Task, dict]) -> dict[str, tuple[float, float]]:
    """By arm the rate that scored best, and its score, larger for better; failed runs lose."""
    score, best = self.runs.score, {}
    value = lambda run: finite(run["metrics"], score.metric, -np.inf * score.sign) * score.sign
    for arm in self.study.swept_arms(self.scale):
      swept = {rate: [runs.get(Task(arm, rate, SWEEP_SEED + i))
                      for i in range(self.scale.sweep_seeds)]
               for rate in self.scale.learning_rates}
      if any(None in at_rate for at_rate in swept.values()):
        continue
      scores = {rate: float(np.mean([value(run) for run in at_rate]))
                for rate, at_rate in swept.items()}
      rate = max(scores, key=scores.get)
      if np.isfinite(scores[rate]):
        best[arm] = (rate, scores[rate])
    if self.study.one_rate and best:
      return {arm.name: best[self.study.baseline] for arm in self.study.arms}
    return best

  def _run_all(self, tasks: Sequence[Task]) -> bool:
    """Runs the tasks that no part has; False if time ran out."""
    done = self.finished()
    for group in self._groups([task for task in tasks if task not in done]):
      if self.deadline and time.monotonic() > self.deadline:
        return False
      if not self._run_group(group):
        return False
    return True

  def _groups(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks that one program can train together, as many as the scale allows."""
    by_program: dict[Hashable, list[Task]] = {}
    for task in tasks:
      by_program.setdefault(self.runs.program(task), []).append(task)
    for together in by_program.values():
      for start in range(0, len(together), self.scale.vmapped_runs):
        yield together[start:start + self.scale.vmapped_runs]

  def _run_group(self, tasks: list[Task]) -> bool:
    label = tasks[0].name if len(tasks) == 1 else f"{tasks[0].name}-and-{len(tasks) - 1}-more"
    print(f"{self.study.name}: {label}", file=sys.stderr, flush=True)
    folder = RunFolder(self._folder(tasks))
    left = self.deadline and max(1.0, self.deadline - time.monotonic())
    try:
      found, status = self.runs.train(tasks, folder, left), FINISHED
    except TrainingError as error:
      found, status = [{"metrics": {}} for _ in tasks], f"failed: {error}"
    finally:
      folder.close()
    if found is None:
      return False
    spent = cost.total(folder.path)
    share = {key: None if value is None else value / len(tasks) for key, value in spent.items()}
    self.own_runs += [{**dataclasses.asdict(task), "status": status, "cost": share, **result}
                      for task, result in zip(tasks, found, strict=True)]
    write_json_atomic(self.part, {"provenance": provenance.describe(), "runs": self.own_runs})
    if not self.study.keep_runs:
      shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    return True

  def _folder(self, tasks: list[Task]) -> pathlib.Path:
    if self.study.keep_runs:
      return self.out.path / tasks[0].name
    if len(tasks) == 1:
      return self.out.path / "runs" / tasks[0].name
    digest = hashlib.sha256("\n".join(task.name for task in tasks).encode()).hexdigest()[:8]
    return self.out.path / "runs" / f"vmapped-{digest}"

  def where_it_ran(self) -> dict:
    """The parts' provenance where they agree; the command is this one, which merged them."""
    return provenance.merged([json.loads(path.read_text())["provenance"]
                              for path in sorted(self.parts.glob("*.json"))])

  def judge(self) -> dict:
    """Writes `outcome` as results.json, with its summary and report; returns it."""
    result = self.outcome()
    write_json_atomic(self.out.path / "results.json", result)
    write_json_atomic(self.out.path / results.SUMMARY, study_summary(result))
    self._print(result)
    print(f"report: {write_study_report(self.out.path, result)}")
    return result

  def outcome(self) -> dict:
    """Merges the parts and compares what can be compared: what results.json holds."""
    runs = self.finished()
    swept = self._swept(runs)
    best = {arm: rate for arm, (rate, _) in swept.items()}
    ran = {arm.name: compared_runs(runs.values(), arm.name, best.get(arm.name))
           for arm in self.study.arms}
    compared = {arm: {seed: run["metrics"] for seed, run in by_seed.items()}
                for arm, by_seed in ran.items()}
    scores = {arm: score for arm, (_, score) in swept.items()}
    comparisons = [c for c in (compare(c, compared, scores, best) for c in self.study.comparisons)
                   if c]
    seeds = compared[self.study.baseline]
    metrics = list(next(iter(seeds.values()), {}))
    return {
        "name": self.study.name, "claim": self.study.claim, "source": self.study.source,
        "scale": self.scale_name, "definition": self.study.definition(self.scale_name),
        "arms": [{"name": arm.name, "settings": " ".join(arm.settings) or "none",
                  "best learning rate": self._describe_rate(best.get(arm.name))}
                 for arm in self.study.arms],
        "best_learning_rates": best, "runs": list(runs.values()), "comparisons": comparisons,
        "noise": {metric: noise([values[metric] for values in seeds.values()])
                  for metric in metrics if len(seeds) > 1},
        "detectable": {f"{c['name']} ({c['metric']})": c["paired"]["detectable"]
                       for c in comparisons},
        **self.runs.report_parts({arm: [by_seed[seed] for seed in sorted(by_seed)]
                                  for arm, by_seed in ran.items()}),
        "total_cost": cost.add_up([run["cost"] for run in runs.values()]),
        "provenance": self.where_it_ran()}

  def _describe_rate(self, rate: float | None) -> str:
    rates = self.scale.learning_rates
    if not rates:
      return "not swept"
    if rate is None:
      return "sweep not finished"
    return f"{rate:g}" + (" (an end of the sweep)" if rate in (rates[0], rates[-1]) else "")

  def _print(self, result: dict) -> None:
    metrics = dict.fromkeys(c.metric for c in self.study.comparisons)
    print(f"seed standard deviation of {self.study.baseline}: " + (", ".join(
        f"{metric} {result['noise'][metric]:.2g}" for metric in metrics
        if metric in result["noise"]) or "needs two seeds"))
    for c in result["comparisons"]:
      pair = c["paired"]
      print(f"{c['verdict']:12} {c['name']}: {pair['mean']:+.4g} [{pair['low']:.4g}, "
            f"{pair['high']:.4g}] on {pair['n']} seeds, minimum detectable effect "
            f"{pair['detectable']:.2g}; the paper: {c['paper'] or 'no figure'}"
            + (f"; not judged: {c['not_judged']}" if "not_judged" in c else ""))
    if result["runs"]:
      spent = result["total_cost"]
      joules = "" if spent["joules"] is None else f", {spent['joules'] / 1e3:.1f} kJ"
      print(f"{len(result['runs'])} runs cost {spent['device_seconds'] / 60:.1f} device-minutes, "
            f"{spent['flops']:.3g} FLOP{joules}")
