"""Compare two settings on paired seeds: your own idea with the defaults, or two ideas.

`--a` and `--b` take settings as `--set` does; an arm without any is the unchanged configuration.
The learning rate of both arms is swept.
"""

import dataclasses
import itertools
import math

import numpy as np

from experiments.options import Options
from experiments.programs.pretrain import SCALES
from experiments.stats import Claim
from experiments.studies.comparing import compared_runs
from experiments.studies.runner import execute
from experiments.studies.study import Arm, Comparison, Scale, Study

_MARGIN = 0.02  # nats: a smaller difference counts as none
_EVALUATIONS = 8


def main(options: Options) -> None:
  options.require_supported("profile")
  if not options.a and not options.b:
    raise ValueError("say how the arms differ: --a key=value, --b key=value or both")
  scale = options.scale_of(SCALES)
  cfg = SCALES[scale].without_extras()
  cfg = dataclasses.replace(cfg, train=dataclasses.replace(
      cfg.train, eval_every=max(1, cfg.train.steps // _EVALUATIONS)))
  rate = cfg.optimizer.learning_rate
  budget = Scale(cfg, (rate / 2, rate, rate * 2), seeds=8, minutes=5, hardware="2 CPU cores")
  study = Study(
      name="ab", claim=f"b ({' '.join(options.b) or 'unchanged'}) reaches a lower validation loss "
                       f"than a ({' '.join(options.a) or 'unchanged'})",
      source="your idea", arms=(Arm("a", options.a), Arm("b", options.b)), baseline="a",
      comparisons=(
          Comparison("b is better than a", "validation_loss", "b", "a", Claim("sign", sign=-1)),
          Comparison(f"b equals a within {_MARGIN} nats", "validation_loss", "b", "a",
                     Claim("equivalent", margin=_MARGIN))),
      scales={scale: budget})
  results = execute(study, scale, options)
  print(_speed_up(*(compared_runs(results["runs"], arm, results["best_learning_rates"].get(arm))
                    for arm in "ab")))


def _speed_up(runs_a: dict[int, dict], runs_b: dict[int, dict]) -> str:
  """FLOPs that a needs for its final loss over those that b needs for the same, over the seeds."""
  ratios = []
  for seed in runs_a.keys() & runs_b.keys():
    a, b = runs_a[seed], runs_b[seed]
    flops = flops_to_loss(b["validation_curve"], b["flops"], a["validation_curve"][-1][1])
    ratios.append(a["flops"] / flops if flops else math.nan)
  if not ratios:
    return "no pair of finished runs to compare FLOPs of"
  reached = [ratio for ratio in ratios if not math.isnan(ratio)]
  if len(reached) < len(ratios):
    return (f"b did not reach a's final loss on {len(ratios) - len(reached)} of {len(ratios)} "
            "seeds: no speed-up to state")
  return (f"b reaches a's final loss with {1 / np.mean(reached):.2f} of a's FLOPs: a speed-up of "
          f"{np.mean(reached):.2f} (from {min(reached):.2f} to {max(reached):.2f} over "
          f"{len(reached)} seeds)")


def flops_to_loss(curve: list[list[float]], flops: float, target: float) -> float | None:
  """FLOPs at which a validation curve first reaches `target`, linear between evaluations.

  Args:
    curve: [step, loss] pairs, ascending.
    flops: of the whole run.
    target: a loss.

  Returns:
    None if it never does.
  """
  last_step = curve[-1][0]
  for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
    if next_loss <= target:
      share = 0.0 if loss <= target else (loss - target) / (loss - next_loss)
      return flops * (step + share * (next_step - step)) / last_step
  return None
