"""The training loop: steps, evaluations, checkpoints, and records that survive a kill.

The order of writes matters: a step's metrics and evaluation are on disk before its checkpoint is
begun, and a resumed run drops those past the checkpoint that it starts from. So every step is
recorded exactly once.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.config_io import to_dict
from train.cost import CostMeter, total
from train.data import Data
from train.program import Program, mean_evaluation
from train.progress import Progress
from train.run_folder import MetricsFile, RunFolder
from train.signals import Signals
from train.step import TrainState
from train.trackers import Trackers, check_installed


class TrainingError(ValueError):
  """Training cannot continue. What is on disk is intact."""


def check_skipped(
    step: int, skipped: int, allowed: int, setting: str, checkpoints: Checkpoints) -> None:
  """Raises an error if too many steps have been skipped.

  Args:
    step: the step that has just been taken.
    skipped: number of steps skipped so far, because their loss or gradient was not finite.
    allowed: the largest number of skipped steps that is tolerated.
    setting: name of the setting that gives `allowed`, for the message.
    checkpoints: the run's checkpoints, for the message.

  Raises:
    TrainingError: if `skipped` exceeds `allowed`.
  """
  if skipped > allowed:
    raise TrainingError(
        f"step {step}: the loss or gradient has not been finite in {skipped} steps so far, more "
        f"than {setting}={allowed} allows. Skipped steps changed nothing; "
        f"{checkpoints.folder.parent} holds checkpoints of steps {checkpoints.steps() or 'none'}. "
        "Lower optimizer.learning_rate, or look at the data near this step")


@dataclasses.dataclass
class Result:
  """The result of `train`.

  Attributes:
    seeds: seeds of the runs, one for each.
    status: "finished", or "stopped" by a signal or a time limit; the same call then resumes.
    state: the training state after the last step.
    steps: number of steps taken so far.
    rows: metrics of every step, as in `metrics.jsonl`.
    evaluations: `program.mean_evaluation` of every evaluation, each with its "step".
    evaluation: the last Evaluation in full; None if this process was stopped before making one.
    cost: the cost of the run so far; see `train.cost.total`.
    messages: problems from which the run recovered, such as damaged checkpoints.
  """

  seeds: list[int]
  status: str
  state: TrainState
  steps: int
  rows: list[dict]
  evaluations: list[dict]
  evaluation: Any
  cost: dict
  messages: list[str]


def train(
    configs: Sequence[RunConfig], data: Data, folder: RunFolder, *, variables: dict | None = None,
    show: bool = True, max_seconds: float | None = None, profile: bool = False,
    on_evaluation: Callable[[int, Any], None] | None = None) -> Result:
  """Trains a run, or resumes the one in the folder.

  Args:
    configs: one config per run; several runs train as a vmapped batch (see `train.program`).
    data: what `train.data.load` returned for the configs' `data`.
    folder: the run folder, with the metrics and the checkpoints.
    variables: initial variables of all runs; None for random ones.
    show: whether to draw a progress bar on stderr.
    max_seconds: stop, after saving, once this much time has passed; None for no limit.
    profile: whether to write a profiler trace of a few steps to the folder's `profile`.
    on_evaluation: called after every evaluation with the step and the Evaluation.

  Raises:
    TrainingError: if too many steps were skipped because their loss or gradient was not finite.
    CheckpointError: if a checkpoint cannot be written, or none of those in the folder can be read.
    ValueError: if the folder's checkpoints are those of another model or optimizer, if nothing is
      held out for validation, or if the package of a tracker is not installed.
  """
  if not data.heldout:
    paths = ", ".join(source.path for source in data.cfg.sources)
    raise ValueError(f"nothing of {paths} is held out for validation: give at least two "
                     "different documents of a domain, as equal ones are held out together or not "
                     "at all, and a positive data.heldout_fraction")
  return _Run(configs, data, folder, show, profile, on_evaluation).run(variables, max_seconds)


class _Run:
  """A run in progress: its program, its files, and what it has evaluated so far."""

  def __init__(self, configs, data, folder, show, profile, on_evaluation):
    check_installed(configs[0].train.log_to)
    self.cfg, self.data, self.path = configs[0], data, folder.path
    self.seeds = [cfg.train.seed for cfg in configs]
    self.program = Program(configs, data.heldout)
    self.checkpoints = Checkpoints(
        self.path / "checkpoints", keep=self.cfg.train.keep_checkpoints)
    self.metrics = MetricsFile(self.path / "metrics.jsonl")
    self.evaluations = MetricsFile(self.path / "evaluations.jsonl")
    self.show, self.profile, self.on_evaluation = show, profile, on_evaluation
    self.messages: list[str] = []
    self.last_evaluation = None
    self.pending: list[tuple[int, dict, float]] = []

  def run(self, variables, max_seconds) -> Result:
    state, start, position = self._start(variables)
    train = self.cfg.train
    self.cost = CostMeter(self.path, self.cfg.flops_per_token, len(self.seeds))
    self.trackers = Trackers(train.log_to, self.path, [
        *self.metrics.read(), *map(_validation_scalars, self.evaluations.read())],
        to_dict(self.cfg))
    self.progress = Progress(self.cfg, len(self.seeds), start, self.show)
    status = "finished"
    deadline = time.monotonic() + max_seconds if max_seconds else None
    with Signals() as signals, contextlib.ExitStack() as closing:
      trace = _Trace(self.path / "profile", range(start + 4, start + 7) if self.profile else [])
      for part in (self.progress, self.trackers, self.metrics, self.evaluations, self.cost,
                   self.checkpoints, trace):
        closing.callback(part.close)
      if start == 0:
        self._evaluate(state, 0)
      sizes = [self.program.batch_size(i) for i in range(start, train.steps)]
      batches = self.data.batches(self.seeds, position, sizes)
      step = start
      self.progress.say("compiling" if start == 0 else f"resumed after step {start}, compiling")
      for step, batch in enumerate(batches, start + 1):
        trace.begin(step)
        state, metrics = self.program.step(state, step - 1, batch)
        trace.end(step, metrics)
        if step == start + 1:
          jax.block_until_ready(metrics)
          self.progress.compiled()
          signals.can_save()
        self.checkpoints.check()
        position += self.program.batch_size(step - 1)
        self.pending.append((step, metrics, time.time()))
        self._write_rows(leave=1)
        self.cost.add(self.program.batch_size(step - 1) * self.cfg.data.seq_len)
        done = step == train.steps
        if done or (train.eval_every and step % train.eval_every == 0):
          self._write_rows(leave=0)
          self._evaluate(state, step)
        stop = signals.received or (deadline and time.monotonic() > deadline)
        due = train.checkpoint_every and step % train.checkpoint_every == 0
        if done or due or stop:
          self._save(state, step, position)
        if stop and not done:
          status = "stopped"
          break
      self.checkpoints.wait()
      if status == "finished" and self.last_evaluation is None:  # by an earlier process
        self.last_evaluation = self.program.evaluate(state.variables)
    return Result(self.seeds, status, state, step, self.metrics.read(), self.evaluations.read(),
                  self.last_evaluation, total(self.path), self.messages)

  def _start(self, variables) -> tuple[TrainState, int, int]:
    """Returns the state to start or resume from, its step, and its position in the data."""
    restored = self.checkpoints.restore(self.program.abstract_state())
    step, position = (restored.step, restored.extra["position"]) if restored else (0, 0)
    if restored:
      self.messages += restored.damaged
    for file in (self.metrics, self.evaluations):
      file.truncate_after(step if restored else -1)
    state = restored.arrays if restored else self.program.init(variables)
    return state, step, position

  def _evaluate(self, state, step) -> None:
    self.progress.note("evaluating")
    evaluation = self.program.evaluate(state.variables)
    row = {"step": step, **mean_evaluation(evaluation)}
    if state.ema is not None:
      averaged = self.program.evaluate({**state.variables, "params": state.ema})
      row["ema"] = mean_evaluation(averaged)
    self.evaluations.append(row)
    self.trackers.append(_validation_scalars(row))
    self.last_evaluation = evaluation
    self.progress.note(f"{float(np.mean(evaluation.mean_bits_per_byte)):.3f} bits per byte")
    if self.on_evaluation:
      self.on_evaluation(step, evaluation)

  def _save(self, state, step, position) -> None:
    self._write_rows(leave=0)
    self.cost.write()
    self.checkpoints.save(step, state, {"position": position, "seeds": self.seeds})

  def _write_rows(self, leave: int) -> None:
    """Writes the metrics of finished steps, except those of the `leave` newest.

    These may still be running, and reading their metrics would wait for the device.
    """
    while len(self.pending) > leave:
      step, metrics, seen = self.pending.pop(0)
      metrics = jax.device_get(metrics)
      row = self._row(step, metrics, seen)
      self.metrics.append(row)
      self.trackers.append(row)
      self.progress.update(row)
      check_skipped(step, int(np.max(metrics["skipped"])), self.cfg.train.max_skipped_steps,
                    "train.max_skipped_steps", self.checkpoints)

  def _row(self, step: int, metrics: dict, seen: float) -> dict:
    hyper = self.program.hyper(step - 1)
    row = {"step": step}
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    rates = np.asarray([h["learning_rate"] for h in hyper], np.float64)
    values["learning_rate"] = rates if len(rates) > 1 else rates[0]
    if len(self.seeds) > 1:
      row |= {name: value.mean(0).tolist() for name, value in values.items()}
      row["per_seed"] = {name: value.tolist() for name, value in values.items() if value.ndim == 1}
    else:
      row |= {name: value.tolist() for name, value in values.items()}
    return row | {"time": seen, **self.progress.rates(seen, self.program.batch_size(step - 1))}


def _validation_scalars(row: dict) -> dict:
  """Returns the numbers of an evaluation for trackers, named `validation/bits_per_byte/DOMAIN`.

  Args:
    row: a row of `evaluations.jsonl`.
  """
  scalars = {"step": row["step"]}
  for name, value in row.items():
    if isinstance(value, dict):
      scalars |= {f"validation/{name}/{domain}": number for domain, number in value.items()}
    elif name != "step":
      scalars[f"validation/{name}"] = value
  return scalars


class _Trace:
  """A profiler trace of some successive steps, or of those of them that the run takes."""

  def __init__(self, folder: pathlib.Path, steps: Sequence[int]):
    self.folder, self.steps, self.running = folder, steps, False

  def begin(self, step: int) -> None:
    if step in self.steps and not self.running:
      jax.profiler.start_trace(str(self.folder))
      self.running = True

  def end(self, step: int, result: dict) -> None:
    """Ends the trace after the last of the steps, once the device has computed its result."""
    if self.running and step == self.steps[-1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    if self.running:
      jax.profiler.stop_trace()
      self.running = False
