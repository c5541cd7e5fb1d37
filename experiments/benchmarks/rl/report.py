"""The report of `bench_rl`: the ratio first, then phases, then learning over the wall clock."""

import json
import operator
import pathlib
from typing import Any

from experiments.benchmarks.rl import sums
from experiments.reports import plots
from experiments.reports.markdown import document, duration, figure, flat, number, origin, table

_COLUMNS = ("step", *sums.PHASES)


def write_bench_report(folder: pathlib.Path) -> pathlib.Path:
  """Reads results.json of the folder; writes report.md and its plot there."""
  result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
  training = {name: run for name, run in result.get("training", {}).items() if run["steps"]}
  head = {key: result[key] for key in ("command", "commit", "dirty", "device", "cpu", "cores",
                                       "versions")}
  head["versions"] = head["versions"] | result.get("versions_of_peer", {})
  return document(folder / "report.md", f"GRPO on {result['bench']['task']}", [
      ("Ratio", _ratio(result)),
      ("", _warm_up(result)),
      ("Phases", _phases(result["sides"])),
      ("Training", _training(result)),
      ("", figure(folder, "training", "Reward and held-out pass@1 over each side's own clock",
                  plots.learning, training)),
      ("Left out", _left_out(result)),
      ("Settings", table(("setting", "value"), flat(result["bench"]))),
      ("How to run it again", origin(head))])


def _ratio(result: dict[str, Any]) -> str:
  """Ours over every peer; the strongest comes first, and bold."""
  by_round = {name: side["by_round"] for name, side in result["sides"].items()}
  over = lambda pick, name: number(pick(by_round["ours"]) / pick(by_round[name]), 3)
  lines = []
  for name, ratio in result["ratios"].items():
    parts = ", ".join(f"{phase} {number(ratio[phase], 3)}" for phase in sums.PHASES)
    times = f"{number(ratio['step'], 3)} times"
    lines.append(
        f"- {times if lines else f'**{times}**'} the tokens/s of {name} ({parts}) by medians; last "
        f"round against last {over(operator.itemgetter(-1), name)}, fastest against fastest "
        f"{over(max, name)}")
  return "\n".join(lines) or "No peer was measured."


def _warm_up(result: dict[str, Any]) -> str:
  """Whether the sides ran steadily when they were timed."""
  if "warm_up" not in result:
    rounds = "; ".join(f"{name} {', '.join(map(number, side['by_round']))}"
                       for name, side in result["sides"].items())
    return ("No rounds to warm up came before these: the first was not warm, and the last is "
            f"nearer to a steady pace than the median. Tokens/s by round: {rounds}.")
  warm_up = result["warm_up"]
  rounds = max(len(side["by_round"]) for side in warm_up.values())
  unsteady = [name for name, side in warm_up.items() if not side["steady"]]
  found = f"not reached by {', '.join(unsteady)}" if unsteady else "reached by all"
  return (f"{rounds} rounds to warm up came before those timed, until each side's last two agree "
          f"within 10 %: {found}.")


def _left_out(result: dict[str, Any]) -> str:
  """Sides that failed, and ways of the peer that nobody asked for."""
  bench, parts = result["bench"], []
  if result["failed"]:
    parts.append(table(("side", "why"), result["failed"].items()))
  if bench["peer"] == "trl":
    unasked = [way for way in sums.GENERATION if way not in bench["peer_generation"]]
    if unasked:
      parts.append("Ways of TRL to sample that were not run: " + "; ".join(
          f"{way} ({sums.GENERATION[way]})" for way in unasked) + ".")
  if bench["peer"]:
    parts.append("vLLM, with which TRL can sample, was not measured.")
  return "\n\n".join(parts)


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
  if not rows:
    return ""
  problems, questions = result["bench"]["eval_problems"], result.get("heldout_questions")
  over = (f"over the {questions} distinct questions of {problems} held-out problems" if questions
          else f"over {problems} held-out problems; those that ask the same were taken as "
               "independent, so they are too narrow")
  return (table(("side", "pass@1 before", "after", "steps", "clock", goal), rows)
          + f"\n\nIntervals of 95 % are {over}.")

