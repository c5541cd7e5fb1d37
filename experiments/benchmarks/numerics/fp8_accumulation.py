"""Measure the precision that a tensor core loses in FP8 sums, and what promotion restores.

DeepSeek-V3 found that Hopper keeps 14 bits of such sums: for two random matrices with K = 4096, the
largest relative error is nearly 2 % (arXiv:2412.19437, section 3.3.2). Here random matrices in
E4M3, without scales, are multiplied by an emulation of that arithmetic, which runs on any device,
and on a Hopper GPU by its tensor cores: by a kernel that leaves the whole sum to them, by our
kernel with promotion, and by libraries with and without what they call fast accumulation. All
results are compared with the exact product of the same FP8 values, in float64.

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
from experiments.options import Options, writes_results
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
    widths: values of K, the number of products in a sum; multiples of 128.
    rows: M and N, the number of rows of each operand.
    seed: seed of the random operands.
  """

  widths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
  rows: int = 256
  seed: int = 0

  def __post_init__(self):
    require_positive(self, "rows")
    require(self.widths and min(self.widths) > 0 and not any(k % BLOCK for k in self.widths),
            f"widths={self.widths} must be one or more positive multiples of {BLOCK}")


_CUBLASLT = "__cublas$lt$matmul$f8"  # name of the custom call in a compiled program
_NUMBERS = {"normal": lambda x: x, "positive": np.abs}
_ERRORS = {
    "of_deviation": "largest error ÷ standard deviation",
    "relative": "largest relative error",
    "frobenius": "relative Frobenius norm of the error"}
_LABELS = {"raw_matmul": "ours, not promoted", "fp8_matmul, promoted": "ours, promoted",
           "emulated": "emulated, not promoted"}
_DRAWN = {"normal": "of_deviation", "positive": "relative"}  # errors in the figure, by operands
_PAPER = 0.02  # section 3.3.2: the largest relative error for random matrices with K = 4096
_SAME = 0.05  # errors that differ by a smaller fraction cannot be told apart in a figure


def implementations(lhs_MK: jax.Array, rhs_NK: jax.Array) -> dict:
  """Returns implementations of the product by name: functions of [M, K] and [N, K] to [M, N].

  On a Hopper GPU these include the tensor core with and without promotion, XLA's dot and, where it
  is installed, torch's product.

  Args:
    lhs_MK: FP8; gives the shape for which XLA's dot is compiled.
    rhs_NK: FP8; gives the shape for which XLA's dot is compiled.
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
  """Returns the errors; "relative" only for positive operands, as other sums may be close to 0."""
  difference = np.abs(ours - exact)
  found = {"of_deviation": float(difference.max() / exact.std()), "frobenius": error(ours, exact)}
  return found | ({"relative": float((difference / exact).max())} if numbers == "positive" else {})


CONFIG = AccumulationConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  rows = []
  for numbers, width in itertools.product(_NUMBERS, cfg.widths):
    rows += [{"numbers": numbers, "width": width, "way": name, **found}
             for name, found in _measure(cfg, numbers, width).items()]
    if options.out:  # after each width, as the next may run out of memory
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
  return {name: errors(np.asarray(product(*operands), np.float64), exact, numbers)
          for name, product in implementations(*operands).items()}


def _promote(lhs_MK: jax.Array, rhs_NK: jax.Array) -> jax.Array:
  unscaled = lambda x: Quantized.of(x, jnp.ones((len(x), x.shape[1] // BLOCK)), (1, BLOCK))
  return fp8_matmul(unscaled(lhs_MK), unscaled(rhs_NK), dtype=jnp.float32,
                    implementation="mosaic_gpu")


def _raw_matmul(lhs_MK: jax.Array, rhs_NK: jax.Array) -> jax.Array:
  raw = importlib.import_module("pallas_kernels.mosaic_gpu.raw_fp8")  # Pallas takes long to import
  return raw.raw_matmul(lhs_MK, rhs_NK)


_emulated = jax.jit(emulated_matmul, static_argnames="promote_every")
_promoted, _raw = jax.jit(_promote), jax.jit(_raw_matmul)


@functools.cache
def _compiled_dot(lhs_shape: tuple, rhs_shape: tuple, precision: lax.Precision):
  """XLA's product, compiled; at DEFAULT precision cuBLASLt may add up in the tensor core."""
  dot = jax.jit(functools.partial(
      jnp.einsum, "mk,nk->mn", precision=precision, preferred_element_type=jnp.float32))
  operands = (jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in (lhs_shape, rhs_shape))
  # Otherwise XLA may choose its own Triton kernel if that happens to be faster.
  return dot.lower(*operands).compile({"xla_gpu_enable_triton_gemm": False})


