"""Runs of a study that do RL from a base.

A base is pretrained when the first run needs it, in the user's cache, where all arms, studies and
later commands that begin with the same base find it: whoever changes how bases are made deletes
`bases` there. What one command makes there others wait for. Runs go one at a time, a folder each.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import model
import rl.start
from experiments.bases import Base, DocumentsConfig
from experiments.rl_metrics import gains, judged, of_rows
from experiments.runs import Score, Task, left, stretches
from model.checks import require, require_positive
from rl import loop
from rl.config import RLConfig
from rl.sampler import Sampler
from train import cost
from train.config import RunConfig
from train.config_io import to_dict
from train.run_folder import RunFolder, write_json_atomic

_CURVES = {"reward": "reward (mean of a rollout)", "pass@1": "held-out pass@1",
           "length": "length (tokens)", "kl": "KL to the reference (nats per token)"}
_HARDER = ("pass@1", "cons@k", "pass@k")
_POLL_SECONDS = 1.0
_BASE_METRICS = ("pass@1", "cons@k", "pass@k", "format", "length", "length_pays")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluations before and after RL.

  Attributes:
    problems: held-out ones.
    samples: of each, a power of two: pass@k and cons@k are of all of them.
    temperature: None for the training's.
    harder: also of the task's harder problems; their metrics are "harder_*".
  """

  problems: int = 200
  samples: int = 16
  temperature: float | None = None
  harder: bool = False

  def __post_init__(self):
    require_positive(self, "problems", "samples")
    require(self.samples.bit_count() == 1,
            f"evaluation.samples={self.samples} must be a power of two: 1, 2, 4 ...")
    require(self.temperature is None or self.temperature > 0,
            f"evaluation.temperature={self.temperature} must be positive, or none for the "
            "training's")


@dataclasses.dataclass(frozen=True)
class RLStudyConfig:
  """A base, and RL on it.

  Attributes:
    base: how it is pretrained; its sources are the documents.
    documents: see there.
    bases: a run of seed n begins with base n modulo this: fewer than seeds cost less, and say less
      of other bases.
    rl: the RL run.
    value_rate_ratio: PPO's value model learns at this times the policy's rate.
    evaluation: see there.
  """

  base: RunConfig
  documents: DocumentsConfig = dataclasses.field(default_factory=DocumentsConfig)
  bases: int = 3
  rl: RLConfig = dataclasses.field(default_factory=RLConfig)
  value_rate_ratio: float = 1.0
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

  def __post_init__(self):
    require_positive(self, "bases", "value_rate_ratio")


