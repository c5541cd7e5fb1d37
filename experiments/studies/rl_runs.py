"""Runs of studies that train a base model by RL.

A base is pretrained when the first run needs it. Unless the study keeps its own bases, it is stored
in the user's cache folder, where all arms, studies and later commands that start from the same base
find it, if they have the same code, versions and hardware. While another process makes a base or
evaluates it, a command waits for the result. Runs train one at a time, each in a folder of its own.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import model
from experiments.reports.labels import metric_label
from experiments.studies import rl_evaluation, rl_metrics, rl_tables, store
from experiments.studies.rl_evaluation import EvaluationConfig, Evaluator
from experiments.studies.rl_metrics import by_problem, gains, metrics_of_rows
from experiments.studies.runs import Score, Task, binned_curve, remaining_seconds
from model.checks import require, require_positive
from rl import extraction, loop, rewards
from rl.config import RLConfig
from rl.documents import DocumentsConfig
from rl.evaluate import require_memory
from rl.loading import load_model
from rl.sampler import Sampler, require_context, require_drafts, reward_function
from rl.stages import BaseConfig, pretrain_base, run_rl
from rl.tasks import get_task
from train import cost
from train.chat import require_chat
from train.config import TOKENIZERS, RunConfig
from train.config_io import to_dict
from train.loading import LoadedModel, prompt_format, stored_prompting
from train.optimizer import learning_rate
from train.run_folder import MetricsFile, RunFolder, write_json_atomic
from train.templates import CHAT, get_template
from train.tokenizer import Tokenizer

_POLL_SECONDS = 1.0
_PROMPTS_CHECKED = 64  # problems whose prompts are measured before a base is pretrained for them
_SAMPLES_SHOWN = 4  # completions of a run in the report, at its first and at its last evaluation


@dataclasses.dataclass(frozen=True)
class RLStudyConfig:
  """A base model, RL on it, and how both are evaluated.

  Attributes:
    base: how the base is pretrained; the generated documents replace its `data.sources`.
    documents: the documents on which the base is pretrained.
    rl: the RL run.
    evaluation: the evaluations before and after RL.
    init: run folder or Hugging Face folder of a model to start RL from; None to pretrain a base.
      Unless RL's template is set, it is the one that the model was trained with.
    bases: number of bases: the run with seed n starts from base n modulo this number. Fewer bases
      than seeds cost less, but the results say less about other bases. None for one base per seed.
    bases_in: where bases are stored: "cache", the user's cache folder, where other studies find
      them, or "out", the study's own folder.
    value_rate_ratio: learning rate of PPO's value model relative to the policy's.
  """

  base: RunConfig
  documents: DocumentsConfig = dataclasses.field(default_factory=DocumentsConfig)
  rl: RLConfig = dataclasses.field(default_factory=RLConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  init: str | None = None
  bases: int | None = 3
  bases_in: Literal["cache", "out"] = "cache"
  value_rate_ratio: float = 1.0

  def __post_init__(self):
    require_positive(self, "value_rate_ratio")
    require(self.bases is None or self.bases > 0,
            f"RLStudyConfig.bases={self.bases} must be positive, or none for one base per "
            "seed")


class RLRuns:
  """Implements `experiments.studies.runs.Runs` by `rl.loop.train`.

  Learning rates are chosen by pass@1.
  """

  score: ClassVar = Score("pass@1", 1)
  named: ClassVar = {"base.model": model.get_config}
  learning_rate: ClassVar = "rl.optimizer.learning_rate"
  nudge: ClassVar = "rl.loop.nudge"
  measuring: ClassVar = (rl_metrics, rl_evaluation, rewards, extraction)
  packages: ClassVar = ("model", "pallas_kernels", "train", "rl")
  ignored: ClassVar = {
      "rl.loop.seed": "every run has its own seed: give --seeds=N or --seeds=FROM:TO",
      "base.train.seed": "a base has the seed of its run: give --seeds=N or --seeds=FROM:TO",
      "base.init": "a base is pretrained from random weights: to start RL from a model, set init",
      "base.data.sources": "a base is pretrained on documents that are generated from rl.task: set "
                           "documents.*, or init to start RL from a model of your own",
      "base.data.template": "a base's documents are written in rl.template: set that"}

  def __init__(self, base: RLStudyConfig, configs: Mapping[str, RLStudyConfig],
               overridden: Collection[str], folder: pathlib.Path):
    if base.init:
      stored = stored_prompting(base.init)
      base = _with_prompting(base, *stored, overridden)
      configs = {arm: _with_prompting(cfg, *stored, overridden) for arm, cfg in configs.items()}
    if CHAT in {cfg.rl.template for cfg in (base, *configs.values())}:
      require_chat(prompt_format(base.init) if base.init else None)
    _check_before_pretraining(configs, overridden)
    self._scale, self._configs, self._folder = base, configs, folder
    self._keep_vocabulary = "base.model.vocab_size" in overridden
    self._starts: dict[pathlib.Path, LoadedModel] = {}
    if base.init:
      _require_effect(base, configs, overridden)

  def identity(self) -> dict[str, Any]:
    """Returns the scale's config, most of which is declared outside the study's module."""
    return {"config": to_dict(_without_cache(self._scale))}

  @property
  def cache_folder(self) -> pathlib.Path:
    return self._scale.base.data.cache_folder

  def identifies(self, task: Task) -> dict[str, Any] | None:
    cfg = _without_cache(self.config(task))
    # The contents of files may change, and so may what is not part of this project.
    elsewhere = (cfg.init or cfg.rl.task.startswith(("file:", "gym:")) or cfg.rl.rewards.custom
                 or cfg.base.data.tokenizer not in TOKENIZERS)
    return None if elsewhere else {"config": to_dict(cfg), "keep_vocabulary": self._keep_vocabulary}

  def prepare(self) -> None:
    for cfg in self._configs.values():  # before a base is trained
      for reward in cfg.rl.rewards.custom:
        rewards.load(reward.function)

  def program(self, task: Task) -> Task:
    return task

  def train(self, tasks: Sequence[Task], folder: RunFolder,
            max_seconds: float | None) -> list[dict[str, Any]] | None:
    (task,), began = tasks, time.monotonic()
    cfg = self.config(task)
    start = self._start(task, max_seconds)
    if start is None:
      return None
    result = run_rl(cfg.rl, start, folder, max_seconds=remaining_seconds(max_seconds, began))
    if result.status == "stopped":
      return None
    plain = dataclasses.replace(  # the policy comes without the MTP modules that would draft
        cfg.rl, sampling=dataclasses.replace(cfg.rl.sampling, drafts=0))
    evaluator = Evaluator(
        cfg.evaluation, Sampler(model.Transformer(start.cfg), plain, start.tokenizer(),
                                start.prompt_format()), task.seed)
    base = self.base_folder(task)
    before = self._evaluate_base(evaluator, start.variables, base, cfg)
    after = evaluator(result.state.train.variables)
    _print_outcome(task, before["heldout"], after["heldout"])
    spent = cost.total(base) if (base / "cost").is_dir() else None
    return [by_problem(before, after) | {
        "metrics": after["metrics"] | gains(before["metrics"], after["metrics"])
                   | {f"base_{name}": before["metrics"][name] for name in ("length_pays", "pass@k")}
                   | metrics_of_rows(result.rows),
        "curves": _curves(result), "before": before, "after": after,
        "samples": _samples(folder.path), "params": start.cfg.param_count(),
        "base": {"name": base.name, "cost": spent}}]

  def config(self, task: Task) -> RLStudyConfig:
    """Returns the config of one run."""
    cfg = self._configs[task.arm]
    objective, optimizer = cfg.rl.objective, cfg.rl.optimizer
    if task.learning_rate is not None:
      optimizer = dataclasses.replace(optimizer, learning_rate=task.learning_rate)
    if objective.name == "ppo" and objective.value_learning_rate is None:
      objective = dataclasses.replace(
          objective, value_learning_rate=cfg.value_rate_ratio * optimizer.learning_rate)
    return dataclasses.replace(cfg, rl=dataclasses.replace(
        cfg.rl, objective=objective, optimizer=optimizer,
        loop=dataclasses.replace(cfg.rl.loop, seed=task.seed)))

  def base(self, task: Task) -> BaseConfig:
    """Returns the config of the base that a run starts from."""
    cfg = self._configs[task.arm]
    return self._base_of(cfg, task.seed % cfg.bases if cfg.bases else task.seed)

  def _base_of(self, cfg: RLStudyConfig, seed: int) -> BaseConfig:
    return BaseConfig(cfg.base, cfg.documents, cfg.rl.task, cfg.rl.template, seed,
                      self._keep_vocabulary)

  def base_folder(self, task: Task) -> pathlib.Path:
    """Returns the folder of the base that a run starts from.

    It is in the cache, under a digest of everything that determines the base, or in the study's
    folder.
    """
    cfg, base = self._configs[task.arm], self.base(task)
    if cfg.init:
      return self._folder / f"init-seed{base.seed}"
    if cfg.bases_in == "out":
      shared = self._base_of(self._scale, base.seed) == base
      return self._folder / f"base{'' if shared else f'-{task.arm}'}-seed{base.seed}"
    identity = {**to_dict(dataclasses.replace(base, run=_without_cache(cfg).base, seed=0)),
                "code": store.code_hash(self.packages), **store.environment()}
    return cfg.base.data.cache_folder / "bases" / f"{_digest(identity)}-seed{base.seed}"

  def _start(self, task: Task, max_seconds: float | None) -> LoadedModel | None:
    """Returns the model that a run starts from, and keeps it in memory for the runs that follow.

    None if the time limit was reached while the model was being made.
    """
    cfg, path, began = self._configs[task.arm], self.base_folder(task), time.monotonic()
    if path in self._starts:
      return self._starts[path]
    if cfg.init:
      folder = cfg.init
    else:
      locked = _lock(path / "making", max_seconds)
      if locked is None:
        return None
      with contextlib.closing(locked):
        folder = pretrain_base(self.base(task), out=path,
                               max_seconds=remaining_seconds(max_seconds, began),
                               check=lambda tokenizer: _require_prompts_fit(cfg, tokenizer))
      if folder is None:
        return None
    self._starts[path] = load_model(folder)
    return self._starts[path]

  def _evaluate_base(self, evaluator: Evaluator, variables: dict, folder: pathlib.Path,
                     cfg: RLStudyConfig) -> dict:
    """Returns the evaluation of a base, and stores it in the base's folder for other runs.

    Args:
      evaluator: the evaluator of `cfg`.
      variables: the base's variables.
      folder: the base's folder.
      cfg: the config of the run. The stored evaluation is used if it has the same settings.
    """
    key = {"init": cfg.init, "task": cfg.rl.task, "template": cfg.rl.template,
           **({"system": cfg.rl.system} if cfg.rl.system else {}),
           "evaluation": to_dict(cfg.evaluation), "sampling": to_dict(cfg.rl.sampling),
           "seed": cfg.rl.loop.seed, "problems": "of the seed"}
    path = folder / f"evaluation-{_digest(key)}.json"
    if not path.exists():
      with contextlib.closing(_lock(path.with_suffix(""))):
        if not path.exists():
          write_json_atomic(path, {"of": key, "found": evaluator.base(variables)})
    return json.loads(path.read_text())["found"]

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns curves over steps and over K, tables of all runs, completions, and the bases."""
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    return {"panels": rl_tables.panels(runs), "tables": rl_tables.tables(runs),
            "samples": rl_tables.samples(runs), "bases": rl_tables.bases(runs)}


