"""Studies: arms that differ in a setting, trained on paired seeds, judged by rules fixed before.

A study runs in two phases. First every arm's learning rate is swept on seeds of its own; then each
arm trains at its best one on the seeds that are compared. Runs that differ in numbers only train
together, as lanes of one program. What is finished is in `parts/`, one small file an invocation:
folders of several machines merge by copying those files together.
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
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from experiments import provenance, settings
from experiments.options import Options
from experiments.pretrain import fit_vocabulary
from experiments.report import FINISHED, write_study_report
from experiments.stats import Claim, expert_domain_information, judge, noise, paired
from train import cost
from train.config import RunConfig
from train.data import Data, load
from train.loop import Result, TrainingError, train
from train.program import shared
from train.run_folder import RunFolder, write_json_atomic

_SWEEP_SEED = 1000  # seeds from here on choose learning rates and are never compared
_CURVE_POINTS = 60
_SHUFFLES = 20


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
    metric: a key of `measure`.
    arm: the treatment. "group_*" stands for that arm of the group whose mean `matched` metric is
      closest to the baseline's.
    baseline: what it is compared with on the same seeds; None judges the arm's own value.
    claim: see `stats.Claim`; the margin is fixed here, before any run.
    paper: what the paper reports, in words.
    matched: see `arm`.
  """

  name: str
  metric: str
  arm: str
  baseline: str | None
  claim: Claim
  paper: str = ""
  matched: str = "max_violation"


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
  """

  config: RunConfig
  learning_rates: tuple[float, ...]
  seeds: int
  minutes: float
  hardware: str
  lanes: int = 1
  sweep_seeds: int = 1

  def __post_init__(self):
    if len(self.learning_rates) < 3:
      raise ValueError("compare arms at their best of at least three learning rates, or it is the "
                       "tuning that is compared")


@dataclasses.dataclass(frozen=True)
class Study:
  """A claim of a paper, made testable. `baseline` is the arm whose seed noise is reported."""

  name: str
  claim: str
  source: str
  arms: tuple[Arm, ...]
  baseline: str
  comparisons: tuple[Comparison, ...]
  scales: dict[str, Scale]

  def cost(self, scale: str) -> str:
    """The whole study's price, in words."""
    s = self.scales[scale]
    runs = len(self.arms) * (len(s.learning_rates) * s.sweep_seeds + s.seeds)
    minutes = runs / s.lanes * s.minutes
    total = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    together = f", {s.lanes} at a time" if s.lanes > 1 else ""
    return (f"{runs} runs ({len(self.arms)} arms x ({len(s.learning_rates)} learning rates + "
            f"{s.seeds} seeds)){together}, {total} on {s.hardware}")


@dataclasses.dataclass(frozen=True)
class Task:
  """One run."""

  arm: str
  learning_rate: float
  seed: int

  @property
  def name(self) -> str:
    return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


def main(study: Study, options: Options) -> None:
  """Runs what is missing of a study, and judges what is there."""
  options.refuse("a", "b", "profile")
  execute(study, options.scale_of(study.scales), options, source_hash=_source_hash(study))


def execute(study: Study, scale_name: str, options: Options, source_hash: str) -> dict:
  """`main` for a study made on the spot; returns what results.json holds."""
  runner = _Runner(study, scale_name, options, source_hash)
  try:
    runner.run()
    return runner.judge()
  finally:
    runner.out.close()


def _source_hash(study: Study) -> str:
  """Of the files that fix arms, claims, margins and the rules of judging."""
  names = (f"experiments.{study.name}", "experiments.stats")
  files = [pathlib.Path(importlib.import_module(name).__file__) for name in names]
  return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def measure(result: Result, lane: int | None) -> dict[str, float]:
  """A finished run's metrics, on held-out text.

  "validation_loss" in nats per token and "bits_per_byte", means over domains; "max_violation" over
  all held-out tokens, the mean over layers; "specialisation", the mutual information of expert and
  domain in nats, the mean over layers, less what shuffled domains give.
  """
  evaluation = result.evaluation
  pick = lambda x: np.asarray(x) if lane is None else np.asarray(x)[lane]
  metrics = {"validation_loss": float(pick(evaluation.mean_loss)),
             "bits_per_byte": float(pick(evaluation.mean_bits_per_byte))}
  if evaluation.max_violation is not None:
    metrics["max_violation"] = float(pick(evaluation.max_violation))
  loads = {domain: pick(rows) for domain, rows in evaluation.row_loads.items()}
  layers = next(iter(loads.values())).shape[1]
  if layers and len(loads) > 1:
    rows_RLE = np.concatenate(list(loads.values()))
    domain_R = np.repeat(list(loads), [len(rows) for rows in loads.values()])
    metrics["specialisation"] = float(np.mean([
        expert_domain_information(rows_RLE[:, layer], domain_R, _SHUFFLES, layer).corrected
        for layer in range(layers)]))
  return metrics


