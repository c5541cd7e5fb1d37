"""Time `model.generate`: reading prompts and writing tokens apart, against what memory allows.

A pass that writes a token of every row cannot take less time than reading the weights that it needs
and the cache from memory. The least time is that of the weights of all layers, of the experts
that tokens choose if they choose at random, and of the cache at its mean length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.benchmarks import timing
from experiments.benchmarks.training.contenders import random_variables
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim, target
from model import ModelConfig, get_config
from model.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """The model, and how many tokens it reads and writes.

  Attributes:
    model: the architecture; weights are random.
    shapes: of each case, the rows, the prompt tokens of a row and its new tokens, as "BxTxN".
    bandwidth: what the device's memory can be copied at, in GB/s, read and written together; 0 if
      it is not known.
    attend: implementation of attention over the cache, see `model.mla.MultiHeadLatentAttention`.
    share: the least share of the time that memory allows which is aimed at, for several rows.
    rounds: rounds, in each of which every case is timed once; an even number.
  """

  model: ModelConfig
  shapes: tuple[str, ...] = ("1x128x128", "32x128x128", "256x128x128", "64x2048x64")
  bandwidth: float = 0.0
  attend: Literal["xla", "blockwise", "mla_decode"] | None = None
  share: float = 0.4
  rounds: int = 12

  def __post_init__(self):
    require_positive(self, "rounds")
    require(self.rounds % 2 == 0, f"rounds={self.rounds} must be even: rounds are paired")
    require(self.bandwidth >= 0, f"bandwidth={self.bandwidth} must not be negative")
    for shape in self.shapes:
      parts = shape.split("x")
      require(len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts)
              and int(parts[2]) > 1, f"shapes: {shape!r} is not BxTxN with N above 1")
      _, prompt, new = map(int, parts)
      require(prompt + new <= self.model.max_seq_len,
              f"shapes: {shape} is longer than the model's context of {self.model.max_seq_len}")


def _of(name: str, numerics: str, **fields: Any) -> DecodeConfig:
  return DecodeConfig(dataclasses.replace(
      get_config(name), numerics=model.NUMERICS[numerics], mtp=None), **fields)


SCALES = {
    "smoke": _of("nano", "fp32", shapes=("2x8x4",), rounds=2),
    "cpu": _of("nano", "fp32", shapes=("1x32x64", "8x32x64", "64x32x64"), rounds=6),
    "gpu": _of("base", "bf16", bandwidth=4300.0),
}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings,
                       named={"model": get_config})
  variables = random_variables(cfg.model)
  runs = {}
  for shape in cfg.shapes:
    rows, prompt, new = map(int, shape.split("x"))
    runs |= {(shape, count): _run(cfg, variables, rows, prompt, count) for count in (1, new)}
  seconds = timing.alternate(timing.call_timers(runs, jax.block_until_ready), cfg.rounds)
  result = {"parameters": cfg.model.param_count(), "numerics": cfg.model.numerics.compute,
            "bandwidth": cfg.bandwidth, "share": cfg.share, "cases": [
                {"shape": shape, "read": seconds[shape, 1],
                 "all": seconds[shape, int(shape.split("x")[2])],
                 "bytes": _bytes_of_a_pass(cfg.model, *map(int, shape.split("x")))}
                for shape in cfg.shapes]}
  for row in _rows(result):
    print(f"{row[0]}: {row[1]:,.0f} new tokens/s, {row[2]:,.0f} prompt tokens/s, {row[3]:.3f} ms "
          "per pass", flush=True)
  if options.out:
    results.record(options.out, result, summary)


def _run(cfg: DecodeConfig, variables: dict, rows: int, prompt: int,
         new: int) -> Callable[[], model.Generated]:
  prompts = np.random.default_rng(0).integers(
      0, cfg.model.vocab_size, (rows, prompt)).astype(np.int32)
  return lambda: model.generate(
      model.Transformer(cfg.model, attend=cfg.attend), variables, prompts, np.full(rows, prompt),
      max_new_tokens=new, key=jax.random.key(0))


def _bytes_of_a_pass(cfg: ModelConfig, rows: int, prompt: int, new: int) -> float:
  """Returns the bytes that a pass over one token of each row has to read."""
  size = jnp.dtype(cfg.numerics.compute_dtype).itemsize
  numbers = cfg.param_count()
  if not cfg.tie_embeddings:
    numbers -= cfg.vocab_size * cfg.d_model  # of the embedding only a few rows are read
  if cfg.moe is not None:
    moe = cfg.moe
    missed = (1 - moe.experts_per_token / moe.num_experts) ** rows
    numbers -= missed * cfg.num_moe_layers * moe.num_experts * 3 * cfg.d_model * moe.expert_dim
  return size * (numbers + rows * (prompt + new / 2) * cfg.kv_cache_elements_per_token())


def _written(case: dict) -> np.ndarray:
  """Returns the seconds of a pass in each round: what is not spent on reading prompts."""
  new = int(case["shape"].split("x")[2])
  return (np.asarray(case["all"]) - np.asarray(case["read"])) / (new - 1)


def _rows(result: dict) -> list[list]:
  """Returns a row for every case; the last entry is None where the bandwidth is not known."""
  found = []
  for case in result["cases"]:
    rows, prompt, new = map(int, case["shape"].split("x"))
    whole, read, passed = (float(np.median(x)) for x in (case["all"], case["read"], _written(case)))
    least = case["bytes"] / (1e9 * result["bandwidth"]) if result["bandwidth"] else None
    found.append([case["shape"], rows * new / whole, rows * prompt / read, 1e3 * passed,
                  None if least is None else 1e3 * least])
  return found


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  claims = []
  for case in result["cases"]:
    rows, _, new = map(int, case["shape"].split("x"))
    basis, rate = f"{len(case['all'])} rounds", rows * new / np.asarray(case["all"])
    claims.append(claim(f"{case['shape']}: prompts read and tokens written", "new tokens/s",
                        *timing.median_interval(rate), n=basis))
    if result["bandwidth"]:
      share = timing.median_interval(
          case["bytes"] / (1e9 * result["bandwidth"]) / _written(case))
      text, metric = f"{case['shape']}: tokens written", "share of what memory allows"
      claims.append(claim(text, metric, *share, n=basis) if rows == 1 else
                    target(text, metric, share, at_least=result["share"], n=basis))
  return bench_summary(
      "bench_decode", f"{backend(result)}-{result['numerics']}",
      f"Decoding: {result['parameters']:,} parameters, {result['numerics']}.", result,
      claims=claims, tables=[{
          "name": "rates", "caption": "Tokens by rows x prompt tokens x new tokens",
          "header": ["shape", "new tokens/s", "prompt tokens/s", "ms per pass",
                     "least ms by memory"],
          "rows": _rows(result),
          "note": "New tokens per second include reading the prompts; a pass does not."}])
