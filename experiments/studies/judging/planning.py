"""What a study is likely to find: the power of its claims, by a committed deviation."""

from collections.abc import Collection

from experiments import catalogue
from experiments.reports import results
from experiments.stats import power
from experiments.studies.study import Study
from train.run_folder import read_run_json


def expected_power(study: Study, scale_name: str, arms: Collection[str], n: int) -> list[str]:
  """Returns a line for every claim whose power is known: how likely n seeds are to reproduce it.

  The deviation of the differences is that of the committed result at the same scale.

  Args:
    study: the study.
    scale_name: name of the scale.
    arms: the arms that run.
    n: number of seeds.
  """
  entry = catalogue.experiments().get(study.name)
  committed = results.ROOT / entry.results_folder / scale_name if entry else None
  if committed is None or not (committed / results.RAW).exists():
    return []
  with results.raw(committed) as folder:
    outcomes = read_run_json(folder / "results.json")["comparisons"]
  deviations = {outcome["name"]: outcome["paired"]["std"] for outcome in outcomes}
  claims = [c for c in study.comparisons if _runs(c.arm, arms) and _runs(c.baseline, arms)]
  lines = []
  for comparison in claims:
    std = deviations.get(comparison.name)
    found = power(comparison.claim, std, n, family=len(claims)) if std else None
    if found:
      needed = "more than 4096" if found.seeds is None else found.seeds
      lines.append(f"{comparison.name}: {found.probability:.0%} with {n} seeds if the true value "
                   f"is {found.effect:.3g}; 80 % needs {needed}")
  return lines


def _runs(pattern: str | None, arms: Collection[str]) -> bool:
  """Whether an arm, or one of a group "name_*", is among those that run; true for None."""
  if pattern is None or pattern in arms:
    return True
  return pattern.endswith("*") and any(arm.startswith(pattern[:-1]) for arm in arms)

