"""The report of `bench_rl`: speed-ups, rates and seconds by phase, and learning over time."""

import operator
import pathlib
from typing import Any

from experiments.benchmarks.rl import sums
from experiments.reports import plots
from experiments.reports.markdown import duration, figure, flat, number, table
from experiments.reports.summary import backend, bench_summary, claim

_COLUMNS = ("step", *sums.PHASES)


def summary(result: dict[str, Any]) -> dict[str, Any]:
  """Returns the summary of a result, as read from results.json; the fastest peer comes first."""
  found, bench = result["contenders"], result["bench"]
  rounds = f"medians of {bench['repeats']} rounds"
  claims = [claim(f"a step of GRPO: ours against {name}", "ratio of tokens/s", ratio["step"],
                  n=rounds) for name, ratio in result["ratios"].items()]
  claims += [claim(f"training to pass@1 {bench['goal']:g}: {name}", "seconds",
                   run["seconds_to_goal"], n="one run")
             for name, run in result.get("training", {}).items() if "seconds_to_goal" in run]
  rates = [[name, *(timed["tokens_per_second"][phase] for phase in _COLUMNS),
            min(timed["by_round"]), max(timed["by_round"])] for name, timed in found.items()]
  seconds = [[name, *(timed["seconds"][phase] for phase in _COLUMNS), timed["tokens"],
              timed["mean_reward"], timed["masters"]] for name, timed in found.items()]
  title = (f"GRPO on {bench['task']}: {result['params']:,} parameters, {bench['num_prompts']} "
           f"prompts x {bench['num_generations']} completions of at most "
           f"{bench['max_completion_length']} tokens, contenders alternating on one device.")
  provenance = result | {"versions": result["versions"] | result.get("versions_of_peer", {})}
  return bench_summary("bench_rl", backend(result), title, provenance, claims=claims, tables=[
      {"name": "rates", "caption": "Tokens per second",
       "header": ["contender", *_COLUMNS, "slowest round", "fastest round"], "rows": rates},
      {"name": "seconds", "caption": "Seconds per step",
       "header": ["contender", *_COLUMNS, "tokens per step", "mean reward", "weights"],
       "rows": seconds,
       "note": "Tokens per second are the sampled tokens, up to and including the one that ends a "
               "completion, over the seconds of a phase; all values are medians over rounds. "
               "Phases that a contender does not time separately are part of its update."}])


def sections(folder: pathlib.Path, result: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns the report's sections besides the summary, and draws the figure of the training."""
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
  """Returns the speed-ups of ours over the peers; that over the fastest comes first, in bold."""
  by_round = {name: timed["by_round"] for name, timed in result["contenders"].items()}
  over = lambda pick, name: number(pick(by_round["ours"]) / pick(by_round[name]), 3)
  lines = []
  for name, ratio in result["ratios"].items():
    parts = ", ".join(f"{phase} {number(ratio[phase], 3)}" for phase in sums.PHASES)
    times = f"{number(ratio['step'], 3)} times"
    lines.append(
        f"- {times if lines else f'**{times}**'} the tokens/s of {name} ({parts}), by medians "
        f"over rounds; {over(operator.itemgetter(-1), name)} times by the last rounds, "
        f"{over(max, name)} times by the fastest")
  return "\n".join(lines) or "No peer was measured."


def _warm_up(result: dict[str, Any]) -> str:
  """States whether the contenders had reached a steady pace when they were timed."""
  if "warm_up" not in result:
    rounds = "; ".join(f"{name} {', '.join(map(number, timed['by_round']))}"
                       for name, timed in result["contenders"].items())
    return ("There were no warm-up rounds, so the first timed round was not warm, and the last is "
            f"closer to a steady pace than the median. Tokens/s by round: {rounds}.")
  warm_up = result["warm_up"]
  rounds = max(len(paced["by_round"]) for paced in warm_up.values())
  unsteady = [name for name, paced in warm_up.items() if not paced["steady"]]
  found = f"not reached by {', '.join(unsteady)}" if unsteady else "reached by all"
  return (f"{rounds} untimed warm-up rounds came first. A steady pace, at which the last two "
          f"rounds agree to within 10 %, was {found}.")


def _not_measured(result: dict[str, Any]) -> str:
  """Lists contenders that failed, and sampling methods that were not requested."""
  bench, parts = result["bench"], []
  if result["failed"]:
    parts.append(table(("contender", "reason"), result["failed"].items()))
  if bench["peer"] == "trl":
    others = [name for name in sums.GENERATION if name not in bench["peer_generation"]]
    if others:
      parts.append("TRL's other sampling methods: " + "; ".join(
          f"{name} ({sums.GENERATION[name]})" for name in others) + ".")
  if bench["peer"]:
    parts.append("vLLM, which TRL can also use for sampling.")
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
          else f"over {problems} held-out problems; repeated questions count as independent, so "
               "the intervals are too narrow")
  goal = f"time to pass@1 {result['bench']['goal']:g}"
  return (table(("contender", "pass@1 before", "pass@1 after", "steps", "time", goal), rows)
          + f"\n\n95 % intervals {over}.")
