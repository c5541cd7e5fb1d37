"""Measure how much a tensor core loses of a sum of FP8 products, and what promotion gives back.

DeepSeek-V3 found that Hopper keeps 14 bits of such sums: of two random matrices with K = 4096 the
largest relative error is nearly 2 % (arXiv:2412.19437, section 3.3.2). Here random matrices of
E4M3, without scales, are multiplied by an emulation of that everywhere, and on a Hopper GPU by its
tensor cores: by a kernel that leaves the whole sum to them, by ours with promotion, and by
libraries, with what they call fast accumulation and without. Everything is compared with the exact
product of the same FP8 numbers in float64.

Shape letters:  M, N rows of the operands  K contracted width
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import settings
from experiments.options import Options
from experiments.reports import plots, provenance, results
from experiments.reports.markdown import figure, table
from experiments.reports.summary import backend, bench_summary, claim
from model.checks import require, require_positive
from pallas_kernels import Quantized, fp8_matmul
from pallas_kernels.implementations import local_backend
from pallas_kernels.quantized import BLOCK, error
from pallas_kernels.tensor_core import emulated_matmul
from train.config_io import to_dict


@dataclasses.dataclass(frozen=True)
class AccumulationConfig:
  """What is multiplied.

  Attributes:
    widths: K; multiples of 128.
    rows: M and N.
    seed: of the numbers.
  """

  widths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
  rows: int = 256
  seed: int = 0

  def __post_init__(self):
    require_positive(self, "rows")
    require(self.widths and min(self.widths) > 0 and not any(k % BLOCK for k in self.widths),
            f"widths={self.widths} must be multiples of {BLOCK}, one at least")


_CUBLASLT = "__cublas$lt$matmul$f8"  # what a compiled program calls
_NUMBERS = {"normal": lambda x: x, "positive": np.abs}
_ERRORS = {
    "of_deviation": "largest error ÷ standard deviation",
    "relative": "largest relative error",
    "frobenius": "relative Frobenius norm of the error"}


def ways(lhs_MK: jax.Array, rhs_NK: jax.Array) -> dict:
  """Functions of these two FP8 matrices, [M, K] and [N, K], to [M, N], by name.

  A Hopper GPU has more: the tensor core with and without promotion, XLA's dot, and torch's where
  it is installed.
  """
  found = {"emulated": _emulated,
           "emulated, promoted": functools.partial(_emulated, promote_every=BLOCK)}
  if local_backend() != "mosaic_gpu":
    return found
  found |= {"raw_matmul": _raw, "fp8_matmul, promoted": _promoted}
  for kind, precision in (("", lax.Precision.DEFAULT), (", precise", lax.Precision.HIGHEST)):
    dot = _compiled_dot(lhs_MK.shape, rhs_NK.shape, precision)
    library = "cuBLASLt" if _CUBLASLT in dot.as_text() else "not cuBLASLt"
    found[f"XLA's dot{kind} ({library})"] = dot
  with contextlib.suppress(ImportError):
    peer = importlib.import_module("experiments.benchmarks.peers.torch_kernels")
    found |= {f"torch._scaled_mm{kind}": functools.partial(peer.unscaled_mm, fast=not kind)
              for kind in ("", ", precise")}
  return found


def errors(ours: np.ndarray, exact: np.ndarray, numbers: str) -> dict[str, float]:
  """Relative errors are of positive numbers only: sums of others may be next to nothing."""
  off = np.abs(ours - exact)
  found = {"of_deviation": float(off.max() / exact.std()), "frobenius": error(ours, exact)}
  return found | ({"relative": float((off / exact).max())} if numbers == "positive" else {})


CONFIG = AccumulationConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  rows = []
  for numbers, width in itertools.product(_NUMBERS, cfg.widths):
    rows += [{"numbers": numbers, "width": width, "way": name, **found}
             for name, found in _measure(cfg, numbers, width).items()]
    if options.out:  # after each, as the next may be too wide
      provenance.record(options.out, {"config": to_dict(cfg), "rows": rows})
  print(table(_HEADER, _lines(rows)))
  if options.out:
    result = {"config": to_dict(cfg), "rows": rows}
    print(f"report: {results.record(options.out, result, summary, _sections)}")


def _measure(cfg: AccumulationConfig, numbers: str, width: int) -> dict[str, dict[str, float]]:
  rng = np.random.default_rng((cfg.seed, width))
  operands = [jnp.asarray(_NUMBERS[numbers](rng.standard_normal((cfg.rows, width))), jnp.float32)
              .astype(jnp.float8_e4m3fn) for _ in range(2)]
  lhs_MK, rhs_NK = (np.asarray(x, np.float64) for x in operands)
  exact = lhs_MK @ rhs_NK.T
  return {name: errors(np.asarray(way(*operands), np.float64), exact, numbers)
          for name, way in ways(*operands).items()}


def _promote(lhs_MK: jax.Array, rhs_NK: jax.Array) -> jax.Array:
  unscaled = lambda x: Quantized(x, jnp.ones((len(x), x.shape[1] // BLOCK)), (1, BLOCK))
  return fp8_matmul(unscaled(lhs_MK), unscaled(rhs_NK), dtype=jnp.float32,
                    implementation="mosaic_gpu")


def _raw_matmul(lhs_MK: jax.Array, rhs_NK: jax.Array) -> jax.Array:
  raw = importlib.import_module("pallas_kernels.mosaic_gpu.raw_fp8")  # Pallas takes long to import
  return raw.raw_matmul(lhs_MK, rhs_NK)


_emulated = jax.jit(emulated_matmul, static_argnames="promote_every")
_promoted, _raw = jax.jit(_promote), jax.jit(_raw_matmul)


@functools.cache
def _compiled_dot(lhs_shape: tuple, rhs_shape: tuple, precision: lax.Precision):
  """XLA's product; at DEFAULT it lets cuBLASLt add up in the tensor core."""
  dot = jax.jit(functools.partial(
      jnp.einsum, "mk,nk->mn", precision=precision, preferred_element_type=jnp.float32))
  operands = (jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in (lhs_shape, rhs_shape))
  # Or it may choose a kernel of its own that happened to be faster.
  return dot.lower(*operands).compile({"xla_gpu_enable_triton_gemm": False})


