"""The contents of an RL study's report, as plain data: panels of curves, tables, completions.

Everything is computed from what `RLRuns.train` returns, by arm and in the order of seeds. Runs of
earlier versions lack some entries, and are left out of the parts that need these.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reports.labels import LABELS
from experiments.reports.markdown import number

ByArm = Mapping[str, Sequence[Mapping[str, Any]]]

_CURVES = {"reward": "reward (mean of a rollout)", "pass@1": "held-out pass@1",
           "length": "length (tokens)", "kl": "KL to the reference (nats per token)",
           "lenient_pass@1": "held-out pass@1, lenient match", "format_reward": "format accuracy",
           "entropy": "entropy (nats per token)", "grad_norm": "gradient norm"}
_BASE_METRICS = ("pass@1", "cons@k", "pass@k", "format", "length", "length_pays")
_OUTCOME = ("pass@1", "pass@k", "maj@k", "lenient_pass@1", "format", "length", "clipped")
_REFLECTION = {"kept": "accuracy, reflection kept", "cut": "accuracy, reflection cut out",
               "difference": "difference", "again": "fraction that reflects after the cut",
               "without": "accuracy of those that do not reflect after the cut"}


def panels(runs: ByArm) -> list[dict[str, Any]]:
  """Returns panels of curves over training steps and over K, with their range over seeds."""
  curves = {label: {arm: _over_seeds([run["curves"][key] for run in by_seed])
                    for arm, by_seed in runs.items()
                    if all(run["curves"].get(key) for run in by_seed)}
            for key, label in _CURVES.items()}
  return [
      {"name": "curves", "caption": "Training curves",
       "curves": {label: by_arm for label, by_arm in curves.items() if by_arm}},
      {"name": "by_k", "caption": "pass@K and majority vote of K samples, before and after RL",
       "ratios": "K (samples per problem)", "shared": list(_curves_of_bases(runs).values()),
       "curves": _by_k(runs)}]


def tables(runs: ByArm) -> list[dict[str, Any]]:
  """Returns tables of every run before and after RL, of the base's sampling, and of reflections."""
  found = [_outcomes(runs, "heldout", "Held-out problems, before and after RL"),
           _outcomes(runs, "harder", "Harder problems, before and after RL"),
           _base_sampling(runs), _reflection_rates(runs), _reflection_effects(runs)]
  return [table for table in found if table["rows"]]


def samples(runs: ByArm) -> list[dict[str, Any]]:
  """Returns completions of the first seed of every arm, as [{"title", "rows"}]."""
  return [{"title": _name(arm, by_seed[0]), "rows": by_seed[0]["samples"]}
          for arm, by_seed in runs.items() if by_seed[0].get("samples")]


def bases(runs: ByArm) -> list[dict[str, Any]]:
  """Returns the models that RL started from, each with the arms that started from it."""
  found: dict[str, dict] = {}
  for arm, by_seed in runs.items():
    for run in by_seed:
      base = found.setdefault(run["base"]["name"], {
          **run["base"], "arms": [],
          "metrics": {name: run["before"]["metrics"][name] for name in _BASE_METRICS
                      if name in run["before"]["metrics"]}})
      if arm not in base["arms"]:
        base["arms"].append(arm)
  return list(found.values())


def _name(arm: str, run: Mapping[str, Any]) -> str:
  return f"{arm}, seed {run['seed']}"


