"""Results as Markdown with figures beside it: one training run, or a study of several.

Both take what `results.json` holds and skip what is absent. A number that could not be measured is
null there and a dash here.
"""

import functools
import math
import pathlib
import statistics
from collections.abc import Iterable

from experiments import plots
from experiments.markdown import (
  collapsed,
  document,
  duration,
  fenced,
  figure,
  flat,
  number,
  origin,
  table,
)
from experiments.stats import Paired

FINISHED = "finished"  # the status of a run that counts


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def _median(rows: Iterable[dict], key: str) -> float | None:
  known = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
  return statistics.median(known) if known else None


def _cost(cost: dict, rows: list[dict] = ()) -> str:
  """Totals, and the rates that follow from them."""
  if not cost:
    return ""
  seconds, tokens, flops = (cost.get(name) for name in ("device_seconds", "tokens", "flops"))
  utilisation, rate = (_median(rows, key) for key in ("utilisation", "tokens_per_second"))
  joules = cost.get("joules")
  lines = [
      ("device time", seconds and duration(seconds)),
      ("tokens", tokens),
      ("FLOP", flops and number(float(flops), 3)),
      ("tokens per second, mean", seconds and tokens and f"{tokens / seconds:,.0f}"),
      ("tokens per second, median step", rate and f"{rate:,.0f}"),
      ("GFLOP/s, mean", seconds and flops and f"{flops / seconds / 1e9:,.1f}"),
      ("utilisation, median step", utilisation and f"{utilisation:.1%}"),
      ("energy", "not measured" if joules is None else f"{joules / 1000:,.1f} kJ"),
  ]
  return table(("cost", "value"), [line for line in lines if line[1] is not None])


# One training run.

def _mean_bits(evaluation: dict) -> float | None:
  return _mean(evaluation.get("bits_per_byte", {}).values())


def _mean_over(domains: list[str], by_domain: dict) -> float | None:
  """None if a domain is missing: a mean over fewer would not compare."""
  values = [by_domain.get(domain) for domain in domains]
  return None if None in values else _mean(values)


def _run_summary(run: dict, rows: list[dict], evaluations: list[dict]) -> str:
  provenance, cost, domains = run.get("provenance", {}), run.get("cost", {}), _domains(evaluations)
  what = f"{rows[-1]['step']:,} steps" if rows else "No training step"
  if cost.get("tokens"):
    what += f" on {cost['tokens']:,} tokens"
  where = provenance.get("device") or "an unknown device"
  if provenance.get("cpu"):
    where += f" ({provenance['cpu']}, {provenance.get('cores', '?')} cores)"
  long = f" in {duration(cost['device_seconds'])}" if cost.get("device_seconds") else ""
  sentences = [f"{what} ran on {where}{long}; status: **{run.get('status', 'unknown')}**."]
  if run.get("skipped_steps"):
    sentences.append(f"{run['skipped_steps']:,} steps were skipped: loss or gradient not finite.")
  if domains:
    over = f"the mean over {' and '.join(domains)}" if len(domains) > 1 else domains[0]
    means = [_mean_bits(evaluation) for evaluation in evaluations]
    change = f"was **{means[0]:.3f}**" if len(means) == 1 else (
        f"went from {means[0]:.3f} to **{means[-1]:.3f}**")
    sentences.append(f"Bits per byte of held-out text, {over}, {change}.")
    best = [(mean, name) for name, by_domain in run.get("baselines", {}).items()
            if (mean := _mean_over(domains, by_domain)) is not None]
    if best:
      sentences.append("The best baseline, {1}, takes {0:.3f}.".format(*min(best)))
  return " ".join(sentences)


def _domains(evaluations: list[dict]) -> list[str]:
  return list(dict.fromkeys(name for e in evaluations for name in e.get("bits_per_byte", {})))


def _bits_table(evaluations: list[dict], baselines: dict) -> str:
  """Held-out bits per byte by domain, before and after, beside the baselines."""
  domains = _domains(evaluations)
  if not domains:
    return ""
  ends = evaluations[:1] + evaluations[1:][-1:]
  columns = {f"step {e['step']:,}": e.get("bits_per_byte", {}) for e in ends} | baselines
  bits = lambda value: None if value is None else f"{value:.3f}"
  lines = [[domain, *(bits(by.get(domain)) for by in columns.values())] for domain in domains]
  if len(domains) > 1:
    lines.append(["mean", *(bits(_mean_over(domains, by)) for by in columns.values())])
  return f"{table(['domain', *columns], lines)}\n\nLower is better; a byte as it is takes 8 bits."


