"""Training speed beside a peer, alternating in one run: same shape, format, threads and batch.

The peer is transformers' DeepSeek-V3 on torch, as a subprocess of an interpreter that has them
(`bench.python`), in its fastest known variants; ours is quoted against the best of those. Beside
it: what the input pipeline gives alone, and what a checkpoint costs.
"""

import dataclasses
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Literal

import jax
import numpy as np

from experiments import provenance, settings
from experiments.options import Options
from model import ModelConfig, get_config
from train.checkpoint import Checkpoints
from train.config import DataConfig, RunConfig, TrainConfig
from train.config_io import to_dict
from train.data import load
from train.program import Program

_PEER = pathlib.Path(__file__).parent / "peers" / "transformers_train.py"
_VARIANTS = (  # flags of the peer: the fastest of a dozen, without and with a compiler
    ("--experts=eager", "--adamw=fused"), ("--experts=grouped_mm", "--adamw=fused"),
    ("--experts=grouped_mm", "--adamw=plain"),
    ("--experts=grouped_mm", "--adamw=fused", "--compile"))
_WARM_UP = 12  # steps of either side before any is timed: by then its memory has stopped growing
_STEPS_TO_CHECKPOINT = 6


@dataclasses.dataclass(frozen=True)
class Bench:
  """How to measure.

  Attributes:
    peer: what to compare with; None for ours alone.
    python: the interpreter that has torch and transformers.
    rounds: alternations; medians over them are quoted.
    steps: a round's.
  """

  peer: Literal["transformers"] | None = None
  python: str = sys.executable
  rounds: int = 7
  steps: int = 3

  def __post_init__(self):
    if self.rounds < 1 or self.steps < 1:
      raise ValueError("Bench.rounds and Bench.steps must be positive")
    if self.peer and not shutil.which(self.python):
      raise ValueError(f"bench.python={self.python} is no program: give an interpreter that has "
                       "torch and transformers")


# Without MTP, which the peer does not train.
_MICRO = dataclasses.replace(get_config("micro"), mtp=None)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What is trained, and how it is timed."""

  bench: Bench = Bench()
  model: ModelConfig = _MICRO
  seq_len: int = 256
  batch_size: int = 8


def main(options: Options) -> None:
  options.refuse("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(BenchConfig(), options.settings, named={"model": get_config})
  run_cfg = RunConfig(
      model=cfg.model, data=DataConfig(seq_len=cfg.seq_len),
      train=TrainConfig(steps=10_000, batch_size=cfg.batch_size, unroll=cfg.model.num_layers))
  ours = _Ours(run_cfg)
  sides = {"ours": ours}
  if cfg.bench.peer:
    sides |= {f"transformers {' '.join(flags)}": _Peer(cfg, flags) for flags in _VARIANTS}
  try:
    for _ in range(cfg.bench.rounds):
      for side in sides.values():
        side.go(cfg.bench.steps)
  finally:
    for side in sides.values():
      side.quit()
  tokens = cfg.batch_size * cfg.seq_len
  result = {
      "shape": to_dict(cfg), "params": cfg.model.param_count(),
      "sides": {name: side.summary(tokens) for name, side in sides.items()},
      "input_pipeline_tokens_per_second": _pipeline(run_cfg),
      "checkpoint": ours.checkpoint_cost(run_cfg.train.checkpoint_every)}
  _report(cfg, result)
  if options.out:
    provenance.record(options.out, result)


def _report(cfg: BenchConfig, result: dict) -> None:
  flops = cfg.model.flops_per_token(cfg.seq_len)
  sides = result["sides"]
  ours = sides["ours"]["tokens_per_second"]
  peers = {name: side["tokens_per_second"] for name, side in sides.items() if name != "ours"}
  if peers:
    best = max(peers, key=peers.get)
    result["ratio"] = ours / peers[best]
    print(f"ours over the best peer ({best}): {result['ratio']:.2f}")
    for name in sorted(peers, key=peers.get, reverse=True)[1:]:
      print(f"  over {name}: {ours / peers[name]:.2f}")
  print(f"{'':64}{'tokens/s':>10}{'GFLOP/s':>9}{'peak MB':>9}{'start s':>9}")
  for name, side in sides.items():
    rate = side["tokens_per_second"]
    print(f"{name:64}{rate:10,.0f}{rate * flops / 1e9:9.1f}{side['peak_rss_mb']:9,.0f}"
          f"{side['start_seconds']:9.1f}")
  pipeline = result["input_pipeline_tokens_per_second"]
  print(f"input pipeline alone: {pipeline:,.0f} tokens/s, {pipeline / ours:.0f} times the training")
  save = result["checkpoint"]
  print(f"a checkpoint costs {save['seconds']:.2f} s, {save['share']:.1%} of the "
        f"{save['interval']} steps between two")


class _Ours:
  """This project's train step, optimizer included, on new random tokens every step."""

  def __init__(self, cfg: RunConfig):
    started = time.perf_counter()
    self._cfg, self._program = cfg, Program([cfg], {})
    self._state, self._index, self._rates = self._program.init(), 0, []
    self._rng = np.random.default_rng(0)
    self._run(1)
    self._start_seconds = time.perf_counter() - started
    self._run(_WARM_UP - 1)

  def _run(self, steps: int) -> float:
    started = time.perf_counter()
    rows, length = self._cfg.train.batch_size, self._cfg.data.seq_len
    for _ in range(steps):
      tokens = self._rng.integers(0, self._cfg.model.vocab_size, (rows, length + 1), np.int32)
      batch = {"tokens": tokens, "loss_mask": np.ones((rows, length), bool)}
      self._state, metrics = self._program.step(self._state, self._index, batch)
      self._index += 1
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - started

  def go(self, steps: int) -> None:
    self._rates.append(steps / self._run(steps))

  def quit(self) -> None:
    self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

  def summary(self, tokens: int) -> dict:
    return _summary(self._rates, tokens, self._peak, self._start_seconds)

  def checkpoint_cost(self, interval: int) -> dict:
    """Seconds that a save adds to the steps around it, and their share of all between two."""
    with tempfile.TemporaryDirectory() as folder:
      checkpoints, extra = Checkpoints(folder, keep=1), []
      for index in range(3):
        plain = self._run(_STEPS_TO_CHECKPOINT)
        started = time.perf_counter()
        checkpoints.save(index, self._state, {})
        self._run(_STEPS_TO_CHECKPOINT)
        extra.append(time.perf_counter() - started - plain)
        checkpoints.wait()
      checkpoints.close()
    seconds = float(np.median(extra))
    return {"seconds": seconds, "interval": interval,
            "share": seconds / (interval * plain / _STEPS_TO_CHECKPOINT)}


