"""Time a training step of several seeds, trained as a vmapped batch, against a step of one seed."""

import dataclasses
import time

import jax
import numpy as np

from experiments import settings
from experiments.benchmarks.timing import alternate, median_interval
from experiments.benchmarks.training.contenders import random_rows
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import bench_summary, claim, of_numerics, target
from model import ModelConfig, get_config
from model.checks import require
from train.config import DataConfig, RunConfig, TrainConfig
from train.program import Program
from train.stages import with_seeds

_ROUNDS, _STEPS = 7, 10
_TARGET = 2.0  # largest ratio to the seconds of one seed
_NANO, _DATA = get_config("nano"), DataConfig(seq_len=256)
_TRAIN = TrainConfig(steps=1000, batch_size=16)


@dataclasses.dataclass(frozen=True)
class SeedsConfig(RunConfig):
  """A training run, and the number of seeds that are compared with one.

  Attributes:
    seeds: number of seeds that train as a vmapped batch.
  """

  model: ModelConfig = _NANO
  data: DataConfig = _DATA
  train: TrainConfig = _TRAIN
  seeds: int = 8

  def __post_init__(self):
    super().__post_init__()
    require(self.seeds >= 2, f"seeds={self.seeds} must be at least 2, to be compared with one")


CONFIG = SeedsConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings, named={"model": get_config})
  run = cfg.without_extras()
  steppers = {count: _Stepper(run, count) for count in (1, cfg.seeds)}
  by_round = alternate({count: stepper.seconds for count, stepper in steppers.items()}, _ROUNDS)
  median = {count: float(np.median(seconds)) for count, seconds in by_round.items()}
  tokens = run.train.batch_size * run.data.seq_len
  ratio = median[cfg.seeds] / median[1]
  print(f"a step of {cfg.seeds} seeds takes {ratio:.2f} times as long as a step of one seed")
  for count, seconds in median.items():
    print(f"{count} seeds: {1e3 * seconds:.2f} ms per step, "
          f"{count * tokens / seconds:,.0f} tokens/s")
  if options.out:
    results.record(options.out, {
        "ratio": ratio, "batch": run.train.batch_size, "seq_len": run.data.seq_len,
        "numerics": run.model.numerics.compute, "seconds_per_step": by_round}, summary)


class _Stepper:
  """Takes training steps of a number of seeds on random tokens."""

  def __init__(self, cfg: RunConfig, count: int):
    self._program = Program(with_seeds(cfg, list(range(count))), {})
    self._state, self._index = self._program.init(), 0
    lead = (count,) if count > 1 else ()
    self._batch = random_rows(np.random.default_rng(0), cfg.model.vocab_size, *lead,
                              cfg.train.batch_size, cfg.data.seq_len)
    self.seconds()  # compiles

  def seconds(self) -> float:
    """Returns the seconds per step, averaged over a few steps."""
    started = time.perf_counter()
    for _ in range(_STEPS):
      self._state, metrics = self._program.step(self._state, self._index, self._batch)
      self._index += 1
    jax.block_until_ready(metrics)
    return (time.perf_counter() - started) / _STEPS


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  (one, single), (many, vmapped) = result["seconds_per_step"].items()
  ratio = median_interval(np.asarray(vmapped) / np.asarray(single))
  tokens, rounds = result["batch"] * result["seq_len"], f"{len(single)} rounds"
  scale, numerics = of_numerics(result)
  return bench_summary(
      "bench_seeds", scale,
      f"A training step of several seeds as a vmapped batch, against a step of one seed: "
      f"{result['batch']} x {result['seq_len']} tokens per seed, {numerics}.", result,
      claims=[target(f"a step of {many} seeds against a step of one seed, {numerics}",
                     "ratio of seconds", ratio, at_most=_TARGET, n=rounds),
              claim(f"throughput of {many} seeds against that of one, {numerics}",
                    "ratio of tokens/s", int(many) / ratio[0], n=rounds)],
      tables=[{"name": "steps", "caption": "Training steps",
               "header": ["seeds", "ms per step", "tokens/s"],
               "rows": [[count, 1e3 * float(np.median(seconds)),
                         int(count) * tokens / float(np.median(seconds))]
                        for count, seconds in ((one, single), (many, vmapped))]}])
