"""Runs of studies that train on text."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.studies.runs import Score, Task, binned_curve
from experiments.studies.text import specialisation
from model.checks import require
from train.config import TOKENIZERS, RunConfig
from train.config_io import to_dict
from train.data import Data, load
from train.loop import Result, train
from train.program import static_config
from train.run_folder import RunFolder
from train.sources import fingerprint
from train.stages import fit_vocabulary

_SHUFFLES = 20


def measure(result: Result, run: int | None) -> dict[str, float]:
  """Returns the metrics of a finished run on held-out text.

  Args:
    result: the result of the run, or of several that trained as a vmapped batch.
    run: index of the run in the batch; None if there is only one.

  Returns:
    "validation_loss", in nats per token, and "bits_per_byte", means over domains; with experts also
    "max_violation", MaxVio over all held-out tokens, averaged over layers; and, with several
    domains, "specialisation", the mutual information of expert and domain in nats, corrected for
    chance and averaged over layers.
  """
  evaluation = result.evaluation
  pick = lambda x: np.asarray(x) if run is None else np.asarray(x)[run]
  metrics = {"validation_loss": float(pick(evaluation.mean_loss)),
             "bits_per_byte": float(pick(evaluation.mean_bits_per_byte))}
  if evaluation.max_violation is not None:
    metrics["max_violation"] = float(pick(evaluation.max_violation))
  loads = {domain: pick(rows) for domain, rows in evaluation.row_loads.items()}
  layers = next(iter(loads.values())).shape[1]
  if layers and len(loads) > 1:
    rows_RLE = np.concatenate(list(loads.values()))
    domain_R = np.repeat(list(loads), [len(rows) for rows in loads.values()])
    information = specialisation.expert_domain_information
    metrics["specialisation"] = float(np.mean([
        information(rows_RLE[:, layer], domain_R, _SHUFFLES, layer).corrected
        for layer in range(layers)]))
  return metrics


class TextRuns:
  """Implements `experiments.studies.runs.Runs` by `train.loop.train`.

  Runs that differ only in values that enter the training step as data can train as a vmapped batch.
  """

  score: ClassVar = Score("validation_loss", -1)
  named: ClassVar = {}
  learning_rate: ClassVar = "optimizer.learning_rate"
  nudge: ClassVar = "train.nudge"
  measuring: ClassVar = (measure, specialisation)
  packages: ClassVar = ("model", "pallas_kernels", "train")
  ignored: ClassVar = {
      "train.seed": "every run has its own seed: give --seeds=N or --seeds=FROM:TO",
      "init": "the runs of a study start from random weights: leave it out"}

  def __init__(self, base: RunConfig, configs: Mapping[str, RunConfig],
               overridden: Collection[str], folder: pathlib.Path):
    del folder  # the runs share only the data, which has its own cache
    self.base, self.configs = base, configs
    self.keep_vocabulary = "model.vocab_size" in overridden
    differing = [arm for arm, cfg in configs.items() if cfg.data != base.data]
    require(not differing, f"data.* is set by {' and '.join(differing)}, but all arms of a study "
            "train on the same data: set it for all of them with --set")

  def identity(self) -> dict[str, Any]:
    return {}

  @property
  def cache_folder(self) -> pathlib.Path:
    return self.base.data.cache_folder

  def identifies(self, task: Task) -> dict[str, Any] | None:
    cfg = self._assigned(task)
    if cfg.data.tokenizer not in TOKENIZERS:  # a file, whose contents may change
      return None
    data = dataclasses.replace(cfg.data, cache_dir=None)
    return {"config": to_dict(dataclasses.replace(cfg, data=data)), "contents": self._contents,
            "keep_vocabulary": self.keep_vocabulary}

  @functools.cached_property
  def _contents(self) -> list[str]:
    return [fingerprint(source, self.base.data.template) for source in self.base.data.sources]

  def prepare(self) -> None:
    self.data: Data = load(self.base.data)

  def program(self, task: Task) -> RunConfig:
    return static_config(self._config(task))

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    result = train([self._config(task) for task in tasks], self.data, folder,
                   max_seconds=max_seconds)
    if result.status == "stopped":
      return None
    runs = range(len(tasks)) if len(tasks) > 1 else [None]
    return [{"metrics": self._measure(self._config(task), result, run),
             "flops": _flops(self._config(task)), **self._curves(result, run)}
            for task, run in zip(tasks, runs, strict=True)]

  def _measure(self, cfg: RunConfig, result: Result, run: int | None) -> dict[str, float]:
    """Returns the metrics of a finished run by name; see `measure` for the arguments."""
    del cfg  # for subclasses
    return measure(result, run)

  def _curves(self, result: Result, run: int | None) -> dict[str, list[list[float]]]:
    """Returns the training loss, averaged over bins of steps, and the loss of every evaluation."""
    loss = lambda row: row["loss"] if run is None else row["per_seed"]["loss"][run]
    evaluations = [[e["step"], float(np.mean(list(e["loss"].values()))) if run is None
                    else e["per_seed"]["mean_loss"][run]] for e in result.evaluations]
    return {"curve": binned_curve(result.rows, loss), "validation_curve": evaluations}

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the metrics of every arm by seed, and curves of the training loss."""
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    metrics = dict.fromkeys(name for by_seed in runs.values() for run in by_seed
                            for name in run["metrics"])
    return {"outcomes": {name: {arm: [run["metrics"].get(name) for run in by_seed]
                                for arm, by_seed in runs.items()
                                if any(name in run["metrics"] for run in by_seed)}
                         for name in metrics},
            "panels": [loss_panel(runs)] if runs else []}

  def _config(self, task: Task) -> RunConfig:
    return fit_vocabulary(self._assigned(task), self.data, keep=self.keep_vocabulary)

  def _assigned(self, task: Task) -> RunConfig:
    """Returns a run's config, with the vocabulary size of the settings."""
    cfg = self.configs[task.arm]
    optimizer = cfg.optimizer
    if task.learning_rate is not None:
      optimizer = dataclasses.replace(optimizer, learning_rate=task.learning_rate)
    return dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, seed=task.seed), optimizer=optimizer)


