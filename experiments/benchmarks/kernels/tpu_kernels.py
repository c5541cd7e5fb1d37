"""Compile our kernels and XLA's products ahead of time for TPUs, and compare their formats.

libtpu, from the extra `tpu`, compiles for every TPU on any host. It estimates the cycles of XLA's
own products, so that formats can be compared on every chip. It does not look into Pallas kernels:
its estimates of their time follow from the FLOPs and bytes that we declare.

Shape letters:  M, N rows of the operands  K contracted width  R rows in groups  G groups
                S rows when every group starts at a multiple of 128
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments import settings
from experiments.options import Options, writes_results
from experiments.reports import provenance, results
from experiments.reports.markdown import collapsed, table
from experiments.reports.summary import bench_summary, claim
from model.checks import require, require_positive
from model.config import MLAConfig, ModelConfig
from model.registry import get_config
from pallas_kernels import Quantized
from pallas_kernels.mosaic_tpu import (
  fp8_grouped,
  fp8_matmul,
  fp8_weight_gradient,
  grouped_matmul,
  quantize,
)
from pallas_kernels.ops.fp8_grouped import aligned_rows
from pallas_kernels.ops.quantize import SMALLEST_AMAX
from pallas_kernels.quantized import BLOCK, num_tiles
from train.config_io import to_dict

_MACHINES = 8  # over which V3's 256 experts are divided
_DOTS = {"bf16": (jnp.bfloat16, jnp.float32), "int8": (jnp.int8, jnp.int32),
         "fp8": (jnp.float8_e4m3fn, jnp.float32)}
_UNKNOWN = 2**63 - 1  # the compiler's entry where it has no estimate of the cycles


@dataclasses.dataclass(frozen=True)
class TpuConfig:
  """What is compiled, and for which chips.

  Attributes:
    models: names of the architectures whose layers give the shapes.
    chips: libtpu's names of the TPU topologies to compile for.
    tokens: tokens per step on one chip.
    only: compile only the layers whose name contains this text; empty for all.
  """

  models: tuple[str, ...] = ("base", "deepseek_v2_lite", "deepseek_v3")
  chips: tuple[str, ...] = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
  tokens: int = 8192
  only: str = ""

  def __post_init__(self):
    require_positive(self, "tokens")
    require(self.models and self.chips, "models and chips must each name at least one")


class Layer(NamedTuple):
  """A product of x [rows, K] with weights [groups, N, K], or [N, K] if groups is 0."""

  rows: int
  n: int
  k: int
  groups: int = 0


class Case(NamedTuple):
  """A program to compile: the function `run` and the shapes of its operands."""

  name: str
  run: Callable
  operands: tuple


def layers(cfg: ModelConfig, tokens: int) -> dict[str, Layer]:
  """Returns the products of a model with latent attention and experts, by the layer's name."""
  d, att, moe = cfg.d_model, cfg.attention, cfg.moe
  if not isinstance(att, MLAConfig) or moe is None:
    raise ValueError("tpu_kernels needs models with latent attention and experts, such as base")
  queries = att.num_heads * (att.qk_nope_head_dim + att.qk_rope_head_dim)
  values = att.num_heads * att.v_head_dim
  dense = {
      "kv_a": (att.kv_lora_rank + att.qk_rope_head_dim, d),
      "kv_b": (att.num_heads * att.qk_nope_head_dim + values, att.kv_lora_rank),
      "output": (d, values),
      "mlp_up": (2 * cfg.ffn_dim, d), "mlp_down": (d, cfg.ffn_dim),
      "shared_up": (2 * moe.shared_dim, d), "shared_down": (d, moe.shared_dim)}
  dense |= {"query": (queries, d)} if att.q_lora_rank is None else {
      "query_a": (att.q_lora_rank, d), "query_b": (queries, att.q_lora_rank)}
  rows = tokens * moe.experts_per_token
  groups = moe.num_experts if moe.num_experts < 256 else moe.num_experts // _MACHINES
  return {name: Layer(tokens, *shape) for name, shape in dense.items()} | {
      "experts_up": Layer(rows, 2 * moe.expert_dim, d, groups),
      "experts_down": Layer(rows, d, moe.expert_dim, groups)}


