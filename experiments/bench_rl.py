"""GRPO beside a peer, in one run: the same model, problems, lengths, reward and learning rate.

The sides take turns on the device: first a few timed steps each from the first weights, again and
again, in which tokens/s of every phase are measured; then each trains, to the goal or as long as it
may, with evaluations on held-out problems that the clock does not count. What is there so far is
written after every part, so that a run that is cut off has not been for nothing.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import provenance, settings
from experiments.bench_rl_report import write_bench_report
from experiments.bench_rl_sides import PHASES, Bench, Ours, Peer, Side
from experiments.options import Options
from rl.pass_rates import interval
from train.config_io import to_dict


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
  result: dict[str, Any] = {"bench": to_dict(bench), "failed": {}}

  def save() -> None:
    # Whatever was there: this folder's results are of one run.
    provenance.record(folder, result)
    write_bench_report(folder)

  ours = Ours(bench)
  result["params"] = ours.cfg.param_count()
  peers, sides = [], [ours]
  with tempfile.TemporaryDirectory() as work:
    config = pathlib.Path(work) / "peer.json"
    config.write_text(json.dumps(ours.for_peers()), encoding="utf-8")
    try:
      ways = bench.peer_generation if bench.peer == "trl" else ("generate",)
      peers += [Peer(bench, way, config) for way in ways if bench.peer]
      sides += _warm(ours, peers, result)
      _time(bench, sides, result)
      save()
      if bench.minutes:
        _train_all(bench, sides, result, save)
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


def _time(bench: Bench, sides: list[Side], result: dict[str, Any]) -> None:
  """Alternates; what fails leaves `sides`."""
  rounds = {side.name: [] for side in sides}
  for _ in range(bench.repeats):
    for side in tuple(sides):
      def turn(side=side):
        side.reset()
        rounds[side.name].append(side.go(bench.steps_timed))
      if not _tried(side, turn, result):
        sides.remove(side)
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
  names = dict(zip((*PHASES, "step"), (*PHASES, "seconds"), strict=True))
  by_round = [total(steps, "tokens") / total(steps, "seconds") for steps in rounds]
  return {
      "seconds": {phase: median(total(steps, name) / len(steps) for steps in rounds)
                  for phase, name in names.items()},
      "tokens_per_second": {phase: median(total(steps, "tokens") / total(steps, name)
                                          for steps in rounds) for phase, name in names.items()},
      "tokens": median(total(steps, "tokens") / len(steps) for steps in rounds),
      "mean_reward": median(total(steps, "mean_reward") / len(steps) for steps in rounds),
      "by_round": by_round}


def _train_all(bench: Bench, sides: list[Side], result: dict[str, Any],
               save: Callable[[], None]) -> None:
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
    _tried(side, lambda side=side, run=run: train(bench, side, run, save), result)
    save()


def train(bench: Bench, side: Side, run: dict[str, Any], save: Callable[[], None]) -> None:
  """Trains from the first weights to the goal, or for `bench.minutes` of the side's own clock.

  Args:
    bench: says how long.
    side: who.
    run: "steps" and "evaluations" are appended to its lists, each with the clock's "time" in
      seconds; "seconds_to_goal" is set if the goal is reached.
    save: called after every evaluation.
  """
  side.reset()
  clock = 0.0
  while True:
    rate = interval(np.array(side.evaluate()))
    run["evaluations"].append({"time": clock, "step": len(run["steps"]), "pass@1": list(rate)})
    if rate.estimate >= bench.goal:
      run["seconds_to_goal"] = clock
    save()
    if "seconds_to_goal" in run or clock >= 60 * bench.minutes:
      return
    for step in side.go(bench.eval_every):
      clock += step["seconds"]
      run["steps"].append(step | {"time": clock})
