"""Processes that do several tasks at once, divided over the GPUs of this machine."""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax

_LOG_SHOWN = 2000  # characters at the end of a failed worker's log


def leave_memory_to_workers() -> None:
  """Keeps this process from taking the memory of its GPUs when it asks which devices there are.

  It has no effect once the devices are initialised.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Workers:
  """Worker processes, each of which does one task at a time.

  A worker is a module that reads tasks with `tasks`, and writes an answer to each with `answer`.
  Workers do not receive the signals of the terminal, and are told to stop when this process ends.
  On a context's exit they are killed.

  Args:
    module: dotted name of the module.
    arguments: its command line.
    count: number of workers.
  """

  def __init__(self, module: str, arguments: Sequence[str], count: int):
    self._command = [sys.executable, "-m", module, *arguments]
    self._environments = environments(count)
    self._pool = concurrent.futures.ThreadPoolExecutor(count)
    self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
    self._processes: list[subprocess.Popen] = []

  def __enter__(self) -> Self:
    self._folder = tempfile.TemporaryDirectory()
    for i, environment in enumerate(self._environments):
      with open(self._log(i), "w", encoding="utf-8") as log:
        self._processes.append(subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment, start_new_session=True))
      self._idle.put(i)
    return self

  def __exit__(self, *exc):
    self._pool.shutdown(wait=False, cancel_futures=True)
    for process in self._processes:
      process.kill()
      process.wait()
    self._folder.cleanup()

  def submit(self, task: Any) -> concurrent.futures.Future:
    """Gives a task, as JSON data, to the next idle worker; the future's result is its answer.

    The future raises ValueError, with the end of the log, if the worker ends without an answer.
    """
    return self._pool.submit(self._ask, task)

  def stop(self) -> None:
    """Sends SIGTERM to all workers, on which they save what they are doing."""
    for process in self._processes:
      with contextlib.suppress(OSError):
        process.terminate()

  def _ask(self, task: Any) -> Any:
    i = self._idle.get()
    process = self._processes[i]
    try:
      process.stdin.write(json.dumps(task) + "\n")
      process.stdin.flush()
      return json.loads(process.stdout.readline())
    except (OSError, ValueError) as error:  # it has ended
      status = process.wait()
      how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
      log = self._log(i).read_text(encoding="utf-8", errors="replace")
      raise ValueError(f"a worker process has ended {how}:\n{log[-_LOG_SHOWN:]}") from error
    finally:
      self._idle.put(i)

  def _log(self, i: int) -> pathlib.Path:
    return pathlib.Path(self._folder.name) / f"log-{i}.txt"


def environments(count: int) -> list[dict[str, str]]:
  """Returns the environment variables of each worker.

  They have the compilation cache of this process and, on GPUs, one GPU and a share of its memory.
  """
  environment = os.environ | {"DEEPSEEK_JAX_RESTART": "0"}
  if cache := jax.config.jax_compilation_cache_dir:
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS":
            str(jax.config.jax_persistent_cache_min_compile_time_secs)}
  if jax.default_backend() != "gpu":
    return [environment] * count
  names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jax.device_count())))
  gpus = names.split(",")
  fraction = round(0.9 / math.ceil(count / len(gpus)), 3)
  environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(fraction))
  return [environment | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]


def tasks() -> Iterator[Any]:
  """Returns the tasks that a worker process is given; what it prints then goes to its log.

  When the process that gives them has ended, this one gets a SIGTERM, which stops a training run
  after it has been saved.
  """
  lines: queue.SimpleQueue[str] = queue.SimpleQueue()

  def read() -> None:
    for line in sys.stdin:
      lines.put(line)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=read, daemon=True).start()
  global _answers
  _answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
  return map(json.loads, iter(lines.get, None))


def answer(data: Any) -> None:
  """Answers the last task of `tasks` with JSON data."""
  print(json.dumps(data), file=_answers, flush=True)


_answers = sys.stdout