def kernels(layer: Layer, native: bool) -> Iterator[Case]:
  """Yields a layer's kernels: quantisation of the inputs, forward product and weight gradient."""
  rows, n, k, groups = layer
  to_fp8 = functools.partial(
      quantize.run, format="e4m3", power_of_two=False, smallest_amax=SMALLEST_AMAX)
  forward = {"dtype": jnp.bfloat16, "native": native}
  gradient = {"dtype": jnp.float32, "native": native}
  yield Case("quantize", functools.partial(to_fp8, tile=(1, BLOCK)), (_array(rows, k),))
  if not groups:
    yield Case("quantize, 128x128", functools.partial(to_fp8, tile=(BLOCK, BLOCK)),
               (_array(n, k, dtype=jnp.float32),))
    yield Case("fp8_matmul", functools.partial(fp8_matmul.run, **forward),
               (_quantized(rows, k), _quantized(n, k, tile=(BLOCK, BLOCK))))
    yield Case("fp8_matmul, weight gradient", functools.partial(fp8_matmul.run, **gradient),
               (_quantized(n, rows), _quantized(k, rows)))
    return
  sizes_G = _array(groups, dtype=jnp.int32)
  x_RK, dy_RN, aligned = _array(rows, k), _array(rows, n), aligned_rows(rows, groups)
  yield Case("grouped_matmul", grouped_matmul.run, (x_RK, _array(groups, k, n), sizes_G))
  yield Case("grouped_matmul, transposed",
             functools.partial(grouped_matmul.run, transpose_rhs=True),
             (dy_RN, _array(groups, k, n), sizes_G))
  yield Case("grouped_weight_gradient",
             functools.partial(grouped_matmul.run_weight_gradient, dtype=jnp.float32),
             (x_RK, dy_RN, sizes_G))
  yield Case("fp8_grouped_matmul", functools.partial(fp8_grouped.run, **forward),
             (_quantized(rows, k), _quantized(groups, n, k, tile=(BLOCK, BLOCK)), sizes_G))
  yield Case("fp8_grouped_weight_gradient", functools.partial(fp8_weight_gradient.run, **gradient),
             (_quantized(k, aligned), _quantized(n, aligned), sizes_G))


def dots(layer: Layer) -> Iterator[Case]:
  """Yields XLA's own product of that shape in every format, as if all rows were one group."""
  for name, (dtype, sums) in _DOTS.items():
    dot = lambda x_MK, w_NK, sums=sums: jnp.einsum(
        "mk,nk->mn", x_MK, w_NK, preferred_element_type=sums).astype(jnp.bfloat16)
    yield Case(name, dot, (_array(layer.rows, layer.k, dtype=dtype),
                           _array(layer.n, layer.k, dtype=dtype)))


def compiled(case: Case, device: Any) -> dict:
  """Returns the compiler's report: None for unknown times, or its `error` if it refuses."""
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=SingleDeviceSharding(device)), case.operands)
  started = time.perf_counter()
  try:
    program = jax.jit(case.run).lower(*placed).compile()
  except Exception as error:  # the compiler raises errors of many types
    return {"error": str(error).splitlines()[0]}
  costs, memory = program.cost_analysis(), program.memory_analysis()
  seconds = costs.get("optimal_seconds", -1)
  return {
      "compile_seconds": time.perf_counter() - started, "flops": costs.get("flops"),
      "bytes": costs.get("bytes accessed"), "optimal_seconds": seconds if seconds > 0 else None,
      "cycles": cycles(program.as_text()), "temporaries": memory.temp_size_in_bytes,
      "program": memory.generated_code_size_in_bytes}


def cycles(program: str) -> int | None:
  """Sum of the operations' estimates; None if one is missing or the program has Pallas kernels."""
  if "tpu_custom_call" in program:
    return None
  found = [int(text) for text in re.findall(r'estimated_cycles":"(\d+)"', program)]
  return sum(found) if found and _UNKNOWN not in found else None


