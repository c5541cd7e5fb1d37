"""Measure candidate tilings of the Hopper kernels, and write the table of the fastest ones.

The candidates for an operation and shape are timed alternately. The table, `tilings.json`, is
written to the folder that --out names, next to the measurements; entries that were not measured are
copied from the present table in `pallas_kernels/mosaic_gpu`. To use the new table, move it there
and commit it.

Shape letters:  M, R rows  N, K widths  G groups
"""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import pallas_kernels as ops
from experiments import settings
from experiments.benchmarks.kernels.cases import group_sizes, normal
from experiments.benchmarks.timing import CallTimer, alternate
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.markdown import table
from experiments.reports.summary import backend, bench_summary
from model.checks import require
from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import tilings
from pallas_kernels.mosaic_gpu.tilings import key
from train.config_io import to_dict
from train.run_folder import write_json_atomic


@dataclasses.dataclass(frozen=True)
class TuneConfig:
  """How the candidates are timed.

  Attributes:
    rounds: number of rounds, in each of which every candidate is timed once.
    seconds: approximate time for which a candidate runs in a round.
    only: tune only the operations whose name begins with this text; empty for all.
  """

  rounds: int = 10
  seconds: float = 0.006
  only: str = ""

  def __post_init__(self):
    require(self.rounds > 0, f"rounds={self.rounds} must be positive")
    require(self.seconds >= 0, f"seconds={self.seconds} must not be negative")


@dataclasses.dataclass(frozen=True)
class Job:
  """An operation on one shape.

  Attributes:
    key: key of the entry in the table of tilings.
    flops: FLOPs of one call.
    run: the kernel, a function of the operands and the keyword argument `tiling`.
    operands: makes the operands.
    candidates: tilings to time, the one that the kernel's rule chooses first.
  """

  key: str
  flops: float
  run: Callable
  operands: Callable[[], tuple]
  candidates: tuple


# M, N and K of dense products with one scale for each block of the weight: DeepGEMM's shapes.
_BLOCKS = ((8192, 8192, 8192), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 16384))
# Rows, groups, K and N of grouped products: V2-Lite's (the gate, gate and up as one product, down,
# and the gradient of gate and up), V3's gate on one of eight nodes, and those of `base`.
_EXPERTS = ((65536, 64, 2048, 1408), (98304, 64, 2048, 2816), (98304, 64, 1408, 2048),
            (98304, 64, 2816, 2048), (65536, 32, 7168, 2048),
            (98304, 64, 1024, 1024), (98304, 64, 512, 1024), (98304, 64, 1024, 512))


CONFIG = TuneConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  require(implementations.local_backend() == "mosaic_gpu",
          f"tune_kernels times kernels for {implementations.BACKENDS['mosaic_gpu']}, and this "
          f"device is {jax.devices()[0].device_kind}")
  chosen = [job for job in jobs() if job.key.startswith(cfg.only)]
  require(chosen, f"no operation's name begins with only={cfg.only}")
  rows = []
  for job in chosen:
    rows += _measure(job, cfg)
    if options.out:  # after each of the many jobs, so that an interrupted run keeps them
      results.record(options.out, {"config": to_dict(cfg), "rows": rows}, summary, _sections)
      write_json_atomic(options.out / "tilings.json",
                        dict(sorted((tilings.table() | best(rows)).items())))
  print(table(_HEADER, map(_line, rows)))


