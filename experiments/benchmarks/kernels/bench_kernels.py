"""Time the low-precision operations against torch's and XLA's, alternating in one process.

`--scale=smoke` runs small shapes on any device, to check that everything works. `--scale=gpu` is
for a Hopper GPU, on shapes of real models, and `--scale=gpu_random` on shapes that were drawn at
random after the kernels' code was fixed. Where torch is installed, its products are timed as peers.

On a GPU, times are those of the device, from a profiler's trace, and operands rotate through four
times the L2 cache. The ceilings are measured in the same process: the rate of a copy of 1 GiB, and
the rates of XLA's own products of 8192 x 8192 matrices. On an H200 whose copies are slower than 4.1
TB/s something else is running, and nothing is measured. A target is met if the whole 95 % interval
of the median speed-up, over pairs of rounds in counterbalanced order, is at least the target.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import settings
from experiments.benchmarks import device_time, timing
from experiments.benchmarks.device_time import Timed
from experiments.benchmarks.kernels.cases import SHAPES, Case, cases
from experiments.benchmarks.timing import (
    CallTimer,
    describe,
    median_interval,
    paired_rounds,
    speedup,
)
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.markdown import number, table
from experiments.reports.summary import (
    bench_summary,
    claim,
    claims_table,
    target,
    target_verdict,
)
from model.checks import require
from pallas_kernels import implementations
from train.config_io import to_dict

_L2 = 50 << 20  # bytes of an H100's or H200's L2 cache
_LEAST_COPY = {"H200": 4100}  # GB/s; an undisturbed one copies at 4260
_MANY = 6  # shapes of an operation about which claims are made
_SLOWER = 0.92  # a speed-up that no shape's whole interval should be below


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """How the operations are timed.

  Attributes:
    rounds: number of rounds, in each of which every contender is timed once; an even number. Fewer
      than 12 rounds give no interval.
    seconds: approximate time for which a contender runs in a round.
    only: time only the operations whose name contains this text; empty for all.
    peers: whether to time torch's products as well.
  """

  rounds: int = 20
  seconds: float = 0.01
  only: str = ""
  peers: bool = True

  def __post_init__(self):
    require(self.rounds > 0 and self.rounds % 2 == 0,
            f"rounds={self.rounds} must be positive and even: rounds are paired, one in each order")
    require(self.seconds >= 0, f"seconds={self.seconds} must not be negative")


CONFIG = BenchConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  scale = options.scale_of(SHAPES)
  kernels = implementations.local_backend()
  require(scale == "smoke" or kernels is not None,
          f"--scale={scale} times kernels, and {jax.devices()[0].device_kind} has none; "
          "use --scale=smoke")
  chosen = [case for case in cases(scale, kernels) if cfg.only in case.operation]
  require(chosen, f"only={cfg.only} is in no operation's name")
  with device_time.alone():
    ceilings = _ceilings(scale, cfg)
  print("ceilings: " + ", ".join(f"{name} {value:,.0f}" for name, value in ceilings.items()))
  # Everything is compiled before anything is measured, as XLA times variants on the device.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = list(pool.map(_compile, chosen))
  rows = []
  for case, programs in zip(chosen, compiled, strict=True):
    with device_time.alone():
      rows += _measure(case, programs, cfg, ceilings)
    if options.out:  # after each of the many cases, so that an interrupted run keeps them
      results.record(options.out, {"config": to_dict(cfg), "scale": scale, "ceilings": ceilings,
                                   "rows": rows}, summary)
  print(table(_HEADER, map(_line, rows)))
  print(claims_table(_over_shapes(rows, cfg.rounds)))


def _compile(case: Case) -> dict[str, Callable | jax.errors.JaxRuntimeError]:
  """Returns the programs that make a case's operands, its contenders', and its reference's.

  Instead of a program that needs more memory than there is, it returns the error.
  """
  make = jax.jit(case.operands).trace()
  programs = {"operands": make.lower().compile()}
  reference = {"reference": case.reference} if case.reference else {}
  for name, run in (case.contenders | reference).items():
    try:
      programs[name] = jax.jit(run).lower(*make.out_info).compile()
    except jax.errors.JaxRuntimeError as why:
      programs[name] = why
  return programs


def _run(program: Callable | jax.errors.JaxRuntimeError, operands: tuple) -> Any:
  """Returns a program's result, once it is ready, or raises the error that it has instead."""
  if isinstance(program, jax.errors.JaxRuntimeError):
    raise program
  return jax.block_until_ready(program(*operands))


