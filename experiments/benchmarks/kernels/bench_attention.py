"""Time training's attention: whole sequences, and sequences packed with documents.

A token of a packed sequence sees those before it in its own document only. So what is compared is
not tokens but pairs of a token and one that it sees, per second. All are forward and backward
passes, with random operands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.benchmarks import timing
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim, target
from model.attention import IMPLEMENTATIONS, Context, attend
from model.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """The shapes, and the implementations.

  Attributes:
    shapes: sequences and the tokens of each, as "BxT".
    documents: of the packed sequences, the shortest and the longest document, in tokens; they are
      drawn uniformly, and the last of a sequence is cut.
    heads: number of heads.
    key_width, value_width: widths of a head's queries and keys, and of its values.
    numerics: name of the numerics policy.
    implementations: those of `model.attention.attend`; "default" for the one that it chooses.
    share: the least ratio of pairs per second in packed and in whole sequences that is aimed at.
    rounds: rounds, in each of which everything is timed once; an even number.
  """

  shapes: tuple[str, ...]
  documents: tuple[int, int]
  heads: int
  key_width: int
  value_width: int
  numerics: str
  implementations: tuple[str, ...] = ("default", *IMPLEMENTATIONS)
  share: float = 0.9
  rounds: int = 12

  def __post_init__(self):
    require_positive(self, "heads", "key_width", "value_width", "rounds")
    require(self.rounds % 2 == 0, f"rounds={self.rounds} must be even: rounds are paired")
    require(self.numerics in model.NUMERICS, f"numerics={self.numerics!r} must be one of "
                                             f"{', '.join(model.NUMERICS)}")
    for name in self.implementations:
      require(name in ("default", *IMPLEMENTATIONS),
              f"implementations: {name!r} must be one of default, {', '.join(IMPLEMENTATIONS)}")
    require(len(self.documents) == 2 and 0 < self.documents[0] <= self.documents[1],
            f"documents={self.documents} must be two lengths, the shortest and the longest")
    for shape in self.shapes:
      parts = shape.split("x")
      require(len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts),
              f"shapes: {shape!r} is not BxT")


SCALES = {
    "smoke": AttentionConfig(("1x32",), (4, 16), 2, 8, 8, "fp32", rounds=2),
    "cpu": AttentionConfig(("8x128", "4x256", "4x512", "2x1024", "1x2048", "1x4096"), (64, 1024), 4,
                           48, 32, "fp32", rounds=6),
    # The widths of V2's and V3's heads.
    "gpu": AttentionConfig(("32x512", "8x2048", "4x4096", "1x16384"), (128, 2048), 16, 192, 128,
                           "bf16"),
}


class _Case(NamedTuple):
  """A shape, whether it is packed with documents, and an implementation."""

  shape: str
  packed: bool
  implementation: str


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(SCALES[options.scale_of(SCALES)], options.settings)
  rows = []
  for shape in cfg.shapes:
    rows += _measure(cfg, shape)
    for row in rows:
      if row["shape"] == shape:
        print(f"{_name(row)}, {row['implementation']}: {1e3 * np.median(row['seconds']):.2f} ms, "
              f"{row['pairs'] / np.median(row['seconds']):.3g} pairs/s, "
              f"{row['bytes'] / 2**20:,.0f} MiB", flush=True)
    if options.out:
      results.record(options.out, {"rows": rows} | dataclasses.asdict(cfg), summary)


def _measure(cfg: AttentionConfig, shape: str) -> list[dict[str, Any]]:
  """Returns a row for each implementation, of whole and of packed sequences."""
  batch, length = map(int, shape.split("x"))
  rng = np.random.default_rng(0)
  documents_BT = _documents(rng, batch, length, cfg.documents)
  programs, pairs, memory = {}, {}, {}
  for packed in (False, True):
    ids = documents_BT if packed else np.zeros_like(documents_BT)
    pairs[packed] = cfg.heads * sum(_pairs(row) for row in ids)
    for name in cfg.implementations:
      case = _Case(shape, packed, name)
      try:
        programs[case], memory[case] = _program(cfg, rng, case, jnp.asarray(documents_BT))
      except (ValueError, jax.errors.JaxRuntimeError) as error:  # unsupported, or too large
        print(f"excluded: {shape}, {name}{', packed' * packed}: {str(error).splitlines()[0]}")
  require(programs, f"implementations={cfg.implementations}: none of them runs here")
  seconds = timing.alternate(timing.call_timers(programs, jax.block_until_ready), cfg.rounds)
  return [{"shape": case.shape, "packed": case.packed, "implementation": case.implementation,
           "pairs": pairs[case.packed], "bytes": memory[case], "seconds": seconds[case]}
          for case in programs]


def _documents(rng: np.random.Generator, batch: int, length: int,
               bounds: tuple[int, int]) -> np.ndarray:
  """Returns the number of each token's document in its sequence, int32 [B, T], from 1 on."""
  rows = []
  for _ in range(batch):
    sizes = rng.integers(bounds[0], bounds[1] + 1, -(-length // bounds[0]))
    rows.append(np.repeat(np.arange(1, len(sizes) + 1), sizes)[:length])
  return np.stack(rows).astype(np.int32)


def _pairs(documents_T: np.ndarray) -> int:
  """Returns how many pairs of a token and one that it sees there are in a sequence."""
  sizes = np.unique(documents_T, return_counts=True)[1].astype(int)
  return int((sizes * (sizes + 1) // 2).sum())


def _program(cfg: AttentionConfig, rng: np.random.Generator, case: _Case,
             documents_BT: jax.Array) -> tuple[Callable[[], Any], int]:
  """Returns a call of the forward and the backward pass, and the bytes that it takes besides."""
  batch, length = documents_BT.shape
  network = dataclasses.replace(
      model.get_config("nano"), numerics=model.NUMERICS[cfg.numerics])
  slots_1T = jnp.arange(length, dtype=jnp.int32)[None]
  chosen = None if case.implementation == "default" else case.implementation

  def result(documents, *heads):
    where = Context(None, None, slots_1T, documents if case.packed else None, causal=True)
    return attend(*heads, where, cfg.key_width**-0.5, network, chosen)

  def step(documents, down, *heads):
    out, backward = jax.vjp(lambda *heads: result(documents, *heads), *heads)
    return out, *backward(down)

  draw = lambda width: jnp.asarray(rng.standard_normal((batch, length, cfg.heads, width)),
                                   network.numerics.compute_dtype)
  operands = (documents_BT, draw(cfg.value_width), draw(cfg.key_width), draw(cfg.key_width),
              draw(cfg.value_width))
  compiled = jax.jit(step).lower(*operands).compile()
  return (lambda: compiled(*operands)), compiled.memory_analysis().temp_size_in_bytes


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  found = {_Case(row["shape"], row["packed"], row["implementation"]): row
           for row in result["rows"]}
  claims, table = [], []
  for case, row in found.items():
    exact = found.get(case._replace(implementation="xla"))
    ratio = timing.speedup(row["seconds"], exact["seconds"]) if exact else (None,)
    rate = row["pairs"] / np.median(row["seconds"])
    table.append([case.shape, "documents" if case.packed else "whole", case.implementation,
                  1e3 * np.median(row["seconds"]), rate / 1e9, row["bytes"] / 2**20, ratio[0]])
    if exact and case.implementation == "blockwise":
      claims.append(claim(f"{_name(row)}: blocks against all pairs", "speed-up", *ratio,
                          n=f"{result['rounds']} rounds"))
    whole = found.get(case._replace(packed=False))
    if case.packed and case.implementation == "default" and whole:
      share = timing.median_interval(
          np.asarray(whole["seconds"]) / np.asarray(row["seconds"]) * row["pairs"] / whole["pairs"])
      claims.append(target(f"{case.shape}: pairs per second, documents against whole sequences",
                           "ratio", share, at_least=result["share"],
                           n=f"{result['rounds']} rounds"))
  low, high = result["documents"]
  return bench_summary(
      "bench_attention", f"{backend(result)}-{result['numerics']}",
      f"Attention, forward and backward: {result['heads']} heads, keys {result['key_width']} wide "
      f"and values {result['value_width']}, {result['numerics']}; documents of {low} to {high} "
      "tokens.", result, claims=claims, tables=[{
          "name": "times", "caption": "Forward and backward",
          "header": ["sequences x tokens", "what is seen", "implementation", "ms",
                     "G pairs/s", "temporary MiB", "times as fast as xla"], "rows": table}])


def _name(row: dict[str, Any]) -> str:
  return f"{row['shape']}{', documents' * row['packed']}"
