"""Time the low-precision operations against torch's and XLA's, alternating in one process.

`--scale=smoke` runs small shapes on any device, to check that everything works; `--scale=gpu` is
for a Hopper GPU. Where torch is installed, its products are timed as peers. A target is met if the
whole 95 % interval of the median speed-up, over pairs of rounds in counterbalanced order, is at
least the target. The ceilings are measured in the same process: the rate of a copy, and the rates
of XLA's own products of 8192 x 8192 matrices.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import settings
from experiments.benchmarks.kernels.cases import SHAPES, Case, cases
from experiments.benchmarks.timing import CallTimer, alternate, describe, paired_rounds, speedup
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.markdown import number, table
from experiments.reports.summary import bench_summary, claim, target, target_verdict
from model.checks import require
from pallas_kernels import implementations
from pallas_kernels.quantized import error
from train.config_io import to_dict

_CEILING = {"smoke": 256, "gpu": 8192}


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
  ceilings = _ceilings(_CEILING[scale], cfg)
  print("ceilings: " + ", ".join(f"{name} {value:,.0f}" for name, value in ceilings.items()))
  rows = []
  for case in cases(scale, kernels):
    if cfg.only in case.operation:
      rows += _measure(case, cfg, ceilings)
      if options.out:  # after each of the many cases, so that an interrupted run keeps them
        results.record(options.out, {"config": to_dict(cfg), "scale": scale, "ceilings": ceilings,
                                     "rows": rows}, summary)
  require(rows, f"only={cfg.only} is in no operation's name")
  print(table(_HEADER, map(_line, rows)))


def _ceilings(width: int, cfg: BenchConfig) -> dict[str, float]:
  """Median rates: GB/s of a copy, and TFLOP/s of XLA's products of square matrices."""
  x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
  small = x.astype(jnp.float8_e4m3fn)
  product = lambda a: jnp.einsum("mk,nk->mn", a, a, preferred_element_type=jnp.bfloat16)
  runs = {"copy GB/s": (jax.jit(lambda a: -a), x, 2 * x.nbytes / 1e9),
          "bf16 TFLOP/s": (jax.jit(product), x, 2 * width**3 / 1e12),
          "FP8 TFLOP/s": (jax.jit(product), small, 2 * width**3 / 1e12)}
  found = {}
  for name, (run, operand, work) in runs.items():
    timed = CallTimer(functools.partial(run, operand), jax.block_until_ready, cfg.seconds)
    found[name] = work / float(np.median([timed() for _ in range(cfg.rounds)]))
  return found


def _measure(case: Case, cfg: BenchConfig, ceilings: dict[str, float]) -> list[dict]:
  operands, timed, excluded = case.operands(), {}, {}
  for name, run in case.contenders.items():
    try:
      timed[name] = CallTimer(functools.partial(jax.jit(run), *operands), jax.block_until_ready,
                          cfg.seconds)
    except jax.errors.JaxRuntimeError as why:
      if name == "ours":
        raise
      excluded[name] = _does_not_fit(why)
  errors = _error(case, operands, timed["ours"].result)
  if cfg.peers and case.peers:
    peers, unavailable = _peers(case, operands, cfg)
    timed, excluded = timed | peers, excluded | unavailable
  seconds = alternate(timed, cfg.rounds)
  return [_row(case, name, seconds, ceilings, errors if name == "ours" else {"error": None})
          for name in timed] + [
      {"operation": case.operation, "shape": case.shape, "contender": name, "absent": why}
      for name, why in excluded.items()]


def _does_not_fit(why: jax.errors.JaxRuntimeError) -> str:
  """Returns the first line of an out-of-memory error; raises any other error again."""
  reason = str(why).partition("\n")[0]
  if "RESOURCE_EXHAUSTED" not in reason:
    raise why
  return reason


def _peers(case: Case, operands: tuple,
           cfg: BenchConfig) -> tuple[dict[str, CallTimer], dict[str, str]]:
  """Returns timers of the peers that run here, and the reasons why the others do not."""
  found, excluded = {}, {}
  try:
    torch = importlib.import_module("experiments.benchmarks.peers.torch_kernels")
    tensors = torch.tensors(operands)
  except (ImportError, RuntimeError) as why:
    return {}, dict.fromkeys(case.peers, str(why).partition("\n")[0])
  for name, function in case.peers.items():
    try:
      run = functools.partial(getattr(torch, function), *tensors)
      found[name] = CallTimer(run, torch.wait, cfg.seconds)
    except (RuntimeError, AttributeError, ValueError) as why:
      excluded[name] = str(why).partition("\n")[0]
  return found, excluded


def _error(case: Case, operands: tuple, ours) -> dict:
  """Returns the largest relative Frobenius error of our results, or why it is unknown."""
  if case.reference is None:
    return {"error": None}
  try:
    exact = jax.block_until_ready(jax.jit(case.reference)(*operands))
  except jax.errors.JaxRuntimeError as why:
    return {"error": None, "reference_absent": _does_not_fit(why)}
  return {"error": max(
      error(np.asarray(a, np.float32), np.asarray(b, np.float32))
      for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True))}


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
  ceilings, rounds = result["ceilings"], result["config"]["rounds"]
  claims = []
  for row in result["rows"]:
    if "speedup" in row:
      text = f"{row['operation']}, {row['shape']}: ours against {row['contender']}"
      estimate, n = row["speedup"], f"{rounds // 2} pairs of rounds"
      claims.append(target(text, "speed-up", estimate, at_least=row["target"], n=n)
                    if "target" in row else claim(text, "speed-up", *estimate, n=n))
  return bench_summary(
      "bench_kernels", result["scale"],
      "Low-precision operations against torch's and XLA's, alternating in one process.", result,
      claims=claims, tables=[{
          "name": "rates", "caption": "Rates", "header": _HEADER,
          "rows": list(map(_line, result["rows"])),
          "note": "Ceilings, measured in the same process: " + ", ".join(
              f"{name} {number(value)}" for name, value in ceilings.items()) + "."}])