def _on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def _ceilings(scale: str, cfg: BenchConfig) -> dict[str, float]:
  """Median rates: GB/s of a copy, and TFLOP/s of XLA's products of square matrices.

  Raises:
    ValueError: if the device copies so slowly that it must be busy otherwise.
  """
  width, copied = (256, 1 << 16) if scale == "smoke" else (8192, 1 << 29)
  x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
  small, large = x.astype(jnp.float8_e4m3fn), jnp.ones(copied, jnp.bfloat16)
  # Tuned even where XLA_FLAGS say that nothing is, for faster compiling.
  product = jax.jit(
      lambda a: jnp.einsum("mk,nk->mn", a, a, preferred_element_type=jnp.bfloat16),
      compiler_options={"xla_gpu_autotune_level": 4} if _on_gpu() else None)
  runs = {"copy GB/s": (jax.jit(jnp.copy), large, 2 * large.nbytes / 1e9),
          "bf16 TFLOP/s": (product, x, 2 * width**3 / 1e12),
          "FP8 TFLOP/s": (product, small, 2 * width**3 / 1e12)}
  seconds = _alternate({name: Timed(lambda _, run=run, operand=operand: run(operand),
                                    jax.block_until_ready)
                        for name, (run, operand, _) in runs.items()}, cfg)
  found = {name: work / float(np.median(seconds[name])) for name, (*_, work) in runs.items()}
  for kind, least in _LEAST_COPY.items():
    require(kind not in jax.devices()[0].device_kind or found["copy GB/s"] >= least,
            f"this device copies {found['copy GB/s']:.0f} GB/s, and an undisturbed {kind} at least "
            f"{least}: no other program may use it while kernels are timed")
  return found


def _alternate(timed: dict[str, Timed], cfg: BenchConfig) -> dict[str, list[float]]:
  """Returns the seconds of every contender, round by round: a GPU's own, or the host's."""
  if _on_gpu():
    return device_time.alternate(timed, cfg.rounds, cfg.seconds)
  return timing.alternate(
      {name: CallTimer(functools.partial(each.run, 0), each.wait, cfg.seconds)
       for name, each in timed.items()}, cfg.rounds)


