"""GRPO beside a peer, in one run: the same model, problems, lengths, reward and learning rate.

The sides take turns on the device. First each takes a few steps from the first weights, again and
again until all run steadily, and then as often as is timed: tokens/s of every phase. Then each
trains to the goal, or as long as it may, with evaluations on held-out problems that the clock does
not count. What is there so far is written after every part, so that a run that is cut off has not
been for nothing.

Shape letters:  P held-out problems  Q their distinct questions
"""

import collections
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import provenance, settings, sums
from experiments.bench_rl_report import write_bench_report
from experiments.bench_rl_sides import Bench, Ours, Peer, Side
from experiments.options import Options
from rl.pass_rates import interval
from train.config_io import to_dict

_STEADY = 0.1  # by which a side's last two rounds may differ, of the faster


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """See `Bench`."""

  bench: Bench = dataclasses.field(default_factory=Bench)


def main(options: Options) -> None:
  options.refuse("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  bench = settings.apply(BenchConfig(), options.settings).bench
  if not bench.model:
    raise ValueError("say which model to train: --set bench.model=DIR, a Hugging Face folder")
  if bench.peer:
    # Read when the device is first used: the sides share its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  folder = options.folder("bench_rl")
  folder.mkdir(parents=True, exist_ok=True)
  result: dict[str, Any] = {"bench": to_dict(bench), "failed": {}}

  def save() -> None:
    # Whatever was there: this folder's results are of one run.
    provenance.record(folder, result)
    write_bench_report(folder)

  ours = Ours(bench)
  result["params"] = ours.cfg.param_count()
  result["heldout_questions"] = len(set(ours.questions))
  peers, sides = [], [ours]
  with tempfile.TemporaryDirectory() as work:
    config = pathlib.Path(work) / "peer.json"
    config.write_text(json.dumps(ours.for_peers()), encoding="utf-8")
    try:
      ways = bench.peer_generation if bench.peer == "trl" else ("generate",)
      peers += [Peer(bench, way, config) for way in ways if bench.peer]
      sides += _warm(ours, peers, result)
      settle(bench, sides, result)
      _time(bench, sides, result)
      save()
      if bench.minutes:
        _train_all(bench, sides, ours.questions, result, save)
    finally:
      for peer in peers:
        peer.quit()
  print((folder / "report.md").read_text(encoding="utf-8"))


def _warm(ours: Ours, peers: Sequence[Peer], result: dict[str, Any]) -> list[Peer]:
  """Compiles ours while the peers warm up; returns those that can run."""
  ours.warm_up()
  alive = []
  for peer in peers:
    if _tried(peer, lambda peer=peer: peer.ready(ours.cfg.param_count()), result):
      alive.append(peer)
      result["versions_of_peer"] = peer.versions
  return alive


def _tried(side: Side, what: Callable[[], Any], result: dict[str, Any]) -> bool:
  """Does it; a peer that fails is noted, and the others go on."""
  try:
    what()
    return True
  except ValueError as error:
    if not isinstance(side, Peer):
      raise
    print(f"left out: {error}", file=sys.stderr)
    result["failed"][side.name] = str(error)
    side.quit()
    return False


def settle(bench: Bench, sides: list[Side], result: dict[str, Any]) -> None:
  """Warms up round by round, until all sides' rounds are steady.

  Args:
    bench: says how many rounds at most.
    sides: a peer that fails is removed.
    result: gets "warm_up": by side "by_round", tokens/s of whole steps, and "steady".
  """
  rounds = collections.defaultdict(list)
  for _ in range(bench.warm_up_rounds):
    _round(bench, sides, rounds, result)
    rates = {side.name: [_rate(steps) for steps in rounds[side.name]] for side in sides}
    result["warm_up"] = {name: {"by_round": by_round, "steady": steady(by_round)}
                         for name, by_round in rates.items()}
    if all(side["steady"] for side in result["warm_up"].values()):
      return


def steady(rates: Sequence[float]) -> bool:
  """Whether the last two rounds' tokens/s agree within a tenth of the faster."""
  last = rates[-2:]
  return len(last) == 2 and max(last) - min(last) <= _STEADY * max(last)


def _round(bench: Bench, sides: list[Side], rounds: dict[str, list], result: dict[str, Any]):
  """A turn for each; who fails leaves `sides`."""
  for side in tuple(sides):
    def turn(side=side):
      side.reset()
      rounds[side.name].append(side.go(bench.steps_timed))
    if not _tried(side, turn, result):
      sides.remove(side)


def _rate(steps: Sequence[dict[str, float]]) -> float:
  return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def _time(bench: Bench, sides: list[Side], result: dict[str, Any]) -> None:
  """Alternates, and compares medians."""
  rounds = collections.defaultdict(list)
  for _ in range(bench.repeats):
    _round(bench, sides, rounds, result)
  result["sides"] = {side.name: summary(rounds[side.name]) | {"masters": side.masters}
                     for side in sides}
  rates = {name: found["tokens_per_second"] for name, found in result["sides"].items()}
  # The strongest first.
  rivals = sorted(set(rates) - {"ours"}, key=lambda name: rates[name]["step"], reverse=True)
  result["ratios"] = {name: {phase: rates["ours"][phase] / rate
                             for phase, rate in rates[name].items()} for name in rivals}


def summary(rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
  """Medians over rounds of a side.

  Args:
    rounds: of each its steps, as `Side.go` has them.

  Returns:
    By phase and for the whole step "seconds" (a step's) and "tokens_per_second"; "tokens" of a
    step, "mean_reward", and "by_round", tokens/s of whole steps.
  """
  total = lambda steps, name: sum(step[name] for step in steps)
  median = lambda values: float(np.median(list(values)))
  names = dict(zip((*sums.PHASES, "step"), (*sums.PHASES, "seconds"), strict=True))
  return {
      "seconds": {phase: median(total(steps, name) / len(steps) for steps in rounds)
                  for phase, name in names.items()},
      "tokens_per_second": {phase: median(total(steps, "tokens") / total(steps, name)
                                          for steps in rounds) for phase, name in names.items()},
      "tokens": median(total(steps, "tokens") / len(steps) for steps in rounds),
      "mean_reward": median(total(steps, "mean_reward") / len(steps) for steps in rounds),
      "by_round": [_rate(steps) for steps in rounds]}


def _train_all(bench: Bench, sides: list[Side], questions: Sequence[str],
               result: dict[str, Any], save: Callable[[], None]) -> None:
  """Ours, and then the fastest peer of those that can learn at this rate."""
  speed = lambda side: result["sides"][side.name]["tokens_per_second"]["step"]
  ours, *rivals = sides
  # Small steps vanish in weights of bfloat16.
  able = [peer for peer in rivals if peer.masters == "float32"]
  chosen = max(able, key=speed, default=None)
  for peer in rivals:
    if peer is not chosen:
      peer.quit()
  result["training"] = {}
  for side in (ours, chosen) if chosen else (ours,):
    run = result["training"].setdefault(side.name, {"evaluations": [], "steps": []})
    _tried(side, lambda side=side, run=run: train(bench, side, questions, run, save), result)
    save()


def by_question(rates_P: Sequence[float], questions_P: Sequence[str]) -> np.ndarray:
  """The mean rate of each distinct question, float [Q]: equal ones are not independent."""
  _, of_P = np.unique(questions_P, return_inverse=True)
  return np.bincount(of_P, weights=rates_P) / np.bincount(of_P)


def train(bench: Bench, side: Side, questions: Sequence[str], run: dict[str, Any],
          save: Callable[[], None]) -> None:
  """Trains from the first weights to the goal, or for `bench.minutes` of the side's own clock.

  Args:
    bench: says how long.
    side: who.
    questions: of the held-out problems; pass@1 and its interval are over the distinct ones.
    run: "steps" and "evaluations" are appended to its lists, each with the clock's "time" in
      seconds; "seconds_to_goal" is set if the goal is reached.
    save: called after every evaluation.
  """
  side.reset()
  clock = 0.0
  while True:
    rate = interval(by_question(side.evaluate(), questions))
    run["evaluations"].append({"time": clock, "step": len(run["steps"]), "pass@1": list(rate)})
    if rate.estimate >= bench.goal:
      run["seconds_to_goal"] = clock
    save()
    if "seconds_to_goal" in run or clock >= 60 * bench.minutes:
      return
    for step in side.go(bench.eval_every):
      clock += step["seconds"]
      run["steps"].append(step | {"time": clock})