def jobs() -> Iterator[Job]:
  """Yields everything that is tuned; kernels are imported here because only a GPU needs them."""
  from pallas_kernels.mosaic_gpu import (
      fp8_grouped,
      fp8_matmul,
      fp8_tiling,
      fp8_weight_gradient,
      grouped_matmul,
      grouped_weight_gradient,
  )

  dense, bf16, f32 = fp8_tiling.Tiling, jnp.bfloat16, jnp.float32
  blocks = (dense(), dense(cluster=2), dense(depth=1), dense(block_n=192, depth=1, stages=4),
            dense(block_m=256, depth=1, stages=3))
  vectors = (
      dense(block_m=256, depth=1, stages=3), dense(depth=1, stages=4), dense(depth=1, stages=3),
      dense(depth=1, stages=4, cluster=2), dense(block_m=256, block_n=96, stages=3))
  plain = grouped_matmul.Tiling
  products = plain(128, 256), plain(128, 192), plain(128, 128, 6), plain(256, 128)
  gradients = plain(128, 256, swizzle=1), plain(256, 128, swizzle=1), plain(128, 256)
  for m, n, k in _BLOCKS:
    rule = fp8_tiling.dense_tiling(bf16, False, m, n, k)
    yield Job(key("fp8_matmul 128x128", bf16, m, n, k), 2 * m * n * k,
              functools.partial(fp8_matmul.run, dtype=bf16),
              lambda m=m, n=n, k=k: (_quantised(m, k), _quantised(n, k, tile="128x128")),
              _first(rule, blocks))
  for rows, groups, k, n in _EXPERTS:
    make, flops = functools.partial(_grouped, rows, groups, k, n), 2 * rows * k * n
    product = grouped_matmul.product_tiling(n)
    for name, dtype, run, kind, rule, others in (
        ("fp8_grouped_matmul", bf16, fp8_grouped.run, "fp8",
         fp8_tiling.grouped_tiling(bf16, n), blocks),
        ("fp8_grouped_weight_gradient", f32, fp8_weight_gradient.run, "fp8 gradient",
         fp8_tiling.gradient_tiling(f32, groups, k, n), vectors),
        ("grouped_matmul", bf16, grouped_matmul.run, "plain", product, products),
        ("grouped_matmul transposed", bf16,
         functools.partial(grouped_matmul.run, transpose_rhs=True), "transposed", product,
         products),
        ("grouped_weight_gradient", f32, grouped_weight_gradient.run, "gradient",
         grouped_weight_gradient.gradient_tiling(k, n), gradients)):
      yield Job(key(name, dtype, groups, k, n), flops, functools.partial(run, dtype=dtype),
                functools.partial(make, kind), _first(rule, others))


def _first(rule, others: tuple) -> tuple:
  """Returns the tilings without repetitions, the one that the rule chooses first."""
  return tuple(dict.fromkeys((rule, *others)))


def _quantised(rows: int, columns: int, tile: str = "1x128"):
  return ops.quantize(normal(rows, columns, seed=rows), tile)


def _grouped(rows, groups, k, n, kind: str) -> tuple:
  sizes_G = group_sizes(rows, groups, "even")
  if kind in ("gradient", "fp8 gradient"):
    pair = normal(rows, k), normal(rows, n, seed=1)
    if kind == "fp8 gradient":
      pair = tuple(ops.quantize_groups(x, sizes_G) for x in pair)
    return *pair, sizes_G
  x_RK = normal(rows, k)
  if kind == "fp8":
    return ops.quantize(x_RK), ops.quantize(normal(groups, n, k, seed=1), "128x128"), sizes_G
  shape = (groups, n, k) if kind == "transposed" else (groups, k, n)
  return x_RK, normal(*shape, seed=1), sizes_G


def _measure(job: Job, cfg: TuneConfig) -> list[dict]:
  operands = job.operands()

  def compiled(tiling):
    return jax.jit(functools.partial(job.run, tiling=tiling)).lower(*operands).compile()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    programs = dict(zip(job.candidates, pool.map(compiled, job.candidates), strict=True))
  timed = {tiling: CallTimer(functools.partial(program, *operands), jax.block_until_ready,
                             cfg.seconds) for tiling, program in programs.items()}
  seconds = alternate(timed, cfg.rounds)
  default = seconds[job.candidates[0]]
  return [{"key": job.key, "tiling": dataclasses.asdict(tiling),
           "seconds": statistics.median(found), "rate": job.flops / statistics.median(found),
           "of_default": statistics.median(a / b for a, b in zip(found, default, strict=True))}
          for tiling, found in seconds.items()]


def best(rows: list[dict]) -> dict[str, dict[str, int]]:
  """Returns each key's tiling with the smallest median ratio of its time to the default's."""
  found = {}
  for row in sorted(rows, key=lambda row: row["of_default"], reverse=True):
    found[row["key"]] = row["tiling"]
  return found


_HEADER = ("operation", "tiling", "µs", "TFLOP/s", "time ÷ default time")


def _line(row: dict) -> tuple:
  tiling = " ".join(f"{name}={value}" for name, value in row["tiling"].items())
  return row["key"], tiling, 1e6 * row["seconds"], row["rate"] / 1e12, row["of_default"]


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  chosen = best(result["rows"])
  tuned = result["config"]["only"] or "all operations"
  return bench_summary(
      "tune_kernels", f"{backend(result)}-{tuned.replace(' ', '-')}",
      f"Candidate tilings of the Hopper kernels, timed alternately ({tuned}).", result, tables=[
          {"name": "best", "caption": "The fastest tiling of every operation and shape",
           "header": list(_HEADER),
           "rows": [_line(row) for row in result["rows"] if chosen[row["key"]] == row["tiling"]],
           "note": f"Medians of {result['config']['rounds']} rounds."}])


def _sections(_, result: dict) -> list[tuple[str, str]]:
  return [("All candidates", table(_HEADER, map(_line, result["rows"])))]
