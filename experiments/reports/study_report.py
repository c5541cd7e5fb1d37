"""The report of a study: verdicts, intervals, arms and cost, from the content of `results.json`.

Parts that are absent are left out. A number that could not be measured is null in the results and a
dash in the report.
"""

import functools
import math
import pathlib
import statistics

from experiments.reports import plots, study_plots
from experiments.reports.labels import metric_label
from experiments.reports.markdown import (
  document,
  duration,
  fenced,
  figure,
  flat,
  number,
  origin,
  table,
)
from experiments.reports.run_report import cost_table
from experiments.reports.summary import criterion, is_relative, not_judged
from experiments.stats import Paired

FINISHED = "finished"  # status of the runs that are evaluated
PILOT_SEED = 900  # seeds from here on are for pilots: their deviation is reported, and no verdict
SWEEP_SEED = 1000  # seeds from here on are for learning-rate sweeps, and are never compared


def _paired(fields: dict) -> Paired:
  """Returns the estimate; fields that are null in JSON were not finite."""
  unbounded = {"std": math.nan, "stderr": math.nan, "low": -math.inf, "high": math.inf,
               "detectable": math.inf}
  known = {key: value for key, value in fields.items() if value is not None}
  return Paired(**unbounded | known)


def power_of(c: dict) -> str | None:
  """Returns how likely a comparison's claim was to be reproduced, in words; None if unknown."""
  found = c.get("power")
  if not found:
    return None
  seeds = "more than 4096 seeds" if found["seeds"] is None else f"{found['seeds']} seeds"
  return (f"{found['probability']:.0%} if the true value is {found['effect']:.3g}, 80 % with "
          f"{seeds}")


def again_of(study: dict, metric: str) -> str | None:
  """Returns how far the baseline ends from itself, started one rounding away; None if unknown."""
  found = study.get("again", {}).get(metric)
  if not found:
    return None
  return f"{found['std']:.2g}" if found["std"] else "0, deterministic"


def _verdicts(study: dict) -> str:
  comparisons = study.get("comparisons", [])
  lines, known = [], any(map(power_of, comparisons))
  corrected = any(c.get("p_value") is not None for c in comparisons)
  repeated = bool(study.get("again"))
  for c in comparisons:
    pair = _paired(c["paired"])
    arms = f"{c['arm']} − {c['baseline']}" if c.get("baseline") else c["arm"]
    lines.append([
        c["name"], c["metric"], arms, criterion(c["claim"], c["metric"]), c.get("paper"),
        number(pair.mean, 3), f"{number(pair.low, 3)} to {number(pair.high, 3)}",
        f"{pair.same_sign} of {pair.n} {'>' if pair.sign > 0 else '<'} 0"
        if c["claim"]["kind"] == "sign" else pair.n,
        # The formula is that of the claim of a sign.
        number(pair.detectable, 3) if c["claim"]["kind"] != "equivalent" else None,
        *([again_of(study, c["metric"])] if repeated else []),
        *([number(c.get("p_value"), 2)] if corrected else []),
        *([power_of(c)] if known else []), f"**{c['verdict']}**"])
  found = table(("claim", "metric", "arms", "claimed", "paper", "mean", "95 % interval", "seeds",
                 "minimum detectable effect", *(["A/A deviation"] if repeated else []),
                 *(["p-value"] if corrected else []),
                 *(["power"] if known else []), "verdict"),
                lines) if lines else ""
  equal = ("The A/A deviation is that of the differences, seed by seed, between the baseline and "
           "the same runs with initial weights one rounding away: what rounding alone changes."
           if repeated else "")
  reasons = not_judged({c["name"]: c["not_judged"] for c in comparisons if "not_judged" in c},
                       len(comparisons))
  note = ("A difference d of the logarithms of losses is a relative difference of the losses of "
          "exp(d) − 1: 0.0025 is 0.25 %."
          if any(is_relative(c["metric"]) for c in comparisons) else "")
  family = ("P-values, for or against a claim, are corrected for the number of claims (Holm), as "
            "are powers; a claim is decided below 0.05. Intervals and minimum detectable effects "
            "are those of each claim by itself." if corrected else "")
  shared = max((c.get("shared_problems", 0) for c in comparisons), default=0)
  problems = (f"All seeds have the same {shared} problems; intervals include the variance that "
              "comes from the choice of these problems." if shared else "")
  surprise = ("A claim is contradicted. Claims that share a baseline err together, so confirm it "
              f"on fresh seeds:\n\n```bash\n{study['confirmed_by']}\n```"
              if study.get("confirmed_by") else "")
  return "\n\n".join(filter(None, [found, note, equal, family, problems, reasons, surprise]))


def _forest_lines(comparisons: list[dict]) -> list[study_plots.Comparison]:
  lines = []
  for c in comparisons:
    claim, threshold = c["claim"], c["claim"].get("threshold")
    lines.append(study_plots.Comparison(
        c["name"], _paired(c["paired"]),
        _axis(c["metric"], c.get("baseline")), claim.get("paper"),
        claim.get("margin"), c["verdict"], threshold or 0.0))
  return lines


