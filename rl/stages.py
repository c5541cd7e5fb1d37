"""The stages of R1's recipe, and how they chain.

A stage is `stage(config, start, *, out, max_seconds) -> folder`: it starts from the model in the
folder `start` and leaves a run folder `out`, or None if it was stopped before its end.

    pretrain_base  noisy worked solutions are generated and pretrained on
    fine_tune      supervised fine-tuning, by `train.stages.train_on_text`
    reinforce      reinforcement learning from rewards
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rl import loop
from rl.config import RLConfig
from rl.documents import DocumentsConfig, write_documents
from rl.loading import TOKENIZER, as_dict, load_model, upgrade_config
from train.config import RunConfig
from train.config_io import to_dict, upgrade
from train.data import load
from train.loading import LoadedModel
from train.loop import train
from train.run_folder import RunFolder
from train.stages import close_stage, fit_vocabulary, open_stage, train_on_text

# From any model that this project writes or reads, RL run folders among them.
fine_tune = functools.partial(train_on_text, load_model=load_model)


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """A base model for RL, pretrained on noisy worked solutions.

  Attributes:
    run: how it is pretrained; its sources are the generated documents.
    documents: how many there are, and how good.
    task: of the documents, a spec of `rl.tasks.get_task`.
    template: of the documents, a name of `rl.templates.get_template`.
    seed: of the documents and of pretraining.
    keep_vocabulary: leave `run.model.vocab_size` as it is.
  """

  run: RunConfig
  documents: DocumentsConfig
  task: str
  template: str
  seed: int = 0
  keep_vocabulary: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a pipeline, as data.

  Attributes:
    name: of its folder, below the pipeline's.
    run: the stage function.
    config: what it is given.
  """

  name: str
  run: Callable[..., pathlib.Path | None]
  config: Any


def run_stages(
    stages: Sequence[Stage], start: str | os.PathLike | None, *, out: str | os.PathLike,
    max_seconds: float | None = None) -> pathlib.Path | None:
  """Runs stages one after the other, each from the folder that the one before left.

  Stages that have finished in `out` are skipped, so the same call resumes.

  Args:
    stages: in order; their names must differ.
    start: the model that the first starts from; None for random weights.
    out: a folder, in which every stage has one of its own.
    max_seconds: stop after saving once so much time has passed.

  Returns:
    The last stage's folder; None if one was stopped before its end.

  Raises:
    ValueError: if two stages have one name.
  """
  names = [stage.name for stage in stages]
  if len(set(names)) < len(names):
    raise ValueError(f"stages {', '.join(names)} need different names: each has a folder")
  began, folder = time.monotonic(), start
  for stage in stages:
    left = max_seconds and max(1e-3, max_seconds - (time.monotonic() - began))
    folder = stage.run(stage.config, folder, out=pathlib.Path(out) / stage.name, max_seconds=left)
    if folder is None:
      return None
  return folder if folder is None else pathlib.Path(folder)


def pretrain_base(
    cfg: BaseConfig, start: str | os.PathLike | None = None, *, out: str | os.PathLike,
    max_seconds: float | None = None) -> pathlib.Path | None:
  """The stage that pretrains a base; see the head of this file.

  Raises:
    ValueError: if there is a `start`, as a base begins with random weights; if `out` holds another
      base; or if the task has no documents.
  """
  if start is not None:
    raise ValueError(f"a base is pretrained from random weights, and start={start} is a model: "
                     "leave one of them out")
  requested = to_dict(cfg)
  with open_stage(out, requested, _upgrade_base) as folder:
    if folder is None:
      return pathlib.Path(out)
    source = write_documents(folder.path / "documents.jsonl", cfg.task, cfg.template,
                             cfg.documents, cfg.seed)
    run = dataclasses.replace(
        cfg.run, data=dataclasses.replace(cfg.run.data, sources=(source,)),
        train=dataclasses.replace(cfg.run.train, seed=cfg.seed))
    data = load(run.data)
    run = fit_vocabulary(run, data, keep=cfg.keep_vocabulary)
    folder.check_config({"config": to_dict(run), "seeds": [cfg.seed], "requested": requested},
                        _upgrade_base)
    data.tokenizer.save(folder.path / TOKENIZER)
    print(f"pretraining the base on {cfg.documents.count:,} documents", file=sys.stderr)
    result = train([run], data, folder, max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def _upgrade_base(stored: dict) -> dict:
  """A base's `config.json` as this version writes it; "requested" was once called "asked"."""
  renamed = {"requested" if name == "asked" else name: value for name, value in stored.items()}
  return upgrade(renamed, {"config": RunConfig, "requested": BaseConfig})


def reinforce(
    cfg: RLConfig, start: str | os.PathLike, *, out: str | os.PathLike,
    max_seconds: float | None = None) -> pathlib.Path | None:
  """The stage that trains by RL; see the head of this file.

  Raises:
    ValueError: if `out` holds another configuration.
  """
  requested = {"rl": to_dict(cfg), "start": str(start)}
  with open_stage(out, requested, upgrade_config) as folder:
    if folder is None:
      return pathlib.Path(out)
    result = run_rl(cfg, load_model(start), folder, identity={"requested": requested},
                    max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def run_rl(cfg: RLConfig, start: LoadedModel, folder: RunFolder, *,
           identity: dict[str, Any] | None = None,
           max_seconds: float | None = None) -> loop.RLResult:
  """RL from a model in memory, in a folder that is held; resumes what the folder has of it.

  Args:
    cfg: the run.
    start: the model.
    folder: of the run.
    identity: what `config.json` is to hold besides the configuration.
    max_seconds: stop after saving once so much time has passed.

  Raises:
    ValueError: if the folder holds another configuration.
  """
  folder.check_config({**as_dict(cfg, start.cfg), **(identity or {})}, upgrade_config)
  tokenizer = start.tokenizer()
  tokenizer.save(folder.path / TOKENIZER)
  result = loop.train(cfg, start.cfg, start.variables, tokenizer, folder, max_seconds=max_seconds)
  for message in result.messages:
    print(f"damaged checkpoint, passed over: {message}", file=sys.stderr)
  return result
