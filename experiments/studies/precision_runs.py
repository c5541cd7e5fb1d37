"""Runs of a study that compares precisions: their losses are compared as ratios."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.studies.runs import Task
from experiments.studies.text_runs import TextRuns
from train.run_folder import RunFolder

_BASELINE = "bf16"
_SEEDS = "two seeds of bf16"
_SMOOTHING = 0.9  # as in V3's figure 10


class PrecisionRuns(TextRuns):
  """Training on text, with logarithms of the losses among the metrics."""

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    runs = super().train(tasks, folder, max_seconds)
    return runs and [run | {"metrics": run["metrics"] | log_losses(run)} for run in runs]

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return super().report_parts(runs) | relative_errors(runs)


def log_losses(run: Mapping[str, Any]) -> dict[str, float]:
  """Logarithms of a run's held-out loss, and of its training loss in the last half of the steps.

  Args:
    run: as `TextRuns.train` gives it.
  """
  late = [math.log(loss) for _, loss in run["curve"][len(run["curve"]) // 2:]]
  return {"log_validation_loss": math.log(run["metrics"]["validation_loss"]),
          "log_training_loss": math.fsum(late) / len(late)}


def relative_errors(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Every arm's loss against bfloat16's, and beside them two bfloat16 seeds against each other.

  Args:
    runs: by arm, as `TextRuns.train` gives them, with their seeds.

  Returns:
    "tables" and "panels" of `write_study_report`; nothing without bfloat16.
  """
  baseline = {run["seed"]: run for run in runs.get(_BASELINE, ())}
  pairs = {arm: [(run, baseline[run["seed"]]) for run in by_seed if run["seed"] in baseline]
           for arm, by_seed in runs.items() if arm != _BASELINE}
  seeds = sorted(baseline)
  pairs[_SEEDS] = [(baseline[b], baseline[a]) for a, b in itertools.pairwise(seeds)]
  pairs = {name: by_seed for name, by_seed in pairs.items() if by_seed}
  if not pairs:
    return {}
  rows = [[name, *(_cells(by_seed, metric) for metric in ("log_training_loss",
                                                          "log_validation_loss")), len(by_seed)]
          for name, by_seed in pairs.items()]
  return {
      "tables": [{
          "caption": "Relative loss error against bfloat16; the paper's bound is 0.25 %",
          "header": ["", "training, last half: mean (each pair)", "held out: mean (each pair)",
                     "pairs"],
          "rows": rows}],
      "panels": [{
          "name": "relative", "caption": "Relative error of the training loss over steps, "
                                         f"smoothed with {_SMOOTHING}, means over pairs",
          "curves": _curves(pairs)}]}


def _cells(pairs: Sequence[tuple], metric: str) -> str:
  """The mean relative error, and every pair's."""
  errors = [math.expm1(a["metrics"][metric] - b["metrics"][metric]) for a, b in pairs]
  percent = lambda error: f"{100 * error:+.3f}"
  return f"{percent(statistics.fmean(errors))} % ({', '.join(map(percent, errors))})"


def _curves(pairs: Mapping[str, Sequence[tuple]]) -> dict[str, dict[str, tuple[list, list]]]:
  """Panels of the arms with the difference between two seeds, and of the arms alone."""
  curves = {name: _mean_curve(by_seed) for name, by_seed in pairs.items()}
  return {"relative error of the loss (%), arms and seeds": curves,
          "relative error of the loss (%), arms alone": {
              name: curve for name, curve in curves.items() if name != _SEEDS}}


def _mean_curve(pairs: Sequence[tuple]) -> tuple[list, list]:
  curves = [zip(smoothed(a["curve"]), smoothed(b["curve"]), strict=True) for a, b in pairs]
  errors = [[100 * (ours / theirs - 1) for ours, theirs in curve] for curve in curves]
  return ([step for step, _ in pairs[0][0]["curve"]],
          [statistics.fmean(at_step) for at_step in zip(*errors, strict=True)])


def smoothed(curve: Iterable[Sequence[float]]) -> list[float]:
  """The exponential moving average of [step, loss], without a bias to its first value."""
  average, weight, averages = 0.0, 0.0, []
  for _, loss in curve:
    average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
    weight = _SMOOTHING * weight + (1 - _SMOOTHING)
    averages.append(average / weight)
  return averages