def _measure(case: Case, programs: dict[str, Any], cfg: BenchConfig,
             ceilings: dict[str, float]) -> list[dict]:
  operands, timed, excluded = programs["operands"](), {}, {}
  rotating = [operands]
  if _on_gpu():
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(operands))
    rotating += [jax.tree.map(jnp.copy, operands) for _ in range(min(64, 4 * _L2 // num_bytes))]
  for name in case.contenders:
    try:
      result = _run(programs[name], operands)
    except jax.errors.JaxRuntimeError as why:
      if name == "ours":
        raise
      excluded[name] = _does_not_fit(why)
      continue
    timed[name] = Timed(_rotate(programs[name], rotating), jax.block_until_ready)
    if name == "ours":
      errors = _error(case, programs, operands, result)
    del result
  if cfg.peers and case.peers:
    peers, unavailable = _peers(case, rotating)
    timed, excluded = timed | peers, excluded | unavailable
  seconds = _alternate(timed, cfg)
  return [_row(case, name, seconds, ceilings, errors if name == "ours" else {"error": None})
          for name in timed] + [
      {"operation": case.operation, "shape": case.shape, "contender": name, "absent": why}
      for name, why in excluded.items()]


def _rotate(run: Callable, rotating: list[tuple]) -> Callable[[int], Any]:
  """Returns a function that runs on other operands at every call, to find none of them in L2."""
  return lambda call: run(*rotating[call % len(rotating)])


def _does_not_fit(why: jax.errors.JaxRuntimeError) -> str:
  """Returns the first line of an out-of-memory error; raises any other error again."""
  reason = str(why).partition("\n")[0]
  if "RESOURCE_EXHAUSTED" not in reason:
    raise why
  return reason


def _peers(case: Case, rotating: list[tuple]) -> tuple[dict[str, Timed], dict[str, str]]:
  """Returns the peers that run here, and the reasons why the others do not."""
  found, excluded = {}, {}
  try:
    torch = importlib.import_module("experiments.benchmarks.peers.torch_kernels")
    tensors = [torch.tensors(operands) for operands in rotating]
  except (ImportError, RuntimeError) as why:
    return {}, dict.fromkeys(case.peers, str(why).partition("\n")[0])
  for name, function in case.peers.items():
    try:
      run = _rotate(getattr(torch, function), tensors)
      torch.wait(run(0))
      found[name] = Timed(run, torch.wait)
    except (RuntimeError, AttributeError, ValueError) as why:
      excluded[name] = str(why).partition("\n")[0]
  return found, excluded


def _error(case: Case, programs: dict[str, Any], operands: tuple, ours) -> dict:
  """Returns the largest relative Frobenius error of our results, or why it is unknown."""
  if case.reference is None:
    return {"error": None}
  try:
    exact = _run(programs["reference"], operands)
  except jax.errors.JaxRuntimeError as why:
    return {"error": None, "reference_absent": _does_not_fit(why)}
  return {"error": max(map(_relative_error, jax.tree.leaves(ours), jax.tree.leaves(exact)))}


def _relative_error(of: jax.Array, exact: jax.Array) -> float:
  """Returns the norm of the difference over the norm of `exact`, computed where the arrays are."""
  of, exact = of.astype(jnp.float32), exact.astype(jnp.float32)
  return float(jnp.linalg.norm(of - exact) / jnp.linalg.norm(exact))


def _row(case: Case, name: str, seconds: dict[str, list[float]], ceilings: dict[str, float],
         errors: dict) -> dict:
  median = float(np.median(seconds[name]))
  rate = case.work / median / (1e12 if case.unit == "TFLOP/s" else 1e9)
  ceiling = ceilings["copy GB/s" if case.unit == "GB/s" else
                     "FP8 TFLOP/s" if case.operation.startswith("fp8") else "bf16 TFLOP/s"]
  row = {"operation": case.operation, "shape": case.shape, "contender": name, "seconds": median,
         "by_round": seconds[name], "rate": rate, "unit": case.unit,
         "fraction_of_ceiling": rate / ceiling, **errors}
  if name == "ours":
    if case.most_seconds and implementations.local_backend():
      most = case.most_seconds(1e9 * ceilings["copy GB/s"])
      row["of_most_seconds"] = median_interval(np.asarray(paired_rounds(seconds[name])) / most)
    return row
  row["speedup"] = speedup(paired_rounds(seconds["ours"]), paired_rounds(seconds[name]))
  targets = case.targets if implementations.local_backend() else ()  # targets are for kernels
  goals = [target.ratio for target in targets if target.contender == name]
  return row | ({"target": goals[0]} if goals else {})


_HEADER = ("operation", "shape", "contender", "ms", "rate", "unit", "fraction of ceiling",
           "relative error", "speed-up of ours", "target")


def _line(row: dict) -> tuple:
  if "absent" in row:
    return (row["operation"], row["shape"], row["contender"], None, None, row["absent"],
            *[None] * 4)
  estimate = row.get("speedup")
  goal = None
  if "target" in row:
    goal = f"{row['target']} {target_verdict(estimate, at_least=row['target'])[0]}"
  return (row["operation"], row["shape"], row["contender"], 1e3 * row["seconds"], row["rate"],
          row["unit"], row["fraction_of_ceiling"], row["error"],
          estimate and describe(*estimate), goal)


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  ceilings, rounds, rows = result["ceilings"], result["config"]["rounds"], result["rows"]
  n, claims = _basis(rounds), _over_shapes(rows, rounds)
  for row in rows:
    text = f"{row['operation']}, {row['shape']}: ours"
    if "of_most_seconds" in row:
      claims.append(target(f"{text} against the time to read the weights", "ratio of times",
                           row["of_most_seconds"], at_most=1, n=n))
    if "speedup" in row:
      text, estimate = f"{text} against {row['contender']}", row["speedup"]
      claims.append(target(text, "speed-up", estimate, at_least=row["target"], n=n)
                    if "target" in row else claim(text, "speed-up", *estimate, n=n))
  return bench_summary(
      "bench_kernels", result["scale"],
      "Low-precision operations against torch's and XLA's, alternating in one process.", result,
      claims=claims, tables=[{
          "name": "rates", "caption": "Rates", "header": _HEADER,
          "rows": list(map(_line, rows)),
          "note": "Ceilings, measured in the same process: " + ", ".join(
              f"{name} {number(value)}" for name, value in ceilings.items()) + "."}])


def _basis(rounds: int) -> str:
  return f"{rounds // 2} pairs of rounds"


def _over_shapes(rows: list[dict], rounds: int) -> list[dict]:
  """Returns claims about the speed-ups of an operation over all shapes, if it has many."""
  by_contender = {}
  for row in rows:
    if "speedup" in row:
      by_contender.setdefault((row["operation"], row["contender"]), []).append(row)
  claims, n = [], _basis(rounds)
  for (operation, contender), found in by_contender.items():
    if len(found) < _MANY:
      continue
    ours = {row["shape"]: row["by_round"] for row in rows
            if row["operation"] == operation and row["contender"] == "ours"}
    ratios = [np.asarray(paired_rounds(row["by_round"])) / paired_rounds(ours[row["shape"]])
              for row in found]
    mean = median_interval(np.exp(np.mean(np.log(ratios), 0)))
    text = f"{operation}, {len(found)} shapes: ours against {contender}"
    metric, goal = "geometric mean of speed-ups", found[0].get("target")
    claims.append(target(text, metric, mean, at_least=goal, n=n) if goal else
                  claim(text, metric, *mean, n=n))
    highest = [row["speedup"][2] for row in found]
    if None not in highest:  # few rounds give no intervals
      claims.append(target(f"shapes of {operation} with less than {_SLOWER} of {contender}'s speed",
                           "whole interval below", (sum(high < _SLOWER for high in highest),),
                           at_most=0, n=n))
  return claims