def _evaluation_table(evaluations: list[dict]) -> str:
  columns = {
      "bits per byte": _mean_bits,
      "loss (nats per token)": lambda e: _mean(e.get("loss", {}).values()),
      "MTP acceptance": lambda e: e.get("mtp_acceptance"),
      "MaxVio": lambda e: e.get("max_violation"),
  }
  known = {name: get for name, get in columns.items() if any(get(e) is not None
                                                              for e in evaluations)}
  if not known:
    return ""
  lines = [[e["step"], *(get(e) for get in known.values())] for e in evaluations]
  note = "Bits per byte and loss are means over the domains."
  return f"{table(['step', *known], lines)}\n\n{note}"


def _data_tables(data: dict) -> str:
  """The domains as one table, all else by dotted path as another."""
  domains = data.get("domains", {})
  columns = list(dict.fromkeys(key for entry in domains.values() for key in entry))
  rest = {key: value for key, value in data.items() if key != "domains"}
  tables = []
  if domains:
    lines = [[name, *map(entry.get, columns)] for name, entry in domains.items()]
    tables.append(table(["domain", *columns], lines))
  if rest:
    tables.append(table(("data", "value"), flat(rest)))
  return "\n\n".join(tables)


def write_run_report(folder: pathlib.Path, run: dict, rows: list[dict]) -> pathlib.Path:
  """Writes report.md and its figures for one training run.

  Args:
    folder: where to; it exists.
    run: the content of results.json. "provenance" of `provenance.describe`; "config" nested;
      "data": {"domains": {domain: {"documents", "bytes", "tokens"}}, ...}; "evaluations": [{"step",
      "bits_per_byte": {domain: x}, "loss": {domain: nats per token}, "mtp_acceptance",
      "loads": {domain: [layers, experts]}, "max_violation"}] by step; "baselines": {name: {domain:
      bits per byte}}; "cost": {"device_seconds", "flops", "tokens", "joules"}; "samples":
      [{"prompt", "text"}]; "skipped_steps"; "status". Each may be absent.
    rows: a step's metrics each: "step", "loss", "learning_rate", "max_violation",
      "tokens_per_second", "utilisation" (a share), and "per_seed" if several seeds ran at once.

  Returns:
    The path of report.md.
  """
  folder = pathlib.Path(folder)
  evaluations, config = run.get("evaluations", []), run.get("config", {})
  having = lambda key: [row for row in rows if row.get(key) is not None]
  judged = [e for e in evaluations if e.get("bits_per_byte")]
  # A model without experts has loads of no layers.
  loads = next((e["loads"] for e in reversed(evaluations) if any(e.get("loads", {}).values())), {})
  drawn = lambda *args: figure(folder, *args)
  samples = [fenced(f"{sample['prompt']}▸{sample['text']}") for sample in run.get("samples", [])]
  return document(folder / "report.md", f"Training run {folder.resolve().name}", [
      ("", _run_summary(run, rows, judged)),
      ("Bits per byte", _bits_table(judged, run.get("baselines", {}))),
      ("", drawn("validation", "Validation by domain", plots.validation, judged)),
      ("Training", drawn("loss", "Training loss", plots.loss_curves,
                          {"": having("loss")} if having("loss") else {})),
      ("", drawn("learning_rate", "Learning rate", plots.learning_rate, having("learning_rate"))),
      ("Experts", drawn("loads", "Load of every expert by layer and domain, last evaluation",
                         plots.load_heat_map, loads)),
      ("", drawn("max_violation", "MaxVio", plots.max_violation, having("max_violation"))),
      ("Evaluations", _evaluation_table(evaluations)),
      ("Samples", "\n\n".join(["The prompt ends at ▸.", *samples]) if samples else ""),
      ("Cost", _cost(run.get("cost", {}), rows)),
      ("Data", _data_tables(run.get("data", {}))),
      ("Command", origin(run.get("provenance", {}))),
      ("Configuration", config and collapsed("every field", table(("field", "value"),
                                                                     flat(config)))),
  ])


