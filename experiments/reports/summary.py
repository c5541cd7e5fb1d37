"""Summaries: the values of a result that the index, README and docs quote.

A summary is an object with "experiment", "scale", "title", "claims", "tables" and "provenance";
that of a study also has its "definition". A claim has

    "claim"        what is claimed, or what was measured
    "metric"       the metric of the estimate
    "claimed"      the criterion, such as "above 0.02", or the target; empty if there is none
    "reference"    the value of the paper or of baselines, in words
    "value", "low", "high"    the estimate and its 95 % interval; None if unknown
    "n"            the basis of the estimate, in words, such as "7 rounds"
    "verdict"      that of a study; "met", "missed" or "unresolved" if there is a target; otherwise
                   "measured"
    "reason"       why no verdict could be given; otherwise absent
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reports.labels import metric_label
from experiments.reports.markdown import number, plain_command, table

_HEADER = ("claim", "metric", "claimed", "paper or baseline", "measured", "basis", "verdict")
# Set by the command itself where the CPU has these vectors; see `experiments.run`.
_AUTOMATIC_FLAGS = ("--xla_cpu_prefer_vector_width",)


def claim(text: str, metric: str, value: float | None, low: float | None = None,
          high: float | None = None, *, claimed: str = "", reference: str = "", n: str = "",
          verdict: str = "measured", reason: str | None = None) -> dict[str, Any]:
  """Returns a claim, see the top of this file; values that are not finite become None."""
  bound = lambda x: None if x is None or not math.isfinite(x) else x
  found = {"claim": text, "metric": metric, "claimed": claimed, "reference": reference,
           "value": bound(value), "low": bound(low), "high": bound(high), "n": n,
           "verdict": verdict}
  return found | ({"reason": reason} if reason else {})


def target(text: str, metric: str, estimate: Sequence[float], *, at_least: float | None = None,
           at_most: float | None = None, n: str = "") -> dict[str, Any]:
  """Returns the claim that an estimate meets a target.

  The target is met if the whole interval reaches it, missed if none of the interval does, and
  otherwise unresolved.

  Args:
    text: what is claimed.
    metric: the metric of the estimate.
    estimate: the value with its interval, (value, low, high), or the value alone, (value,).
    at_least: the target, if it is a lower bound.
    at_most: the target, if it is an upper bound.
    n: the basis of the estimate, in words.
  """
  verdict, goal = target_verdict(estimate, at_least=at_least, at_most=at_most)
  return claim(text, metric, *estimate, claimed=goal, n=n, verdict=verdict)


def target_verdict(estimate: Sequence[float | None], *, at_least: float | None = None,
                   at_most: float | None = None) -> tuple[str, str]:
  """Returns the verdict on a target and the target in words, for the arguments of `target`."""
  value, *bounds = estimate
  low, high = bounds or (value, value)
  low, high = -math.inf if low is None else low, math.inf if high is None else high
  if at_least is not None:
    met, missed, goal = low >= at_least, high < at_least, f"at least {at_least:g}"
  else:
    met, missed, goal = high <= at_most, low > at_most, f"at most {at_most:g}"
  return "met" if met else "missed" if missed else "unresolved", goal


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
            claimed=criterion(c["claim"], c["metric"]), reference=c["paper"],
            n=_seeds(c["paired"]["n"]), verdict=c["verdict"], reason=c.get("not_judged"))
      | {"arm": c["arm"], "baseline": c["baseline"],
         "minimum_detectable_effect": c["paired"]["detectable"]} for c in result["comparisons"]]
  return {
      "experiment": result["name"], "scale": result["scale"], "title": result["claim"],
      "source": result["source"], "claims": claims, "tables": [],
      "seed_standard_deviation": result["noise"], "cost": result["total_cost"],
      "runs": len(result["runs"]), "definition": result["definition"],
      "judged_by": result.get("judged_by"), "measured_by": result.get("measured_by", [None]),
      "provenance": short_provenance(result["provenance"])}


def _seeds(count: int) -> str:
  return f"{count} seed{'s' * (count != 1)}"


def short_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what identifies a result's origin; its command with the XLA flags that were set."""
  kept = ("commit", "dirty", "sources", "versions", "xla_flags", "device", "cpu", "cores")
  command = plain_command(provenance["command"])
  flags = provenance.get("xla_flags")
  if isinstance(flags, str) and not flags.startswith(_AUTOMATIC_FLAGS):
    prefix = f"XLA_FLAGS={shlex.quote(flags)} "
    command = prefix + command.removeprefix(prefix)  # a committed command has it already
  return {"command": command} | {
      name: provenance[name] for name in kept if provenance.get(name) is not None}