def _axis(metric: str, baseline: str | None) -> str:
  """Returns the axis label of a comparison: a difference between arms, or one arm's value."""
  label = metric_label(metric)
  return f"difference in {label}" if baseline else label


def _spread(values: list[float]) -> str | None:
  """Returns mean ± standard deviation over seeds, to the second digit of the deviation."""
  values = [value for value in values if value is not None and math.isfinite(value)]
  if len(values) < 2:
    return number(values[0]) if values else None
  mean, std = statistics.fmean(values), statistics.stdev(values)
  decimals = max(0, 1 - math.floor(math.log10(std))) if std else 4
  return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}".replace("-", "−")


def _metrics(names: list[str], runs: list[dict]) -> str:
  """Returns the metrics of arms at every learning rate, over the seeds that finished.

  Args:
    names: names of the arms in the order of the rows.
    runs: the runs.
  """
  groups: dict[tuple, list[dict]] = {}
  for run in sorted(runs, key=lambda run: names.index(run["arm"]) if run["arm"] in names else 1e9):
    if run["status"] == FINISHED:
      groups.setdefault((run["arm"], run.get("learning_rate")), []).append(run)
  metrics = list(dict.fromkeys(m for run in runs for m in run.get("metrics", {})))
  lines = [[arm, rate, ", ".join(str(run["seed"]) for run in group),
            *(_spread([run["metrics"].get(metric) for run in group]) for metric in metrics)]
           for (arm, rate), group in groups.items()]
  return table(("arm", "learning rate", "seeds", *metrics), lines) if lines else ""


def _sweep(arms: list, runs: list[dict]) -> str:
  """Returns the metrics of the runs that chose learning rates, which no comparison uses."""
  return _metrics(_names(arms), [run for run in runs if run["seed"] >= SWEEP_SEED])


def _names(arms: list) -> list[str]:
  return [arm["name"] if isinstance(arm, dict) else arm for arm in arms]


def _arms(arms: list, runs: list[dict]) -> str:
  """Returns every arm's metrics over its compared seeds, and the settings that it changes."""
  results = _metrics(_names(arms), [run for run in runs if run["seed"] < PILOT_SEED])
  meanings = [f"- **{arm['name']}**: " + ", ".join(f"{key} {value}" for key, value in flat(
      {key: value for key, value in arm.items() if key != "name"}))
              for arm in arms if isinstance(arm, dict) and len(arm) > 1]
  note = "Mean ± standard deviation over the seeds that finished." if results else ""
  return "\n\n".join(filter(None, [results, note, "\n".join(meanings)]))


def _sensitivity(noise: dict, detectable: dict) -> str:
  names = list(dict.fromkeys([*noise, *detectable]))
  return table(("", "seed standard deviation", "minimum detectable effect (80 % power)"),
                [(name, noise.get(name), detectable.get(name)) for name in names]) if names else ""


def _failures(runs: list[dict]) -> str:
  failed = [run for run in runs if run["status"] != FINISHED]
  if not runs:
    return ""
  if not failed:
    return f"None: all {len(runs)} finished."
  return f"{len(failed)} of {len(runs)}, left out of all values above.\n\n" + table(
      ("arm", "learning rate", "seed", "status"),
      [(run["arm"], run.get("learning_rate"), str(run["seed"]), run["status"]) for run in failed])


def _study_summary(study: dict) -> str:
  verdicts = [c["verdict"] for c in study.get("comparisons", [])]
  counts = [f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)]
  source = f" ({study['source']})" if study.get("source") else ""
  counted = f"Of {len(verdicts)} comparisons: {', '.join(counts)}." if verdicts else ""
  missing = len(study.get("missing") or ())
  unfinished = (f"**Not finished**: {missing} of the runs that the command asks for "
                f"{'is' if missing == 1 else 'are'} missing." if missing else "")
  return "\n\n".join(filter(None, [
      f"> {study.get('claim', 'No claim stated')}{source}", unfinished, counted]))


def _panels(folder: pathlib.Path, drawn: dict) -> str:
  """Draws panels of curves, or small multiples, and returns a reference to the figure."""
  if "label" in drawn:
    draw = functools.partial(
        study_plots.multiples, label=drawn["label"], bound=drawn.get("bound"),
        first=drawn.get("first"), other_scale=drawn.get("other_scale", ()),
        note=drawn.get("note", ""))
  else:
    draw = functools.partial(plots.panels, ratios=drawn.get("ratios"),
                             shared=drawn.get("shared", ()))
  return figure(folder, drawn["name"], drawn["caption"], draw, drawn["curves"])


