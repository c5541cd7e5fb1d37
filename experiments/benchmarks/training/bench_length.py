"""Train the same run with more tokens: whether longer runs are quieter.

How small an effect a study resolves depends on the number of its seeds and on how far runs that
differ in nothing of interest lie apart. For each length and seed there are two runs: one, and one
whose initial parameters are each moved to the next larger number of their format
(`TrainConfig.nudge`). The deviation between seeds limits unpaired comparisons, and that of the
differences within pairs is the least that any comparison of pairs has.

The built-in text is a few million tokens, so longer runs want `--set data.sources=...`. Several
processes may train at once, divided over all GPUs, as small models leave a GPU idle. What is
measured is kept: the same command goes on from the results in its output folder.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import special

import model
from experiments import settings
from experiments.benchmarks.training.bench_repeat import SCALES as REPEATS
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import bench_summary, claim, of_numerics
from experiments.stats import noise
from experiments.workers import Workers, leave_memory_to_workers
from model.checks import require
from train.config import OptimizerConfig, RunConfig
from train.config_io import to_dict
from train.data import load
from train.stages import check_fits, fit_vocabulary

_CHILD = "experiments.benchmarks.training.length_child"
_EFFECT = 0.01  # nats, of the differences for whose resolution the cost is reported


@dataclasses.dataclass(frozen=True)
class LengthConfig(RunConfig):
  """A training run, the lengths that are compared, and the number of seeds.

  Attributes:
    lengths: numbers of training tokens, ascending; they replace `TrainConfig.steps`.
    seeds: number of seeds; each trains twice at every length.
    at_once: number of processes that train at the same time.
  """

  lengths: tuple[int, ...] = (2**23, 2**25, 2**26)
  seeds: int = 8
  at_once: int = 1

  def __post_init__(self):
    super().__post_init__()
    require(self.seeds >= 2, f"seeds={self.seeds} must be at least 2, for a standard deviation")
    require(self.at_once >= 1, f"at_once={self.at_once} must be at least 1")
    require(len(self.lengths) >= 2 and tuple(sorted(set(self.lengths))) == self.lengths,
            f"lengths={self.lengths} must be at least two numbers of tokens, ascending")
    require(self.lengths[0] >= self.tokens_per_step,
            f"lengths={self.lengths} must be at least one step, {self.tokens_per_step:,} tokens")

  @property
  def tokens_per_step(self) -> int:
    return self.train.batch_size * self.data.seq_len


SCALES = {
    "cpu": LengthConfig.of(REPEATS["cpu"], lengths=(2**15, 2**17), seeds=3),
    "gpu": LengthConfig.of(
        REPEATS["gpu"], at_once=4, optimizer=OptimizerConfig(learning_rate=1e-3)),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  scale = dataclasses.replace(options, scale=options.scale or "cpu").scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings, named={"model": model.get_config})
  leave_memory_to_workers()
  data = load(cfg.data)
  run = fit_vocabulary(cfg.without_extras(), data, keep=False)
  check_fits(run)
  result = {"config": to_dict(run), "lengths": list(cfg.lengths),
            "tokens_per_step": cfg.tokens_per_step, "parameters": run.model.param_count(),
            "numerics": run.model.numerics.compute, "runs": _found(options.out, to_dict(run))}
  known = {(each["tokens"], each["seed"], each["nudge"]) for each in result["runs"]}
  # The longest first, so that no process trains alone at the end.
  tasks = [task for seed in range(cfg.seeds) for task in itertools.product(
      reversed(cfg.lengths), (seed,), (False, True)) if task not in known]
  for (tokens, seed, nudge), loss in _train(run, tasks, cfg.tokens_per_step, cfg.at_once):
    print(f"{tokens:,} tokens, seed {seed}{', one rounding away' * nudge}: validation loss "
          f"{loss:.5f} nats", flush=True)
    result["runs"].append({"tokens": tokens, "seed": seed, "nudge": nudge, "loss": loss})
    if options.out:
      results.record(options.out, result, summary)
  for row in _rows(result):
    print(f"{row['tokens']:,} tokens: deviation of {row['seeds']} seeds {row['deviation']:.4f} "
          f"nats, of pairs {row['paired']:.4f}")


def _found(folder: pathlib.Path | None, config: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the runs of an earlier command in this folder, if they are of the same config."""
  path = folder / "results.json" if folder else None
  if path is None or not path.exists():
    return []
  found = json.loads(path.read_text(encoding="utf-8"))
  return found["runs"] if found.get("config") == json.loads(json.dumps(config)) else []


