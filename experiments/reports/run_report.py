"""The report of one training run: `report.md` and its figures, from the content of `results.json`.

Parts that are absent are left out. A number that could not be measured is null in the results and a
dash in the report.
"""

import math
import pathlib
import statistics
from collections.abc import Iterable

from experiments.reports import plots
from experiments.reports.markdown import (
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


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def _median(rows: Iterable[dict], key: str) -> float | None:
  known = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
  return statistics.median(known) if known else None


def cost_table(cost: dict, rows: list[dict] = ()) -> str:
  """Returns a table of the cost of one or more runs, and of their rates; "" without a cost.

  Args:
    cost: total "device_seconds", "tokens", "flops" and "joules", each possibly absent or None.
    rows: metrics of every step of a single run, for the median rates.
  """
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


def _mean_bits(evaluation: dict) -> float | None:
  return _mean(evaluation.get("bits_per_byte", {}).values())


def _mean_over(domains: list[str], by_domain: dict) -> float | None:
  """Returns the mean, or None if a domain is missing: a mean over fewer is not comparable."""
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
    sentences.append(f"{run['skipped_steps']:,} steps were skipped, because their loss or gradient "
                     "was not finite.")
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
  """Returns a table of held-out bits per byte by domain, before, after, and of the baselines."""
  domains = _domains(evaluations)
  if not domains:
    return ""
  ends = evaluations[:1] + evaluations[1:][-1:]
  columns = {f"step {e['step']:,}": e.get("bits_per_byte", {}) for e in ends} | baselines
  bits = lambda value: None if value is None else f"{value:.3f}"
  lines = [[domain, *(bits(by.get(domain)) for by in columns.values())] for domain in domains]
  if len(domains) > 1:
    lines.append(["mean", *(bits(_mean_over(domains, by)) for by in columns.values())])
  return (f"{table(['domain', *columns], lines)}\n\n"
          "Lower is better; an uncompressed byte takes 8 bits.")


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
  """Returns a table of the domains, and another of all other data by dotted path."""
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
    folder: the folder of the run, which exists.
    run: the content of results.json. Each of its fields may be absent:
      "provenance": as `provenance.describe` returns it.
      "config": the configuration as nested dicts.
      "data": {"domains": {domain: {"documents", "bytes", "tokens"}}, ...}.
      "evaluations": [{"step", "bits_per_byte": {domain: x}, "loss": {domain: nats per token},
        "mtp_acceptance", "loads": {domain: [layers, experts]}, "max_violation"}] in order of steps.
      "baselines": {name: {domain: bits per byte}}.
      "cost": {"device_seconds", "flops", "tokens", "joules"}.
      "samples": [{"prompt", "text"}].
      "skipped_steps": the number of skipped steps.
      "status": "finished", "stopped" or "failed".
    rows: metrics of every step: "step", "loss", "learning_rate", "max_violation",
      "tokens_per_second", "utilisation" (a fraction), and "per_seed" if several seeds ran as one
      batch.

  Returns:
    The path of report.md.
  """
  folder = pathlib.Path(folder)
  evaluations, config = run.get("evaluations", []), run.get("config", {})
  having = lambda key: [row for row in rows if row.get(key) is not None]
  with_bits = [e for e in evaluations if e.get("bits_per_byte")]
  # The loads of a model without experts have no layers.
  loads = next((e["loads"] for e in reversed(evaluations) if any(e.get("loads", {}).values())), {})
  drawn = lambda *args: figure(folder, *args)
  samples = [fenced(f"{sample['prompt']}▸{sample['text']}") for sample in run.get("samples", [])]
  return document(folder / "report.md", f"Training run {folder.resolve().name}", [
      ("", _run_summary(run, rows, with_bits)),
      ("Bits per byte", _bits_table(with_bits, run.get("baselines", {}))),
      ("", drawn("validation", "Validation by domain", plots.validation, with_bits)),
      ("Training", drawn("loss", "Training loss", plots.training_loss, having("loss"))),
      ("", drawn("learning_rate", "Learning rate", plots.learning_rate, having("learning_rate"))),
      ("Experts", drawn("loads", "Load of every expert by layer and domain, last evaluation",
                         plots.load_heat_map, loads)),
      ("", drawn("max_violation", "MaxVio", plots.max_violation, having("max_violation"))),
      ("Evaluations", _evaluation_table(evaluations)),
      ("Samples", "\n\n".join(["The prompt ends at ▸.", *samples]) if samples else ""),
      ("Cost", cost_table(run.get("cost", {}), rows)),
      ("Data", _data_tables(run.get("data", {}))),
      ("Command", origin(run.get("provenance", {}))),
      ("Configuration", config and collapsed("Every field", table(("field", "value"),
                                                                     flat(config)))),
  ])