_HEADER = ("numbers", "K", "way", *_ERRORS.values())


def _lines(rows: list[dict]) -> list[list]:
  return [[row["numbers"], row["width"], row["way"],
           *(_percent(row.get(name)) for name in _ERRORS)] for row in rows]


def _percent(value: float | None) -> str | None:
  return None if value is None else f"{100 * value:.3f} %"


def summary(result: dict) -> dict:
  """The summary of what results.json holds."""
  errors = {(row["numbers"], row["width"], row["way"]): row for row in result["rows"]}
  ways = dict.fromkeys(way for *_, way in errors)
  raw, promoted = (("raw_matmul", "fp8_matmul, promoted") if "raw_matmul" in ways
                   else ("emulated", "emulated, promoted"))
  size, widths = result["config"]["rows"], result["config"]["widths"]
  claims = [
      claim(f"sums of {width} positive products: {words}", "largest relative error",
            errors["positive", width, way]["relative"], n=f"{size} x {size} sums",
            reference="nearly 2 % of random matrices with K = 4096"
            if width == 4096 and way == raw else "")
      for width in widths
      for words, way in (("all of it in the tensor core", raw), ("promoted every 128", promoted))]
  percent = lambda numbers, name, width, way: _percent(errors[numbers, width, way][name])
  return bench_summary(
      "fp8_accumulation", backend(result),
      f"Errors of {size} x {size} sums of K products of E4M3 numbers against float64.", result,
      claims=claims, tables=[{
          "name": "promotion", "caption": "The largest error, with and without promotion",
          "header": ["K", "normal, ÷ σ", "promoted every 128", "positive, relative",
                     "promoted every 128"],
          "rows": [[width, *(percent(numbers, name, width, way)
                             for numbers, name in (("normal", "of_deviation"),
                                                   ("positive", "relative"))
                             for way in (raw, promoted))]
                   for width in widths]}])


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  rows = result["rows"]
  panels = {
      label: {
          name: ([row["width"] for row in rows if (row["numbers"], row["way"]) == (numbers, name)],
                 [row[metric] for row in rows if (row["numbers"], row["way"]) == (numbers, name)])
          for name in dict.fromkeys(row["way"] for row in rows)}
      for numbers, metric, label in (("normal", "of_deviation", "normal: error ÷ σ"),
                                     ("positive", "relative", "positive: relative error"))}
  draw = functools.partial(plots.panels, doublings="K (products in a sum)", logarithmic=True)
  return [("Errors over K", figure(folder, "errors", "Errors over K", draw, panels)),
          ("All errors", table(_HEADER, _lines(rows)))]
