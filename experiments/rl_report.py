"""Reports of RL runs: every arm and seed that is in a folder, beside the base."""

import json
import pathlib
import statistics

from experiments import plots
from experiments.markdown import document, duration, fenced, figure, number, origin, table
from train.run_folder import MetricsFile, write_json_atomic

_FIGURES = ("pass@1", "lenient_pass@1", "format", "length", "clipped")
_BY_ROLLOUT = {
    "reward": "reward", "completions/mean_length": "length (tokens)",
    "rewards/format/mean": "well-formed", "kl": "KL (nats per token)",
    "entropy": "entropy (nats per token)", "grad_norm": "gradient norm"}


def write_rl_report(folder: pathlib.Path) -> pathlib.Path:
  """Reads every `*/results.json` of the folder; writes report.md and results.json there."""
  runs = {path.parent.name: json.loads(path.read_text())
          for path in sorted(folder.glob("*/results.json"))}
  rows = {name: MetricsFile(folder / name / "metrics.jsonl").read() for name in runs}
  evaluations = {name: MetricsFile(folder / name / "evaluations.jsonl").read() for name in runs}
  first = next(iter(runs.values()))
  write_json_atomic(folder / "results.json", {
      "provenance": first["provenance"], "config": first["config"], "runs": [
          {key: value for key, value in run.items() if key not in ("config", "provenance")}
          for run in runs.values()]})
  return document(folder / "report.md", f"RL on {first['config']['rl']['task']}", [
      ("Before and after", _outcomes(runs)),
      ("", _verdict(runs)),
      ("Harder problems", _outcomes(runs, "harder")),
      ("The base, asked in other ways", _base(runs)),
      ("Reflections", _reflections(runs, evaluations)),
      ("Curves", figure(folder, "evaluations", "Held-out problems over steps", plots.panels,
                        _curves(evaluations, {"pass@1": "pass@1", "lenient_pass@1": "pass@1, "
                                              "read kindly", "format": "well-formed",
                                              "length": "length (tokens)"}))),
      ("", figure(folder, "rollouts", "Rollouts over steps", plots.panels,
                  _curves(rows, _BY_ROLLOUT))),
      ("Completions", _samples(folder, runs)),
      ("Cost", _cost(runs)),
      ("How to run it again", origin(first["provenance"]))])


def _cell(found: list | None) -> str:
  if found is None or found[0] is None:
    return "–"
  return f"{number(found[0], 3)} [{found[1]:.3g}, {found[2]:.3g}]"


def _outcomes(runs: dict[str, dict], split: str = "heldout") -> str:
  if not all(split in run["after"] for run in runs.values()):
    return ""
  cons = next(name for name in next(iter(runs.values()))["after"][split]
              if name.startswith("cons@"))
  best = cons.replace("cons", "pass")
  names = ("pass@1", *((best,) if best != "pass@1" else ()), cons, *_FIGURES[1:])
  row = lambda found: [_cell(found.get(name)) for name in names]
  lines = [[name, *row(base[split])] for name, base in _bases(runs).items()]
  lines += [[name, *row(run["after"][split])] for name, run in runs.items()]
  return table(("run", *names), lines) + (
      f"\n\n{_counts(runs, split)} 95 % bootstrap intervals over these. \"lenient\" finds "
      "answers without their block.")


def _counts(runs: dict[str, dict], split: str) -> str:
  found = next(iter(runs.values()))["after"][split]
  return f"{found['problems']} problems, {found['questions']} different ones."


def _verdict(runs: dict[str, dict]) -> str:
  """What RL gained, and how much of it the controls have too."""
  value = lambda run, when, name="pass@1": run[when]["heldout"][name][0]
  by_arm = {}
  for run in runs.values():
    by_arm.setdefault(run["arm"], []).append(run)
  lines = []
  for arm, done in by_arm.items():
    gain = [100 * (value(run, "after") - value(run, "base")) for run in done]
    kindly = [100 * (value(run, "after", "lenient_pass@1") - value(run, "base", "lenient_pass@1"))
              for run in done]
    lines.append([arm, len(done), *(f"{statistics.mean(x):+.1f} ({min(x):+.1f} to {max(x):+.1f})"
                                    for x in (gain, kindly))])
  return table(("arm", "seeds", "pass@1, points gained", "read kindly"), lines)


def _bases(runs: dict[str, dict]) -> dict[str, dict]:
  """By name; several arms share one."""
  return {run.get("base_name", f"base-seed{run['seed']}"): run["base"] for run in runs.values()}


def _base(runs: dict[str, dict]) -> str:
  lines = []
  for of, base in _bases(runs).items():
    for temperature, found in base.get("temperatures", {}).items():
      name = "greedy" if float(temperature) == 0 else f"temperature {temperature}"
      lines.append([of, name, *(_cell(found.get(key)) for key in _FIGURES[:3])])
  return table(("base", "sampling", *_FIGURES[:3]), lines) if lines else ""


def _reflections(runs: dict[str, dict], evaluations: dict[str, list[dict]]) -> str:
  """How often completions take something back, and what cutting that out does to accuracy."""
  rate = lambda run, when: run[when]["heldout"]["reflection"]
  most = lambda name: max((row["reflection"] for row in evaluations[name]), default=None)
  rates = [[name, _cell(rate(run, "base")), _cell(most(name)), _cell(rate(run, "after"))]
           for name, run in runs.items()]
  models = _bases(runs) | {name: run["after"] for name, run in runs.items()}
  effects = {name: found["reflection"] for name, found in models.items()
             if found.get("reflection")}
  parts = ("kept", "cut", "difference", "again", "without")
  lines = [[name, effect["completions"], effect["questions"], *(_cell(effect[x]) for x in parts)]
           for name, effect in effects.items()]
  text = table(("run", "rate in the base", "highest rate in RL", "rate after"), rates)
  if lines:
    text += "\n\n" + table(
        ("model", "completions", "questions", "accuracy, kept", "cut out", "difference",
         "reflects again", "accuracy of those that do not"), lines) + (
             "\n\nCompletions that take something back, sampled on from behind that place and from "
             "before it; 95 % bootstrap intervals over questions.")
  return text


def _curves(rows: dict[str, list[dict]], labels: dict[str, str]) -> dict:
  """By panel and run, steps and values."""
  def curve(of_run, key):
    points = [(row["step"], row[key][0] if isinstance(row[key], list) else row[key])
              for row in of_run if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]

  drawn = {label: {name: curve(of_run, key) for name, of_run in rows.items()
                   if any(row.get(key) is not None for row in of_run)}
           for key, label in labels.items()}
  return {label: curves for label, curves in drawn.items() if curves}


def _samples(folder: pathlib.Path, runs: dict[str, dict]) -> str:
  """The same problems at the first and the last evaluation."""
  parts = []
  for name in runs:
    rows = MetricsFile(folder / name / "completions.jsonl").read()
    if rows:
      steps = sorted({row["step"] for row in rows})
      shown = [row for row in rows if row["step"] in (steps[0], steps[-1])]
      parts.append(f"**{name}**\n\n" + "\n\n".join(
          f"step {row['step']}, right is {row['answer']}:\n"
          f"{fenced(row['prompt'] + row['completion'])}" for row in shown))
  return "\n\n".join(parts)


def _cost(runs: dict[str, dict]) -> str:
  lines = [[name, duration(run["cost"]["device_seconds"]), run["cost"]["tokens"],
            run["params"]] for name, run in runs.items()]
  return table(("run", "device time", "tokens sampled", "parameters"), lines)
