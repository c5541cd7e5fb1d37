"""Time training steps on all devices against steps on one, with as many sequences for each device.

This is weak scaling. Each mesh divides over all devices along one axis: with "data" every device
has all parameters, and with "fsdp" a part of them. What the devices can communicate is measured
too, as the rate of an all-reduce. `--profile` shows where the time of a step goes on a device.
"""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import settings
from experiments.benchmarks.timing import alternate, median_interval
from experiments.benchmarks.training import profiles
from experiments.benchmarks.training.contenders import random_rows, random_variables
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim, target
from model import NUMERICS, ModelConfig, get_config
from model.checks import require, require_positive
from train.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from train.program import Program

_ROUNDS = 7
_TARGET = 0.9  # least throughput of a device, against that of a single one
_ALL_REDUCES = 10  # in one program, so that starting it does not count
_BASE = dataclasses.replace(get_config("base"), numerics=NUMERICS["bf16"])
_DATA = DataConfig(seq_len=1024)
_TRAIN = TrainConfig(steps=1000, batch_size=16, unroll=_BASE.num_layers)


@dataclasses.dataclass(frozen=True)
class ScalingConfig(RunConfig):
  """A training run on one device, and how it is divided over all.

  The batch size is the number of sequences of each device.

  Attributes:
    axes: the axes of the mesh along which the run is divided over all devices, one after another.
    steps: steps of a round.
    mebibytes: size of the all-reduced array, float32.
  """

  model: ModelConfig = _BASE
  data: DataConfig = _DATA
  train: TrainConfig = _TRAIN
  axes: tuple[str, ...] = ("data", "fsdp")
  steps: int = 10
  mebibytes: int = 1024

  def __post_init__(self):
    super().__post_init__()
    require_positive(self, "steps", "mebibytes")
    known = [field.name for field in dataclasses.fields(MeshConfig)]
    for axis in self.axes:
      require(axis in known, f"axes has {axis!r}, which is not one of {', '.join(known)}")


CONFIG = ScalingConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings, named={"model": get_config})
  count = jax.device_count()
  require(count > 1, "there is a single device, and nothing to compare it with")
  runs = {"one device": cfg.without_extras()} | {
      axis: _divided(cfg, axis, count) for axis in cfg.axes}
  steppers = {name: _Stepper(run, cfg.steps) for name, run in runs.items()}
  with ThreadPoolExecutor() as pool:
    list(pool.map(_Stepper.compile, steppers.values()))
  for stepper in steppers.values():
    stepper.start()
    stepper.seconds()  # the first steps allocate memory, and connect the devices
  by_round = alternate({name: lambda stepper=stepper: stepper.seconds() / cfg.steps
                        for name, stepper in steppers.items()}, _ROUNDS)
  if options.profile:
    for name, stepper in steppers.items():
      profiles.write(stepper.trace(), name, options.out)
  del steppers
  tokens = cfg.train.batch_size * cfg.data.seq_len
  result = {"devices": count, "tokens_of_a_device": tokens, "params": cfg.model.param_count(),
            "numerics": cfg.model.numerics.compute, "seconds_per_step": by_round}
  result["all_reduce"] = {"mebibytes": cfg.mebibytes, "seconds": alternate(
      {"sum": _AllReduce(cfg.mebibytes)}, _ROUNDS)["sum"]}
  for name, milliseconds, rate in _rates(result):
    print(f"{name}: {milliseconds:.2f} ms per step, {rate:,.0f} tokens/s")
  print(f"all-reduce of {cfg.mebibytes:,} MiB: {_gigabytes_per_second(result):.0f} GB/s")
  if options.out:
    results.record(options.out, result, summary)


def _divided(cfg: ScalingConfig, axis: str, count: int) -> RunConfig:
  """Returns the run on all devices, with as many sequences for each."""
  run = cfg.without_extras()
  return dataclasses.replace(
      run, mesh=MeshConfig(**{axis: count}),
      train=dataclasses.replace(run.train, batch_size=run.train.batch_size * count))


