"""From metrics by arm and seed to the outcome of each comparison."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from experiments.reports.study_report import FINISHED
from experiments.stats import judge, paired
from experiments.studies.study import Comparison

SWEEP_SEED = 1000  # seeds from here on choose learning rates and are never compared


def compared_runs(
    runs: Iterable[dict], arm: str, learning_rate: float | None) -> dict[int, dict]:
  """An arm's finished runs at its best learning rate, by seed; those of the sweep left out.

  Args:
    runs: of all arms.
    arm: its name.
    learning_rate: the best; None if the arm's sweep is not finished, and then there are no runs.
  """
  return {run["seed"]: run for run in runs
          if run["arm"] == arm and run["learning_rate"] == learning_rate
          and run["seed"] < SWEEP_SEED and run["status"] == FINISHED}


def compare(question: Comparison, compared: dict[str, dict[int, dict]],
            swept: Mapping[str, float] | None = None,
            rates: Mapping[str, float] | None = None) -> dict | None:
  """A comparison's outcome over the seeds that both arms have, or None if there are none.

  Args:
    question: the comparison.
    compared: metrics by arm and seed.
    swept: by arm the best score of its sweep, larger for better, for `matched` "sweep".
    rates: by arm its best learning rate, for `at_one_rate`.

  Returns:
    As in results.json; "not_judged" is the reason, where the numbers may not decide.
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
                 if all(finite(values[seed], question.metric) is not None for values in arms))
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


def finite(metrics: dict, name: str, otherwise: float | None = None) -> float | None:
  """A metric if it was measured and is finite (JSON has null where it is not), else `otherwise`."""
  value = metrics.get(name)
  return value if value is not None and np.isfinite(value) else otherwise


def _rates_differ(question: Comparison, rates: Mapping[str, float], arm: str,
                  baseline: str | None) -> str | None:
  """Why the arms' learning rates forbid a verdict, if they do."""
  if not question.at_one_rate or baseline is None or rates.get(arm) == rates.get(baseline):
    return None
  return (f"{arm} swept best at {rates.get(arm)} and {baseline} at {rates.get(baseline)}, and the "
          f"learning rate itself moves {question.metric}")


def _no_room(question: Comparison, by_seed: Sequence[dict]) -> str | None:
  """Why the arm had no room to fail the claim, if it had none."""
  if question.room is None:
    return None
  metric, bound = question.room
  mean = np.mean([values[metric] for values in by_seed])
  return None if mean < bound else f"no room: {metric} is {mean:.3g}, not below {bound:g}"


def _swept_best(pattern: str | None, swept: Mapping[str, float]) -> str | None:
  """The arm of a group whose sweep scored best; None if none was swept. Other names as they are."""
  if pattern is None or not pattern.endswith("*"):
    return pattern
  return max((arm for arm in swept if arm.startswith(pattern[:-1])), key=swept.get, default=None)