def _outcomes(folder: pathlib.Path, study: dict) -> str:
  """Draws the metrics that claims are about by arm, and returns a reference to the figure.

  Logarithms are left out: they are compared as relative errors, far below the spread of seeds.
  """
  found, comparisons = study.get("outcomes", {}), study.get("comparisons", [])
  claimed = dict.fromkeys(c["metric"] for c in comparisons)
  drawn = {metric_label(metric): found[metric] for metric in claimed
           if metric in found and not metric.startswith("log_")}
  thresholds = {metric_label(c["metric"]): c["claim"]["threshold"] for c in comparisons
                if c["claim"].get("threshold") is not None}
  draw = functools.partial(study_plots.outcomes, thresholds=thresholds)
  return figure(folder, "metrics", "Metrics by arm, one point per seed", draw, drawn)


def _table(shown: dict) -> str:
  """Returns a table that the study itself defines, with its note."""
  note = f"\n\n{shown['note']}" if shown.get("note") else ""
  return table(shown["header"], shown["rows"]) + note


def _bases(bases: list[dict]) -> str:
  """Returns a table of the models that RL started from, with their metrics before RL."""
  metrics = list(dict.fromkeys(name for base in bases for name in base["metrics"]))
  time = lambda base: base["cost"] and duration(base["cost"]["device_seconds"])
  return table(("base", "arms", "device time", *metrics), [
      [base["name"], ", ".join(base["arms"]), time(base),
       *(base["metrics"].get(name) for name in metrics)] for base in bases]) if bases else ""


def _samples(samples: list[dict]) -> str:
  """Returns completions of the same problems before and after training, by run."""
  return "\n\n".join(f"**{run['title']}**\n\n" + "\n\n".join(
      f"step {row['step']}, reference answer {row['answer']}:\n"
      f"{fenced(row['prompt'] + row['completion'])}" for row in run["rows"])
      for run in samples)


def write_study_report(folder: pathlib.Path, study: dict) -> pathlib.Path:
  """Writes report.md and its figures for a study.

  Args:
    folder: the folder of the study, which exists.
    study: the content of results.json. Each of its fields except "name" may be absent:
      "name", "claim", "source": as in `experiments.studies.study.Study`.
      "arms": names, or dicts with "name" and the settings that the arm changes.
      "runs": [{"arm", "learning_rate", "seed", "metrics": {name: x}, "status", "cost"}]; only those
        whose status is `FINISHED` are evaluated.
      "comparisons": [{"name", "metric", "arm", "baseline", "paired": fields of `stats.Paired`,
        "claim": fields of `stats.Claim`, "verdict", "paper": what the paper reports, in words,
        "p_value": corrected for the number of claims, "power": fields of `stats.Power`,
        "not_judged": the reason, if there is no verdict}].
      "again": {metric: {"std", "n"}}, how far the baseline ends from itself, started one rounding
        away.
      "missing": names of the runs that the command asks for and that have not run.
      "confirmed_by": a command with fresh seeds, if a claim is contradicted.
      "noise": {metric: seed standard deviation}.
      "detectable": {metric: minimum detectable effect}.
      "panels": [{"name", "caption", "curves", and arguments of `plots.panels` ("ratios" and
        "shared") or of `study_plots.multiples` ("label", "first", "bound", "other_scale" and
        "note")}].
      "outcomes": {metric: {arm: one value per seed}}; those that claims are about are drawn.
      "tables": [{"caption", "header", "rows", "note"}].
      "samples": [{"title", "rows": [{"step", "prompt", "completion", "answer"}]}].
      "bases": [{"name", "arms", "metrics", "cost"}], the models that RL started from.
      "total_cost": the cost of all runs, as `run_report.cost_table` takes it.
      "provenance": as `provenance.describe` returns it.

  Returns:
    The path of report.md.
  """
  folder = pathlib.Path(folder)
  comparisons, runs = study.get("comparisons", []), study.get("runs", [])
  return document(folder / "report.md", f"Study {study['name']}", [
      ("", _study_summary(study)),
      ("Verdicts", _verdicts(study)),
      ("", figure(folder, "forest", "Every comparison with its interval", study_plots.forest,
                   _forest_lines(comparisons))),
      ("Metrics by arm", _outcomes(folder, study)),
      *((shown["caption"], _table(shown)) for shown in study.get("tables", [])),
      *((drawn["caption"], _panels(folder, drawn)) for drawn in study.get("panels", [])),
      ("Completions", _samples(study.get("samples", []))),
      ("Bases", _bases(study.get("bases", []))),
      ("Arms", _arms(study.get("arms", []), runs)),
      ("Pilot", _metrics(_names(study.get("arms", [])), [
          run for run in runs if PILOT_SEED <= run["seed"] < SWEEP_SEED])),
      ("Sweep of the learning rates", _sweep(study.get("arms", []), runs)),
      ("Noise", _sensitivity(study.get("noise", {}), study.get("detectable", {}))),
      ("Failed runs", _failures(runs)),
      ("Cost of all runs", cost_table(study.get("total_cost", {}))),
      ("How to run it again", origin(study.get("provenance", {}))),
  ])
