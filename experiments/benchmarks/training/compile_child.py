"""Runs a command of `experiments.run` and records what it compiles, for `bench_compile`.

    python -m experiments.benchmarks.training.compile_child TIMES.json --experiment=NAME ...
"""

import atexit
import collections
import json
import pathlib
import runpy
import sys
import time

from jax import monitoring

# JAX's events, by the stage of compiling whose duration they report.
STAGES = {"/jax/core/compile/jaxpr_trace_duration": "trace",
          "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
          "/jax/core/compile/backend_compile_duration": "compile"}


def record_to(path: pathlib.Path) -> None:
  """Writes, when the process ends, the seconds of every stage of every program it compiled.

  The file is an object {"seconds": those of the whole process, "programs": {NAME: {STAGE: [seconds
  of each time that the program was compiled]}}}.
  """
  started = time.monotonic()
  programs = collections.defaultdict(lambda: {stage: [] for stage in STAGES.values()})

  def listen(event: str, seconds: float, **details) -> None:
    if event in STAGES:
      name = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
      programs[name][STAGES[event]].append(seconds)

  def write() -> None:
    path.write_text(json.dumps({"seconds": time.monotonic() - started, "programs": programs}),
                    encoding="utf-8")

  monitoring.register_event_duration_secs_listener(listen)
  atexit.register(write)


if __name__ == "__main__":
  times, *arguments = sys.argv[1:]
  record_to(pathlib.Path(times))
  sys.argv = ["experiments.run", *arguments]
  runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
