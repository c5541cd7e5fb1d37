"""Studies: arms that differ in a setting, trained on paired seeds, judged by rules fixed before.

A study runs in two phases. First learning rates are swept, on seeds of their own, every arm's or
only the baseline's; then each arm trains at the best one on the seeds that are compared. What a run
is, its study says: training on text, or RL from a base. Runs of one program train together, as
lanes of it. What is finished is in `parts/`, one small file an invocation: folders of several
machines merge by copying those files together.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import provenance, settings
from experiments.options import Options
from experiments.report import FINISHED, write_study_report
from experiments.runs import Runs, Task
from experiments.stats import Claim, judge, noise, paired
from experiments.text_runs import TextRuns
from train import cost
from train.loop import TrainingError
from train.run_folder import RunFolder, write_json_atomic

_SWEEP_SEED = 1000  # seeds from here on choose learning rates and are never compared


@dataclasses.dataclass(frozen=True)
class Arm:
  """One side of a comparison: a name, and what it sets."""

  name: str
  settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A question, and how its answer is judged.

  Attributes:
    name: in a few words.
    metric: of the runs' metrics.
    arm: the treatment. "group_*" stands for that arm of the group whose mean `matched` metric is
      closest to the baseline's; or, where `matched` is "sweep", for the one that swept best.
    baseline: what it is compared with on the same seeds; None judges the arm's own value. With
      `matched` "sweep" it may be a group too.
    claim: see `stats.Claim`; the margin is fixed here, before any run.
    paper: what the paper reports, in words.
    matched: see `arm`.
    at_one_rate: the arms must have swept the same best rate, or it is unresolved: for metrics that
      the learning rate itself moves, such as the distance from the base.
    room: a metric and a bound that the arm's mean of it must stay under, or it is unresolved: for
      claims that nothing rises, which a base that is already at the top could not contradict.
  """

  name: str
  metric: str
  arm: str
  baseline: str | None
  claim: Claim
  paper: str = ""
  matched: str = "max_violation"
  at_one_rate: bool = False
  room: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scale:
  """A budget.

  Attributes:
    config: what the arms' settings apply to.
    learning_rates: the sweep, ascending, at least three.
    seeds: paired seeds that are compared.
    minutes: of one run, on `hardware`.
    hardware: where that was measured.
    lanes: runs that train together where they can.
    sweep_seeds: for each learning rate.
    shared_minutes: of what is made once for all runs, such as bases.
  """

  config: Any
  learning_rates: tuple[float, ...]
  seeds: int
  minutes: float
  hardware: str
  lanes: int = 1
  sweep_seeds: int = 1
  shared_minutes: float = 0.0

  def __post_init__(self):
    if len(self.learning_rates) < 3:
      raise ValueError("compare arms at their best of at least three learning rates, or it is the "
                       "tuning that is compared")


@dataclasses.dataclass(frozen=True)
class Study:
  """A claim of a paper, made testable.

  `baseline` is the arm whose seed noise is reported; `kind` says what a run is; with `one_rate` all
  arms train at the rate that the baseline swept best, for claims that all else is left alone.
  """

  name: str
  claim: str
  source: str
  arms: tuple[Arm, ...]
  baseline: str
  comparisons: tuple[Comparison, ...]
  scales: dict[str, Scale]
  kind: type[Runs] = TextRuns
  one_rate: bool = False

  @property
  def swept_arms(self) -> tuple[str, ...]:
    """The arms whose learning rates are swept."""
    return (self.baseline,) if self.one_rate else tuple(arm.name for arm in self.arms)

  def cost(self, scale: str) -> str:
    """The whole study's price, in words."""
    s = self.scales[scale]
    swept = len(self.swept_arms) * len(s.learning_rates) * s.sweep_seeds
    runs = swept + len(self.arms) * s.seeds
    minutes = runs / s.lanes * s.minutes + s.shared_minutes
    total = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    together = f", {s.lanes} at a time" if s.lanes > 1 else ""
    of = f"{len(s.learning_rates)} learning rates"
    arms = (f"{of} + {len(self.arms)} arms x {s.seeds} seeds" if self.one_rate else
            f"{len(self.arms)} arms x ({of} + {s.seeds} seeds)")
    return f"{runs} runs ({arms}){together}, {total} on {s.hardware}"


