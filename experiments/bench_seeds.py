"""Times a training step of one seed against that of several along an array axis."""

import dataclasses
import time

import jax
import numpy as np

from experiments import provenance, settings
from experiments.options import Options
from experiments.pretrain import with_seeds
from model import ModelConfig, get_config
from train.config import DataConfig, RunConfig, TrainConfig
from train.program import Program

_ROUNDS, _STEPS = 7, 10
_NANO, _DATA = get_config("nano"), DataConfig(seq_len=256)
_TRAIN = TrainConfig(steps=1000, batch_size=16)


@dataclasses.dataclass(frozen=True)
class _Config(RunConfig):
  """A run; `seeds` is what one is compared with."""

  model: ModelConfig = _NANO
  data: DataConfig = _DATA
  train: TrainConfig = _TRAIN
  seeds: int = 8


def main(options: Options) -> None:
  options.refuse("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(_Config(), options.settings, named={"model": get_config})
  run = cfg.without_extras()
  steps = {count: _Stepper(run, count) for count in (1, cfg.seeds)}
  for _ in range(_ROUNDS):  # alternating, so that both see the same machine
    for step in steps.values():
      step.time()
  median = {count: float(np.median(step.seconds)) for count, step in steps.items()}
  tokens = run.train.batch_size * run.data.seq_len
  ratio = median[cfg.seeds] / median[1]
  print(f"{cfg.seeds} seeds take {ratio:.2f} times as long as one")
  for count, seconds in median.items():
    print(f"{count} seeds: {1e3 * seconds:.2f} ms a step, {count * tokens / seconds:,.0f} tokens/s")
  if options.out:
    provenance.record(options.out, {
        "ratio": ratio, "batch": run.train.batch_size, "seq_len": run.data.seq_len,
        "seconds_a_step": {count: step.seconds for count, step in steps.items()}})


class _Stepper:
  """Runs of one program on random tokens, timed."""

  def __init__(self, cfg: RunConfig, count: int):
    self._program = Program(with_seeds(cfg, list(range(count))), {})
    self._state, self._index, self.seconds = self._program.init(), 0, []
    lead = (count,) if count > 1 else ()
    shape = (*lead, cfg.train.batch_size, cfg.data.seq_len)
    rng = np.random.default_rng(0)
    self._batch = {
        "tokens": rng.integers(0, cfg.model.vocab_size, (*shape[:-1], shape[-1] + 1), np.int32),
        "loss_mask": np.ones(shape, bool)}
    self.time()
    self.seconds.clear()

  def time(self) -> None:
    started = time.perf_counter()
    for _ in range(_STEPS):
      self._state, metrics = self._program.step(self._state, self._index, self._batch)
      self._index += 1
    jax.block_until_ready(metrics)
    self.seconds.append((time.perf_counter() - started) / _STEPS)
