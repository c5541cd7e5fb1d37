"""The stages of R1's pipeline (arXiv:2501.12948, section 2.3), and a function that chains them.

A stage is a function `stage(config, start, *, out, max_seconds) -> folder`. It starts from the
model in the folder `start`, writes the run folder `out`, and returns its path, or None if it was
stopped before its end.

    pretrain_base  pretrains a base model on generated, noisy worked solutions
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
from train.chat import require_chat
from train.config import RunConfig
from train.config_io import to_dict, upgrade
from train.data import load
from train.loading import LoadedModel, keep_hf_files, prompt_format
from train.loop import train
from train.run_folder import RunFolder
from train.stages import close_stage, fit_vocabulary, open_stage, train_on_text
from train.templates import CHAT
from train.tokenizer import Tokenizer

# Starts from any folder that this project can load a model from, including RL runs' folders.
fine_tune = functools.partial(train_on_text, load_model=load_model)


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """The pretraining of a base model for RL on noisy worked solutions.

  Attributes:
    run: how the base is pretrained; the generated documents replace its `data.sources`, and `seed`
      its `train.seed`.
    documents: number of documents and their noise.
    task: spec of the task whose solutions are written, see `rl.tasks.get_task`.
    template: name of the prompt template of the documents, see `train.templates.get_template`.
    seed: seed of the documents and of pretraining.
    keep_vocabulary: keep `run.model.vocab_size` as it is, instead of setting it to the number of
      the tokenizer's tokens.
  """

  run: RunConfig
  documents: DocumentsConfig
  task: str
  template: str
  seed: int = 0
  keep_vocabulary: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a pipeline.

  Attributes:
    name: name of the stage's folder within the pipeline's folder.
    run: the stage function, such as `reinforce`.
    config: the configuration that the stage function is called with.
  """

  name: str
  run: Callable[..., pathlib.Path | None]
  config: Any


def run_stages(
    stages: Sequence[Stage], start: str | os.PathLike | None, *, out: str | os.PathLike,
    max_seconds: float | None = None) -> pathlib.Path | None:
  """Runs stages one after another, each from the folder that the one before it wrote.

  Stages that have finished in `out` are skipped, so the same call resumes.

  Args:
    stages: the stages in order, with different names.
    start: folder of the model from which the first stage starts; None for random weights.
    out: the pipeline's folder, in which every stage has a folder of its own.
    max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.

  Returns:
    The last stage's folder; None if a stage was stopped before its end. Without stages, `start`.

  Raises:
    ValueError: if two stages have the same name, or for what a stage refuses.
  """
  names = [stage.name for stage in stages]
  if len(set(names)) < len(names):
    raise ValueError(f"the names of the stages {', '.join(names)} must differ, as each names a "
                     "folder")
  began, folder = time.monotonic(), start
  for stage in stages:
    left = max_seconds and max(1e-3, max_seconds - (time.monotonic() - began))
    folder = stage.run(stage.config, folder, out=pathlib.Path(out) / stage.name, max_seconds=left)
    if folder is None:
      return None
  return folder if folder is None else pathlib.Path(folder)


def pretrain_base(
    cfg: BaseConfig, start: str | os.PathLike | None = None, *, out: str | os.PathLike,
    max_seconds: float | None = None,
    check: Callable[[Tokenizer], None] | None = None) -> pathlib.Path | None:
  """Stage: generates noisy worked solutions and pretrains a base model on them.

  Args:
    cfg: the base's configuration.
    start: must be None, as a base is pretrained from random weights.
    out: the run folder, in which the documents are written to `documents.jsonl`.
    max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.
    check: called with the base's tokenizer before training; raises ValueError if what follows could
      not use the base.

  Returns:
    The folder; None if the stage was stopped before its end.

  Raises:
    ValueError: if `start` is given, if `out` holds another base, or if the task cannot write
      documents.
  """
  if start is not None:
    raise ValueError(f"a base is pretrained from random weights, but start={start} names a model: "
                     "leave out either the model or the pretraining")
  requested = to_dict(cfg)
  with open_stage(out, requested, _upgrade_base) as folder:
    if folder is None:
      return pathlib.Path(out)
    source = write_documents(folder.path / "documents.jsonl", cfg.task, cfg.template,
                             cfg.documents, cfg.seed)
    run = dataclasses.replace(
        # The documents' prompts are written in the template already.
        cfg.run, data=dataclasses.replace(cfg.run.data, sources=(source,), template="plain"),
        train=dataclasses.replace(cfg.run.train, seed=cfg.seed))
    data = load(run.data)
    if check:
      check(data.tokenizer)
    run = fit_vocabulary(run, data, keep=cfg.keep_vocabulary)
    folder.check_config({"config": to_dict(run), "seeds": [cfg.seed], "requested": requested},
                        _upgrade_base)
    data.tokenizer.save(folder.path / TOKENIZER)
    print(f"pretraining the base on {cfg.documents.count:,} documents", file=sys.stderr)
    result = train([run], data, folder, max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def _upgrade_base(stored: dict) -> dict:
  """Converts a base's `config.json` to the current version; "requested" was once "asked"."""
  renamed = {"requested" if name == "asked" else name: value for name, value in stored.items()}
  return upgrade(renamed, {"config": RunConfig, "requested": BaseConfig})


def reinforce(
    cfg: RLConfig, start: str | os.PathLike, *, out: str | os.PathLike,
    max_seconds: float | None = None) -> pathlib.Path | None:
  """Stage: trains a model by RL.

  Args:
    cfg: the run's configuration.
    start: folder of the model to start from, see `rl.loading.load_model`.
    out: the run folder.
    max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.

  Returns:
    The folder; None if the stage was stopped before its end.

  Raises:
    ValueError: if `out` holds a run with another configuration, or for what `rl.loop.train`
      refuses.
  """
  requested = {"rl": to_dict(cfg), "start": str(start)}
  with open_stage(out, requested, upgrade_config) as folder:
    if folder is None:
      return pathlib.Path(out)
    if cfg.template == CHAT:
      require_chat(prompt_format(start))
    result = run_rl(cfg, load_model(start), folder, identity={"requested": requested},
                    max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def run_rl(cfg: RLConfig, start: LoadedModel, folder: RunFolder, *,
           identity: dict[str, Any] | None = None,
           max_seconds: float | None = None) -> loop.RLResult:
  """Trains a model in memory by RL, or resumes the run that the folder holds.

  Args:
    cfg: the run's configuration.
    start: the model to start from.
    folder: the run's folder, which the caller has opened and thereby locked.
    identity: further entries of `config.json`, which must be the same at a resume.
    max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.

  Raises:
    ValueError: if the folder holds a run with another configuration, or for what `rl.loop.train`
      refuses.
  """
  folder.check_config({**as_dict(cfg, start.cfg), **(identity or {})}, upgrade_config)
  tokenizer = start.tokenizer()
  tokenizer.save(folder.path / TOKENIZER)
  keep_hf_files(start, folder.path)
  return loop.train(cfg, start.cfg, start.variables, tokenizer, folder,
                    form=start.prompt_format(), max_seconds=max_seconds)
