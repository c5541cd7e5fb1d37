"""Models to evaluate or go on from: what RL wrote, and all that `train.start` reads."""

import json
import pathlib

import model
import train.start
from rl.config import RLConfig
from rl.step import abstract_rl_state
from train.checkpoint import read_newest
from train.config_io import from_dict, to_dict
from train.start import TOKENIZER, Start


def as_dict(cfg: RLConfig, model_cfg: model.ModelConfig) -> dict:
  """What an RL run's `config.json` holds."""
  return {"rl": to_dict(cfg), "model": to_dict(model_cfg)}


def load(path: str) -> Start:
  """Loads a folder of an RL run (its newest checkpoint), or what `train.start.load` knows.

  Raises:
    ValueError: if it is none of these, or has no checkpoint.
  """
  folder = pathlib.Path(path)
  config = folder / "config.json"
  plain = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
  if "rl" not in plain:
    return train.start.load(path)
  model_cfg = from_dict(model.ModelConfig, plain["model"])
  # What was learned can be loaded without the task's file or package, and is the same for any task.
  cfg = from_dict(RLConfig, plain["rl"] | {"task": RLConfig.task})
  restored = read_newest(
      folder / "checkpoints", abstract_rl_state(model.abstract_variables(model_cfg), cfg))
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint yet")
  return Start(model_cfg, restored.arrays.train.variables, str(folder / TOKENIZER))