def main(study: Study, options: Options) -> None:
  """Runs what is missing of a study, and judges what is there."""
  options.refuse("a", "b", "profile")
  execute(study, options.scale_of(study.scales), options, source_hash=_source_hash(study))


def execute(study: Study, scale_name: str, options: Options, source_hash: str) -> dict:
  """`main` for a study made on the spot; returns what results.json holds."""
  runner = _Runner(study, scale_name, options, source_hash)
  try:
    finished = runner.run()
    judged = runner.judge()
    if not finished:
      print("stopped, saved; the same command goes on")
    return judged
  finally:
    runner.out.close()


def _source_hash(study: Study) -> str:
  """Of the files that fix arms, claims, margins and the rules of judging."""
  names = (f"experiments.{study.name}", "experiments.stats")
  files = [pathlib.Path(importlib.import_module(name).__file__) for name in names]
  return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class _Runner:

  def __init__(self, study: Study, scale_name: str, options: Options, source_hash: str):
    self.study, self.scale = study, study.scales[scale_name]
    self.scale_name, self.source_hash = scale_name, source_hash
    known = {arm.name: arm for arm in study.arms}
    unknown = set(options.arms) - known.keys()
    if unknown:
      raise ValueError(f"--arms={','.join(sorted(unknown))} does not exist; {study.name} has "
                       + ", ".join(known))
    base = settings.apply(self.scale.config, options.settings, named=study.kind.named)
    # Every arm's settings are tried before anything runs.
    configs = {arm.name: settings.apply(base, arm.settings, named=study.kind.named)
               for arm in study.arms}
    self.runs = study.kind(base, configs, settings.assigned(options.settings))
    self.arms = list(options.arms) or list(known)
    self.seeds = options.seed_range(self.scale.seeds)
    if self.seeds.stop > _SWEEP_SEED:
      raise ValueError(f"--seeds={options.seeds}: seeds from {_SWEEP_SEED} on sweep learning rates")
    self.out = RunFolder(options.folder(f"{study.name}-{scale_name}"))
    self.out.check_config({
        "study": study.name, "scale": scale_name, "settings": sorted(options.settings),
        "arms": {arm.name: list(arm.settings) for arm in study.arms}, "source_hash": source_hash,
        **self.runs.identity()})
    self.deadline = (time.monotonic() + 60 * options.max_minutes if options.max_minutes else None)
    self.parts = self.out.path / "parts"
    self.parts.mkdir(exist_ok=True)
    self.part = self.parts / f"{time.time_ns()}-{os.getpid()}.json"
    self.mine: list[dict] = []

  def finished(self) -> dict[Task, dict]:
    """All runs of all parts, the failed ones too."""
    runs = [run for path in sorted(self.parts.glob("*.json"))
            for run in json.loads(path.read_text())["runs"]]
    return {Task(run["arm"], run["learning_rate"], run["seed"]): run for run in runs}

  def run(self) -> bool:
    """Runs what no part has; False if time ran out."""
    self.runs.prepare()
    swept = self.study.swept_arms if self.study.one_rate else self.arms
    sweep = [Task(arm, rate, _SWEEP_SEED + i) for arm in swept
             for rate in self.scale.learning_rates for i in range(self.scale.sweep_seeds)]
    if not self._run_all(sweep):
      return False
    best = self.best_learning_rates(self.finished())
    return self._run_all([Task(arm, best[arm], seed) for arm in self.arms for seed in self.seeds
                          if arm in best])

  def best_learning_rates(self, runs: dict[Task, dict]) -> dict[str, float]:
    """Of the arms whose sweep is whole, and in which a run finished."""
    return {arm: rate for arm, (rate, _) in self._swept(runs).items()}

  def _swept(self, runs: dict[Task, dict]) -> dict[str, tuple[float, float]]:
    """By arm the rate that scored best, and its score, larger for better; a run that failed lost.
    """
    score, best = self.runs.score, {}
    value = lambda run: _finite(run["metrics"], score.metric, -np.inf * score.sign) * score.sign
    for arm in self.study.swept_arms:
      swept = {rate: [runs.get(Task(arm, rate, _SWEEP_SEED + i))
                      for i in range(self.scale.sweep_seeds)]
               for rate in self.scale.learning_rates}
      if any(None in of_rate for of_rate in swept.values()):
        continue
      scores = {rate: float(np.mean([value(run) for run in of_rate]))
                for rate, of_rate in swept.items()}
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
      for start in range(0, len(together), self.scale.lanes):
        yield together[start:start + self.scale.lanes]

  def _run_group(self, tasks: list[Task]) -> bool:
    label = tasks[0].name if len(tasks) == 1 else f"{tasks[0].name}-and-{len(tasks) - 1}-more"
    print(f"{self.study.name}: {label}", file=sys.stderr, flush=True)
    digest = hashlib.sha256("\n".join(task.name for task in tasks).encode()).hexdigest()[:8]
    folder = RunFolder(self.out.path / "runs" / (label if len(tasks) == 1 else f"lanes-{digest}"))
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
    self.mine += [{**dataclasses.asdict(task), "status": status, "cost": share, **of_task}
                  for task, of_task in zip(tasks, found, strict=True)]
    write_json_atomic(self.part, {"provenance": provenance.describe(), "runs": self.mine})
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    return True

  def where_it_ran(self) -> dict:
    """The parts' provenance, where they agree; the command is this one, which merged them."""
    here = provenance.describe()
    parts = [json.loads(path.read_text())["provenance"] for path in self.parts.glob("*.json")]
    for key in ("commit", "dirty", "versions", "device", "cpu", "cores"):
      values = [part[key] for part in parts]
      if values:
        same = all(value == values[0] for value in values)
        here[key] = values[0] if same else "several: see parts/"
    return here

  def judge(self) -> dict:
    """Merges the parts, compares what can be compared, and writes results.json and report.md."""
    runs = self.finished()
    swept = self._swept(runs)
    best = {arm: rate for arm, (rate, _) in swept.items()}
    ran = {arm.name: compared_runs(runs.values(), arm.name, best.get(arm.name))
           for arm in self.study.arms}
    compared = {arm: {seed: run["metrics"] for seed, run in of_arm.items()}
                for arm, of_arm in ran.items()}
    scores = {arm: score for arm, (_, score) in swept.items()}
    comparisons = [c for c in (compare(c, compared, scores, best) for c in self.study.comparisons)
                   if c]
    seeds = compared[self.study.baseline]
    metrics = list(next(iter(seeds.values()), {}))
    study = {
        "name": self.study.name, "claim": self.study.claim, "source": self.study.source,
        "scale": self.scale_name, "source_hash": self.source_hash,
        "arms": [{"name": arm.name, "settings": " ".join(arm.settings) or "as it is",
                  "best learning rate": _with_edge(best.get(arm.name), self.scale.learning_rates)}
                 for arm in self.study.arms],
        "best_learning_rates": best, "runs": list(runs.values()), "comparisons": comparisons,
        "noise": {metric: noise([values[metric] for values in seeds.values()])
                  for metric in metrics if len(seeds) > 1},
        "detectable": {f"{c['name']} ({c['metric']})": c["paired"]["detectable"]
                       for c in comparisons},
        **self.runs.drawn({arm: [of_arm[seed] for seed in sorted(of_arm)]
                           for arm, of_arm in ran.items()}),
        "total_cost": cost.add_up([run["cost"] for run in runs.values()]),
        "provenance": self.where_it_ran()}
    write_json_atomic(self.out.path / "results.json", study)
    asked = dict.fromkeys(c.metric for c in self.study.comparisons)
    print(f"noise of {self.study.baseline} between seeds: " + (", ".join(
        f"{metric} {study['noise'][metric]:.2g}" for metric in asked if metric in study["noise"])
        or "needs two seeds"))
    for c in comparisons:
      pair = c["paired"]
      print(f"{c['verdict']:12} {c['name']}: {pair['mean']:+.4g} [{pair['low']:.4g}, "
            f"{pair['high']:.4g}] on {pair['n']} seeds, detectable {pair['detectable']:.2g}; "
            f"the paper: {c['paper'] or 'no figure'}"
            + (f"; not judged: {c['not_judged']}" if "not_judged" in c else ""))
    if runs:
      spent = study["total_cost"]
      joules = "" if spent["joules"] is None else f", {spent['joules'] / 1e3:.1f} kJ"
      print(f"{len(runs)} runs cost {spent['device_seconds'] / 60:.1f} device-minutes, "
            f"{spent['flops']:.3g} FLOP{joules}")
    print(f"report: {write_study_report(self.out.path, study)}")
    return study


