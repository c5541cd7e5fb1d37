"""Runs of a study that train on text."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.pretrain import fit_vocabulary
from experiments.runs import Score, Task, stretches
from experiments.stats import expert_domain_information
from train.config import RunConfig
from train.data import Data, load
from train.loop import Result, train
from train.program import shared
from train.run_folder import RunFolder

_SHUFFLES = 20


class TextRuns:
  """`experiments.runs.Runs` of `train.loop.train`: lanes of one program where they can be."""

  score: ClassVar = Score("validation_loss", -1)
  named: ClassVar = {}

  def __init__(self, base: RunConfig, configs: Mapping[str, RunConfig], told: Collection[str]):
    self.base, self.configs, self.told = base, configs, "model.vocab_size" in told

  def identity(self) -> dict[str, Any]:
    return {}

  def prepare(self) -> None:
    self.data: Data = load(self.base.data)

  def program(self, task: Task) -> RunConfig:
    return shared(self._config(task))

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    result = train([self._config(task) for task in tasks], self.data, folder,
                   max_seconds=max_seconds)
    if result.status == "stopped":
      return None
    lanes = range(len(tasks)) if len(tasks) > 1 else [None]
    return [{"metrics": measure(result, lane), "flops": _flops(self._config(task)),
             **_curves(result, lane)} for task, lane in zip(tasks, lanes, strict=True)]

  def drawn(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return {"curves": {arm: [{"step": step, "loss": loss} for step, loss in of_arm[0]["curve"]]
                       for arm, of_arm in runs.items() if of_arm}}

  def _config(self, task: Task) -> RunConfig:
    cfg = fit_vocabulary(self.configs[task.arm], self.data, told=self.told)
    return dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, seed=task.seed),
        optimizer=dataclasses.replace(cfg.optimizer, learning_rate=task.learning_rate))


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


def _flops(cfg: RunConfig) -> float:
  """Of the training itself, without what interruptions repeated."""
  return cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len * cfg.flops_per_token


def _curves(result: Result, lane: int | None) -> dict:
  """Training loss, averaged over stretches of steps, and every evaluation's mean loss."""
  loss = lambda row: row["loss"] if lane is None else row["per_seed"]["loss"][lane]
  held = [[e["step"], float(np.mean(list(e["loss"].values()))) if lane is None
           else e["per_seed"]["mean_loss"][lane]] for e in result.evaluations]
  return {"curve": stretches(result.rows, loss), "validation_curve": held}