def _with_prompting(cfg: RLStudyConfig, template: str | None, system: str,
                    overridden: Collection[str]) -> RLStudyConfig:
  """Returns the config with the prompts that the start model was trained with.

  Args:
    cfg: the config.
    template: the prompt template of that training; None to leave the config as it is.
    system: the system's message of that training.
    overridden: dotted names of settings that the user has set, which are kept.
  """
  if template is None or ("rl.template" in overridden and cfg.rl.template != template):
    return cfg
  system = cfg.rl.system if "rl.system" in overridden else system
  return dataclasses.replace(
      cfg, rl=dataclasses.replace(cfg.rl, template=template, system=system))


def _require_effect(base: RLStudyConfig, configs: Mapping[str, RLStudyConfig],
                    overridden: Collection[str]) -> None:
  """Raises ValueError for settings and arms that would change a base, if `init` replaces it."""
  ineffective = [name for name in sorted(overridden) if name.split(".")[0] in ("base", "documents")
                 and name != "base.data.cache_dir"]
  ineffective += [
      f"--arms={arm}" for arm, cfg in configs.items() if cfg.documents != base.documents]
  if ineffective:
    raise ValueError(f"{', '.join(ineffective)} would change a base, but init={base.init} replaces "
                     "the base: leave out one or the other")


