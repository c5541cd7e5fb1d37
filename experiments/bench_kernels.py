"""Times the low-precision operations beside their peers, alternating, in one process.

--scale=smoke runs small shapes by XLA, to see that all of it works; --scale=gpu is for a Hopper
GPU, and takes torch's products for peers where torch is installed. A target is met if the 95 %
interval of the ratio's median, over rounds there and back, lies above it. The ceilings are measured
in the same process: a copy's rate, and XLA's own products of 8192^3.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from experiments import provenance, settings
from experiments.kernel_cases import SHAPES, Case, cases
from experiments.markdown import table
from experiments.options import Options
from model.checks import require
from pallas_kernels import implementations
from pallas_kernels.quantized import error
from train.config_io import to_dict

_CEILING = {"smoke": 256, "gpu": 8192}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """How to measure.

  Attributes:
    rounds: in which every side is timed once; fewer than 12 give no interval.
    seconds: that a side runs for in a round, about.
    only: part of the name of the operations to time; empty for all.
    peers: whether to time torch's.
  """

  rounds: int = 20
  seconds: float = 0.01
  only: str = ""
  peers: bool = True

  def __post_init__(self):
    require(self.rounds > 0 and self.rounds % 2 == 0,
            f"rounds={self.rounds} must be 2, 4, ...: there and back")
    require(self.seconds >= 0, f"seconds={self.seconds} must not be negative")


def main(options: Options) -> None:
  options.refuse("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(BenchConfig(), options.settings)
  scale = options.scale_of(SHAPES)
  kernels = implementations.here()
  require(scale == "smoke" or kernels is not None,
          f"--scale={scale} times kernels, and {jax.devices()[0].device_kind} has none")
  ceilings = _ceilings(_CEILING[scale], cfg)
  print("ceilings: " + ", ".join(f"{name} {value:,.0f}" for name, value in ceilings.items()))
  rows = []
  for case in cases(scale, kernels):
    if cfg.only in case.operation:
      rows += _measure(case, cfg, ceilings)
      if options.out:  # after each, as there are many
        provenance.record(
            options.out, {"config": to_dict(cfg), "ceilings": ceilings, "rows": rows})
  require(rows, f"only={cfg.only} is in no operation's name")
  print(table(_HEADER, map(_line, rows)))


def _ceilings(width: int, cfg: BenchConfig) -> dict[str, float]:
  """GB/s of a copy, TFLOP/s of XLA's products: medians."""
  x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
  small = x.astype(jnp.float8_e4m3fn)
  product = lambda a: jnp.einsum("mk,nk->mn", a, a, preferred_element_type=jnp.bfloat16)
  runs = {"copy GB/s": (jax.jit(lambda a: -a), x, 2 * x.nbytes / 1e9),
          "bf16 TFLOP/s": (jax.jit(product), x, 2 * width**3 / 1e12),
          "FP8 TFLOP/s": (jax.jit(product), small, 2 * width**3 / 1e12)}
  found = {}
  for name, (run, operand, work) in runs.items():
    timed = Timed(functools.partial(run, operand), jax.block_until_ready, cfg.seconds)
    found[name] = work / float(np.median([timed() for _ in range(cfg.rounds)]))
  return found


class Timed:
  """Seconds of one call, of as many as fill the time asked for; compiled and warm."""

  def __init__(self, run: Callable, wait: Callable, seconds: float):
    self._run, self._wait = run, wait
    self.result = run()
    wait(self.result)
    self._calls = 3
    # The first calls find the GPU idle, and are slow; too few to time would be made of those.
    self._calls = max(1, round(seconds / min(self() for _ in range(5))))

  def __call__(self) -> float:
    started = time.perf_counter()
    for _ in range(self._calls):
      result = self._run()
    self._wait(result)
    return (time.perf_counter() - started) / self._calls


def in_turns[Side](timed: Mapping[Side, Callable[[], float]],
                   rounds: int) -> dict[Side, list[float]]:
  """Each side's seconds, round by round, so that a machine that slows down slows all of them.

  Every other round goes backwards: what ran before leaves a machine hot.
  """
  seconds = {side: [] for side in timed}
  for index in range(rounds):
    for side in (list, reversed)[index % 2](timed):
      seconds[side].append(timed[side]())
  return seconds