_HEADER = ("operands", "K", "implementation", *_ERRORS.values())


def _lines(rows: list[dict]) -> list[list]:
  return [[row["numbers"], row["width"], _label(row["way"]),
           *(_percent(row.get(name)) for name in _ERRORS)] for row in rows]


def _percent(value: float | None) -> str | None:
  return None if value is None else f"{100 * value:.3f} %"


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  errors = {(row["numbers"], row["width"], row["way"]): row for row in result["rows"]}
  names = dict.fromkeys(name for *_, name in errors)
  raw, promoted = (("raw_matmul", "fp8_matmul, promoted") if "raw_matmul" in names
                   else ("emulated", "emulated, promoted"))
  size, widths = result["config"]["rows"], result["config"]["widths"]
  claims = [
      claim(f"sums of {width} positive products: {words}", "largest relative error",
            errors["positive", width, name]["relative"], n=f"{size} x {size} sums",
            reference="nearly 2 % for random matrices with K = 4096"
            if width == 4096 and name == raw else "")
      for width in widths
      for words, name in (("added up in the tensor core", raw), ("promoted every 128", promoted))]
  percent = lambda numbers, metric, width, name: _percent(errors[numbers, width, name][metric])
  return bench_summary(
      "fp8_accumulation", backend(result),
      f"Errors of {size} x {size} sums of K products in E4M3, compared with float64.", result,
      claims=claims, tables=[{
          "name": "promotion", "caption": "Largest error without and with promotion",
          "header": ["K", "normal: error ÷ σ", "normal, promoted every 128",
                     "positive: relative error", "positive, promoted every 128"],
          "rows": [[width, *(percent(numbers, metric, width, name)
                             for numbers, metric in (("normal", "of_deviation"),
                                                     ("positive", "relative"))
                             for name in (raw, promoted))]
                   for width in widths]}])


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  rows = result["rows"]
  series = {name: {numbers: [row for row in rows if (row["numbers"], row["way"]) == (numbers, name)]
                   for numbers in _NUMBERS}
            for name in dict.fromkeys(row["way"] for row in rows)}
  panels = {}
  for numbers, metric in _DRAWN.items():
    panels[f"{numbers} operands: {_ERRORS[metric]} (%)"] = {
        "\n= ".join(map(_label, names)): (
            [row["width"] for row in series[names[0]][numbers]],
            [100 * row[metric] for row in series[names[0]][numbers]])
        for names in _indistinguishable(series)}
  reference = (100 * _PAPER, "V3, K = 4096: nearly 2 %")
  draw = functools.partial(
      plots.panels, ratios="K (products per sum)", logarithmic=True,
      references={f"positive operands: {_ERRORS['relative']} (%)": reference},
      note=f"Implementations whose errors differ by at most {100 * _SAME:g} % share a curve (=).")
  return [("Errors over K", figure(folder, "errors", "Errors over K", draw, panels)),
          ("All errors", table(_HEADER, _lines(rows)))]


def _indistinguishable(series: dict[str, dict[str, list[dict]]]) -> list[list[str]]:
  """Returns groups of implementations whose errors agree to within `_SAME` in every figure."""
  values = {name: np.array([row[_DRAWN[numbers]] for numbers in _DRAWN
                            for row in by_numbers[numbers]])
            for name, by_numbers in series.items()}
  groups: list[list[str]] = []
  for name in sorted(series, key=lambda name: not _label(name).startswith("ours")):
    same = [group for group in groups
            if np.allclose(values[name], values[group[0]], rtol=_SAME, atol=0)]
    if same:
      same[0].append(name)
    else:
      groups.append([name])
  return groups


def _label(name: str) -> str:
  """Returns the name of an implementation in reports; result files have those of functions."""
  return _LABELS.get(name, name)