class _Peer:
  """A subprocess that trains when told."""

  def __init__(self, cfg: BenchConfig, flags: tuple[str, ...]):
    network, attention, moe = cfg.model, cfg.model.attention, cfg.model.moe
    shape = {
        "vocab_size": network.vocab_size, "hidden_size": network.d_model,
        "num_hidden_layers": network.num_layers, "intermediate_size": network.ffn_dim,
        "first_k_dense_replace": network.num_dense_layers,
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank, "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim, "v_head_dim": attention.v_head_dim,
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_dim, "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups, "topk_group": moe.groups_per_token,
        "max_position_embeddings": network.max_seq_len}
    config = {"shape": shape, "batch": cfg.batch_size, "seq": cfg.seq_len, "steps": 1}
    started = time.perf_counter()
    self._process = subprocess.Popen(
        [cfg.bench.python, str(_PEER), json.dumps(config), *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._rates, ready = [], self._answer()
    self._start_seconds, self._peak = time.perf_counter() - started, 0.0
    if ready["params"] != network.param_count():
      raise ValueError(f"the peer has {ready['params']:,} parameters, and ours "
                       f"{network.param_count():,}")
    self._variant = ready["variant"]
    self._run(_WARM_UP - 1)

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise ValueError("the peer stopped: see its message above")
    return json.loads(line)

  def _run(self, steps: int) -> dict:
    self._process.stdin.write(f"go {steps}\n")
    self._process.stdin.flush()
    return self._answer()

  def go(self, steps: int) -> None:
    answer = self._run(steps)
    self._rates.append(steps / answer["seconds"])
    self._peak = answer["peak_rss_mb"]

  def quit(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def summary(self, tokens: int) -> dict:
    return _summary(self._rates, tokens, self._peak, self._start_seconds) | self._variant


def _summary(rates: list[float], tokens: int, peak: float, start: float) -> dict:
  return {"tokens_per_second": float(np.median(rates)) * tokens,
          "by_round": [rate * tokens for rate in rates], "peak_rss_mb": peak,
          "start_seconds": start}


def _pipeline(cfg: RunConfig) -> float:
  """Tokens/s of documents to batches, nothing trained."""
  data, count = load(cfg.data), 300
  batches = data.batches([0], 0, [cfg.train.batch_size] * count)
  next(batches)
  started = time.perf_counter()
  rest = sum(batch["loss_mask"].size for batch in batches)
  return rest / (time.perf_counter() - started)
