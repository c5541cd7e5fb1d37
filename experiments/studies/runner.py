"""Executes a study: sweeps learning rates, trains its arms on paired seeds, judges its claims.

There are two phases. First, learning rates are swept on separate seeds, for every arm or only for
the baseline. Then each arm trains at its best learning rate on the seeds that are compared. Runs
that share a program may train as a vmapped batch. Every invocation writes its finished runs to one
small file in `parts/`: to merge the results of several machines, copy these files into a new
folder, and repeat the command there for all seeds. On one machine, several processes may train at
once, as a run uses one GPU, which small models leave idle. Runs that another study, or an earlier
command, has trained on this machine are taken from its store (`experiments.studies.store`).
"""

import dataclasses
import itertools
import os
import shutil
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np

from experiments import stats
from experiments.options import Options
from experiments.reports import provenance, results
from experiments.reports.study_report import (
  PILOT_SEED,
  SWEEP_SEED,
  write_study_report,
)
from experiments.reports.summary import study_summary
from experiments.stats import noise
from experiments.studies.judging import comparing, rules
from experiments.studies.judging.commands import confirming_command, reproducing_command
from experiments.studies.judging.comparing import (
  compare,
  compared_runs,
  compared_seeds,
  corrected,
  finite,
  known_values,
  repeated,
  without_another_look,
  without_verdict,
)
from experiments.studies.judging.planning import expected_power
from experiments.studies.judging.printing import verdict_lines
from experiments.studies.runs import Task, group_folder, group_name
from experiments.studies.store import Parts, RunStore
from experiments.studies.study import Study
from experiments.studies.training import MODULE, command_line, runs_of, train_group
from experiments.workers import Workers, leave_memory_to_workers
from train import cost
from train.config_io import renamed_setting, upgrade
from train.run_folder import RunFolder, read_run_json, write_json_atomic
from train.signals import Signals

_SMOKE = "a smoke run checks that everything runs, and is far too short for a verdict"
_PILOT = "pilot seeds are never judged: their deviation tells how many seeds a claim needs"


def main(study: Study, options: Options) -> None:
  """Trains the missing runs of a study, and judges its comparisons on all finished runs."""
  options.require_supported("a", "b", "profile")
  if options.processes:
    leave_memory_to_workers()
  execute(study, options.scale_of(study.scales), options)


def execute(study: Study, scale_name: str, options: Options) -> dict:
  """Does what `main` does, and returns the content of results.json.

  Args:
    study: the study, which need not be in the catalogue.
    scale_name: name of one of its scales.
    options: the flags of the command line.
  """
  runner = Runner(study, scale_name, options)
  try:
    finished = runner.run()
    judged = runner.judge()
    if not finished:
      print("stopped and saved; rerun the same command to resume")
    return judged
  finally:
    runner.out.close()


def left(study: Study, options: Options) -> str:
  """Returns in words what the command of `options` without `--list` would still train."""
  name = options.scale_of(study.scales)
  runner = Runner(study, name, options)
  try:
    return runner.left()
  finally:
    runner.out.close()