def compared_runs(
    runs: Iterable[dict], arm: str, learning_rate: float | None) -> dict[int, dict]:
  """An arm's finished runs at its best learning rate, by seed; those of the sweep left out."""
  return {run["seed"]: run for run in runs
          if run["arm"] == arm and run["learning_rate"] == learning_rate
          and run["seed"] < _SWEEP_SEED and run["status"] == FINISHED}


def compare(question: Comparison, compared: dict[str, dict[int, dict]],
            swept: Mapping[str, float] | None = None,
            rates: Mapping[str, float] | None = None) -> dict | None:
  """A comparison's outcome over the seeds that both arms have, or None if there are none.

  Args:
    question: see there.
    compared: by arm and seed, the metrics.
    swept: by arm the best score of its sweep, larger for better, for `matched` "sweep".
    rates: by arm its best learning rate, for `at_one_rate`.

  Returns:
    As in results.json; "not_judged" says why, where the figures may not decide.
  """
  arm, name = question.arm, question.baseline
  if question.matched == "sweep":
    arm, name = (_swept_best(pattern, swept or {}) for pattern in (arm, name))
    if arm is None or (name is None) != (question.baseline is None):
      return None
  baseline = compared[name] if name else None
  if arm.endswith("*"):
    group = [other for other, seeds in compared.items() if other.startswith(arm[:-1]) and seeds]
    if not group or not baseline:
      return None
    mean = lambda seeds: np.mean([values[question.matched] for values in seeds.values()])
    arm = min(group, key=lambda other: abs(mean(compared[other]) - mean(baseline)))
  arms = (compared[arm],) if baseline is None else (compared[arm], baseline)
  seeds = sorted(seed for seed in arms[0].keys() & arms[-1].keys()
                 if all(_finite(values[seed], question.metric) is not None for values in arms))
  if not seeds:
    return None
  values = [compared[arm][seed][question.metric] for seed in seeds]
  other = [baseline[seed][question.metric] for seed in seeds] if baseline is not None else 0.0
  pair = paired(values, other, sign=question.claim.sign)
  outcome = {"name": question.name, "metric": question.metric, "arm": arm,
             "baseline": name, "paired": dataclasses.asdict(pair),
             "claim": dataclasses.asdict(question.claim), "paper": question.paper,
             "verdict": judge(pair, question.claim)}
  reason = (_rates_differ(question, rates or {}, arm, name)
            or _no_room(question, [compared[arm][seed] for seed in seeds]))
  return outcome | {"verdict": "unresolved", "not_judged": reason} if reason else outcome