def _measure(case: Case, cfg: BenchConfig, ceilings: dict[str, float]) -> list[dict]:
  operands, timed, absent = case.operands(), {}, {}
  for name, run in case.sides.items():
    try:
      timed[name] = Timed(functools.partial(jax.jit(run), *operands), jax.block_until_ready,
                          cfg.seconds)
    except jax.errors.JaxRuntimeError as why:
      if name == "ours":
        raise
      absent[name] = _does_not_fit(why)
  off = _error(case, operands, timed["ours"].result)
  if cfg.peers and case.peers:
    peers, without = _peers(case, operands, cfg)
    timed, absent = timed | peers, absent | without
  seconds = in_turns(timed, cfg.rounds)
  return [_row(case, name, seconds, ceilings, off if name == "ours" else {"error": None})
          for name in timed] + [
      {"operation": case.operation, "shape": case.shape, "side": name, "absent": why}
      for name, why in absent.items()]


def _does_not_fit(why: jax.errors.JaxRuntimeError) -> str:
  """Why, in a line, if memory is too small; anything else is a fault, and raised."""
  reason = str(why).partition("\n")[0]
  if "RESOURCE_EXHAUSTED" not in reason:
    raise why
  return reason


def _peers(case: Case, operands: tuple,
           cfg: BenchConfig) -> tuple[dict[str, Timed], dict[str, str]]:
  """Peers that run here, and of the others why not."""
  found, absent = {}, {}
  try:
    torch = importlib.import_module("experiments.peers.torch_kernels")
    tensors = torch.tensors(operands)
  except (ImportError, RuntimeError) as why:
    return {}, dict.fromkeys(case.peers, str(why).partition("\n")[0])
  for name, function in case.peers.items():
    try:
      run = functools.partial(getattr(torch, function), *tensors)
      found[name] = Timed(run, torch.wait, cfg.seconds)
    except (RuntimeError, AttributeError, ValueError) as why:
      absent[name] = str(why).partition("\n")[0]
  return found, absent


def _error(case: Case, operands: tuple, ours) -> dict:
  """The largest relative Frobenius error of the results, or why there is none."""
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
         off: dict) -> dict:
  median = float(np.median(seconds[name]))
  rate = case.work / median / (1e12 if case.unit == "TFLOP/s" else 1e9)
  ceiling = ceilings["copy GB/s" if case.unit == "GB/s" else
                     "FP8 TFLOP/s" if case.operation.startswith("fp8") else "bf16 TFLOP/s"]
  row = {"operation": case.operation, "shape": case.shape, "side": name, "seconds": median,
         "by_round": seconds[name], "rate": rate, "unit": case.unit,
         "share_of_ceiling": rate / ceiling, **off}
  if name == "ours":
    return row
  row["ours_over_it"] = ratio(_there_and_back(seconds["ours"]), _there_and_back(seconds[name]))
  targets = case.targets if implementations.here() else ()  # they are of kernels
  wanted = [target.ratio for target in targets if target.side == name]
  return row | ({"target": wanted[0], "met": row["ours_over_it"][1] >= wanted[0]} if wanted else {})


def _there_and_back(seconds: list[float]) -> list[float]:
  """Of rounds two by two: in one a side follows itself, in the other what may have run cooler."""
  return np.sqrt(np.asarray(seconds[::2]) * np.asarray(seconds[1::2])).tolist()


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
  """Their seconds over ours, round by round: median and 95 % interval."""
  return median_interval(np.asarray(theirs) / np.asarray(ours))


def median_interval(values: ArrayLike) -> tuple[float, float, float]:
  """The median, and order statistics that have the population's between them, at 95 % or more.

  Whatever its shape, and values far off move neither. Fewer than six tell nothing: 0.5^(n - 1)
  of the samples lie on one side.

  Args:
    values: [n].

  Returns:
    Median, low and high; infinite if no order statistics are far enough apart.
  """
  values_n = np.sort(np.asarray(values, float))
  n, median = values_n.size, float(np.median(values_n))
  # How many the interval may leave out at each end: a binomial of so many is less often so small.
  left_out = sum(2 * special.bdtr(k, n, 0.5) <= 0.05 for k in range(n // 2))
  if not left_out:
    return median, -np.inf, np.inf
  return median, float(values_n[left_out - 1]), float(values_n[n - left_out])


_HEADER = ("operation", "shape", "side", "ms", "rate", "unit", "of ceiling", "error",
           "ours is faster by", "target")


def _line(row: dict) -> tuple:
  if "absent" in row:
    return (row["operation"], row["shape"], row["side"], None, None, row["absent"], *[None] * 4)
  of = row.get("ours_over_it")
  target = f"{row['target']} {'met' if row['met'] else 'missed'}" if "target" in row else None
  return (row["operation"], row["shape"], row["side"], 1e3 * row["seconds"], row["rate"],
          row["unit"], row["share_of_ceiling"], row["error"],
          of and describe(*of), target)


def describe(median: float, low: float, high: float) -> str:
  """A ratio in words."""
  return f"{median:.2f} ({low:.2f} to {high:.2f})" if np.isfinite(low) else f"{median:.2f}"
