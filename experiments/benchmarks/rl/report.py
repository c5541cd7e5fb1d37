"""The report of `bench_rl`: speed-ups first, then phases, then learning over the wall clock."""

import operator
import pathlib
from typing import Any

from experiments.benchmarks.rl import sums
from experiments.reports import plots
from experiments.reports.markdown import duration, figure, flat, number, table
from experiments.reports.summary import backend, bench_summary, claim

_COLUMNS = ("step", *sums.PHASES)


def summary(result: dict[str, Any]) -> dict[str, Any]:
  """The summary of what results.json holds: the strongest peer comes first."""
  found, bench = result["contenders"], result["bench"]
  rounds = f"medians of {bench['repeats']} rounds"
  claims = [claim(f"a step of GRPO: ours against {name}", "ratio of tokens/s", ratio["step"],
                  n=rounds) for name, ratio in result["ratios"].items()]
  claims += [claim(f"seconds to pass@1 {bench['goal']:g}: {name}", "seconds",
                   run["seconds_to_goal"], n="one run")
             for name, run in result.get("training", {}).items() if "seconds_to_goal" in run]
  rates = [[name, *(of["tokens_per_second"][phase] for phase in _COLUMNS), min(of["by_round"]),
            max(of["by_round"])] for name, of in found.items()]
  seconds = [[name, *(of["seconds"][phase] for phase in _COLUMNS), of["tokens"],
              of["mean_reward"], of["masters"]] for name, of in found.items()]
  title = (f"GRPO on {bench['task']}: {result['params']:,} parameters, {bench['num_prompts']} "
           f"prompts x {bench['num_generations']} completions of at most "
           f"{bench['max_completion_length']} tokens, contenders alternating on one device.")
  provenance = result | {"versions": result["versions"] | result.get("versions_of_peer", {})}
  return bench_summary("bench_rl", backend(result), title, provenance, claims=claims, tables=[
      {"name": "rates", "caption": "Tokens per second",
       "header": ["contender", *_COLUMNS, "slowest round", "fastest round"], "rows": rates},
      {"name": "seconds", "caption": "Seconds per step",
       "header": ["contender", *_COLUMNS, "tokens", "reward", "weights"], "rows": seconds,
       "note": "Tokens sampled, up to and with the one that ends a completion, over the seconds of "
               "a phase; medians over rounds. Phases that a contender does not time are part of "
               "its update."}])


def sections(folder: pathlib.Path, result: dict[str, Any]) -> list[tuple[str, str]]:
  """What the report has beside the summary; draws the plot of the training."""
  training = {name: run for name, run in result.get("training", {}).items() if run["steps"]}
  return [
      ("Speed-ups", _speedups(result)),
      ("", _warm_up(result)),
      ("Training", _training(result)),
      ("", figure(folder, "training", "Reward and held-out pass@1 over each contender's own clock",
                  plots.learning, training)),
      ("Not measured", _not_measured(result)),
      ("Settings", table(("setting", "value"), flat(result["bench"])))]


def _speedups(result: dict[str, Any]) -> str:
  """Ours over every peer; the strongest comes first, and bold."""
  by_round = {name: of["by_round"] for name, of in result["contenders"].items()}
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
  """Whether the contenders ran steadily when they were timed."""
  if "warm_up" not in result:
    rounds = "; ".join(f"{name} {', '.join(map(number, of['by_round']))}"
                       for name, of in result["contenders"].items())
    return ("There were no warm-up rounds: the first timed round was not warm, and the last is "
            f"nearer to a steady pace than the median. Tokens/s by round: {rounds}.")
  warm_up = result["warm_up"]
  rounds = max(len(of["by_round"]) for of in warm_up.values())
  unsteady = [name for name, of in warm_up.items() if not of["steady"]]
  found = f"not reached by {', '.join(unsteady)}" if unsteady else "reached by all"
  return (f"{rounds} warm-up rounds came first, until the last two of every contender agree within "
          f"10 %: {found}.")


def _not_measured(result: dict[str, Any]) -> str:
  """Contenders that failed, and ways of the peer that were not asked for."""
  bench, parts = result["bench"], []
  if result["failed"]:
    parts.append(table(("contender", "reason"), result["failed"].items()))
  if bench["peer"] == "trl":
    left_out = [way for way in sums.GENERATION if way not in bench["peer_generation"]]
    if left_out:
      parts.append("TRL's other ways of sampling: " + "; ".join(
          f"{way} ({sums.GENERATION[way]})" for way in left_out) + ".")
  if bench["peer"]:
    parts.append("vLLM, with which TRL can sample.")
  return "\n\n".join(parts)


def _training(result: dict[str, Any]) -> str:
  rows = []
  for name, run in result.get("training", {}).items():
    if run["evaluations"]:
      first, last = run["evaluations"][0], run["evaluations"][-1]
      reached = run.get("seconds_to_goal")
      rows.append([name, *("{:.3f} [{:.3f}, {:.3f}]".format(*one["pass@1"])
                           for one in (first, last)), last["step"], duration(last["time"]),
                   "not reached" if reached is None else duration(reached)])
  if not rows:
    return ""
  problems, questions = result["bench"]["eval_problems"], result.get("heldout_questions")
  over = (f"over the {questions} distinct questions of {problems} held-out problems" if questions
          else f"over {problems} held-out problems, repeated questions counted as independent, so "
               "they are too narrow")
  goal = f"to pass@1 {result['bench']['goal']:g}"
  return (table(("contender", "pass@1 before", "after", "steps", "clock", goal), rows)
          + f"\n\n95 % intervals {over}.")