CONFIG = TpuConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  found = _kept(options.out)
  for row, case, device in _rows(cfg):
    key = _key(row)
    if key in found:
      continue
    found[key] = row | compiled(case, device)
    outcome = found[key].get("error") or f"compiles in {found[key]['compile_seconds']:.1f} s"
    print(f"{row['chip']}, {row['contender']} {row['name']}, {_shape(row)}: {outcome}", flush=True)
    if options.out:
      _record(options.out, cfg, found)
  rows = list(found.values())
  print(table(_FORMATS, verdicts(rows)))
  if options.out:
    print(f"report: {_record(options.out, cfg, found)}")


def _record(folder: pathlib.Path, cfg: TpuConfig, found: dict[tuple, dict]) -> pathlib.Path:
  result = {"config": to_dict(cfg), "libtpu": _libtpu(), "rows": list(found.values())}
  return results.record(folder, result, summary, lambda _, saved: _sections(saved))


def _kept(folder: pathlib.Path | None) -> dict[tuple, dict]:
  """Returns the rows of an earlier run of the same code in this folder, whatever its settings."""
  path = folder and folder / "results.json"
  if not path or not path.exists():
    return {}
  result, now = json.loads(path.read_text()), provenance.describe()
  same = all(result.get(name) == now[name] for name in ("sources", "versions"))
  return {_key(row): row for row in result["rows"]} if same else {}


def _key(row: dict) -> tuple:
  return tuple(row[name] for name in ("chip", "contender", "name", "rows", "n", "k", "groups"))


def _rows(cfg: TpuConfig) -> Iterator[tuple[dict, Case, Any]]:
  """Yields rows to fill, cases and devices; a program that several layers share occurs once."""
  shapes = {}
  for model in cfg.models:
    for name, layer in layers(get_config(model), cfg.tokens).items():
      if cfg.only in name:
        shapes.setdefault(layer, []).append(f"{model} {name}")
  require(shapes, f"only={cfg.only} is in no layer's name")
  devices = {chip: _device(chip) for chip in cfg.chips}
  for chip, device in devices.items():
    seen = set()
    for layer, names in shapes.items():
      cases = [("ours", case) for case in kernels(layer, "TPU7" in device.device_kind)]
      cases += [] if layer.groups else [("XLA", case) for case in dots(layer)]
      for contender, case in cases:
        same = contender, case.name, *((x.shape, x.dtype) for x in jax.tree.leaves(case.operands))
        if same not in seen:
          row = {"chip": chip, "layers": ", ".join(names), **layer._asdict(),
                 "contender": contender, "name": case.name}
          yield row, case, device
        seen.add(same)


def _device(chip: str) -> Any:
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("tpu_kernels needs libtpu: pip install -e '.[tpu]'")
  # There is no TPU here to query for metadata, and none that one process has to itself.
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  jax.config.update("jax_platforms", "cpu")
  # Reading a program from the cache would be timed as its compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"chips: libtpu does not know {chip!r}; a name that it knows is v5e:2x2. Its "
                     "message: " + str(error).partition("\n")[0]) from None


def _libtpu() -> str:
  return importlib.metadata.version("libtpu")


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _quantized(*shape: int, tile: tuple[int, int] = (1, BLOCK)) -> Quantized:
  return jax.eval_shape(functools.partial(Quantized.of, tile=tile),
                        _array(*shape, dtype=jnp.float8_e4m3fn),
                        _array(*shape[:-2], *num_tiles(shape, tile), dtype=jnp.float32))


def speedups(rows: list[dict]) -> dict[str, dict[str, float]]:
  """Cycles of bfloat16 over those of each format, by chip: geometric means over the shapes."""
  found = {}
  for chip in dict.fromkeys(row["chip"] for row in rows):
    cycles_of = {(row["rows"], row["n"], row["k"], row["name"]): row.get("cycles")
                 for row in rows if row["chip"] == chip and row["contender"] == "XLA"}
    shapes = dict.fromkeys(key[:3] for key in cycles_of)
    complete = [shape for shape in shapes if all(cycles_of[*shape, name] for name in _DOTS)]
    if complete:
      found[chip] = {name: math.exp(sum(
          math.log(cycles_of[*shape, "bf16"] / cycles_of[*shape, name]) for shape in complete)
          / len(complete)) for name in _DOTS}
  return found


