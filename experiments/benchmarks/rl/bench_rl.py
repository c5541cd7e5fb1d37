"""Time GRPO against TRL, with the same model, problems, lengths, reward and learning rate.

The contenders alternate on the device. In every round, each takes a few steps from the initial
weights. Untimed rounds come first, until all contenders run at a steady pace; the timed rounds then
give the tokens/s of every phase. After that, ours and the fastest peer that can learn at this
learning rate train until they reach the goal or the time limit, with evaluations on held-out
problems that their clocks do not count. Results are written after every part, so that an
interrupted run keeps what it has measured.

Shape letters:  P held-out problems  Q their distinct questions
"""

import collections
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import settings
from experiments.benchmarks.rl import sums
from experiments.benchmarks.rl.contenders import Bench, OwnTrainer, PeerTrainer, Trainer
from experiments.benchmarks.rl.report import sections, summary
from experiments.benchmarks.timing import attempt, require_packages
from experiments.options import Options, writes_results
from experiments.reports import results
from rl.pass_rates import interval
from train.config_io import to_dict

# Largest difference between a contender's last two rounds at a steady pace, relative to the faster.
_STEADY = 0.1


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """The benchmark's settings.

  Attributes:
    bench: what is trained, and how it is timed.
  """

  bench: Bench = dataclasses.field(default_factory=Bench)


CONFIG = BenchConfig()


def main(options: Options) -> None:
  _measure(dataclasses.replace(options, out=options.folder("bench_rl")))