class _Stepper:
  """Takes training steps on random tokens."""

  def __init__(self, run: RunConfig, steps: int):
    self._run, self._steps = run, steps
    self._program = Program([run], {})

  def compile(self) -> None:
    self._step = self._program.lower().compile()

  def start(self) -> None:
    cfg, rng = self._run, np.random.default_rng(0)
    self._state = self._program.init(random_variables(cfg.model))
    self._arguments = self._program.step_arguments(
        0, random_rows(rng, cfg.model.vocab_size, cfg.train.batch_size, cfg.data.seq_len))

  def seconds(self, steps: int | None = None) -> float:
    """Returns the seconds that some steps take, or those of a round."""
    started = time.perf_counter()
    for _ in range(steps or self._steps):
      self._state, metrics = self._step(self._state, *self._arguments)
    jax.block_until_ready(metrics)
    return time.perf_counter() - started

  def trace(self) -> dict[str, list[profiles.Timing]]:
    """Returns where the time of a step goes; see `profiles.trace`."""
    return profiles.trace(self.seconds, self._step.as_text())


class _AllReduce:
  """Sums a float32 array over all devices; calling it returns the seconds of one such sum."""

  def __init__(self, mebibytes: int):
    mesh = Mesh(jax.devices(), ("device",))
    rows = PartitionSpec("device")
    self._x = jax.device_put(np.ones((len(jax.devices()), 2**18 * mebibytes), np.float32),
                             NamedSharding(mesh, rows))

    def several(x):
      one = lambda _, x: lax.pcast(lax.psum(x, "device"), "device", to="varying") * 0.5
      return lax.fori_loop(0, _ALL_REDUCES, one, x)

    self._sum = jax.jit(jax.shard_map(several, mesh=mesh, in_specs=rows, out_specs=rows),
                        donate_argnums=0)
    self()  # compiles

  def __call__(self) -> float:
    started = time.perf_counter()
    self._x = jax.block_until_ready(self._sum(self._x))
    return (time.perf_counter() - started) / _ALL_REDUCES


def _rates(result: dict) -> list[list]:
  """Returns a row for every mesh: its name, milliseconds per step, and tokens per second."""
  rows = []
  for name, by_round in result["seconds_per_step"].items():
    seconds = float(np.median(by_round))
    devices = 1 if name == "one device" else result["devices"]
    rows.append([name, 1e3 * seconds, devices * result["tokens_of_a_device"] / seconds])
  return rows


def _gigabytes_per_second(result: dict) -> float:
  """Returns the size of the all-reduced array over the time; a ring sends 2 (n - 1) / n of it."""
  reduced = result["all_reduce"]
  return reduced["mebibytes"] * 2**20 / 1e9 / float(np.median(reduced["seconds"]))


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  seconds = {name: np.asarray(took) for name, took in result["seconds_per_step"].items()}
  alone, count = seconds["one device"], result["devices"]
  tokens, numerics = result["tokens_of_a_device"], result["numerics"]
  return bench_summary(
      "bench_scaling", f"{backend(result)}-{count}-{numerics}",
      f"Training steps of {result['params']:,} parameters on {count} devices against one, with "
      f"{tokens:,} tokens for each device, {numerics}.", result,
      claims=[
          *(target(f"{count} devices against one, mesh.{name}={count}", "ratio of tokens/s",
                   median_interval(count * alone / took), at_least=_TARGET * count,
                   n=f"{len(took)} rounds")
            for name, took in seconds.items() if name != "one device"),
          claim(f"all-reduce of {result['all_reduce']['mebibytes']:,} MiB", "GB/s",
                _gigabytes_per_second(result), n=f"{len(result['all_reduce']['seconds'])} rounds")],
      tables=[{"name": "steps", "caption": "Training steps",
               "header": ["mesh", "ms per step", "tokens/s"],
               "rows": _rates(result)}])
