"""Measures candidate tilings of Hopper's kernels, and writes the table that they choose from.

For every operation and shape the candidates run in turns, so that a GPU that slows down slows all
of them. The table, `pallas_kernels/mosaic_gpu/tilings.json`, is written where --out says, beside
the measurements; commit it in its place.

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
from experiments import provenance, settings
from experiments.bench_kernels import Timed
from experiments.kernel_cases import group_sizes, normal
from experiments.markdown import table
from experiments.options import Options
from model.checks import require
from pallas_kernels import implementations
from train.config_io import to_dict
from train.run_folder import write_json_atomic


@dataclasses.dataclass(frozen=True)
class TuneConfig:
  """How to measure.

  Attributes:
    rounds: in which every candidate is timed once.
    seconds: that a candidate runs for in a round, about.
    only: how the names of the operations to tune begin; empty for all.
  """

  rounds: int = 12
  seconds: float = 0.005
  only: str = ""

  def __post_init__(self):
    require(self.rounds > 0, f"rounds={self.rounds} must be positive")
    require(self.seconds >= 0, f"seconds={self.seconds} must not be negative")


@dataclasses.dataclass(frozen=True)
class Job:
  """An operation on one shape.

  Attributes:
    key: of the table.
    flops: of one call.
    run: takes the operands, and `tiling`.
    operands: makes them.
    candidates: the first is the kernel's default.
  """

  key: str
  flops: float
  run: Callable
  operands: Callable[[], tuple]
  candidates: tuple


# Dense products of M, N, K with a scale for each block of the weight: DeepGEMM's, and V2-Lite's
# attention, shared experts and dense layer at 16,384 tokens, forward and for the input's gradient.
_BLOCKS = ((8192, 8192, 8192), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 16384),
           (16384, 3072, 2048), (16384, 2048, 3072), (16384, 4096, 512), (16384, 512, 4096),
           (16384, 2048, 2048), (16384, 5632, 2048), (16384, 2048, 5632), (16384, 2816, 2048),
           (16384, 2048, 2816))
# The same layers' weight gradients, K tokens.
_VECTORS = ((2048, 3072, 16384), (512, 4096, 16384), (2048, 2048, 16384), (2048, 5632, 16384),
            (2816, 2048, 16384))
# Rows, groups, and an expert's widths: V2-Lite's, V3's on one of eight nodes, `base`'s.
_EXPERTS = ((98304, 64, 2048, 1408), (65536, 32, 7168, 2048), (98304, 64, 1024, 512))


def main(options: Options) -> None:
  options.refuse("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(TuneConfig(), options.settings)
  require(implementations.here() == "mosaic_gpu",
          f"tune_kernels times kernels for {implementations.BACKENDS['mosaic_gpu']}, and this is "
          f"{jax.devices()[0].device_kind}")
  rows = [row for job in jobs() if job.key.startswith(cfg.only) for row in _measure(job, cfg)]
  print(table(("operation", "tiling", "µs", "TFLOP/s", "of the default's time"), map(_line, rows)))
  if options.out:
    print(f"wrote {provenance.record(options.out, {'config': to_dict(cfg), 'rows': rows})}")
    write_json_atomic(options.out / "tilings.json", best(rows))


def jobs() -> Iterator[Job]:
  """Everything that is tuned; kernels are imported here, as only a GPU needs them."""
  from pallas_kernels.mosaic_gpu import (
      fp8_grouped,
      fp8_matmul,
      fp8_weight_gradient,
      grouped_matmul,
      grouped_weight_gradient,
  )
  from pallas_kernels.mosaic_gpu.tilings import key

  dense, bf16, f32 = fp8_matmul.Tiling, jnp.bfloat16, jnp.float32
  of_blocks = (
      dense(), dense(cluster=2), dense(depth=1), dense(depth=1, cluster=2), dense(snake=16),
      dense(block_n=192, depth=1, stages=4), dense(block_n=192, depth=1, stages=4, cluster=2),
      dense(block_n=160, depth=1, stages=4))
  of_vectors = (
      dense(depth=1, stages=4), dense(depth=1, stages=3), dense(depth=1, stages=4, cluster=2),
      dense(block_n=160, depth=1, stages=3), dense(block_n=96, depth=1, stages=4))
  for m, n, k in _BLOCKS:
    yield Job(key("fp8_matmul 128x128", bf16, m, n, k), 2 * m * n * k,
              functools.partial(fp8_matmul.run, dtype=bf16),
              lambda m=m, n=n, k=k: (_quantised(m, k), _quantised(n, k, tile="128x128")), of_blocks)
  for m, n, k in _VECTORS:
    yield Job(key("fp8_matmul 1x128", f32, m, n, k), 2 * m * n * k,
              functools.partial(fp8_matmul.run, dtype=f32),
              lambda m=m, n=n, k=k: (_quantised(m, k), _quantised(n, k)), of_vectors)
  for rows, groups, d_model, d_ff in _EXPERTS:
    widths = (d_model, 2 * d_ff), (d_ff, d_model), (2 * d_ff, d_model), (d_model, d_ff)
    for k, n in dict.fromkeys(widths):
      make = functools.partial(_grouped, rows, groups, k, n)
      flops = 2 * rows * k * n
      yield Job(key("fp8_grouped_matmul", bf16, groups, k, n), flops,
                functools.partial(fp8_grouped.run, dtype=bf16),
                functools.partial(make, "fp8"),
                tuple(tiling for tiling in of_blocks if tiling.block_n != 160))
      yield Job(key("grouped_matmul", bf16, groups, k, n), flops, grouped_matmul.run,
                functools.partial(make, "plain"), _fitting(grouped_matmul, n))
      yield Job(key("grouped_matmul transposed", bf16, groups, k, n), flops,
                functools.partial(grouped_matmul.run, transpose_rhs=True),
                functools.partial(make, "transposed"), _fitting(grouped_matmul, n))
      yield Job(key("fp8_grouped_weight_gradient", f32, groups, k, n), flops,
                functools.partial(fp8_weight_gradient.run, dtype=f32),
                functools.partial(make, "fp8 gradient"), of_vectors)
      yield Job(key("grouped_weight_gradient", f32, groups, k, n), flops,
                functools.partial(grouped_weight_gradient.run, dtype=f32),
                functools.partial(make, "gradient"), _fitting(grouped_weight_gradient, n, rows=k))


def _fitting(kernel, columns: int, rows: int = 256) -> tuple:
  tiling = type(kernel.default_tiling(columns))
  every = (kernel.default_tiling(columns), tiling(128, 128, 6), tiling(128, 128, 6, band=16),
           tiling(256, 128), tiling(256, 128, band=4), tiling(128, 256), tiling(128, 256, band=4))
  fit = (tiling for tiling in every if columns % tiling.columns == 0 and rows % tiling.rows == 0)
  return tuple(dict.fromkeys(fit))


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
  timed = {tiling: Timed(functools.partial(program, *operands), jax.block_until_ready, cfg.seconds)
           for tiling, program in programs.items()}
  seconds = {tiling: [] for tiling in timed}
  for _ in range(cfg.rounds):
    for tiling, run in timed.items():
      seconds[tiling].append(run())
  default = seconds[job.candidates[0]]
  return [{"key": job.key, "tiling": dataclasses.asdict(tiling),
           "seconds": statistics.median(found), "rate": job.flops / statistics.median(found),
           "of_default": statistics.median(a / b for a, b in zip(found, default, strict=True))}
          for tiling, found in seconds.items()]


def best(rows: list[dict]) -> dict[str, dict[str, int]]:
  """The table: of each key the tiling with the smallest median of its time over the default's."""
  found = {}
  for row in sorted(rows, key=lambda row: row["of_default"], reverse=True):
    found[row["key"]] = row["tiling"]
  return dict(sorted(found.items()))


def _line(row: dict) -> tuple:
  tiling = " ".join(f"{name}={value}" for name, value in row["tiling"].items())
  return row["key"], tiling, 1e6 * row["seconds"], row["rate"] / 1e12, row["of_default"]
