"""The report of `bench_rl`: the ratio first, then phases, then learning over the wall clock."""

import json
import pathlib
from typing import Any

from experiments import plots
from experiments.bench_rl_sides import PHASES
from experiments.markdown import document, duration, figure, flat, number, origin, table

_COLUMNS = ("step", *PHASES)


def write_bench_report(folder: pathlib.Path) -> pathlib.Path:
  """Reads results.json of the folder; writes report.md and its plot there."""
  result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
  training = {name: run for name, run in result.get("training", {}).items() if run["steps"]}
  head = {key: result[key] for key in ("command", "commit", "dirty", "device", "cpu", "cores",
                                       "versions")}
  head["versions"] = head["versions"] | result.get("versions_of_peer", {})
  return document(folder / "report.md", f"GRPO on {result['bench']['task']}", [
      ("Ratio", _ratio(result)),
      ("Phases", _phases(result["sides"])),
      ("Training", _training(result)),
      ("", figure(folder, "training", "Reward and held-out pass@1 over each side's own clock",
                  plots.learning, training)),
      ("Left out", table(("side", "why"), result["failed"].items()) if result["failed"] else ""),
      ("Settings", table(("setting", "value"), flat(result["bench"]))),
      ("How to run it again", origin(head))])


def _ratio(result: dict[str, Any]) -> str:
  """Ours over every peer; the strongest comes first, and bold."""
  lines = []
  for name, ratio in result["ratios"].items():
    parts = ", ".join(f"{phase} {number(ratio[phase], 3)}" for phase in PHASES)
    times = f"{number(ratio['step'], 3)} times"
    lines.append(f"- {times if lines else f'**{times}**'} the tokens/s of {name} ({parts})")
  return "\n".join(lines) or "No peer was measured."


def _phases(sides: dict[str, dict]) -> str:
  rates = table(("tokens/s", *_COLUMNS, "slowest round", "fastest round"), [
      [name, *(side["tokens_per_second"][phase] for phase in _COLUMNS), min(side["by_round"]),
       max(side["by_round"])] for name, side in sides.items()])
  seconds = table(("seconds a step", *_COLUMNS, "tokens", "reward", "weights"), [
      [name, *(side["seconds"][phase] for phase in _COLUMNS), side["tokens"], side["mean_reward"],
       side["masters"]]
      for name, side in sides.items()])
  return (f"{rates}\n\n{seconds}\n\nTokens sampled, up to and with the one that ends a turn, over "
          "the seconds of a phase; medians over rounds. Phases that others leave unnamed are in "
          "their update.")


def _training(result: dict[str, Any]) -> str:
  rows = []
  for name, run in result.get("training", {}).items():
    if run["evaluations"]:
      first, last = run["evaluations"][0], run["evaluations"][-1]
      reached = run.get("seconds_to_goal")
      rows.append([name, *("{:.3f} [{:.3f}, {:.3f}]".format(*one["pass@1"])
                           for one in (first, last)), last["step"], duration(last["time"]),
                   "not reached" if reached is None else duration(reached)])
  goal = f"to pass@1 {result['bench']['goal']:g}"
  return table(("side", "pass@1 before", "after", "steps", "clock", goal), rows) if rows else ""