# A study of several runs.

def _paired(fields: dict) -> Paired:
  """What JSON made null was not finite."""
  unbounded = {"std": math.nan, "stderr": math.nan, "low": -math.inf, "high": math.inf,
               "detectable": math.inf}
  known = {key: value for key, value in fields.items() if value is not None}
  return Paired(**unbounded | known)


def _claim_text(claim: dict) -> str:
  if claim["kind"] == "equivalent":
    return f"within ±{number(claim['margin'])}"
  if claim["kind"] == "threshold":
    return f"{'above' if claim['sign'] > 0 else 'below'} {number(claim['threshold'])}"
  bound = claim["sign"] * claim.get("margin", 0.0)
  return f"{'above' if claim['sign'] > 0 else 'below'} {number(bound or 0)}"


def _verdicts(comparisons: list[dict]) -> str:
  lines = []
  for c in comparisons:
    pair = _paired(c["paired"])
    arms = f"{c['arm']} − {c['baseline']}" if c.get("baseline") else c["arm"]
    lines.append([
        c["name"], c["metric"], arms, _claim_text(c["claim"]), c.get("paper"),
        number(pair.mean, 3), f"{number(pair.low, 3)} to {number(pair.high, 3)}",
        f"{pair.same_sign} of {pair.n} {'>' if pair.sign > 0 else '<'} 0"
        if c["claim"]["kind"] == "sign" else pair.n,
        number(pair.detectable, 3), f"**{c['verdict']}**"])
  found = table(("comparison", "metric", "of", "claim", "paper", "mean", "95 % interval",
                "seeds", "detectable", "verdict"), lines) if lines else ""
  reasons = [f"- not judged, **{c['name']}**: {c['not_judged']}." for c in comparisons
             if "not_judged" in c]
  return "\n\n".join(filter(None, [found, "\n".join(reasons)]))


def _forest_lines(comparisons: list[dict]) -> list[plots.Comparison]:
  lines = []
  for c in comparisons:
    claim, threshold = c["claim"], c["claim"].get("threshold")
    lines.append(plots.Comparison(
        c["name"], _paired(c["paired"]),
        f"{c['metric']}: difference" if threshold is None else c["metric"], claim.get("paper"),
        claim.get("margin"), c["verdict"], threshold or 0.0))
  return lines


def _spread(values: list[float]) -> str | None:
  """Mean ± standard deviation over seeds, to the deviation's second digit."""
  values = [value for value in values if value is not None and math.isfinite(value)]
  if len(values) < 2:
    return number(values[0]) if values else None
  mean, std = statistics.fmean(values), statistics.stdev(values)
  decimals = max(0, 1 - math.floor(math.log10(std))) if std else 4
  return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}".replace("-", "−")


def _arms(arms: list, runs: list[dict]) -> str:
  """Every arm's metrics at every learning rate, over the seeds that finished."""
  groups: dict[tuple, list[dict]] = {}
  names = [arm["name"] if isinstance(arm, dict) else arm for arm in arms]
  for run in sorted(runs, key=lambda run: names.index(run["arm"]) if run["arm"] in names else 1e9):
    if run["status"] == FINISHED:
      groups.setdefault((run["arm"], run.get("learning_rate")), []).append(run)
  metrics = list(dict.fromkeys(m for run in runs for m in run.get("metrics", {})))
  lines = [[arm, rate, ", ".join(str(run["seed"]) for run in group),
            *(_spread([run["metrics"].get(metric) for run in group]) for metric in metrics)]
           for (arm, rate), group in groups.items()]
  meanings = [f"- **{arm['name']}**: " + ", ".join(f"{key} {value}" for key, value in flat(
      {key: value for key, value in arm.items() if key != "name"}))
              for arm in arms if isinstance(arm, dict) and len(arm) > 1]
  results = table(("arm", "learning rate", "seeds", *metrics), lines) if lines else ""
  note = "Mean ± standard deviation over the seeds that finished." if lines else ""
  return "\n\n".join(filter(None, [results, note, "\n".join(meanings)]))


