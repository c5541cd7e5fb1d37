"""Computes the outcome of each comparison from the metrics of all runs."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from experiments.reports.study_report import FINISHED, PILOT_SEED, SWEEP_SEED
from experiments.stats import (
  SIGNIFICANCE,
  Claim,
  Paired,
  evidence,
  holm,
  judge,
  noise,
  paired,
  power,
)
from experiments.studies.study import Comparison

_FAILED = 0.25  # largest fraction of seeds that may fail without barring a verdict


def compared_seeds(pilot: bool) -> range:
  """Returns the seeds that are compared, or those of pilots; neither are those of sweeps."""
  return range(PILOT_SEED, SWEEP_SEED) if pilot else range(PILOT_SEED)


def compared_runs(runs: Iterable[dict], arm: str, learning_rate: float | None,
                  pilot: bool = False) -> dict[int, dict]:
  """Returns an arm's finished runs at its best learning rate, by seed, without those of the sweep.

  Args:
    runs: runs of all arms.
    arm: name of the arm.
    learning_rate: the arm's best learning rate; None if nothing is swept, or if the sweep is not
      finished, in which case there are no such runs.
    pilot: whether to return the pilot's runs, instead of all others.
  """
  return {run["seed"]: run for run in runs
          if run["arm"] == arm and run["learning_rate"] == learning_rate
          and run["seed"] in compared_seeds(pilot) and run["status"] == FINISHED}


def compare(comparison: Comparison, compared: dict[str, dict[int, dict]],
            swept: Mapping[str, float] | None = None,
            rates: Mapping[str, float] | None = None,
            at_end: Collection[str] = (),
            attempted: Mapping[str, Collection[int]] | None = None,
            by_problem: Mapping[str, Mapping[int, Mapping[str, list]]] | None = None,
            ) -> dict | None:
  """Returns the outcome of a comparison over the seeds that both arms have.

  Args:
    comparison: the comparison.
    compared: metrics by arm and seed.
    swept: best score of each arm's learning-rate sweep, where larger is better; for comparisons
      whose `matched` is "sweep".
    rates: best learning rate of each arm.
    at_end: the arms whose best learning rate is at an end of their sweep.
    attempted: seeds by arm, those of failed runs included; None for those of `compared`.
    by_problem: by arm, seed and metric, the value at each of the problems that all seeds share, if
      they do.

  Returns:
    An entry of "comparisons" in results.json, with the reason as "not_judged" if a condition of the
    comparison is not met. None if the arms have no seed in common.
  """
  arm, name = comparison.arm, comparison.baseline
  if comparison.matched == "sweep":
    arm, name = (_swept_best(pattern, swept or {}) for pattern in (arm, name))
    if arm is None or (name is None) != (comparison.baseline is None):
      return None
  baseline = compared[name] if name else None
  if arm.endswith("*"):
    group = [other for other, seeds in compared.items() if other.startswith(arm[:-1]) and seeds]
    if not group or not baseline:
      return None
    matched = _mean(baseline.values(), comparison.matched)
    distances = {other: abs(_mean(compared[other].values(), comparison.matched) - matched)
                 for other in group}
    arm = min(distances, key=lambda other: np.nan_to_num(distances[other], nan=np.inf))
  arms = (compared[arm],) if baseline is None else (compared[arm], baseline)
  seeds = sorted(seed for seed in arms[0].keys() & arms[-1].keys()
                 if all(finite(values[seed], comparison.metric) is not None for values in arms))
  if not seeds:
    return None
  values = [compared[arm][seed][comparison.metric] for seed in seeds]
  other = [baseline[seed][comparison.metric] for seed in seeds] if baseline is not None else 0.0
  problems = _by_problem(comparison.metric, [
      [(by_problem or {}).get(each, {}).get(seed, {}) for seed in seeds]
      for each in (arm, name) if each])
  pair = paired(values, other, sign=comparison.claim.sign, by_problem=problems)
  outcome = {"name": comparison.name, "metric": comparison.metric, "arm": arm,
             "baseline": name, "paired": dataclasses.asdict(pair),
             "claim": dataclasses.asdict(comparison.claim), "paper": comparison.paper,
             "verdict": judge(pair, comparison.claim),
             **({} if problems is None else {"shared_problems": problems.shape[1]})}
  tried = set.intersection(*(set((attempted or compared)[each]) for each in (arm, name) if each))
  reason = (_failed(len(tried) - len(seeds), len(tried))
            or _rates_differ(comparison, rates or {}, arm, name)
            or _sweep_ends(comparison, [each for each in (arm, name) if each in at_end])
            or _no_noise(comparison, pair)
            or _no_room(comparison, [compared[arm][seed] for seed in seeds]))
  return without_verdict(outcome, reason) if reason else outcome


def _by_problem(metric: str, arms: Sequence[Sequence[Mapping[str, list]]]) -> np.ndarray | None:
  """Returns the differences between arms, [seeds, problems]; None if they are not known for all.

  Args:
    metric: name of the metric.
    arms: of the arm, and of its baseline if it has one, the values of each seed by metric.
  """
  if len(arms[0]) < 2 or not all(metric in values for arm in arms for values in arm):
    return None
  values = [np.array([values[metric] for values in arm]) for arm in arms]
  return values[0] - values[1] if len(values) > 1 else values[0]


def without_verdict(outcome: dict, reason: str) -> dict:
  """Returns an outcome without a verdict, for a reason."""
  return outcome | {"verdict": "unresolved", "not_judged": reason}


def known_values(runs: Iterable[dict], metric: str) -> list[float]:
  """Returns the values of a metric, of the runs in which it was measured and is finite."""
  values = [finite(metrics, metric) for metrics in runs]
  return [value for value in values if value is not None]


def _mean(runs: Iterable[dict], metric: str) -> float:
  """Returns the mean of `known_values`; NaN if there are none."""
  values = known_values(runs, metric)
  return float(np.mean(values)) if values else np.nan


def _failed(left_out: int, tried: int) -> str | None:
  """Returns why failed runs do not allow a verdict, or None if they are few or none.

  What is left out is not random: an arm that often diverges is compared by the runs that did not.
  """
  if left_out <= _FAILED * tried:
    return None
  return f"{left_out} of {tried} seeds failed, or have no value"


def without_another_look(
    outcomes: Sequence[dict], before: Sequence[Mapping], missing: Sequence[str]) -> list[dict]:
  """Returns outcomes without verdicts on part of the seeds, or on more seeds than before.

  Whoever looks at a verdict after every few seeds, and stops once there is one, is wrong more often
  than the 5 % of a single look.

  Args:
    outcomes: outcomes of `compare`.
    before: the comparisons of the results.json that the new one replaces; empty if there is none.
    missing: names of the runs that are missing.

  Returns:
    The outcomes, with the number of seeds of the first verdict as "seen"; 0 if there was none.
  """
  looks = {c["name"]: c.get("seen", 0 if "not_judged" in c else c["paired"]["n"]) for c in before}

  def looked(outcome: dict) -> dict:
    n, seen = outcome["paired"]["n"], looks.get(outcome["name"], 0)
    if "not_judged" in outcome:
      return outcome | {"seen": seen}
    if missing:
      return without_verdict(outcome, f"{len(missing)} of the runs are missing" if len(missing) > 1
                        else "one of the runs is missing") | {"seen": seen}
    if 0 < seen < n:
      return without_verdict(outcome, (
          f"a verdict was given on {seen} seeds, and one on {n} would be a second look: judge new "
          "seeds by themselves, in another folder")) | {"seen": seen}
    return outcome | {"seen": seen or (n if n > 1 or outcome["claim"]["single_run"] else 0)}

  return list(map(looked, outcomes))


def corrected(outcomes: Sequence[dict], n: int | None = None) -> list[dict]:
  """Returns the outcomes of a study's comparisons, with verdicts corrected for their number.

  Those that were judged are one family: the smaller of a claim's p-values, for and against it, is
  corrected by `stats.holm`, and what is then not below 5 % is unresolved. Intervals remain those of
  each claim by itself.

  Args:
    outcomes: outcomes of `compare`; those that are not judged stay as they are.
    n: number of seeds for which the power is stated; None for that of each comparison.

  Returns:
    The outcomes with "p_value", the corrected one, and "power", that of one of all claims, judged
    or not; both are None where they are unknown.
  """
  claims = [Claim(**outcome["claim"]) for outcome in outcomes]
  pairs = [Paired(**outcome["paired"]) for outcome in outcomes]
  found = [None if "not_judged" in outcome else evidence(pair, claim)
           for outcome, pair, claim in zip(outcomes, pairs, claims, strict=True)]
  p_values = iter(holm([min(each) for each in found if each]))
  results = []
  for outcome, pair, claim, each in zip(outcomes, pairs, claims, found, strict=True):
    p_value = next(p_values) if each else None
    chance = power(claim, pair.std, n or pair.n, family=len(outcomes))
    verdict = "unresolved" if each and p_value >= SIGNIFICANCE else outcome["verdict"]
    results.append(outcome | {"verdict": verdict, "p_value": p_value,
                              "power": chance and chance._asdict()})
  return results


def repeated(again: Mapping[int, dict], baseline: Mapping[int, dict],
             metrics: Iterable[str]) -> dict[str, dict]:
  """Returns how far the baseline's runs end from the same ones, started one rounding away.

  Args:
    again: metrics of the latter by seed.
    baseline: metrics of the baseline by seed.
    metrics: names of the metrics.

  Returns:
    By metric, the standard deviation "std" of the paired differences and their number "n". Metrics
    of fewer than two pairs are left out.
  """
  found = {}
  for name in metrics:
    differences = [again[seed][name] - baseline[seed][name] for seed in again.keys() & baseline
                   if finite(again[seed], name) is not None
                   and finite(baseline[seed], name) is not None]
    if len(differences) > 1:
      found[name] = {"std": noise(differences), "n": len(differences)}
  return found


def finite(metrics: dict, name: str, otherwise: float | None = None) -> float | None:
  """Returns a metric, or `otherwise` if it was not measured or is not finite (null in JSON)."""
  value = metrics.get(name)
  return value if value is not None and np.isfinite(value) else otherwise


def _rates_differ(comparison: Comparison, rates: Mapping[str, float], arm: str,
                  baseline: str | None) -> str | None:
  """Returns why the arms' learning rates do not allow a verdict, or None if they do."""
  if not comparison.at_one_rate or baseline is None or rates.get(arm) == rates.get(baseline):
    return None
  return (f"the best learning rate of {arm} is {rates.get(arm)}, that of {baseline} "
          f"{rates.get(baseline)}, and {comparison.metric} depends on the learning rate itself")