class _Runner:

  def __init__(self, study: Study, scale_name: str, options: Options, source_hash: str):
    self.study, self.scale = study, study.scales[scale_name]
    self.scale_name, self.source_hash = scale_name, source_hash
    known = {arm.name: arm for arm in study.arms}
    unknown = set(options.arms) - known.keys()
    if unknown:
      raise ValueError(f"--arms={','.join(sorted(unknown))} does not exist; {study.name} has "
                       + ", ".join(known))
    self.base = settings.apply(self.scale.config, options.settings)
    # Every arm's settings are tried before anything runs.
    self.configs = {arm.name: settings.apply(self.base, arm.settings) for arm in study.arms}
    self.arms = list(options.arms) or list(known)
    self.seeds = options.seed_range(self.scale.seeds)
    if self.seeds.stop > _SWEEP_SEED:
      raise ValueError(f"--seeds={options.seeds}: seeds from {_SWEEP_SEED} on sweep learning rates")
    self.told = "model.vocab_size" in settings.assigned(options.settings)
    self.out = RunFolder(options.folder(f"{study.name}-{scale_name}"))
    self.out.check_config({
        "study": study.name, "scale": scale_name, "settings": sorted(options.settings),
        "arms": {arm.name: list(arm.settings) for arm in study.arms}, "source_hash": source_hash})
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

  def run(self) -> None:
    self.data: Data = load(self.base.data)
    sweep = [Task(arm, rate, _SWEEP_SEED + i) for arm in self.arms
             for rate in self.scale.learning_rates for i in range(self.scale.sweep_seeds)]
    if not self._run_all(sweep):
      return
    best = self.best_learning_rates(self.finished())
    self._run_all([Task(arm, best[arm], seed) for arm in self.arms for seed in self.seeds
                   if arm in best])

  def best_learning_rates(self, runs: dict[Task, dict]) -> dict[str, float]:
    """By validation loss, for the arms whose sweep is whole; a run that failed lost."""
    best = {}
    for arm in self.configs:
      losses = {}
      for rate in self.scale.learning_rates:
        swept = [runs.get(Task(arm, rate, _SWEEP_SEED + i))
                 for i in range(self.scale.sweep_seeds)]
        if None in swept:
          break
        losses[rate] = np.mean([_finite(run["metrics"], "validation_loss", np.inf)
                                for run in swept])
      else:
        rate = min(losses, key=losses.get)
        if np.isfinite(losses[rate]):
          best[arm] = rate
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

  def _config(self, task: Task) -> RunConfig:
    cfg = fit_vocabulary(self.configs[task.arm], self.data, told=self.told)
    return dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, seed=task.seed),
        optimizer=dataclasses.replace(cfg.optimizer, learning_rate=task.learning_rate))

  def _groups(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks that one program can train together, as many as the scale allows."""
    by_program: dict[RunConfig, list[Task]] = {}
    for task in tasks:
      by_program.setdefault(shared(self._config(task)), []).append(task)
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
      result = train([self._config(task) for task in tasks], self.data, folder, max_seconds=left)
      status = result.status
    except TrainingError as error:
      result, status = None, f"failed: {error}"
    finally:
      folder.close()
    if status == "stopped":
      return False
    spent = cost.total(folder.path)
    share = {key: None if value is None else value / len(tasks) for key, value in spent.items()}
    several = len(tasks) > 1
    for lane, task in enumerate(tasks):
      run = {**dataclasses.asdict(task), "status": FINISHED if result else status, "cost": share,
             "metrics": {}}
      if result:
        run |= {"metrics": measure(result, lane if several else None),
                "flops": _flops(self._config(task)), **_curves(result, lane if several else None)}
      self.mine.append(run)
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
    best = self.best_learning_rates(runs)
    compared = {arm: {seed: run["metrics"] for seed, run in compared_runs(
        runs.values(), arm, best.get(arm)).items()} for arm in self.configs}
    comparisons = [c for c in (compare(c, compared) for c in self.study.comparisons) if c]
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
        "curves": {arm: [{"step": step, "loss": loss} for step, loss in run["curve"]]
                   for arm in self.configs for task, run in runs.items()
                   if task.arm == arm and task.seed == self.seeds[0] and "curve" in run},
        "total_cost": cost.add_up([run["cost"] for run in runs.values()]),
        "provenance": self.where_it_ran()}
    write_json_atomic(self.out.path / "results.json", study)
    print(f"noise of {self.study.baseline} between seeds: " + (", ".join(
        f"{metric} {value:.2g}" for metric, value in study["noise"].items()) or "needs two seeds"))
    for c in comparisons:
      pair = c["paired"]
      print(f"{c['verdict']:12} {c['name']}: {pair['mean']:+.4g} [{pair['low']:.4g}, "
            f"{pair['high']:.4g}] on {pair['n']} seeds, detectable {pair['detectable']:.2g}; "
            f"the paper: {c['paper'] or 'no figure'}")
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


def compare(question: Comparison, compared: dict[str, dict[int, dict]]) -> dict | None:
  """A comparison's outcome over the seeds that both arms have, or None if there are none."""
  baseline = compared[question.baseline] if question.baseline else None
  arm = question.arm
  if arm.endswith("*"):
    group = [name for name, seeds in compared.items() if name.startswith(arm[:-1]) and seeds]
    if not group or not baseline:
      return None
    mean = lambda seeds: np.mean([values[question.matched] for values in seeds.values()])
    arm = min(group, key=lambda name: abs(mean(compared[name]) - mean(baseline)))
  arms = (compared[arm],) if baseline is None else (compared[arm], baseline)
  seeds = sorted(seed for seed in arms[0].keys() & arms[-1].keys()
                 if all(_finite(values[seed], question.metric) is not None for values in arms))
  if not seeds:
    return None
  values = [compared[arm][seed][question.metric] for seed in seeds]
  other = [baseline[seed][question.metric] for seed in seeds] if baseline is not None else 0.0
  pair = paired(values, other, sign=question.claim.sign)
  return {"name": question.name, "metric": question.metric, "arm": arm,
          "baseline": question.baseline, "paired": dataclasses.asdict(pair),
          "claim": dataclasses.asdict(question.claim), "paper": question.paper,
          "verdict": judge(pair, question.claim)}


def _finite(metrics: dict, name: str, otherwise: float | None = None) -> float | None:
  """A metric, if it was measured and is a number; JSON has null for one that is not."""
  value = metrics.get(name)
  return value if value is not None and np.isfinite(value) else otherwise


def _with_edge(rate: float | None, rates: Sequence[float]) -> str:
  if rate is None:
    return "sweep not finished"
  edge = " (an end of the sweep)" if rate in (rates[0], rates[-1]) else ""
  return f"{rate:g}{edge}"


def _flops(cfg: RunConfig) -> float:
  """Of the training itself, without what interruptions repeated."""
  return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len * cfg.flops_per_token


def _curves(result: Result, lane: int | None) -> dict:
  """Training loss, averaged over stretches of steps, and every evaluation's mean loss."""
  loss = lambda row: row["loss"] if lane is None else row["per_seed"]["loss"][lane]
  rows = result.rows
  stretches = np.array_split(np.arange(len(rows)), min(len(rows), _CURVE_POINTS))
  curve = [[rows[part[-1]]["step"], float(np.mean([loss(rows[i]) for i in part]))]
           for part in stretches]
  held = [[e["step"], float(np.mean(list(e["loss"].values()))) if lane is None
           else e["per_seed"]["mean_loss"][lane]] for e in result.evaluations]
  return {"curve": curve, "validation_curve": held}
