"""Summaries: the values of a result that the index, README and docs quote.

A summary is an object with "experiment", "scale", "title", "claims", "tables" and "provenance";
that of a study also has its "definition". A claim has

    "claim"        what is claimed, or what was measured
    "metric"       the metric of the estimate
    "reference"    the paper's value, or the target, in words
    "value", "low", "high"    the estimate and its 95 % interval; None if unknown
    "n"            the basis of the estimate, in words, such as "7 rounds"
    "verdict"      that of a study; "met" or "missed" if there is a target; otherwise "measured"
    "reason"       why no verdict could be given; otherwise absent
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reports.labels import metric_label
from experiments.reports.markdown import plain_command, table

_HEADER = ("claim", "metric", "paper or target", "measured", "basis", "verdict")


def claim(text: str, metric: str, value: float | None, low: float | None = None,
          high: float | None = None, *, reference: str = "", n: str = "",
          verdict: str = "measured", reason: str | None = None) -> dict[str, Any]:
  """Returns a claim, see the top of this file; values that are not finite become None."""
  bound = lambda x: None if x is None or not math.isfinite(x) else x
  found = {"claim": text, "metric": metric, "reference": reference, "value": bound(value),
           "low": bound(low), "high": bound(high), "n": n, "verdict": verdict}
  return found | ({"reason": reason} if reason else {})


def target(text: str, metric: str, estimate: Sequence[float], *, at_least: float | None = None,
           at_most: float | None = None, n: str = "") -> dict[str, Any]:
  """Returns the claim that an estimate, with its whole interval, meets a target.

  Args:
    text: what is claimed.
    metric: the metric of the estimate.
    estimate: the value with its interval, (value, low, high), or the value alone, (value,).
    at_least: the target, if it is a lower bound.
    at_most: the target, if it is an upper bound.
    n: the basis of the estimate, in words.
  """
  if at_least is not None:
    met, goal = min(estimate) >= at_least, f"target: at least {at_least:g}"
  else:
    met, goal = max(estimate) <= at_most, f"target: at most {at_most:g}"
  return claim(text, metric, *estimate, reference=goal, n=n, verdict="met" if met else "missed")


def bench_summary(
    experiment: str, scale: str, title: str, provenance: Mapping[str, Any], *,
    claims: Sequence[Mapping[str, Any]] = (),
    tables: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
  """Returns the summary of a benchmark.

  Args:
    experiment: name of the benchmark.
    scale: scale of the benchmark, or another name that distinguishes its results.
    title: what the benchmark measures, in a sentence.
    provenance: an object with at least what `provenance.describe` returns.
    claims: claims, as `claim` returns them.
    tables: [{"name", "caption", "header", "rows", "note"}]; the note may be absent.
  """
  return {"experiment": experiment, "scale": scale, "title": title, "claims": list(claims),
          "tables": list(tables), "provenance": short_provenance(provenance)}


def study_summary(result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the summary of a study, from the content of its results.json."""
  claims = [
      claim(c["name"], c["metric"], c["paired"]["mean"], c["paired"]["low"], c["paired"]["high"],
            reference=c["paper"], n=_seeds(c["paired"]["n"]), verdict=c["verdict"],
            reason=c.get("not_judged"))
      | {"arm": c["arm"], "baseline": c["baseline"],
         "minimum_detectable_effect": c["paired"]["detectable"]} for c in result["comparisons"]]
  return {
      "experiment": result["name"], "scale": result["scale"], "title": result["claim"],
      "source": result["source"], "claims": claims, "tables": [],
      "seed_standard_deviation": result["noise"], "cost": result["total_cost"],
      "runs": len(result["runs"]), "definition": result["definition"],
      "provenance": short_provenance(result["provenance"])}


def _seeds(count: int) -> str:
  return f"{count} seed{'s' * (count != 1)}"


def short_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what identifies a result's origin; its command without machine-specific flags."""
  kept = ("commit", "dirty", "sources", "versions", "xla_flags", "device", "cpu", "cores")
  return {"command": plain_command(provenance["command"])} | {
      name: provenance[name] for name in kept if provenance.get(name) is not None}


def backend(provenance: Mapping[str, Any]) -> str:
  """Returns "cpu", "gpu" or "tpu" by the device's name: the scale of benchmarks without scales."""
  device = str(provenance["device"]).lower()
  return next((name for name in ("cpu", "tpu") if name in device), "gpu")


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of claims with their estimates, and the reasons why some were not judged."""
  if not claims:
    return ""
  lines = [(c["claim"], metric_label(c["metric"]), c["reference"] or None, estimate(c),
            c["n"] or None, f"**{c['verdict']}**") for c in claims]
  reasons = [f"- not judged, **{c['claim']}**: {c['reason']}." for c in claims if c.get("reason")]
  return "\n\n".join(filter(None, [table(_HEADER, lines), "\n".join(reasons)]))


def table_text(shown: Mapping[str, Any]) -> str:
  """Returns a table of a summary, with its note."""
  note = f"\n\n{shown['note']}" if shown.get("note") else ""
  return table(shown["header"], shown["rows"]) + note


def estimate(c: Mapping[str, Any]) -> str:
  """Returns a claim's value and interval as text, to two digits of the interval's width."""
  if c["value"] is None:
    return "–"
  bounds = [c["low"], c["high"]]
  known = None not in bounds
  width = bounds[1] - bounds[0] if known else abs(c["value"])
  digits = 2 if known else 3
  decimals = max(0, digits - 1 - math.floor(math.log10(width))) if width else 0
  shown = lambda x: f"{x:,.{decimals}f}".replace("-", "−") if decimals < 6 else f"{x:.2g}"
  return shown(c["value"]) + (f" ({shown(bounds[0])} to {shown(bounds[1])})" if known else "")