def _check_before_pretraining(configs: Mapping[str, RLStudyConfig],
                              overridden: Collection[str]) -> None:
  """Raises ValueError for what RL or the evaluations would refuse, before a base is pretrained."""
  for cfg in configs.values():
    rl = cfg.rl
    reward_function(rl.rewards, rl.sampling.max_completion_length)
    learning_rate(rl.optimizer, rl.loop.steps * rl.objective.updates)
    for problems, samples in ((cfg.evaluation.problems, cfg.evaluation.samples),
                              (rl.loop.eval_problems, rl.loop.eval_samples)):
      require_memory(problems, samples, rl.sampling.max_completion_length)
    if not cfg.init:
      require_context(rl.sampling, cfg.base.model.max_seq_len)
      require_drafts(rl.sampling, cfg.base.model)
  names = sorted({cfg.rl.objective.name for cfg in configs.values()})
  unused = sorted({*overridden} & {f"rl.objective.{name}" for name in (
      "gae_lambda", "value_learning_rate")})
  require(not unused or "ppo" in names, f"{', '.join(unused)} would have no effect: it is for the "
          f"objective ppo, and the arms have {', '.join(names)}; leave it out")


def _require_prompts_fit(cfg: RLStudyConfig, tokenizer: Tokenizer) -> None:
  """Raises ValueError if prompts of the first problems are longer than the config allows."""
  task, template = get_task(cfg.rl.task), get_template(cfg.rl.template)
  splits = {"train", "heldout", *(("harder",) if cfg.evaluation.harder else ())}
  prompts = [template.render(task.problem(split, index).question)
             for split in sorted(splits & {*task.splits}) for index in range(_PROMPTS_CHECKED)]
  longest = max(map(len, tokenizer.encode_batch(prompts)))
  limit = cfg.rl.sampling.max_prompt_length
  require(longest <= limit,
          f"rl.sampling.max_prompt_length={limit} is too small: prompts of {cfg.rl.task} have up "
          f"to {longest} tokens; raise it, or choose a task with shorter questions")