def of_numerics(result: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the scale of a result, such as "gpu-bfloat16-deterministic", and its numerics in words.
  """
  numerics = result["numerics"]
  scale = f"{backend(result)}-{numerics}"
  if "deterministic_ops=true" not in (result.get("xla_flags") or ""):
    return scale, numerics
  return f"{scale}-deterministic", f"{numerics}, deterministic operations"


def backend(provenance: Mapping[str, Any]) -> str:
  """Returns "cpu", "gpu" or "tpu" by the device's name: the scale of benchmarks without scales."""
  device = str(provenance["device"]).lower()
  return next((name for name in ("cpu", "tpu") if name in device), "gpu")


def claims_table(claims: Sequence[Mapping[str, Any]], results: Sequence[str] = ()) -> str:
  """Returns a table of claims with their estimates, and the reasons why some were not judged.

  Columns without any entry are left out.

  Args:
    claims: the claims.
    results: the name of each claim's result, for a first column; empty for a single result.
  """
  if not claims:
    return ""
  lines = [(c["claim"], metric_of(c), c["claimed"] or None, c["reference"] or None, estimate(c),
            c["n"] or None, f"**{c['verdict']}**") for c in claims]
  header = _HEADER
  if results:
    header, lines = ("result", *header), [(name, *line) for name, line in
                                          zip(results, lines, strict=True)]
  used = [i for i in range(len(header)) if any(line[i] is not None for line in lines)]
  shown = table([header[i] for i in used], [[line[i] for i in used] for line in lines])
  reasons = not_judged({c["claim"]: c["reason"] for c in claims if c.get("reason")}, len(claims))
  return "\n\n".join(filter(None, [shown, reasons]))


def not_judged(reasons: Mapping[str, str], count: int) -> str:
  """Returns why claims were not judged, as a list with an entry for each reason.

  Args:
    reasons: the reasons, by claim.
    count: number of all claims.
  """
  claims: dict[str, list[str]] = {}
  for claim, reason in reasons.items():
    claims.setdefault(reason, []).append(f"**{claim}**")
  return "\n".join(
      f"- none of the claims is judged: {reason}." if len(names) == count > 1
      else f"- not judged, {', '.join(names)}: {reason}." for reason, names in claims.items())


def is_relative(metric: str) -> bool:
  """Whether a metric is a logarithm, whose differences are shown as relative differences in %."""
  return metric.startswith("log_")


def metric_of(c: Mapping[str, Any]) -> str:
  """Returns the label of a claim's metric, and whether the claim is about a difference in it."""
  label = metric_label(c["metric"])
  if is_relative(c["metric"]):
    return f"relative difference in {label.removeprefix('log ')}"
  return f"difference in {label}" if c.get("baseline") else label


def criterion(claim: Mapping[str, Any], metric: str) -> str:
  """Returns the criterion of a claim in words, from the fields of `experiments.stats.Claim`."""
  shown = (lambda x: f"{number(100 * math.expm1(x), 3)} %") if is_relative(metric) else number
  if claim["kind"] == "equivalent":
    return f"within ±{shown(claim['margin'])}"
  bound = claim["threshold"] if claim["kind"] == "threshold" else (
      claim["sign"] * claim.get("margin", 0.0))
  return f"{'above' if claim['sign'] > 0 else 'below'} {shown(bound) if bound else 0}"


def table_text(shown: Mapping[str, Any]) -> str:
  """Returns a table of a summary, with its note."""
  note = f"\n\n{shown['note']}" if shown.get("note") else ""
  return table(shown["header"], shown["rows"]) + note


def estimate(c: Mapping[str, Any]) -> str:
  """Returns a claim's value and interval as text, to two digits of the interval's width."""
  if c["value"] is None:
    return "–"
  values = [c["value"], c["low"], c["high"]]
  unit = ""
  if is_relative(c["metric"]):
    values = [None if value is None else 100 * math.expm1(value) for value in values]
    unit = " %"
  value, *bounds = values
  known = None not in bounds
  width = bounds[1] - bounds[0] if known else abs(value)
  digits = 2 if known else 3
  decimals = max(0, digits - 1 - math.floor(math.log10(width))) if width else 0
  shown = lambda x: f"{x:,.{decimals}f}".replace("-", "−") if decimals < 6 else f"{x:.2g}"
  return shown(value) + unit + (
      f" ({shown(bounds[0])} to {shown(bounds[1])}{unit})" if known else "")
