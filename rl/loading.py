"""Loading a model from an RL run folder, or from whatever else `train.loading` reads."""

import json
import os
import pathlib

import model
from rl.config import RLConfig
from rl.step import abstract_rl_state
from train import loading
from train.checkpoint import read_newest
from train.config_io import from_dict, to_dict, upgrade
from train.loading import TOKENIZER, LoadedModel


def as_dict(cfg: RLConfig, model_cfg: model.ModelConfig) -> dict:
  """What an RL run's `config.json` holds."""
  return {"rl": to_dict(cfg), "model": to_dict(model_cfg)}


def upgrade_config(stored: dict) -> dict:
  """The `config.json` of an RL run, of whichever version, as this one would write it.

  R1-Zero's once held how it was evaluated, which the study's folder now does.
  """
  dropped = ("init", "problems", "samples", "temperatures")
  return upgrade({name: value for name, value in stored.items() if name not in dropped},
                 {"rl": RLConfig, "model": model.ModelConfig})


def load_model(path: str | os.PathLike) -> LoadedModel:
  """Loads a folder of an RL run (its newest checkpoint), or what `train.loading` can.

  Raises:
    ValueError: if it is none of these, or has no checkpoint.
  """
  folder = pathlib.Path(path)
  config = folder / "config.json"
  plain = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
  if "rl" not in plain:
    return loading.load_model(path)
  model_cfg = from_dict(model.ModelConfig, plain["model"])
  # The weights can be loaded without the task's file or package, and are the same for any task.
  cfg = from_dict(RLConfig, plain["rl"] | {"task": RLConfig.task})
  restored = read_newest(
      folder / "checkpoints", abstract_rl_state(model.abstract_variables(model_cfg), cfg))
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint yet")
  return LoadedModel(model_cfg, restored.arrays.train.variables, str(folder / TOKENIZER))