def _print_outcome(task: Task, before: dict, after: dict) -> None:
  print(f"{task.arm}, seed {task.seed}:")
  for name, estimate in before.items():
    if isinstance(estimate, list) and name in after:
      shown = ["{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for found in (before, after)]
      print(f"  {metric_label(name):16} {shown[0]}  ->  {shown[1]}")


def _curves(result: loop.RLResult) -> dict[str, list[list[float]]]:
  column = lambda name: binned_curve(result.rows, lambda row: row.get(name))
  estimate = lambda name: binned_curve(result.evaluations, lambda row: row[name][0])
  return {"reward": column("reward"), "length": column("completions/mean_length"),
          "kl": column("kl"), "entropy": column("entropy"), "grad_norm": column("grad_norm"),
          "format_reward": column("rewards/format/mean"),
          "pass@1": estimate("pass@1"), "lenient_pass@1": estimate("lenient_pass@1")}


def _samples(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns completions of the same problems at the run's first and last evaluation."""
  rows = MetricsFile(folder / "completions.jsonl").read()
  steps = sorted({row["step"] for row in rows})
  return [row for step in dict.fromkeys((*steps[:1], *steps[-1:]))
          for row in [row for row in rows if row["step"] == step][:_SAMPLES_SHOWN]]


def _lock(folder: pathlib.Path, max_seconds: float | None = None) -> RunFolder | None:
  """Locks a folder, waiting while another process has locked it.

  Returns:
    The locked folder; None if the time limit was reached first.
  """
  began, announced = time.monotonic(), False
  while True:
    try:
      return RunFolder(folder)
    except ValueError as error:
      if not isinstance(error.__cause__, BlockingIOError):
        raise
    if max_seconds and time.monotonic() - began > max_seconds:
      return None
    if not announced:
      print(f"waiting for another process that uses {folder}", file=sys.stderr, flush=True)
    announced = True
    time.sleep(_POLL_SECONDS)


def _digest(plain: Any) -> str:
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _without_cache(cfg: RLStudyConfig) -> RLStudyConfig:
  """Returns a config without the path of the cache folder, which does not affect results."""
  data = dataclasses.replace(cfg.base.data, cache_dir=None)
  return dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, data=data))