@writes_results
def _measure(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  bench = settings.apply(CONFIG, options.settings).bench
  if not bench.model:
    raise ValueError("there is no model to train: --set bench.model=DIR, a Hugging Face folder")
  if bench.peer:
    needed = ("torch", "transformers") + (("trl", "datasets") if bench.peer == "trl" else ())
    require_packages(bench.peer_python, needed, "bench.peer_python")
    # JAX reads this when it first uses the device, whose memory the contenders share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  result: dict[str, Any] = {"bench": to_dict(bench), "failed": {}}

  def save() -> None:
    # Overwrites earlier results: the folder holds those of a single run.
    results.record(options.out, result, summary, sections)

  ours = OwnTrainer(bench)
  result["params"] = ours.cfg.param_count()
  result["heldout_questions"] = len(set(ours.questions))
  peers: list[PeerTrainer] = []
  with tempfile.TemporaryDirectory() as work:
    config = pathlib.Path(work) / "peer.json"
    config.write_text(json.dumps(ours.for_peers()), encoding="utf-8")
    try:
      generations = bench.peer_generation if bench.peer == "trl" else ("generate",)
      peers += [PeerTrainer(bench, generation, config)
                for generation in generations if bench.peer]
      contenders = [ours, *_warm(ours, peers, result)]
      warm_up(bench, contenders, result)
      _time(bench, contenders, result)
      save()
      if bench.minutes:
        _train_all(bench, contenders, ours.questions, result, save)
    finally:
      for peer in peers:
        peer.quit()
  print((options.out / "report.md").read_text(encoding="utf-8"))


def _warm(ours: OwnTrainer, peers: Sequence[PeerTrainer],
          result: dict[str, Any]) -> list[PeerTrainer]:
  """Compiles ours while the peers warm up; returns the peers that can run."""
  ours.warm_up()
  alive = list(peers)
  attempt(alive, lambda peer: peer.ready(ours.cfg.param_count()), result["failed"])
  for peer in alive:
    result["versions_of_peer"] = peer.versions
  return alive


def warm_up(bench: Bench, contenders: list[Trainer], result: dict[str, Any]) -> None:
  """Runs untimed rounds until every contender's pace is steady.

  Args:
    bench: the settings, which limit the number of rounds.
    contenders: the contenders in order; those that fail are removed from the list.
    result: receives "warm_up": by contender, "by_round", the tokens/s of whole steps in every
      round, and whether the pace is "steady".
  """
  rounds = collections.defaultdict(list)
  for _ in range(bench.warm_up_rounds):
    _round(bench, contenders, rounds, result)
    rates = {contender.name: [_rate(steps) for steps in rounds[contender.name]]
             for contender in contenders}
    result["warm_up"] = {name: {"by_round": by_round, "steady": steady(by_round)}
                         for name, by_round in rates.items()}
    if all(found["steady"] for found in result["warm_up"].values()):
      return


def steady(rates: Sequence[float]) -> bool:
  """Whether the tokens/s of the last two rounds agree to within a tenth of the faster."""
  last = rates[-2:]
  return len(last) == 2 and max(last) - min(last) <= _STEADY * max(last)


def _round(bench: Bench, contenders: list[Trainer], rounds: dict[str, list],
           result: dict[str, Any]) -> None:
  """Lets every contender take its steps; those that fail are removed from `contenders`."""
  def turn(contender: Trainer) -> None:
    contender.reset()
    rounds[contender.name].append(contender.steps(bench.steps_timed))

  attempt(contenders, turn, result["failed"])


def _rate(steps: Sequence[dict[str, float]]) -> float:
  return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def _time(bench: Bench, contenders: list[Trainer], result: dict[str, Any]) -> None:
  """Times alternating rounds, and compares the contenders by their medians."""
  rounds = collections.defaultdict(list)
  for _ in range(bench.repeats):
    _round(bench, contenders, rounds, result)
  result["contenders"] = {
      contender.name: medians(rounds[contender.name]) | {"masters": contender.masters}
      for contender in contenders}
  rates = {name: found["tokens_per_second"] for name, found in result["contenders"].items()}
  # The fastest first.
  rivals = sorted(set(rates) - {"ours"}, key=lambda name: rates[name]["step"], reverse=True)
  result["ratios"] = {name: {phase: rates["ours"][phase] / rate
                             for phase, rate in rates[name].items()} for name in rivals}


def medians(rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
  """Returns a contender's medians over rounds.

  Args:
    rounds: the steps of every round, as `Trainer.steps` returns them.

  Returns:
    "seconds" per step and "tokens_per_second", each by phase and for the whole "step"; "tokens" per
    step; "mean_reward"; and "by_round", the tokens/s of whole steps in every round.
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


def _train_all(bench: Bench, contenders: list[Trainer], questions: Sequence[str],
               result: dict[str, Any], save: Callable[[], None]) -> None:
  """Trains ours, then the fastest of those peers that can learn at this learning rate."""
  speed = lambda contender: result["contenders"][contender.name]["tokens_per_second"]["step"]
  ours, *rivals = contenders
  # Updates as small as these are rounded away in bfloat16 weights.
  able = [peer for peer in rivals if peer.masters == "float32"]
  chosen = max(able, key=speed, default=None)
  for peer in rivals:
    if peer is not chosen:
      peer.quit()
  result["training"] = {}
  for contender in (ours, chosen) if chosen else (ours,):
    run = result["training"].setdefault(contender.name, {"evaluations": [], "steps": []})
    attempt([contender], lambda contender, run=run: train(bench, contender, questions, run, save),
            result["failed"])
    save()


def by_question(rates_P: Sequence[float], questions_P: Sequence[str]) -> np.ndarray:
  """Mean rate of each distinct question, float [Q]: equal ones are not independent."""
  _, index_P = np.unique(questions_P, return_inverse=True)
  return np.bincount(index_P, weights=rates_P) / np.bincount(index_P)


def train(bench: Bench, contender: Trainer, questions: Sequence[str], run: dict[str, Any],
          save: Callable[[], None]) -> None:
  """Trains from the initial weights to the goal, or for `bench.minutes` of the contender's clock.

  Args:
    bench: the settings, with the goal and the time limit.
    contender: the contender to train.
    questions: questions of the held-out problems; pass@1 and its interval are computed over the
      distinct ones.
    run: receives the "steps" and "evaluations", appended to its lists, each with the clock's "time"
      in seconds; and "seconds_to_goal" if the goal is reached.
    save: called after every evaluation.
  """
  contender.reset()
  clock = 0.0
  while True:
    rate = interval(by_question(contender.evaluate(), questions))
    run["evaluations"].append({"time": clock, "step": len(run["steps"]), "pass@1": list(rate)})
    if rate.estimate >= bench.goal:
      run["seconds_to_goal"] = clock
    save()
    if "seconds_to_goal" in run or clock >= 60 * bench.minutes:
      return
    for step in contender.steps(bench.eval_every):
      clock += step["seconds"]
      run["steps"].append(step | {"time": clock})