def _rates_differ(question: Comparison, rates: Mapping[str, float], arm: str,
                  baseline: str | None) -> str | None:
  """Why the arms' learning rates forbid a verdict, if they do."""
  if not question.at_one_rate or baseline is None or rates.get(arm) == rates.get(baseline):
    return None
  return (f"{arm} swept best at {rates.get(arm)} and {baseline} at {rates.get(baseline)}, and the "
          f"rate itself moves {question.metric}")


def _no_room(question: Comparison, of_seeds: Sequence[dict]) -> str | None:
  """Why the arm had no room to fail the claim, if it had none."""
  if question.room is None:
    return None
  metric, bound = question.room
  mean = np.mean([values[metric] for values in of_seeds])
  return None if mean < bound else f"no room: {metric} is {mean:.3g}, not under {bound:g}"


def _swept_best(pattern: str | None, swept: Mapping[str, float]) -> str | None:
  """The arm of a group whose sweep scored best; None if none was swept. Other names as they are."""
  if pattern is None or not pattern.endswith("*"):
    return pattern
  return max((arm for arm in swept if arm.startswith(pattern[:-1])), key=swept.get, default=None)


def _finite(metrics: dict, name: str, otherwise: float | None = None) -> float | None:
  """A metric, if it was measured and is a number; JSON has null for one that is not."""
  value = metrics.get(name)
  return value if value is not None and np.isfinite(value) else otherwise


def _with_edge(rate: float | None, rates: Sequence[float]) -> str:
  if rate is None:
    return "sweep not finished"
  edge = " (an end of the sweep)" if rate in (rates[0], rates[-1]) else ""
  return f"{rate:g}{edge}"
