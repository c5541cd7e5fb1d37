"""Train the same run again, and once more from a start one rounding away: how far apart they end.

For each seed there are three runs: one, the same again, and one whose initial parameters are each
moved to the next larger number of their format (`TrainConfig.nudge`). A difference between the
first two is noise of the hardware: sums that are added up in varying order. That between the first
and the third is how far training carries a difference of one rounding, however it arises, and so
the least effect that pairs of runs can resolve. With `--xla_gpu_deterministic_ops=true` in
XLA_FLAGS, the first two should not differ.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any

import model
from experiments import settings
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import bench_summary, claim, of_numerics
from experiments.stats import paired
from experiments.studies.v3.load_balancing import REAL_DOMAINS, gpu_model
from model.checks import require
from train.config import BalanceConfig, DataConfig, RunConfig, TrainConfig
from train.data import Data, load
from train.loop import train
from train.run_folder import RunFolder
from train.stages import check_fits, fit_vocabulary

_WAYS = {"the same again": False, "one rounding away": True}  # and whether the start is nudged


@dataclasses.dataclass(frozen=True)
class RepeatConfig(RunConfig):
  """A training run, and the number of its seeds.

  Attributes:
    seeds: number of seeds, each of which trains three times.
  """

  seeds: int = 4

  def __post_init__(self):
    super().__post_init__()
    require(self.seeds >= 2, f"seeds={self.seeds} must be at least 2, for a standard deviation")


_BIAS = BalanceConfig(bias_rate=0.01, bias_fraction=1.0, sequence_weight=0.0)

SCALES = {
    "cpu": RepeatConfig(
        model=dataclasses.replace(model.get_config("nano"), num_layers=3, mtp=None), balance=_BIAS,
        data=DataConfig(seq_len=128, bpe_vocab_size=1024, heldout_bytes=50_000,
                        sources=REAL_DOMAINS),
        train=TrainConfig(steps=60, batch_size=8, checkpoint_every=0), seeds=2),
    # 8 M tokens a run: seven seconds on an H200.
    "gpu": RepeatConfig(
        model=gpu_model(), balance=_BIAS,
        data=DataConfig(seq_len=512, bpe_vocab_size=8192, heldout_bytes=200_000,
                        sources=REAL_DOMAINS),
        train=TrainConfig(steps=250, batch_size=64, checkpoint_every=0)),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  scale = dataclasses.replace(options, scale=options.scale or "cpu").scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings, named={"model": model.get_config})
  data = load(cfg.data)
  run = fit_vocabulary(cfg.without_extras(), data, keep=False)
  check_fits(run)
  seeds = []
  for seed in range(cfg.seeds):
    first, *others = (train_run(run, data, seed, nudge) for nudge in (False, *_WAYS.values()))
    seeds.append({"seed": seed, "losses": first["losses"],
                  "validation_loss": first["validation_loss"],
                  "ways": {way: _difference(first, other)
                           for way, other in zip(_WAYS, others, strict=True)}})
    for way, found in seeds[-1]["ways"].items():
      print(f"seed {seed}, {way}: validation loss {found['validation_loss']:+.5f} nats, "
            f"{_since(found['first_step'])}", flush=True)
    if options.out:
      tokens = run.train.steps * run.train.batch_size * run.data.seq_len
      results.record(options.out, {"tokens": tokens, "parameters": run.model.param_count(),
                                   "numerics": run.model.numerics.compute, "seeds": seeds}, summary)


def train_run(run: RunConfig, data: Data, seed: int, nudge: bool) -> dict[str, Any]:
  """Trains, and returns the training losses and MaxVio by step, and the validation loss.

  Args:
    run: the run, whose seed and start are replaced.
    data: its data.
    seed: the seed.
    nudge: whether the run starts one rounding away, as in `TrainConfig.nudge`.

  Raises:
    ValueError: if the run is stopped by a signal.
  """
  cfg = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed, nudge=nudge))
  with (tempfile.TemporaryDirectory() as path,
        contextlib.closing(RunFolder(pathlib.Path(path))) as folder):
    result = train([cfg], data, folder, show=False)
    require(result.status != "stopped", "stopped before the end of a run; what was measured before "
            "it is kept")
    return {"losses": [row["loss"] for row in result.rows],
            "violations": [row["max_violation"] for row in result.rows],
            "validation_loss": statistics.fmean(result.evaluations[-1]["loss"].values())}


def _difference(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  """Returns how another run differs from the first: from which step on, and by how much at the end.

  Steps count from 1, and a step of None says that nothing ever differed. A routing has changed for
  certain where the largest load of an expert has.
  """
  since = lambda key: next((step for step, (a, b) in enumerate(
      zip(first[key], other[key], strict=True), 1) if a != b), None)
  return {"first_step": since("losses"), "first_step_of_routing": since("violations"),
          "validation_loss": other["validation_loss"] - first["validation_loss"],
          "differences": [b - a for a, b in zip(first["losses"], other["losses"], strict=True)]}


def _since(step: int | None) -> str:
  return "no loss differs" if step is None else f"losses differ from step {step} on"


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  seeds, (scale, numerics) = result["seeds"], of_numerics(result)
  claims, rows = [], []
  for way in _WAYS:
    found = [seed["ways"][way] for seed in seeds]
    ends = paired([each["validation_loss"] for each in found], 0.0)
    claims += [claim(f"{way}: validation loss", "difference, nats", ends.mean, ends.low, ends.high,
                     n=f"{ends.n} seeds"),
               claim(f"{way}: validation loss, standard deviation of the difference", "nats",
                     ends.std, n=f"{ends.n} seeds")]
    rows += [[way, seed["seed"], each["validation_loss"],
              max(map(abs, each["differences"])), _or_never(each["first_step"]),
              _or_never(each["first_step_of_routing"])]
             for seed, each in zip(seeds, found, strict=True)]
  return bench_summary(
      "bench_repeat", scale,
      f"The same training run repeated, and started one rounding away: {result['tokens']:,} tokens "
      f"a run, {result['parameters']:,} parameters, {numerics}.", result, claims=claims,
      tables=[{"name": "pairs", "caption": "Differences from the first run of the same seed",
               "header": ["run", "seed", "validation loss, nats",
                          "largest of a training loss, nats", "first step with another loss",
                          "first step with another load of experts"],
               "rows": rows}])


def _or_never(step: int | None) -> int | str:
  return "never" if step is None else step