def _flops(cfg: RunConfig) -> float:
  """Returns the FLOPs of training, without those of steps that were repeated after a kill."""
  return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len * cfg.flops_per_token


def loss_panel(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Returns the training loss of the first arm, and the other arms' differences from it.

  Args:
    runs: by arm, at least one finished run, with their "seed" and "curve".

  Returns:
    An entry of "panels" for `write_study_report`. Differences are between runs of the same seed.
  """
  baseline, *others = runs
  losses = {arm: {run["seed"]: np.array(run["curve"])[:, 1] for run in by_seed}
            for arm, by_seed in runs.items()}
  steps = [step for step, _ in runs[baseline][0]["curve"]]
  unit = "training loss (nats per token)"
  own = banded(steps, list(losses[baseline].values()))
  pairs = {arm: [losses[arm][seed] - losses[baseline][seed] for seed in losses[arm]
                 if seed in losses[baseline]] for arm in others}
  differences = {arm: banded(steps, by_seed) for arm, by_seed in pairs.items() if by_seed}
  if not differences:
    return {"name": "loss", "caption": "Training loss", "curves": {unit: {baseline: own}}}
  return {"name": "loss", "caption": f"Training loss of {baseline}, and differences from it",
          "curves": differences, "first": [baseline, unit, own],
          "label": f"loss − loss of {baseline} (nats per token)",
          "note": "Differences are between runs with the same seed: lines are means, bands go from "
                  "the lowest to the highest pair." + _other_rates(runs)}


def _other_rates(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Returns a sentence on arms whose learning rate is not the first arm's; "" for none."""
  baseline, *others = rates = {arm: by_seed[0].get("learning_rate")
                               for arm, by_seed in runs.items()}
  differing = [f"{arm} at {rates[arm]:g}" for arm in others if rates[arm] != rates[baseline]]
  if not differing:
    return ""
  return (f" {baseline} trained at a learning rate of {rates[baseline]:g}, "
          f"{', '.join(differing)}.")


def banded(steps: Sequence[int], curves: Sequence[Sequence[float]]) -> list[list]:
  """Returns a curve for figures: steps, means and, of several, the lowest and highest values."""
  values = np.array(curves)
  band = [values.min(0).tolist(), values.max(0).tolist()] if len(values) > 1 else []
  return [list(steps), values.mean(0).tolist(), *band]
