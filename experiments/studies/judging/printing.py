"""What a study prints when it has been judged."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.reports.study_report import again_of, power_of
from experiments.studies.study import Study


def verdict_lines(study: Study, result: Mapping[str, Any]) -> Iterator[str]:
  """Yields lines about the noise, every claim, and the cost.

  Args:
    study: the study.
    result: the content of results.json.
  """
  metrics = dict.fromkeys(c.metric for c in study.comparisons)
  deviations = ", ".join(f"{metric} {result['noise'][metric]:.2g}" for metric in metrics
                         if metric in result["noise"])
  if deviations or not result["missing"]:
    yield f"seed standard deviation of {study.baseline}: {deviations or 'needs two seeds'}"
  for c in result["comparisons"]:
    again, power = again_of(result, c["metric"]), power_of(c)
    yield (f"{c['verdict']:12} {c['name']}: {c['paired']['mean']:+.4g} {_interval(c)}; "
           f"paper: {c['paper'] or 'no value'}"
           + (f"; A/A: {again}" if again else "") + (f"; power: {power}" if power else "")
           + (f"; not judged: {c['not_judged']}" if "not_judged" in c else ""))
  if result["confirmed_by"]:
    yield f"a contradicted claim is a surprise: confirm it on fresh seeds, {result['confirmed_by']}"
  if result["runs"]:
    spent = result["total_cost"]
    joules = "" if spent["joules"] is None else f", {spent['joules'] / 1e3:.1f} kJ"
    runs = f"{len(result['runs'])} run{'s' * (len(result['runs']) != 1)}"
    yield (f"{runs} cost {spent['device_seconds'] / 60:.1f} device-minutes, "
           f"{spent['flops']:.3g} FLOP{joules}")


def _interval(comparison: Mapping[str, Any]) -> str:
  pair = comparison["paired"]
  if pair["n"] == 1:
    return "on one seed, which gives no interval"
  detectable = (f", minimum detectable effect {pair['detectable']:.2g}"
                if comparison["claim"]["kind"] != "equivalent" else "")
  return f"[{pair['low']:.4g}, {pair['high']:.4g}] on {pair['n']} seeds{detectable}"