class RLRuns:
  """`experiments.runs.Runs` of `rl.loop.train`; learning rates are chosen by held-out pass@1."""

  score: ClassVar = Score("pass@1", 1)
  named: ClassVar = {"base.model": model.get_config}

  def __init__(self, base: RLStudyConfig, configs: Mapping[str, RLStudyConfig],
               told: Collection[str]):
    self._scale, self._configs = base, configs
    self._told = "base.model.vocab_size" in told
    self._starts: dict[pathlib.Path, rl.start.Start] = {}

  def identity(self) -> dict[str, Any]:
    """The scale's config, most of which other files than the study's say."""
    return {"config": to_dict(_somewhere(self._scale))}

  def prepare(self) -> None:
    pass

  def program(self, task: Task) -> Task:
    return task

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    (task,), began = tasks, time.monotonic()
    cfg, base = self.config(task), self.base(task)
    start = self._start(base, max_seconds)
    if start is None:
      return None
    folder.check_config(rl.start.as_dict(cfg.rl, start.cfg))
    tokenizer = start.tokenizer()
    tokenizer.save(folder.path / rl.start.TOKENIZER)
    result = loop.train(cfg.rl, start.cfg, start.variables, tokenizer, folder,
                        max_seconds=left(max_seconds, began))
    if result.status == "stopped":
      return None
    judge = _Judge(cfg, Sampler(model.Transformer(start.cfg), cfg.rl, tokenizer))
    before = judge.base(start.variables, base.path)
    after = judge(result.state.train.variables)
    return [{
        "metrics": after["metrics"] | gains(before["metrics"], after["metrics"])
                   | {f"base_{name}": before["metrics"][name] for name in ("length_pays", "pass@k")}
                   | of_rows(result.rows),
        "curves": _curves(result), "before": before, "after": after,
        "base": {"name": base.path.name, "cost": cost.total(base.path)}}]

  def config(self, task: Task) -> RLStudyConfig:
    """Of one run."""
    cfg = self._configs[task.arm]
    objective = cfg.rl.objective
    if objective.name == "ppo":
      objective = dataclasses.replace(
          objective, value_learning_rate=cfg.value_rate_ratio * task.learning_rate)
    return dataclasses.replace(cfg, rl=dataclasses.replace(
        cfg.rl, objective=objective,
        loop=dataclasses.replace(cfg.rl.loop, seed=task.seed),
        optimizer=dataclasses.replace(cfg.rl.optimizer, learning_rate=task.learning_rate)))

  def base(self, task: Task) -> Base:
    """The base that a run begins with, in the cache under what decides it."""
    cfg = self._configs[task.arm]
    decides = {"base": to_dict(_somewhere(cfg).base), "documents": to_dict(cfg.documents),
               "task": cfg.rl.task, "template": cfg.rl.template, "told": self._told}
    seed = task.seed % cfg.bases
    path = cfg.base.data.cache_folder / "bases" / f"{_digest(decides)}-seed{seed}"
    return Base(cfg.base, cfg.documents, cfg.rl.task, cfg.rl.template, seed, path, self._told)

  def _start(self, base: Base, max_seconds: float | None) -> rl.start.Start | None:
    """The loaded base, kept for the runs to come."""
    if base.path not in self._starts:
      began = time.monotonic()
      held = _hold(base.path / "making", max_seconds)
      if held is None:
        return None
      with contextlib.closing(held):
        start = base.load(left(max_seconds, began))
      if start is None:
        return None
      self._starts[base.path] = start
    return self._starts[base.path]

  def drawn(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Curves over steps and over K, means over seeds, and the bases."""
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    curves = {label: {arm: _mean([run["curves"][key] for run in of_arm])
                      for arm, of_arm in runs.items()
                      if all(run["curves"][key] for run in of_arm)}
              for key, label in _CURVES.items()}
    return {
        "panels": [
            {"name": "curves", "caption": "Over steps, means over seeds",
             "curves": {label: of_arm for label, of_arm in curves.items() if of_arm}},
            {"name": "by_k", "caption": "Best and majority of K samples, before and after RL",
             "doublings": "K (samples of a problem)", "curves": _by_k(runs)}],
        "bases": _bases(runs)}


class _Judge:
  """Evaluates variables as the config says."""

  def __init__(self, cfg: RLStudyConfig, sampler: Sampler):
    self._cfg, self._sampler = cfg, sampler

  def __call__(self, variables: dict) -> dict:
    asked = dataclasses.asdict(self._cfg.evaluation)
    splits = ("heldout", "harder") if asked.pop("harder") else ("heldout",)
    found, *harder = (judged(self._sampler, variables, split=split, **asked) for split in splits)
    for other in harder:
      found["metrics"] |= {f"harder_{name}": other["metrics"][name] for name in _HARDER}
    return found

  def base(self, variables: dict, folder: pathlib.Path) -> dict:
    """The base's figures, kept beside it for the runs that ask for the same."""
    cfg = self._cfg
    key = {"evaluation": to_dict(cfg.evaluation), "sampling": to_dict(cfg.rl.sampling),
           "seed": cfg.rl.loop.seed}
    path = folder / f"evaluation-{_digest(key)}.json"
    if not path.exists():
      with contextlib.closing(_hold(path.with_suffix(""))):
        if not path.exists():
          write_json_atomic(path, {"of": key, "found": self(variables)})
    return json.loads(path.read_text())["found"]


def _hold(folder: pathlib.Path, max_seconds: float | None = None) -> RunFolder | None:
  """Holds a folder as soon as no other process does; None if time runs out before."""
  began, told = time.monotonic(), False
  while True:
    try:
      return RunFolder(folder)
    except ValueError as error:
      if not isinstance(error.__cause__, BlockingIOError):
        raise
    if max_seconds and time.monotonic() - began > max_seconds:
      return None
    if not told:
      print(f"waiting for what another process makes in {folder}", file=sys.stderr, flush=True)
    told = True
    time.sleep(_POLL_SECONDS)


def _digest(plain: Any) -> str:
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _somewhere(cfg: RLStudyConfig) -> RLStudyConfig:
  """Without the place of the cache, which decides nothing."""
  data = dataclasses.replace(cfg.base.data, cache_dir=None)
  return dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, data=data))


def _curves(result: loop.RLResult) -> dict[str, list[list[float]]]:
  return {"reward": stretches(result.rows, lambda row: row["reward"]),
          "length": stretches(result.rows, lambda row: row["completions/mean_length"]),
          "kl": stretches(result.rows, lambda row: row.get("kl")),
          "pass@1": stretches(result.evaluations, lambda row: row["pass@1"][0])}


def _mean(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
  """Curves of runs that differ in their seed alone, as one: where it is, and its values."""
  points = np.array([curve[:min(map(len, curves))] for curve in curves], float)
  return points[0, :, 0].tolist(), points[..., 1].mean(0).tolist()


def _by_k(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict]:
  """Panels of pass@K and cons@K; arms that began with the same bases share their curve."""
  of_bases: dict[tuple, str] = {}
  for arm, of_arm in runs.items():
    of_bases.setdefault(tuple(run["base"]["name"] for run in of_arm), arm)
  drawn = {}
  for key, label in {"pass@K": "pass@K", "cons@K": "majority of K"}.items():
    before = {"base" if len(of_bases) == 1 else f"base of {arm}":
              _mean([run["before"][key] for run in runs[arm]]) for arm in of_bases.values()}
    drawn[label] = before | {arm: _mean([run["after"][key] for run in of_arm])
                             for arm, of_arm in runs.items()}
  return {label: curves for label, curves in drawn.items() if curves}


def _bases(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict]:
  found: dict[str, dict] = {}
  for arm, of_arm in runs.items():
    for run in of_arm:
      base = found.setdefault(run["base"]["name"], {
          **run["base"], "arms": [],
          "metrics": {name: run["before"]["metrics"][name] for name in _BASE_METRICS}})
      if arm not in base["arms"]:
        base["arms"].append(arm)
  return list(found.values())
