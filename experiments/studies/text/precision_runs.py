"""Runs of studies that compare numerical precisions by the ratios of their losses."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from experiments.stats import paired
from experiments.studies.runs import Task
from experiments.studies.text.text_runs import TextRuns, banded
from train.run_folder import RunFolder

_BASELINE = "bf16"
_SEEDS = "two seeds of bf16"
_SMOOTHING = 0.9  # decay rate of the moving average in V3's figure 10


def log_losses(run: Mapping[str, Any]) -> dict[str, float]:
  """Returns the logarithms of a run's held-out loss and of its training loss.

  Args:
    run: an entry of what `TextRuns.train` returns.

  Returns:
    "log_validation_loss", and "log_training_loss", the mean over the second half of the steps.
  """
  late = [math.log(loss) for _, loss in run["curve"][len(run["curve"]) // 2:]]
  return {"log_validation_loss": math.log(run["metrics"]["validation_loss"]),
          "log_training_loss": math.fsum(late) / len(late)}


class PrecisionRuns(TextRuns):
  """Runs that train on text, with logarithms of their losses as further metrics."""

  measuring: ClassVar = (*TextRuns.measuring, log_losses)

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    runs = super().train(tasks, folder, max_seconds)
    return runs and [run | {"metrics": run["metrics"] | log_losses(run)} for run in runs]

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    parts, relative = super().report_parts(runs), relative_errors(runs)
    return parts | relative | {"panels": parts["panels"] + relative.get("panels", [])}


def relative_errors(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Returns every arm's loss relative to bfloat16's, and that of one bfloat16 seed to another.

  Args:
    runs: by arm, entries of what `TextRuns.train` returns, with their seeds.

  Returns:
    "tables" and "panels" for `write_study_report`; nothing without runs of bfloat16.
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
          "caption": "Relative error of the loss against bfloat16; the paper's bound is 0.25 %",
          "header": ["arm", "training loss, second half of the steps: mean (each pair)",
                     "held-out loss: mean (each pair)", "pairs"],
          "rows": rows}],
      "panels": [{
          "name": "relative", "caption": "Relative error of the training loss over steps, "
                                         f"smoothed with decay {_SMOOTHING}",
          "label": f"loss ÷ loss of {_BASELINE} − 1 (%)",
          "bound": [0.25, "the paper's bound of ±0.25 %"],
          "other_scale": [_SEEDS],
          "note": "Lines are means over pairs of runs with the same seed, bands their 95 % "
                  f"intervals. The panel of {_SEEDS} shows the noise between seeds on its own "
                  "scale; its band goes from the lowest to the highest pair.",
          "curves": {name: _relative_curve(by_seed, banded if name == _SEEDS else _with_interval)
                     for name, by_seed in pairs.items()}}]}


def _cells(pairs: Sequence[tuple], metric: str) -> str:
  """Returns the mean relative error and that of every pair, as the text of a cell."""
  errors = [math.expm1(a["metrics"][metric] - b["metrics"][metric]) for a, b in pairs]
  percent = lambda error: f"{100 * error:+.3f}"
  return f"{percent(statistics.fmean(errors))} % ({', '.join(map(percent, errors))})"


def _relative_curve(pairs: Sequence[tuple], with_band: Callable) -> list[list]:
  """Returns the relative error of the smoothed loss in percent, with a band over pairs."""
  curves = [zip(smoothed(a["curve"]), smoothed(b["curve"]), strict=True) for a, b in pairs]
  return with_band([step for step, _ in pairs[0][0]["curve"]],
                   [[100 * (ours / theirs - 1) for ours, theirs in curve] for curve in curves])


def _with_interval(steps: Sequence[int], curves: Sequence[Sequence[float]]) -> list[list]:
  """Returns a curve for figures: steps, means, and the bounds of their 95 % intervals."""
  if len(curves) < 2:
    return [list(steps), *map(list, curves)]
  found = [paired(at_step, 0) if all(map(math.isfinite, at_step)) else None
           for at_step in zip(*curves, strict=True)]
  return [list(steps), *([one and getattr(one, part) for one in found]
                         for part in ("mean", "low", "high"))]


def smoothed(curve: Iterable[Sequence[float]]) -> list[float]:
  """Returns the bias-corrected exponential moving average of a curve of [step, loss]."""
  average, weight, averages = 0.0, 0.0, []
  for _, loss in curve:
    average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
    weight = _SMOOTHING * weight + (1 - _SMOOTHING)
    averages.append(average / weight)
  return averages