_FORMATS = ("chip", *(f"cycles, bf16 ÷ {name}" for name in _DOTS), "fastest format")


def verdicts(rows: list[dict]) -> list[list[str]]:
  """Returns the rows of the table of formats; bf16 is fastest unless another gains over 10 %."""
  fastest = lambda gains: max(gains, key=gains.get) if max(gains.values()) > 1.1 else "bf16"
  return [[chip, *(f"{gain:.2f}" for gain in gains.values()), fastest(gains)]
          for chip, gains in speedups(rows).items()]


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  rows = result["rows"]
  ours = [row for row in rows if row["contender"] == "ours"]
  num_compiled = sum("error" not in row for row in ours)
  claims = [claim(f"{chip}: {name} against bfloat16", "ratio of estimated cycles", gains[name],
                  n="the compiler's estimate")
            for chip, gains in speedups(rows).items() for name in gains if name != "bf16"]
  claims.append(claim("programs of our kernels that compile", "fraction",
                      num_compiled / len(ours), n=f"{len(ours)} programs"))
  return bench_summary(
      "tpu_kernels", "ahead_of_time",
      f"Kernels for TPUs, compiled ahead of time by libtpu {result['libtpu']}. Nothing was "
      "measured on a TPU.", result, claims=claims, tables=[{
          "name": "formats", "caption": "Estimated cycles by format", "header": list(_FORMATS),
          "rows": verdicts(rows),
          "note": "Cycles of bfloat16 over those of the format, as the compiler estimates them for "
                  "its own matrix products: geometric means over all shapes. A format counts as "
                  "fastest only if it gains more than 10 %."}])


def _sections(result: dict) -> list[tuple[str, str]]:
  rows = result["rows"]
  ours = [row for row in rows if row["contender"] == "ours"]
  refused = [row for row in rows if "error" in row]
  compiles = (f"{len(ours) - sum(row['contender'] == 'ours' for row in refused)} of {len(ours)} "
              f"programs of our kernels compile, with libtpu {result['libtpu']}.")
  return [
      ("XLA's products", _dots_table(rows)),
      ("", "`optimal_seconds`, the compiler's other estimate, follows from FLOPs and bytes: it "
           "does not know that a chip multiplies one format faster than another of equal width."),
      ("Our kernels", compiles),
      ("", collapsed("All programs", _kernels_table(ours))),
      ("", "The compiler does not look into Pallas kernels, and gives no cycles for them. "
           "Microseconds are its `optimal_seconds`, which follow from the FLOPs and bytes that we "
           "declare. They count FP8 at the rate of bfloat16, and leave out the cost of promotion "
           "and conversion, so they do not predict run times. A dash means that it gave none."),
      ("Not compiled", table(("chip", "kernel", "shape", "error"), (
          (row["chip"], row["name"], _shape(row), row["error"]) for row in refused))
       if refused else "")]


def _dots_table(rows: list[dict]) -> str:
  found = {}
  for row in rows:
    if row["contender"] == "XLA":
      found.setdefault((row["chip"], row["layers"], _shape(row)), {})[row["name"]] = row
  micro = lambda row: _micro(row.get("optimal_seconds"))
  return table(("chip", "layers", "M x N x K", *(f"{name}, cycles" for name in _DOTS),
                *(f"{name}, optimal µs" for name in _DOTS)), (
      (*key, *(named[name].get("cycles") for name in _DOTS),
       *(micro(named[name]) for name in _DOTS)) for key, named in found.items()))


def _kernels_table(ours: list[dict]) -> str:
  mega = lambda row, name: row[name] / 1e6
  return table(("chip", "kernel", "M x N x K", "optimal µs", "temporaries, MB", "program, MB",
                "compile time, s"), (
      (row["chip"], row["name"], _shape(row), _micro(row["optimal_seconds"]),
       mega(row, "temporaries"), mega(row, "program"), row["compile_seconds"])
      for row in ours if "error" not in row))


def _shape(row: dict) -> str:
  shape = f"{row['rows']} x {row['n']} x {row['k']}"
  return f"{shape}, {row['groups']} groups" if row["groups"] else shape


def _micro(seconds: float | None) -> float | None:
  return None if seconds is None else 1e6 * seconds
