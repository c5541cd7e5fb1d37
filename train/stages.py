"""Training on text as a stage: from a configuration and a model to start from to a run folder.

Every stage has the form `stage(config, start, *, out, max_seconds) -> folder`, so that stages
chain: the folder of one is the `start` of the next (`rl.stages.run_stages`). Pretraining and SFT
are the same stage; their configurations differ.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator

from train.config import RunConfig
from train.config_io import to_dict, upgrade
from train.data import Data, load
from train.loading import TOKENIZER, LoadedModel, load_model
from train.loop import train
from train.run_folder import RunFolder

_FINISHED = "finished"  # an empty file that a finished stage leaves


def fit_vocabulary[T: RunConfig](cfg: T, data: Data, *, keep: bool) -> T:
  """The config with its model's vocabulary set to the tokenizer's.

  Args:
    cfg: of the run.
    data: what it trains on.
    keep: leave the vocabulary as it is, as a start model or the user decides it, and only check it.

  Raises:
    ValueError: if a vocabulary that is kept has fewer tokens than the tokenizer.
  """
  needed = data.tokenizer.vocab_size
  if keep:
    if cfg.model.vocab_size < needed:
      raise ValueError(f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {needed} "
                       "tokens: leave it out, or set at least that")
    return cfg
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=needed))


def with_seeds(cfg: RunConfig, seeds: list[int]) -> list[RunConfig]:
  """The config once for each seed."""
  return [dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
          for seed in seeds]


def start_from[T: RunConfig](cfg: T, start: LoadedModel, *, keep_tokenizer: bool = False) -> T:
  """The config with the start model's architecture, and its tokenizer if it has one.

  Args:
    cfg: of the run.
    start: the model.
    keep_tokenizer: use the config's own tokenizer whatever the model's is.
  """
  if start.tokenizer_path and not keep_tokenizer:
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, tokenizer=start.tokenizer_path))
  return dataclasses.replace(cfg, model=start.cfg)


def train_on_text(
    cfg: RunConfig, start: str | os.PathLike | None, *, out: str | os.PathLike,
    keep_vocabulary: bool = False, max_seconds: float | None = None,
    load_model: Callable[[str | os.PathLike], LoadedModel] = load_model,
) -> pathlib.Path | None:
  """The stage: trains on text, or resumes or skips what `out` already holds of it.

  Args:
    cfg: the run.
    start: the folder of the model to start from, which then decides the architecture and the
      tokenizer; None for random weights.
    out: the run folder.
    keep_vocabulary: see `fit_vocabulary`; implied by `start`.
    max_seconds: stop after saving once so much time has passed.
    load_model: reads `start`; `rl.loading.load_model` reads RL run folders, too.

  Returns:
    The folder; None if the stage was stopped before its end.

  Raises:
    ValueError: if `out` holds another configuration.
  """
  requested = {"run": to_dict(cfg), "start": None if start is None else str(start)}
  with open_stage(out, requested) as folder:
    if folder is None:
      return pathlib.Path(out)
    model = None if start is None else load_model(start)
    if model:
      cfg = start_from(cfg, model)
    data = load(cfg.data)
    cfg = fit_vocabulary(cfg, data, keep=keep_vocabulary or model is not None)
    folder.check_config(
        {"config": to_dict(cfg), "seeds": [cfg.train.seed], "requested": requested},
        upgrade=upgrade_run)
    data.tokenizer.save(folder.path / TOKENIZER)
    result = train([cfg], data, folder, variables=model and model.variables,
                   max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def upgrade_run(stored: dict) -> dict:
  """The `config.json` of a run on text, of whichever version, as this one would write it."""
  return upgrade(stored, {"config": RunConfig})


@contextlib.contextmanager
def open_stage(
    out: str | os.PathLike, requested: dict, upgrade: Callable[[dict], dict] = upgrade_run,
) -> Iterator[RunFolder | None]:
  """Holds a stage's run folder; gives None instead if the stage has finished there.

  Args:
    out: the folder.
    requested: the stage's configuration, as `config.json` has it under "requested".
    upgrade: translates a `config.json` of an earlier version.

  Raises:
    ValueError: if the finished stage had another configuration.
  """
  with contextlib.closing(RunFolder(out)) as folder:
    if not (folder.path / _FINISHED).exists():
      yield folder
      return
    config = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    folder.check_config(upgrade(config) | {"requested": requested}, upgrade)
    yield None


def close_stage(folder: RunFolder) -> pathlib.Path:
  """Marks the stage in a folder as finished; returns the folder's path."""
  (folder.path / _FINISHED).touch()
  return folder.path
