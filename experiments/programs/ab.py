"""Compare two configurations on paired seeds, such as an idea of your own with the defaults.

`--a` and `--b` are settings of the two arms, as for `--set`; an arm without any has the unchanged
configuration. The learning rate of each arm is swept over half, once and twice that of the scale,
on a seed of its own; then both arms train on the seeds that are compared.
"""

import dataclasses
import itertools
import math

import numpy as np

from experiments.options import Options
from experiments.programs.pretrain import SCALES
from experiments.reports.study_report import PILOT_SEED
from experiments.stats import Claim
from experiments.studies.checks import apply_arm
from experiments.studies.judging.comparing import compared_runs
from experiments.studies.runner import execute
from experiments.studies.study import Arm, Comparison, Scale, Study

# Estimated duration of one run in minutes with its evaluations, and the hardware, by scale.
_MINUTES = {"smoke": (0.5, "2 CPU cores"), "cpu": (7, "2 CPU cores"), "gpu": (12, "one H200")}
_MARGIN = 0.02  # nats per token; arms that differ by less count as equal
_EVALUATIONS = 8


def main(options: Options) -> None:
  options.require_supported("profile")
  if not options.a and not options.b:
    raise ValueError("the arms do not differ: give --a section.field=value, --b or both")
  scale = options.scale_of(SCALES)
  cfg = SCALES[scale].without_extras()
  cfg = dataclasses.replace(cfg, train=dataclasses.replace(
      cfg.train, eval_every=max(1, cfg.train.steps // _EVALUATIONS)))
  rate, (minutes, hardware) = cfg.optimizer.learning_rate, _MINUTES[scale]
  budget = Scale(cfg, (rate / 2, rate, rate * 2), seeds=8, minutes=minutes,
                 hardware=f"{hardware}, estimated for the scale's own settings")
  study = Study(
      name="ab", claim=f"b ({' '.join(options.b) or 'unchanged'}) reaches a lower validation loss "
                       f"than a ({' '.join(options.a) or 'unchanged'})",
      source="your own comparison", arms=(Arm("a", options.a), Arm("b", options.b)), baseline="a",
      comparisons=(
          Comparison("b has a lower validation loss than a", "validation_loss", "b", "a",
                     Claim("sign", sign=-1)),
          Comparison(f"b's loss is within {_MARGIN} nats of a's", "validation_loss", "b", "a",
                     Claim("equivalent", margin=_MARGIN))),
      scales={scale: budget})
  a, b = (apply_arm(study, budget, options.settings, arm) for arm in study.arms)
  if a == b:
    raise ValueError("the arms do not differ: with --a and --b, both have the same configuration; "
                     "give one of them another value")
  results = execute(study, scale, options)
  pilot = options.seed_range(budget.seeds).start >= PILOT_SEED
  if results["missing"]:
    return
  print(_speed_up(*(compared_runs(results["runs"], arm, results["best_learning_rates"].get(arm),
                                  pilot)
                    for arm in "ab")))


def _speed_up(runs_a: dict[int, dict], runs_b: dict[int, dict]) -> str:
  """Returns in words how many times fewer FLOPs b needs to reach a's final loss.

  Args:
    runs_a: finished runs of arm a by seed, with their "flops" and "validation_curve".
    runs_b: finished runs of arm b by seed.
  """
  ratios = []
  for seed in runs_a.keys() & runs_b.keys():
    a, b = runs_a[seed], runs_b[seed]
    flops = flops_to_loss(b["validation_curve"], b["flops"], a["validation_curve"][-1][1])
    ratios.append(a["flops"] / flops if flops else math.nan)
  if not ratios:
    return "no speed-up can be given: there is no seed on which both arms finished"
  reached = [ratio for ratio in ratios if not math.isnan(ratio)]
  if len(reached) < len(ratios):
    return (f"no speed-up can be given: b did not reach a's final loss on "
            f"{len(ratios) - len(reached)} of {len(ratios)} seeds")
  return (f"b reaches a's final loss with {1 / np.mean(reached):.2f} of a's FLOPs: a speed-up of "
          f"{np.mean(reached):.2f} (from {min(reached):.2f} to {max(reached):.2f} over "
          f"{len(reached)} seeds)")


def flops_to_loss(curve: list[list[float]], flops: float, target: float) -> float | None:
  """Returns the FLOPs after which a validation loss first reaches a target.

  The loss is interpolated linearly between evaluations.

  Args:
    curve: [step, loss] of every evaluation, in ascending order of steps.
    flops: FLOPs of the whole run.
    target: the loss to reach.

  Returns:
    None if the curve never reaches the target.
  """
  last_step = curve[-1][0]
  for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
    if next_loss <= target:
      fraction = 0.0 if loss <= target else (loss - target) / (loss - next_loss)
      return flops * (step + fraction * (next_step - step)) / last_step
  return None
