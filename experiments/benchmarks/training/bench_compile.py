"""Time how long whole commands compile, with empty and with filled caches, and several at once.

Every command runs in a process of its own, which reports each program that it traces, lowers and
compiles. "Cold" means that the caches of compiled programs, of XLA's autotuner and of CUDA are all
empty; "warm", that the same command has run before. "At once" are several cold processes on one
device. On a GPU, "tuned" is a cold run with `--xla_gpu_enable_triton_gemm=true`, XLA's default,
which `model.compiling` turns off.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import settings
from experiments.options import Options
from experiments.reports import markdown, results
from experiments.reports.summary import backend, bench_summary, claim, target
from model.checks import require, require_positive

_CHILD = "experiments.benchmarks.training.compile_child"
_TUNED = "--xla_gpu_enable_triton_gemm=true"
_TIMEOUT = 900.0  # seconds


@dataclasses.dataclass(frozen=True)
class Command:
  """A command whose compiling is timed.

  Attributes:
    arguments: arguments of `experiments.run`.
    programs: names of the programs that are listed singly, as JAX reports them.
    target: largest number of seconds in which they should be ready on an idle GPU; None for none.
    shares_device: whether several processes fit one device.
  """

  arguments: tuple[str, ...]
  programs: tuple[str, ...]
  target: float | None = None
  shares_device: bool = True


COMMANDS = {
    "pretraining": Command(
        ("--experiment=pretrain", "--scale=cpu", "--set=train.steps=2", "--set=baselines=false"),
        ("train_step", "count"), target=12.0),
    "GRPO": Command(
        ("--experiment=r1_zero", "--scale=cpu", "--set=base.train.steps=2",
         "--set=documents.count=2000", "--set=rl.loop.steps=2", "--set=rl.loop.eval_problems=16",
         "--set=rl.loop.eval_samples=2", "--set=evaluation.problems=16",
         "--set=evaluation.samples=2"),
        ("_rollout", "_update"), target=15.0),
    "training of base": Command(
        ("--experiment=bench_train", "--scale=gpu", "--set=bench.peer=none",
         "--set=bench.phases=train", "--set=bench.rounds=2", "--set=bench.steps=1",
         "--set=bench.warm_up=1"),
        ("train_step",), shares_device=False),
}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
  """Which commands are timed, and how.

  Attributes:
    commands: keys of COMMANDS.
    at_once: number of processes that compile at once; 1 leaves this measurement out.
    tuned: commands that are timed with XLA's default options as well.
    rounds: number of cold runs, one after another, of which the median is reported.
  """

  commands: tuple[str, ...] = ("pretraining", "GRPO")
  at_once: int = 1
  tuned: tuple[str, ...] = ()
  rounds: int = 3

  def __post_init__(self):
    require_positive(self, "at_once", "rounds")
    for name in ("commands", "tuned"):
      unknown = set(getattr(self, name)) - set(COMMANDS)
      require(not unknown, f"CompileConfig.{name}: there is no command {', '.join(unknown)}; there "
                           f"are {', '.join(COMMANDS)}")
    require(set(self.tuned) <= set(self.commands) and bool(self.commands),
            "CompileConfig.tuned must be some of CompileConfig.commands, of which there must be "
            "one at least")


SCALES = {
    "cpu": CompileConfig(),
    "gpu": CompileConfig(commands=tuple(COMMANDS), at_once=4,
                         tuned=("pretraining", "training of base")),
}


def main(options: Options) -> None:
  options.require_supported("seeds", "a", "b", "arms", "profile", "max_minutes")
  scale = dataclasses.replace(options, scale=options.scale or "cpu").scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings)
  on_gpu = _has_gpu()
  require(on_gpu or (not cfg.tuned and "training of base" not in cfg.commands),
          f"--scale={scale} compiles programs for a GPU, and there is none: use --scale=cpu")
  found: dict[str, dict[str, list]] = {}
  for name in cfg.commands:
    found[name] = _conditions(name, cfg)
    if options.out:  # after each command, as the next may fail
      results.record(options.out, {"scale": scale, "at_once": cfg.at_once, "commands": found,
                                   "on_gpu": on_gpu}, summary, _sections)


def _conditions(name: str, cfg: CompileConfig) -> dict[str, list[dict[str, Any]]]:
  """Runs a command under all conditions; returns what its processes recorded."""
  command, found = COMMANDS[name], {"cold": []}
  with contextlib.ExitStack() as stack:
    caches = lambda count: [
        stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(count)]
    for _ in range(cfg.rounds):
      last = caches(1)
      found["cold"] += _run(command, last)
    found["warm"] = _run(command, last)
    if cfg.at_once > 1 and command.shares_device:
      found["at once"] = _run(command, caches(cfg.at_once))
    if name in cfg.tuned:
      found["tuned"] = _run(command, caches(1), tuned=True)
  for condition, runs in found.items():
    _report(name, condition, runs)
  return found


def _has_gpu() -> bool:
  """Whether JAX uses a GPU, as a process of its own finds out, since it takes memory there."""
  asked = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"],
                         capture_output=True, text=True, check=False)
  return asked.stdout.strip() == "gpu"


def _run(command: Command, caches: Sequence[str], *, tuned: bool = False) -> list[dict[str, Any]]:
  """Runs a command once for every folder of caches, all at once; returns what each recorded."""
  with tempfile.TemporaryDirectory() as folder:
    times = [pathlib.Path(folder) / f"times-{i}.json" for i in range(len(caches))]
    running = []
    for i, cache in enumerate(caches):
      environment = os.environ | {
          "JAX_COMPILATION_CACHE_DIR": f"{cache}/xla", "CUDA_CACHE_PATH": f"{cache}/cuda",
          "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "DEEPSEEK_JAX_RESTART": "0"}
      if tuned:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_TUNED}".strip()
      with open(f"{folder}/log-{i}.txt", "w", encoding="utf-8") as log:
        running.append(subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(times[i]), *command.arguments,
             f"--out={folder}/out-{i}"], stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
      for i, process in enumerate(running):
        if process.wait(timeout=_TIMEOUT):
          log = pathlib.Path(f"{folder}/log-{i}.txt").read_text(encoding="utf-8", errors="replace")
          raise ValueError(f"the command {' '.join(command.arguments)} failed:\n{log[-2000:]}")
    finally:
      for process in running:
        process.kill()
        process.wait()
    return [json.loads(path.read_text(encoding="utf-8")) for path in times]


def seconds(run: Mapping[str, Any], names: Sequence[str] | None = None,
            stages: Sequence[str] = ("trace", "lower", "compile")) -> float:
  """Returns the seconds that a process took for some stages of some programs; None for all."""
  return sum(sum(times[stage]) for name, times in run["programs"].items()
             if names is None or name in names for stage in stages)


def _typical(condition: str, runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """Returns the run that represents a condition: the slowest of several at once, or the median."""
  ordered = sorted(runs, key=seconds)
  return ordered[-1] if condition == "at once" else ordered[len(ordered) // 2]


def _report(name: str, condition: str, runs: Sequence[Mapping[str, Any]]) -> None:
  run, listed = _typical(condition, runs), COMMANDS[name].programs
  parts = ", ".join(f"{program} {seconds(run, [program]):.1f} s" for program in listed)
  print(f"{name}, {condition}: {seconds(run, listed):.1f} s ({parts}); all programs "
        f"{seconds(run):.1f} s; the command {run['seconds']:.1f} s", flush=True)


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  claims, rows = [], []
  for name, conditions in result["commands"].items():
    command = COMMANDS[name]
    claims += _claims(name, conditions, result)
    for condition, runs in conditions.items():
      run = _typical(condition, runs)
      rows.append([name, condition, seconds(run, command.programs),
                   *(seconds(run, None, [stage]) for stage in ("trace", "lower", "compile")),
                   sum(len(times["compile"]) for times in run["programs"].values()),
                   run["seconds"]])
  return bench_summary(
      "bench_compile", f"{result['scale']}-{backend(result)}" if result["scale"] != backend(result)
      else result["scale"],
      "Seconds in which whole commands trace, lower and compile their programs.", result,
      claims=claims,
      tables=[{"name": "commands", "caption": "Commands",
               "header": ["command", "caches", "listed programs s", "all: trace s", "lower s",
                          "compile s", "programs", "whole command s"], "rows": rows,
               "note": "The median of cold runs; of several processes at once, the slowest. The "
                       "interval of a claim is that from the fastest to the slowest cold run."}])


def _claims(name: str, conditions: Mapping[str, Sequence[Mapping[str, Any]]],
            result: Mapping[str, Any]) -> list[dict[str, Any]]:
  command = COMMANDS[name]
  ready = {condition: seconds(_typical(condition, runs), command.programs)
           for condition, runs in conditions.items()}
  cold = sorted(seconds(run, command.programs) for run in conditions["cold"])
  what = f"{name}: {' and '.join(program.strip('_') for program in command.programs)}"
  basis = f"{len(cold)} cold run{'s' * (len(cold) > 1)}"

  def one(text: str, metric: str, value: Sequence[float], at_most: float | None) -> dict:
    if result["on_gpu"] and at_most:
      return target(text, metric, value, at_most=at_most, n=basis)
    return claim(text, metric, *value, n=basis)

  interval = (cold[0], cold[-1]) if len(cold) > 1 else ()
  found = [one(f"{what}, cold", "seconds", (ready["cold"], *interval), command.target)]
  if "at once" in ready:
    found.append(one(f"{what}, {result['at_once']} processes at once against one",
                     "ratio of seconds", (ready["at once"] / ready["cold"],), 2.0))
  if "tuned" in ready:
    found.append(one(f"{what}, against XLA's default options", "ratio of seconds",
                     (ready["cold"] / ready["tuned"],), 0.5))
  return found


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  del folder
  rows = [(name, condition, program, len(times["compile"]),
           *(sum(times[stage]) for stage in ("trace", "lower", "compile")))
          for name, conditions in result["commands"].items()
          for condition, runs in conditions.items()
          for program, times in sorted(runs[0]["programs"].items(),
                                       key=lambda item: -sum(map(sum, item[1].values())))[:6]]
  return [("The slowest programs of each command", markdown.table(
      ("command", "caches", "program", "compiled", "trace s", "lower s", "compile s"), rows))]
