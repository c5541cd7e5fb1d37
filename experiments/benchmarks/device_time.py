"""Time that contenders take on a GPU, from a profiler's trace in which they alternate.

The host's clock includes what launching costs, which hides how fast short kernels are. A trace says
how long each kernel ran; what ran between the start and the end of a contender's turn is its work.
Between its kernels the GPU may wait for the host, and that time counts for no one.
"""

import contextlib
import fcntl
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import timing

_TURN = "timed turn "  # name of a turn in the trace, before its index


@contextlib.contextmanager
def alone():
  """Waits until no other process of this user measures, and lets none begin before it ends.

  So benchmarks may be started together: while one measures, the others compile.
  """
  name = f"deepseek-jax-measures-{os.getuid()}"
  with open(pathlib.Path(tempfile.gettempdir()) / name, "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


class Timed(NamedTuple):
  """A contender.

  Attributes:
    run: starts its work; takes the number of the call, by which it may choose among operands.
    wait: blocks until the value that `run` returned is ready.
  """

  run: Callable[[int], Any]
  wait: Callable[[Any], Any]


def alternate[Name](timed: Mapping[Name, Timed], rounds: int,
                    seconds: float) -> dict[Name, list[float]]:
  """Returns the device seconds per call of every contender, round by round.

  Turns are in the order of `timing.turns`.

  Args:
    timed: the contenders.
    rounds: number of rounds, in each of which every contender has a turn.
    seconds: approximate length of a turn.

  Raises:
    RuntimeError: if the trace holds no kernel of a turn.
  """
  calls = {name: _calls(contender, seconds) for name, contender in timed.items()}
  turns = timing.turns(timed, rounds)
  with tempfile.TemporaryDirectory() as folder:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
      for index, name in enumerate(turns):
        contender = timed[name]
        with jax.profiler.TraceAnnotation(f"{_TURN}{index}"):
          for call in range(calls[name]):
            result = contender.run(call)
          contender.wait(result)
          time.sleep(2e-4)  # so that clocks of host and device need agree no better
    busy = _busy(pathlib.Path(folder), len(turns))
  found = {name: [] for name in timed}
  for name, took in zip(turns, busy, strict=True):
    if not took:
      raise RuntimeError(f"the trace holds no kernel of {name}")
    found[name].append(took / calls[name])
  return found


def _calls(contender: Timed, seconds: float) -> int:
  """Returns the calls that fit a turn, by the host's clock; the first ones compile and warm up."""
  contender.wait(contender.run(0))
  contender.wait(contender.run(1))
  started = time.perf_counter()
  for call in range(4):
    result = contender.run(call)
  contender.wait(result)
  return max(4, round(4 * seconds / (time.perf_counter() - started)))


def _busy(folder: pathlib.Path, num_turns: int) -> list[float]:
  """Returns the seconds for which kernels of each turn ran on the first GPU."""
  (trace,) = folder.rglob("*.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
  gpu = min((plane for plane in planes if plane.name.startswith("/device:GPU")),
            key=lambda plane: plane.name)
  kernels = sorted((event.start_ns, event.duration_ns) for line in gpu.lines
                   if line.name.startswith("Stream") for event in line.events)
  turns = {event.name: (event.start_ns, event.start_ns + event.duration_ns) for plane in planes
           if plane.name.startswith("/host") for line in plane.lines for event in line.events
           if event.name.startswith(_TURN)}
  starts_K, durations_K = np.asarray(kernels, float).reshape(-1, 2).T
  return [float(durations_K[slice(*np.searchsorted(starts_K, turns[f"{_TURN}{index}"]))].sum())
          / 1e9 for index in range(num_turns)]