def _train(run: RunConfig, tasks: Sequence[tuple[int, int, bool]], tokens_per_step: int,
           at_once: int):
  """Yields each task and its validation loss, as they come from several processes.

  Raises:
    ValueError: if one of them fails.
  """
  if not tasks:
    return
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "config.json"
    path.write_text(json.dumps(to_dict(run)), encoding="utf-8")
    with Workers(_CHILD, [str(path)], min(at_once, len(tasks))) as pool:
      of = {pool.submit({"steps": tokens // tokens_per_step, "seed": seed, "nudge": nudge}):
            (tokens, seed, nudge) for tokens, seed, nudge in tasks}
      for done in concurrent.futures.as_completed(of):
        yield of[done], done.result()


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the deviations by length, of those seeds that have both runs."""
  rows = []
  for tokens in result["lengths"]:
    losses = {(run["seed"], run["nudge"]): run["loss"] for run in result["runs"]
              if run["tokens"] == tokens}
    pairs = [(loss, losses[seed, True]) for (seed, nudge), loss in sorted(losses.items())
             if not nudge and (seed, True) in losses]
    if len(pairs) < 2:
      continue
    rows.append({"tokens": tokens, "seeds": len(pairs),
                 "loss": math.fsum(first for first, _ in pairs) / len(pairs),
                 "deviation": noise([first for first, _ in pairs]),
                 "paired": noise([second - first for first, second in pairs])})
  return rows


def _ratio(longer: float, shorter: float, seeds: int) -> tuple[float, float, float]:
  """Returns the ratio of two deviations of as many seeds, with its 95 % interval.

  The interval is that of independent normal samples, by the F distribution.
  """
  if not shorter or not longer:
    return (longer / shorter if shorter else math.nan, math.nan, math.nan)
  ratio = longer / shorter
  widest = math.sqrt(special.fdtri(seeds - 1, seeds - 1, 0.975))
  return ratio, ratio / widest, ratio * widest


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  rows, (scale, numerics) = _rows(result), of_numerics(result)
  claims = []
  for name, key in (("between seeds", "deviation"), ("between runs one rounding apart", "paired")):
    for longer in rows[1:]:
      seeds = min(longer["seeds"], rows[0]["seeds"])
      claims.append(claim(
          f"deviation {name}, {longer['tokens']:,} against {rows[0]['tokens']:,} tokens", "ratio",
          *_ratio(longer[key], rows[0][key], seeds), n=f"{seeds} seeds"))
  table = [[f"{row['tokens']:,}", row["seeds"], row["loss"], row["deviation"], row["paired"],
            _seeds_for(row["paired"]), f"{2 * _seeds_for(row['paired']) * row['tokens']:,}"]
           for row in rows]
  return bench_summary(
      "bench_length", scale,
      f"Deviations of runs of several lengths: {result['parameters']:,} parameters, "
      f"{result['tokens_per_step']:,} tokens a step, {numerics}.", result, claims=claims, tables=[
          {"name": "lengths", "caption": "Standard deviations of the validation loss",
           "header": ["training tokens", "seeds", "mean validation loss, nats",
                      "between seeds, nats", "between runs one rounding apart, nats",
                      f"seeds for {_EFFECT} nats, paired", "tokens that they train on, two arms"],
           "rows": table}])


def _seeds_for(deviation: float) -> int:
  """Returns how many pairs resolve `_EFFECT` with a power of 80 % at 5 %, by the normal formula."""
  needed = (special.ndtri(0.975) + special.ndtri(0.8)) * deviation / _EFFECT
  return max(2, math.ceil(needed**2))