def _sweep_ends(comparison: Comparison, at_end: Sequence[str]) -> str | None:
  """Returns why sweeps do not allow a verdict: the best rate may lie beyond them. None if they do.
  """
  if comparison.any_rate or not at_end:
    return None
  return "the best learning rate of an arm is at an end of its sweep"


def _no_noise(comparison: Comparison, pair: Paired) -> str | None:
  """Returns why an interval of zero width says nothing, or None if it has a width."""
  if pair.n < 2 or pair.std > 0 or comparison.claim.single_run:
    return None
  return (f"all {pair.n} pairs differ by exactly {pair.mean:g}: the arms do not vary with the "
          "seed, or compute the same, so there is no noise to judge by")


def _no_room(comparison: Comparison, by_seed: Sequence[dict]) -> str | None:
  """Returns why the arm could not have contradicted the claim, or None if it could."""
  if comparison.room is None:
    return None
  metric, bound = comparison.room
  mean = _mean(by_seed, metric)
  return None if mean < bound else (
      f"the claim could not have been contradicted: {metric} is {mean:.3g}, not below {bound:g}")


def _swept_best(pattern: str | None, swept: Mapping[str, float]) -> str | None:
  """Returns the arm of a group with the best score in its sweep; other names are returned as is.

  Args:
    pattern: the name of an arm, "group_*", or None.
    swept: best score of each arm's sweep, where larger is better.

  Returns:
    None if no arm of the group has finished its sweep.
  """
  if pattern is None or not pattern.endswith("*"):
    return pattern
  return max((arm for arm in swept if arm.startswith(pattern[:-1])), key=swept.get, default=None)
