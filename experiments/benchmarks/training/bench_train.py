"""Time training against transformers, with the same shape, formats, device and batch.

The peer is transformers' DeepSeek-V3 on torch, run with an interpreter that has both
(`bench.python`), in its fastest known variants; the target of ours is relative to the fastest of
them. The contenders alternate. At scale `gpu` they share the GPU, and are timed with and without
the optimizer. At `v2_lite`, ours in FP8 is timed against ours in bfloat16, on layers of V2-Lite's
widths. At `cpu`, the throughput of the input pipeline alone and the cost of a checkpoint are
measured as well. `--profile` shows where the time of a step goes.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from experiments import settings
from experiments.benchmarks.timing import alternate, attempt, describe, require_packages, speedup
from experiments.benchmarks.training import profiles
from experiments.benchmarks.training.contenders import (
  Bench,
  BenchConfig,
  OwnTrainer,
  PeerTrainer,
  Trainer,
)
from experiments.options import Options, writes_results
from experiments.reports import markdown, results
from experiments.reports.summary import bench_summary, claim, target
from model import NUMERICS, get_config
from model.checks import require
from train.checkpoint import Checkpoints
from train.config import OptimizerConfig, RunConfig
from train.config_io import to_dict
from train.data import load
from train.hardware import peak_flops

_STEPS_TO_CHECKPOINT, _CHECKPOINT_EVERY = 6, 100
_MOST_ON_A_CPU = 200_000_000  # parameters; larger models take hours
_GPU_FLAGS = "--device=cuda --dtype=bfloat16 --experts=grouped_mm --adamw=fused"


def _scales() -> dict[str, BenchConfig]:
  # Without MTP, which the peer does not train. Its optimizer keeps moments in float32.
  return {
      "cpu": BenchConfig(
          bench=Bench(variants=(  # the fastest of a dozen, without and with --compile
              "--experts=eager --adamw=fused", "--experts=grouped_mm --adamw=fused",
              "--experts=grouped_mm --adamw=plain",
              "--experts=grouped_mm --adamw=fused --compile")),
          model=dataclasses.replace(get_config("micro"), mtp=None), seq_len=256, batch_size=8,
          optimizer=OptimizerConfig()),
      "gpu": BenchConfig(
          bench=Bench(numerics=("bf16",), phases=("forward_backward", "train"), steps=5, warm_up=5,
                      peer_timeout=90.0,
                      variants=(f"{_GPU_FLAGS} --attention=sdpa",
                                f"{_GPU_FLAGS} --attention=cudnn --compile")),
          model=get_config("base"), seq_len=2048, batch_size=8,
          optimizer=OptimizerConfig(moments="float32")),
      "v2_lite": BenchConfig(
          bench=Bench(numerics=("fp8", "bf16"), phases=("forward_backward", "train"), steps=5,
                      warm_up=5),
          model=dataclasses.replace(get_config("deepseek_v2_lite"), num_layers=4,
                                    num_dense_layers=0, vocab_size=32768),
          seq_len=2048, batch_size=8, optimizer=OptimizerConfig())}


SCALES = _scales()
# Targets: the least speed-up over the fastest rival, by scale and phase, and the least fraction of
# the bfloat16 peak.
_TARGETS = {"cpu": {"train": 1.0}, "gpu": {"forward_backward": 2.5, "train": 2.5},
            "v2_lite": {"forward_backward": 1.2, "train": 1.2}}
# What the flags of `experiments.benchmarks.peers.transformers_train` are called in tables.
_FLAG_WORDS = {"experts": "{} experts", "adamw": "{} AdamW", "attention": "{} attention",
               "compile": "compiled"}
_PEAK_TARGETS = {("v2_lite", "ours bf16"): 0.4}


@writes_results
def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "max_minutes")
  scale = dataclasses.replace(options, scale=options.scale or "cpu").scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings, named={"model": get_config})
  if cfg.bench.peer:
    require_packages(cfg.bench.python, ("torch", "transformers"), "bench.python")
    # JAX reads this when it first uses the device, whose memory the contenders share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  params = cfg.model.param_count()
  require(jax.default_backend() != "cpu" or params < _MOST_ON_A_CPU,
          f"--scale={scale} trains {params:,} parameters, which takes hours on a CPU: use "
          "--scale=cpu, or a smaller model with --set model=micro")
  result: dict[str, Any] = {"shape": to_dict(cfg), "params": params,
                            "scale": scale, "absent": {}, "phases": {}}
  peers = [PeerTrainer(cfg, flags) for flags in cfg.bench.variants if cfg.bench.peer]
  try:
    ours = [OwnTrainer(cfg, numerics) for numerics in cfg.bench.numerics]
    contenders: list[Trainer] = [*ours, *peers]
    for phase in cfg.bench.phases:
      timed = result["phases"][phase] = _measure(
          cfg, phase, contenders, result["absent"], options)
      _report(cfg, phase, timed)
      if options.out:  # after each phase, as the next may run out of memory
        results.record(options.out, result, summary, _sections)
  finally:
    for peer in peers:
      peer.quit()
  if scale == "cpu":
    result |= _pipeline_and_checkpoint(cfg, ours[0])
    if options.out:
      results.record(options.out, result, summary, _sections)


def _measure(cfg: BenchConfig, phase: str, contenders: list[Trainer], excluded: dict[str, str],
             options: Options) -> dict:
  """Times all contenders that can run the phase, alternating."""
  attempt(contenders, lambda contender: contender.start(phase), excluded)
  steps = cfg.bench.steps
  seconds = alternate(
      {contender.name: lambda contender=contender: contender.seconds(steps) / steps
       for contender in contenders}, cfg.bench.rounds)
  if options.profile:
    for own in contenders:
      if isinstance(own, OwnTrainer):
        profiles.write(own.trace(), f"{phase}, {own.name}", options.out)
  first = contenders[0].name
  return {
      "contenders": {contender.name: _rates(cfg, seconds[contender.name]) | contender.finish()
                for contender in contenders},
      "speedup": {name: speedup(seconds[first], took)
                    for name, took in seconds.items() if name != first}}


def _rates(cfg: BenchConfig, seconds: list[float]) -> dict:
  rate = cfg.tokens / float(np.median(seconds))
  flops = rate * cfg.model.flops_per_token(cfg.seq_len)
  compute = NUMERICS[cfg.bench.numerics[0]].compute
  # The peak is that of one device: `peak_flops` returns that of all.
  return {"tokens_per_second": rate, "by_round": [cfg.tokens / took for took in seconds],
          "flops_per_second": flops,
          "fraction_of_peak": flops * jax.device_count() / peak_flops(compute)}


def _report(cfg: BenchConfig, phase: str, timed: dict) -> None:
  found = timed["contenders"]
  first, *others = found
  print(f"\n{phase.replace('_', ' + ')}, {cfg.batch_size} x {cfg.seq_len} tokens")
  for name in sorted(others, key=lambda name: -found[name]["tokens_per_second"]):
    print(f"speed-up of {first} over {name}: {describe(*timed['speedup'][name])}")
  width = max(map(len, found))
  print(f"{'':{width}}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'peak MB':>9}{'start s':>9}")
  for name, row in found.items():
    print(f"{name:{width}}{row['tokens_per_second']:10,.0f}{row['flops_per_second'] / 1e12:9.2f}"
          f"{row['fraction_of_peak']:9.1%}{row['peak_mb']:9,.0f}{row['start_seconds']:9.1f}")


def _pipeline_and_checkpoint(cfg: BenchConfig, ours: OwnTrainer) -> dict:
  """Measures the throughput of the input pipeline, and the cost of a checkpoint."""
  run = cfg.run(cfg.bench.numerics[0])
  pipeline = _pipeline(run)
  print(f"input pipeline alone: {pipeline:,.0f} tokens/s")
  ours.start("train")
  save = _checkpoint_cost(ours)
  ours.finish()
  print(f"a checkpoint costs {save['seconds']:.2f} s, {save['fraction']:.1%} of the "
        f"time of the {save['interval']} steps between two checkpoints")
  return {"input_pipeline_tokens_per_second": pipeline, "checkpoint": save}


def _checkpoint_cost(ours: OwnTrainer) -> dict:
  """Returns the cost of a checkpoint.

  "seconds" are those that a save adds to the steps around it, and "fraction" relates them to the
  time of the steps between two checkpoints.
  """
  with tempfile.TemporaryDirectory() as folder:
    checkpoints, extra = Checkpoints(folder, keep=1), []
    for index in range(3):
      plain = ours.seconds(_STEPS_TO_CHECKPOINT)
      started = time.perf_counter()
      checkpoints.save(index, ours.state, {})
      ours.seconds(_STEPS_TO_CHECKPOINT)
      extra.append(time.perf_counter() - started - plain)
      checkpoints.wait()
    checkpoints.close()
  seconds = float(np.median(extra))
  return {"seconds": seconds, "interval": _CHECKPOINT_EVERY,
          "fraction": seconds / (_CHECKPOINT_EVERY * plain / _STEPS_TO_CHECKPOINT)}


def _pipeline(cfg: RunConfig) -> float:
  """Tokens/s from documents to batches, without any training."""
  data, count = load(cfg.data), 300
  batches = data.batches([0], 0, [cfg.train.batch_size] * count)
  next(batches)
  started = time.perf_counter()
  rest = sum(batch["loss_mask"].size for batch in batches)
  return rest / (time.perf_counter() - started)


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  scale, shape = result["scale"], result["shape"]
  claims = [one for phase, timed in result["phases"].items()
            for one in _claims(scale, phase, timed, shape["bench"]["rounds"])]
  if "checkpoint" in result:
    save = result["checkpoint"]
    claims += [
        claim("input pipeline alone", "tokens/s", result["input_pipeline_tokens_per_second"]),
        claim(f"a checkpoint every {save['interval']} steps", "fraction of the time",
              save["fraction"])]
  return bench_summary(
      "bench_train", scale,
      f"Training steps of {result['params']:,} parameters on {shape['batch_size']} x "
      f"{shape['seq_len']} tokens, contenders alternating on one device.", result, claims=claims,
      tables=[_table(phase, timed) for phase, timed in result["phases"].items()])


def _claims(scale: str, phase: str, timed: dict, rounds: int) -> list[dict]:
  """Returns the speed-ups over all rivals, and the fractions of the peak that have a target.

  Of the speed-ups, that over the fastest rival has the target.
  """
  found = timed["contenders"]
  first = next(iter(found))
  rivals = sorted(timed["speedup"], key=lambda name: -found[name]["tokens_per_second"])
  goal, claims = _TARGETS.get(scale, {}).get(phase), []
  for name in rivals:
    text, n = f"{_words(phase)}: {first} against {_short(name)}", f"{rounds} rounds"
    estimate = timed["speedup"][name]
    claims.append(target(text, "speed-up", estimate, at_least=goal, n=n)
                  if goal and name == rivals[0] else claim(text, "speed-up", *estimate, n=n))
  for name, row in found.items():
    if least := _PEAK_TARGETS.get((scale, name)):
      claims.append(target(f"{_words(phase)}: {name}", "fraction of the bfloat16 peak",
                           (row["fraction_of_peak"],), at_least=least, n=f"{rounds} rounds"))
  return claims


def _table(phase: str, timed: dict) -> dict:
  return {
      "name": phase, "caption": _words(phase),
      "header": ["contender", "tokens/s", "TFLOP/s", "fraction of peak", "peak MB", "start s"],
      "rows": [[_short(name), row["tokens_per_second"], row["flops_per_second"] / 1e12,
                f"{row['fraction_of_peak']:.1%}", row["peak_mb"], row["start_seconds"]]
               for name, row in timed["contenders"].items()]}


def _short(name: str) -> str:
  """Returns a contender's name with the flags that distinguish a peer's variants in words."""
  peer, *flags = name.split()
  if not any(flag.startswith("--") for flag in flags):
    return name
  values = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
  words = [_FLAG_WORDS[flag].format(value) for flag, value in values.items()
           if flag in _FLAG_WORDS]
  return f"{peer} ({', '.join(words)})" if words else peer


def _words(phase: str) -> str:
  return {"train": "forward, backward and optimizer"}.get(phase, phase.replace("_", " + "))


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  """Returns links to the profiles, the excluded contenders, and the settings."""
  profiles = "\n".join(f"- [{path.stem.removeprefix('profile-')}]({path.name})"
                       for path in sorted(folder.glob("profile-*.md")))
  excluded = markdown.table(("contender", "reason"), result["absent"].items())
  return [("Where the time of a step goes", profiles),
          ("Not measured", excluded if result["absent"] else ""),
          ("Settings", markdown.collapsed("All settings", markdown.table(
              ("setting", "value"), markdown.flat(result["shape"]))))]