class Runner:
  """Runs a study at one scale in one folder.

  Args:
    study: the study.
    scale_name: name of one of its scales.
    options: the flags of the command line.
    trains: whether runs may be added to the folder, which must then be of the same definition.

  Raises:
    ValueError: if an arm does not exist, a setting is invalid, a seed is reserved for sweeps, or
      the folder is in use or belongs to another study, scale or definition.
  """

  def __init__(self, study: Study, scale_name: str, options: Options, trains: bool = True):
    self.study, self.scale, self.scale_name = study, study.scales[scale_name], scale_name
    self.trains = trains
    known = {arm.name: arm for arm in study.arms}
    unknown = set(options.arms) - known.keys()
    if unknown:
      raise ValueError(f"--arms={','.join(sorted(unknown))} does not exist; {study.name} has "
                       + ", ".join(known))
    self.arms, self.options = list(options.arms or study.arms_to_run()), options
    self.seeds, self.again = options.seed_range(self.scale.seeds), study.again()
    self.repeats = study.baseline in self.arms and len(self.seeds) > 1  # the arm `again`
    needed = {*self.arms, *(study.swept_arms(self.scale) if study.one_rate else ())}
    self._configured = {*needed, *([self.again.name] if self.repeats else [])}
    self.pilot = self.seeds.start >= PILOT_SEED
    if not self.pilot and self.seeds.stop > PILOT_SEED:
      raise ValueError(f"--seeds={options.seeds}: seeds from {PILOT_SEED} on are for pilots, which "
                       "are never judged: ask for a range below or from there on")
    if self.seeds.stop > SWEEP_SEED:
      raise ValueError(f"--seeds={options.seeds}: seeds from {SWEEP_SEED} on are reserved for "
                       "learning-rate sweeps")
    folder = options.folder(f"{study.name}-{scale_name}")
    self.runs = runs_of(study, scale_name, options, self._configured, folder)
    self.out = RunFolder(folder)
    try:
      if trains:
        self.out.check_config({
            "study": study.name, "scale": scale_name, "settings": sorted(options.settings),
            "definition": study.definition(scale_name), **self.runs.identity()}, self._upgrade)
    except ValueError:
      self.out.close()
      raise
    self.deadline = (time.monotonic() + 60 * options.max_minutes if options.max_minutes else None)
    self.parts = Parts(self.out.path / "parts")
    self.part = f"{time.time_ns()}-{os.getpid()}"
    # Smoke runs check that everything runs, the folders of kept runs are needed, and a run that
    # trains in a batch is rounded otherwise.
    self.store = (RunStore(self.runs) if options.reuse_runs and scale_name != "smoke"
                  and not study.keep_runs and self.scale.vmapped_runs == 1 else None)
    self.own_runs: list[dict] = []

  def _upgrade(self, stored: dict) -> dict:
    """Converts an earlier version's `config.json` to the current version.

    Instead of a definition, it recorded the settings of the arms and a hash of the sources.
    """
    if "study" not in stored:  # the folder of something else, which cannot be converted
      return stored
    config = type(self.scale.config)

    def rename(setting: str) -> str:
      name, equals, value = setting.partition("=")
      return f"{renamed_setting(config, name) or name}{equals}{value}"

    upgraded = upgrade(stored, {"config": config})
    if "source_hash" in upgraded:
      del upgraded["source_hash"]
      arms = {arm: list(map(rename, assigned)) for arm, assigned in upgraded.pop("arms").items()}
      upgraded["definition"] = self.study.definition(self.scale_name) | {"arms": arms}
    return upgraded | {"settings": sorted(map(rename, upgraded["settings"]))}

  def finished(self) -> dict[Task, dict]:
    """Returns all runs that are recorded in `parts/`, including those that failed."""
    return self.parts.runs()

  def run(self) -> bool:
    """Trains all runs that are missing; returns False if it was stopped, as by the time limit."""
    self._record_stored()
    if self.missing():
      cost = self.study.cost(self.scale_name, self.arms, len(self.seeds))
      print(f"{self.study.name}: {cost}", file=sys.stderr, flush=True)
      if not (self.pilot or self.options.settings):  # which change the deviation
        for line in expected_power(self.study, self.scale_name, self.arms, len(self.seeds)):
          print(f"power, by the committed result: {line}", file=sys.stderr)
    if not self._next(self.finished()):
      return True
    self.runs.prepare()
    if self.options.processes:
      return self._run_at_once(self.options.processes)
    while tasks := self._next(self.finished()):
      if not self._run_all(tasks):
        return False
      self._record_stored()
    return True

  def _next(self, done: Mapping[Task, dict]) -> list[Task]:
    """Returns the runs that can train next: those of sweeps, then those that are compared."""
    best = self.best_learning_rates(done)
    ready = [task for task in self._compared(best)
             if self._swept_as(task.arm) in best or not self.scale.learning_rates]
    return [task for task in (*self._sweep(done), *ready) if task not in done]

  def _trained_before(self, done: Mapping[Task, dict]) -> dict[Task, dict]:
    """Returns parts with those of the next runs that this or another study has trained before."""
    if not self.store:
      return {}
    return {task: part for task in self._next(done) if (part := self.store.find(task))}

  def _record_stored(self) -> None:
    """Records the next runs, and those after them, as far as they were trained before."""
    while found := self._trained_before(self.finished()):
      for task, part in found.items():
        print(f"{self.study.name}: {task.name}, trained before", file=sys.stderr, flush=True)
        self.parts.write(f"{time.time_ns()}-{os.getpid()}", part)

  def left(self) -> str:
    """Returns in words what is still to train: neither recorded here nor trained before."""
    done = self.finished()
    while found := self._trained_before(done):
      done |= {task: part["runs"][0] for task, part in found.items()}
    count = len(self.missing(done))
    minutes = count / self.scale.vmapped_runs * self.scale.minutes
    minutes += self.scale.shared_minutes * (count > 0)
    return (f"--scale={self.scale_name}: {count} run{'s' * (count != 1)} to train, about "
            f"{minutes:.3g} device-minutes on {self.scale.hardware}; {len(done)} finished")

  def _sweep(self, runs: Mapping[Task, dict]) -> list[Task]:
    """Returns the runs that choose learning rates, as far as finished runs tell which these are."""
    swept = self.study.swept_arms(self.scale) if self.study.one_rate else self.arms
    return [Task(arm, rate, SWEEP_SEED + i) for arm in swept for rate in self._rates(arm, runs)
            for i in range(self.scale.sweep_seeds)]

  def _rates(self, arm: str, runs: Mapping[Task, dict]) -> list[float]:
    """Returns the learning rates of an arm's sweep, extended beyond an end where the best one lies.
    """
    rates = list(self.scale.learning_rates)
    if not self.trains:  # those that were swept then
      return sorted({task.learning_rate for task in runs
                     if task.arm == arm and task.seed >= SWEEP_SEED}) or rates
    for _ in range(self.scale.extra_rates * (self.scale_name != "smoke")):
      found = self._best(arm, rates, runs)
      if found is None or not self._at_end(found[0], rates):
        break
      lower = found[0] == rates[0]
      end, inner = (rates[0], rates[1]) if lower else (rates[-1], rates[-2])
      rates.insert(0 if lower else len(rates), float(f"{end**2 / inner:.6g}"))
    return rates

  @staticmethod
  def _at_end(rate: float, rates: Sequence[float]) -> bool:
    return rate in (rates[0], rates[-1])

  def _best(self, arm: str, rates: Sequence[float],
            runs: Mapping[Task, dict]) -> tuple[float, float] | None:
    """Returns the rate with the best mean score and that score; None if runs are missing or failed.

    Scores have a sign such that larger is better; that of a failed run is minus infinity.
    """
    score, scores = self.runs.score, {}
    value = lambda run: finite(run["metrics"], score.metric, -np.inf * score.sign) * score.sign
    for rate in rates:
      found = [runs.get(Task(arm, rate, SWEEP_SEED + i)) for i in range(self.scale.sweep_seeds)]
      if None in found:
        return None
      scores[rate] = float(np.mean(list(map(value, found))))
    # Of equal scores, that of the rate nearest to the middle, so that none extends the sweep.
    middle = (len(rates) - 1) / 2
    rate = max(scores, key=lambda rate: (scores[rate], -abs(rates.index(rate) - middle)),
               default=None)
    return (rate, scores[rate]) if rate is not None and np.isfinite(scores[rate]) else None

  def _compared(self, best: Mapping[str, float]) -> list[Task]:
    """Returns the runs that are compared; the learning rate is None where none was chosen."""
    arms = [*self.arms, *([self.again.name] if self.repeats else [])]
    if not self.scale.learning_rates:
      return [Task(arm, None, seed) for seed in self.seeds for arm in arms]
    return [Task(arm, best.get(self._swept_as(arm)), seed) for arm in arms for seed in self.seeds]

  def _swept_as(self, arm: str) -> str:
    """Returns the arm whose sweep chooses an arm's learning rate: itself, or the baseline."""
    return self.study.baseline if self.study.one_rate or arm == self.again.name else arm

  def missing(self, done: Mapping[Task, dict] | None = None) -> list[str]:
    """Returns the names of the runs that this command asks for and that are not in `done`.

    Runs of an arm that failed at every learning rate of its sweep are not missing.

    Args:
      done: finished runs; None for those that are recorded.
    """
    done = self.finished() if done is None else done
    sweep, best = [task for task in self._sweep(done) if task not in done], self._swept(done)
    unswept = {task.arm for task in sweep}
    if not self.scale.learning_rates or (self.study.one_rate and sweep):
      unswept |= {self._swept_as(arm) for arm in self.arms}
    compared = self._compared({arm: rate for arm, (rate, _) in best.items()})
    return [task.name for task in (*sweep, *compared)
            if task not in done
            and (task in sweep or self._swept_as(task.arm) in {*best, *unswept})]

  def best_learning_rates(self, runs: dict[Task, dict]) -> dict[str, float]:
    """Returns the best learning rates of the arms whose sweep is complete.

    Arms of whose sweep all runs failed are left out.
    """
    return {arm: rate for arm, (rate, _) in self._swept(runs).items()}

  def _swept(self, runs: dict[Task, dict]) -> dict[str, tuple[float, float]]:
    """Returns the best learning rate by arm, and its mean score, for arms with a complete sweep."""
    found = {arm: self._best(arm, self._rates(arm, runs), runs)
             for arm in self.study.swept_arms(self.scale)}
    best = {arm: of_arm for arm, of_arm in found.items() if of_arm}
    if self.study.one_rate and best:
      return {arm.name: best[self.study.baseline] for arm in self.study.arms}
    return best

  def _run_all(self, tasks: Sequence[Task]) -> bool:
    """Trains runs; returns False if the time limit was reached."""
    for group in self._groups(tasks):
      if self.deadline and time.monotonic() > self.deadline:
        return False
      print(f"{self.study.name}: {group_name(group)}", file=sys.stderr, flush=True)
      if not (part := train_group(self.study, self.runs, group, self.out.path, self._seconds())):
        return False
      self._record(group, part)
    return True

  def _run_at_once(self, count: int) -> bool:
    """Trains what `run` does, several runs at a time, each in a process of its own."""
    command = command_line(self.study, self.scale_name, self.options, self._configured,
                           self.out.path)
    training: dict[Future, list[Task]] = {}
    stopped, told, failure = False, False, None
    with Signals() as signals, Workers(MODULE, command, count) as pool:
      signals.can_save()
      while True:
        if (signals.received or failure) and not told:
          pool.stop()
          told = stopped = True
        stopped |= bool(signals.received or (self.deadline and time.monotonic() > self.deadline))
        if not stopped:
          self._record_stored()
          left = [task for task in self._next(self.finished())
                  if task not in itertools.chain(*training.values())]
          for group in itertools.islice(self._groups(left), count - len(training)):
            print(f"{self.study.name}: {group_name(group)}", file=sys.stderr, flush=True)
            training[pool.submit({"group": list(map(dataclasses.asdict, group)),
                                  "seconds": self._seconds()})] = group
        if not training:
          if failure:
            raise failure
          return not stopped
        for future in wait(training, 1.0, FIRST_COMPLETED).done:  # or look for a signal again
          group = training.pop(future)
          if error := future.exception():
            if not told:  # otherwise it had nothing to save
              failure = ValueError(f"{group_name(group)}: {error}")
          elif part := future.result():
            self._record(group, part)
          else:
            stopped = True

  def _groups(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Yields groups of runs that train as one vmapped batch, at most `vmapped_runs` in each."""
    by_program: dict[Hashable, list[Task]] = {}
    for task in tasks:
      by_program.setdefault(self.runs.program(task), []).append(task)
    for batch in by_program.values():
      for start in range(0, len(batch), self.scale.vmapped_runs):
        yield batch[start:start + self.scale.vmapped_runs]

  def _seconds(self) -> float | None:
    """Returns what is left of the time limit, at least one second; None without a limit."""
    return self.deadline and max(1.0, self.deadline - time.monotonic())

  def _record(self, group: Sequence[Task], part: Mapping[str, Any]) -> None:
    """Writes finished runs to this command's part, and a run that trained alone to the store."""
    self.own_runs += part["runs"]
    self.parts.write(self.part, part | {"runs": self.own_runs})
    if self.store:
      (task,) = group
      self.store.keep(task, part)
    if not self.study.keep_runs:
      shutil.rmtree(group_folder(self.out.path, group, False) / "checkpoints", ignore_errors=True)

  def where_it_ran(self) -> dict:
    """Returns the merged provenance of all parts, with a command that reproduces all of them."""
    seeds = {arm: set(self.seeds) for arm in self.arms}
    for task in self.finished():
      if task.seed < (SWEEP_SEED if self.pilot else PILOT_SEED):
        seeds.setdefault(task.arm, set()).add(task.seed)
    command = reproducing_command(self.study, self.scale_name, self.options, seeds)
    return provenance.merged([part["provenance"] for part in self.parts.read()]) | {
        "command": command}

  def judge(self) -> dict:
    """Writes `outcome` as results.json, its summary and the report, prints it, and returns it."""
    result = self.write(self.outcome())
    print("\n".join(verdict_lines(self.study, result)))
    print(f"report: {self.out.path / 'report.md'}")
    return result

  def write(self, result: dict) -> dict:
    """Writes results.json, the summary and the report, and returns the content of the former."""
    result |= {"confirmed_by": confirming_command(
        self.study, self.scale_name, self.options, result)}
    write_json_atomic(self.out.path / "results.json", result)
    write_json_atomic(self.out.path / results.SUMMARY, study_summary(result))
    write_study_report(self.out.path, result)
    return result

  def outcome(self) -> dict:
    """Returns the content of results.json: all runs, and the comparisons that can be made of them.
    """
    runs = self.finished()
    swept = self._swept(runs)
    best = {arm: rate for arm, (rate, _) in swept.items()}
    compared_of = lambda arm: compared_runs(
        runs.values(), arm, best.get(self._swept_as(arm)), self.pilot)
    ran = {arm.name: compared_of(arm.name) for arm in self.study.arms}
    compared = {arm: {seed: run["metrics"] for seed, run in by_seed.items()}
                for arm, by_seed in ran.items()}
    again = {seed: run["metrics"] for seed, run in compared_of(self.again.name).items()}
    scores = {arm: score for arm, (_, score) in swept.items()}
    at_end = {arm for arm, rate in best.items()
              if self._at_end(rate, self._rates(self._swept_as(arm), runs))}
    attempted = {arm: [task.seed for task in runs if self._is_compared(task)
                       and (task.arm, task.learning_rate) == (arm, best.get(arm))]
                 for arm in compared}
    problems = {arm: {seed: run.get("by_problem", {}) for seed, run in by_seed.items()}
                for arm, by_seed in ran.items()}
    comparisons = [c for c in (compare(c, compared, scores, best, at_end, attempted, problems)
                               for c in self.study.comparisons) if c]
    missing = self.missing()
    if reason := _SMOKE if self.scale_name == "smoke" else _PILOT if self.pilot else None:
      comparisons = [without_verdict(c, reason) for c in comparisons]
    comparisons = corrected(
        without_another_look(
            comparisons, self._judged_before(), [*missing, *self._unfinished(runs)]),
        self.scale.seeds if self.pilot else None)
    seeds = compared[self.study.baseline]
    metrics = list(next(iter(seeds.values()), {}))
    shown = {*self.arms, *(run["arm"] for run in runs.values())}
    listed = (*self.study.arms, self.again)
    return {
        "name": self.study.name, "claim": self.study.claim, "source": self.study.source,
        "scale": self.scale_name, "definition": self.study.definition(self.scale_name),
        "arms": [{"name": arm.name, "settings": " ".join(arm.settings) or "none",
                  "best learning rate": self._describe_rate(
                      best.get(self._swept_as(arm.name)), self._swept_as(arm.name) in at_end)}
                 for arm in listed if arm.name in shown],
        "best_learning_rates": best, "runs": list(runs.values()), "missing": missing,
        "judged_by": judging(), "measured_by": self._measured_by(),
        "comparisons": comparisons, "again": repeated(again, seeds, metrics),
        "noise": {metric: noise(values) for metric in metrics
                  if len(values := known_values(seeds.values(), metric)) > 1},
        "detectable": {f"{c['name']} ({c['metric']})": c["paired"]["detectable"]
                       for c in comparisons if c["claim"]["kind"] != "equivalent"},
        **self.runs.report_parts({arm: [by_seed[seed] for seed in sorted(by_seed)]
                                  for arm, by_seed in ran.items()}),
        "total_cost": cost.add_up([run["cost"] for run in runs.values()]),
        "provenance": self.where_it_ran()}

  def _measured_by(self) -> list[str | None]:
    """Returns the hashes of the code that measured the recorded runs; None where it is unknown."""
    return list(dict.fromkeys(part.get("measured_by") for part in self.parts.read()))

  def _judged_before(self) -> list[dict]:
    """Returns the comparisons of the folder's results.json; none if there is no such file."""
    path = self.out.path / "results.json"
    return read_run_json(path).get("comparisons", []) if path.exists() else []

  def _unfinished(self, runs: Mapping[Task, dict]) -> list[str]:
    """Returns the missing runs of arms that this command does not ask for, and that have others."""
    arms = {task.arm for task in runs if self._is_compared(task)} - {self.again.name}
    best = self.best_learning_rates(runs)
    others = [Task(arm, best.get(arm), seed) for arm in sorted(arms - set(self.arms))
              for seed in self.seeds]
    return [task.name for task in others if task not in runs]

  def _is_compared(self, task: Task) -> bool:
    """Whether a run is one of those that are compared, or of the pilot if that is asked for."""
    return task.seed in compared_seeds(self.pilot)

  def _describe_rate(self, rate: float | None, at_end: bool) -> str:
    if not self.scale.learning_rates:
      return "not swept"
    if rate is None:
      return "sweep not finished"
    return f"{rate:g}" + (" (at the edge of the sweep)" if at_end else "")


def judging() -> str:
  """Returns the hash of the code that judges the metrics of runs."""
  return rules.syntax_hash((
      stats, comparing, Runner.outcome, Runner._rates, Runner._best, Runner._at_end,
      Runner._unfinished, Runner._is_compared))
