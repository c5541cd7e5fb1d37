"""Summaries: the few figures of a result that the index, README and docs quote.

A summary is an object with "experiment", "scale", "title", "claims", "tables" and "provenance";
that of a study also has its "definition". A claim has

    "claim"        what is claimed, or what was measured
    "metric"       in which
    "reference"    the paper's figure, or the target, in words
    "value", "low", "high"    the estimate and its 95 % interval; None if unknown
    "n"            what the estimate is over
    "verdict"      a study's; "met" or "missed" where there is a target; otherwise "measured"
    "reason"       why no verdict could be given; absent otherwise
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reports.markdown import table

_FLAGS_LEFT_OUT = ("--out", "--max_minutes", "--alsologtostderr")
_HEADER = ("claim", "metric", "paper or target", "measured", "over", "verdict")


def claim(text: str, metric: str, value: float | None, low: float | None = None,
          high: float | None = None, *, reference: str = "", n: str = "",
          verdict: str = "measured", reason: str | None = None) -> dict[str, Any]:
  """One claim, as the head of this file says; bounds that are not finite become None."""
  bound = lambda x: None if x is None or not math.isfinite(x) else x
  found = {"claim": text, "metric": metric, "reference": reference, "value": bound(value),
           "low": bound(low), "high": bound(high), "n": n, "verdict": verdict}
  return found | ({"reason": reason} if reason else {})


def target(text: str, metric: str, estimate: Sequence[float], *, at_least: float | None = None,
           at_most: float | None = None, n: str = "") -> dict[str, Any]:
  """The claim that an estimate, with all of its interval, is beyond a bound.

  Args:
    text: what is claimed.
    metric: in which.
    estimate: the value with its interval, or the value alone.
    at_least: the bound below.
    at_most: or the bound above.
    n: what the estimate is over.
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
  """The summary of a benchmark.

  Args:
    experiment: its name.
    scale: its scale, or what else tells its results apart.
    title: what it measures, in a sentence.
    provenance: what `provenance.describe` returns, or more.
    claims: see `claim`.
    tables: [{"name", "caption", "header", "rows", "note"}]; the note may be absent.
  """
  return {"experiment": experiment, "scale": scale, "title": title, "claims": list(claims),
          "tables": list(tables), "provenance": short_provenance(provenance)}


def study_summary(result: Mapping[str, Any]) -> dict[str, Any]:
  """The summary of a study, from what its results.json holds."""
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
  """What names a result's origin; of the command, what concerns one machine alone is left out."""
  kept = ("commit", "dirty", "sources", "versions", "xla_flags", "device", "cpu", "cores")
  return {"command": plain_command(provenance["command"])} | {
      name: provenance[name] for name in kept if provenance.get(name) is not None}


def plain_command(command: str) -> str:
  """A command without its output folder and time limit."""
  kept, skip = [], False
  for word in shlex.split(command):
    flag, equals, _ = word.partition("=")
    if skip:
      skip = False
    elif flag in _FLAGS_LEFT_OUT:
      skip = not equals
    else:
      kept.append(word)
  return shlex.join(kept)


def backend(provenance: Mapping[str, Any]) -> str:
  """"cpu", "gpu" or "tpu", by the name of the device; the scale of benchmarks that have none."""
  device = str(provenance["device"]).lower()
  return next((name for name in ("cpu", "tpu") if name in device), "gpu")


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
  """Claims with the figures that decide them, and why some were not judged."""
  if not claims:
    return ""
  lines = [(c["claim"], c["metric"], c["reference"] or None, estimate(c), c["n"] or None,
            f"**{c['verdict']}**") for c in claims]
  reasons = [f"- not judged, **{c['claim']}**: {c['reason']}." for c in claims if c.get("reason")]
  return "\n\n".join(filter(None, [table(_HEADER, lines), "\n".join(reasons)]))


def table_text(shown: Mapping[str, Any]) -> str:
  """A table of a summary with its note."""
  note = f"\n\n{shown['note']}" if shown.get("note") else ""
  return table(shown["header"], shown["rows"]) + note


def estimate(c: Mapping[str, Any]) -> str:
  """A claim's value and interval, to the two digits of the interval's width that it warrants."""
  if c["value"] is None:
    return "–"
  bounds = [c["low"], c["high"]]
  known = None not in bounds
  width = bounds[1] - bounds[0] if known else abs(c["value"])
  digits = 2 if known else 3
  decimals = max(0, digits - 1 - math.floor(math.log10(width))) if width else 0
  shown = lambda x: f"{x:,.{decimals}f}".replace("-", "−") if decimals < 6 else f"{x:.2g}"
  return shown(c["value"]) + (f" ({shown(bounds[0])} to {shown(bounds[1])})" if known else "")