def _over_seeds(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
  """Returns the abscissae, mean values and, of several curves, the lowest and highest values.

  All curves are cut to the length of the shortest.
  """
  points = np.array([curve[:min(map(len, curves))] for curve in curves], float)
  values = points[..., 1]
  band = [values.min(0).tolist(), values.max(0).tolist()] if len(values) > 1 else []
  return [points[0, :, 0].tolist(), values.mean(0).tolist(), *band]


def _curves_of_bases(runs: ByArm) -> dict[str, str]:
  """Returns, by arm, the name of the curve of the bases that it is the first to start from.

  Bases that are among those of another arm have no curve of their own.
  """
  bases = {arm: {run["base"]["name"] for run in by_seed} for arm, by_seed in runs.items()}
  arms = []
  for arm, of_arm in bases.items():
    others = [bases[other] for other in bases if other != arm]
    if not any(of_arm < other for other in others) and of_arm not in [bases[a] for a in arms]:
      arms.append(arm)
  return {arm: f"base of {arm}" if i else "base" for i, arm in enumerate(arms)}


def _by_k(runs: ByArm) -> dict[str, dict]:
  """Returns panels of pass@K and maj@K, with one curve for the bases that several arms share."""
  drawn: dict[str, dict] = {}
  bases = _curves_of_bases(runs)
  for key, label in {"pass@K": "pass@K", "cons@K": "maj@K (cons@K in R1)"}.items():
    curves = drawn[label] = {}
    for arm, by_seed in runs.items():
      if arm in bases:
        curves[bases[arm]] = _over_seeds([run["before"][key] for run in by_seed])
      curves[arm] = _over_seeds([run["after"][key] for run in by_seed])
  return {label: curves for label, curves in drawn.items() if curves}


def _cell(estimate: Sequence[float] | None) -> str:
  """Returns an estimate with its interval, as the text of a cell."""
  if estimate is None or estimate[0] is None:
    return "–"
  return f"{number(estimate[0], 3)} [{estimate[1]:.3g}, {estimate[2]:.3g}]"


def _models(runs: ByArm) -> dict[str, Mapping[str, Any]]:
  """Returns the evaluations of every base, once, and of every run after RL, by name."""
  before = {run["base"]["name"]: run["before"] for by_seed in runs.values() for run in by_seed}
  return before | {_name(arm, run): run["after"] for arm, by_seed in runs.items()
                   for run in by_seed}


def _estimates(found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns estimates by name, where "pass@k" and "maj@k" are those of all samples."""
  samples = found["samples"]
  return dict(found) | {"pass@k": found.get(f"pass@{samples}"),
                        "maj@k": found.get(f"cons@{samples}")}


def _outcomes(runs: ByArm, split: str, caption: str) -> dict[str, Any]:
  """Returns a table of the evaluations on one split, of every base and of every run after RL."""
  found = {name: of_model[split] for name, of_model in _models(runs).items() if split in of_model}
  if not found:
    return {"caption": caption, "header": [], "rows": []}
  first = next(iter(found.values()))
  k = first["samples"]
  labels = {"pass@k": f"pass@{k}", "maj@k": f"maj@{k} (cons@{k} in R1)"} | LABELS
  return {
      "caption": caption, "header": ["model", *(labels.get(name, name) for name in _OUTCOME)],
      "rows": [[name, *(_cell(_estimates(estimates).get(column)) for column in _OUTCOME)]
               for name, estimates in found.items()],
      "note": f"{_interval_note(first)} The lenient match also finds answers outside the answer "
              "block."}


def _interval_note(found: Mapping[str, Any]) -> str:
  """Returns a sentence on the intervals; earlier versions did not count distinct questions."""
  if "questions" not in found:
    return (f"{found['problems']} problems; 95 % bootstrap intervals over problems, which are too "
            "narrow if several problems have the same question.")
  return (f"{found['problems']} problems with {found['questions']} distinct questions; "
          "95 % bootstrap intervals over questions.")


def _base_sampling(runs: ByArm) -> dict[str, Any]:
  columns = ("pass@1", "lenient_pass@1", "format")
  found = {run["base"]["name"]: run["before"].get("temperatures", {})
           for by_seed in runs.values() for run in by_seed}
  name = lambda temperature: ("greedy" if float(temperature) == 0
                              else f"temperature {temperature}")
  return {
      "caption": "The base at other sampling temperatures",
      "header": ["base", "sampling", *(LABELS.get(column, column) for column in columns)],
      "rows": [[base, name(temperature), *(_cell(estimates.get(column)) for column in columns)]
               for base, at in found.items() for temperature, estimates in at.items()]}


def _reflection_rates(runs: ByArm) -> dict[str, Any]:
  rate = lambda run, when: run[when]["heldout"]["reflection"]
  return {
      "caption": "Fraction of completions that take a step back",
      "header": ["run", "base", "after RL"],
      "rows": [[_name(arm, run), _cell(rate(run, "before")), _cell(rate(run, "after"))]
               for arm, by_seed in runs.items() for run in by_seed
               if "heldout" in run["before"] and "heldout" in run["after"]
               and "reflection" in run["after"]]}


def _reflection_effects(runs: ByArm) -> dict[str, Any]:
  effects = {name: found["reflection"] for name, found in _models(runs).items()
             if found.get("reflection")}
  return {
      "caption": "Effect of reflections on accuracy",
      "header": ["model", "completions", "questions", *_REFLECTION.values()],
      "rows": [[name, effect["completions"], effect.get("questions"),
                *(_cell(effect[part]) for part in _REFLECTION)]
               for name, effect in effects.items()],
      "note": "Completions that take a step back (reflect) are continued from the end of the "
              "reflection, and from before it; 95 % bootstrap intervals over questions."}