def _sensitivity(noise: dict, detectable: dict) -> str:
  names = list(dict.fromkeys([*noise, *detectable]))
  return table(("", "standard deviation between seeds", "detectable at 80 % power"),
                [(name, noise.get(name), detectable.get(name)) for name in names]) if names else ""


def _failures(runs: list[dict]) -> str:
  failed = [run for run in runs if run["status"] != FINISHED]
  if not runs:
    return ""
  if not failed:
    return f"None: all {len(runs)} finished."
  return f"{len(failed)} of {len(runs)}, left out of every number above.\n\n" + table(
      ("arm", "learning rate", "seed", "status"),
      [(run["arm"], run.get("learning_rate"), str(run["seed"]), run["status"]) for run in failed])


def _study_summary(study: dict) -> str:
  verdicts = [c["verdict"] for c in study.get("comparisons", [])]
  counts = [f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)]
  source = f" ({study['source']})" if study.get("source") else ""
  of = f"Of {len(verdicts)} comparisons: {', '.join(counts)}." if verdicts else ""
  return f"> {study.get('claim', 'No claim stated')}{source}\n\n{of}".strip()


def _panels(folder: pathlib.Path, drawn: dict) -> str:
  """A figure of `plots.panels`."""
  draw = functools.partial(plots.panels, doublings=drawn.get("doublings"))
  return figure(folder, drawn["name"], drawn["caption"], draw, drawn["curves"])


def _bases(bases: list[dict]) -> str:
  """The models that RL began with; the metrics are theirs, before it."""
  metrics = list(dict.fromkeys(name for base in bases for name in base["metrics"]))
  return table(("base", "arms", "device time", *metrics), [
      [base["name"], ", ".join(base["arms"]), duration(base["cost"]["device_seconds"]),
       *(base["metrics"].get(name) for name in metrics)] for base in bases]) if bases else ""


def write_study_report(folder: pathlib.Path, study: dict) -> pathlib.Path:
  """Writes report.md and its figures for a study.

  Args:
    folder: where to; it exists.
    study: "name", "claim", "source"; "arms": names, or dicts with "name" and what it changes;
      "runs": [{"arm", "learning_rate", "seed", "metrics": {name: x}, "status", "cost"}], of which
      those whose status is `FINISHED` count; "comparisons": [{"name", "metric", "arm", "baseline",
      "paired": fields of `stats.Paired`, "claim": fields of `stats.Claim`, "verdict", "paper":
      what the paper reports, in words, "not_judged": why, where it was not}]; "noise" and
      "detectable": {metric: x}; "curves": {name: rows for `plots.loss_curves`}; "panels": [{"name",
      "caption", "curves": of `plots.panels`, "doublings": likewise}]; "tables": [{"caption",
      "header", "rows"}]; "bases": [{"name", "arms", "metrics", "cost"}]; "total_cost";
      "provenance"; "source_hash". All but the name may be absent.

  Returns:
    The path of report.md.
  """
  folder = pathlib.Path(folder)
  comparisons, runs = study.get("comparisons", []), study.get("runs", [])
  made_by, source_hash = origin(study.get("provenance", {})), study.get("source_hash")
  return document(folder / "report.md", f"Study {study['name']}", [
      ("", _study_summary(study)),
      ("Verdicts", _verdicts(comparisons)),
      ("", figure(folder, "forest", "Every comparison with its interval", plots.forest,
                   _forest_lines(comparisons))),
      ("Loss", figure(folder, "loss", "Training loss by arm", plots.loss_curves,
                       study.get("curves", {}))),
      *((shown["caption"], table(shown["header"], shown["rows"]))
        for shown in study.get("tables", [])),
      *((drawn["caption"], _panels(folder, drawn)) for drawn in study.get("panels", [])),
      ("Bases", _bases(study.get("bases", []))),
      ("Arms", _arms(study.get("arms", []), runs)),
      ("Noise", _sensitivity(study.get("noise", {}), study.get("detectable", {}))),
      ("Failed runs", _failures(runs)),
      ("Cost of all runs", _cost(study.get("total_cost", {}))),
      ("How to run it again", made_by),
      ("", source_hash and f"Hash of the sources that these numbers come from: `{source_hash}`"),
  ])
