"""Loading a model from an RL run's folder, or from any other that `train.loading` reads."""

import os
import pathlib

import model
from rl.config import RLConfig
from rl.mtp import join_mtp, with_saved_mtp
from rl.step import abstract_rl_state
from train import loading
from train.checkpoint import read_newest
from train.config_io import to_dict, upgrade
from train.loading import TOKENIZER, LoadedModel, hf_files, parse_config
from train.run_folder import read_json_object, read_run_json


def as_dict(cfg: RLConfig, model_cfg: model.ModelConfig) -> dict:
  """Returns an RL run's configuration as its `config.json` holds it."""
  return {"rl": to_dict(cfg), "model": to_dict(model_cfg)}


def upgrade_config(stored: dict) -> dict:
  """Converts an RL run's `config.json` of any earlier version to the current one.

  The R1-Zero study's run folders once held the evaluation's settings too; they are dropped, as the
  study's own folder now holds them.
  """
  dropped = ("init", "problems", "samples", "temperatures")
  upgraded = upgrade({name: value for name, value in stored.items() if name not in dropped},
                     {"rl": RLConfig, "model": model.ModelConfig})
  if isinstance(stored.get("requested"), dict):
    upgraded["requested"] = upgrade(stored["requested"], {"rl": RLConfig})
  return upgraded


def load_model(path: str | os.PathLike) -> LoadedModel:
  """Loads the newest checkpoint of an RL run's folder, or a folder that `train.loading` reads.

  Args:
    path: an RL run's folder, a folder of training on text, or a Hugging Face folder.

  Raises:
    ValueError: if the folder is none of these, has no checkpoint, or has a damaged `config.json`.
  """
  folder = pathlib.Path(path)
  config = folder / "config.json"
  plain = read_json_object(config) if config.is_file() else {}
  if not (folder / "checkpoints").is_dir() and "model_type" not in plain:
    _require_no_runs_inside(folder)
  if "rl" not in plain:
    return loading.load_model(path)
  read_run_json(config, rl=dict, model=dict)
  model_cfg = parse_config(config, model.ModelConfig, plain["model"])
  # The default task stands in for the run's own: the weights do not depend on it, and can then be
  # loaded where the task's file or package is missing.
  cfg = parse_config(config, RLConfig, plain["rl"] | {"task": RLConfig.task})
  restored = read_newest(
      folder / "checkpoints", abstract_rl_state(model.abstract_variables(model_cfg), cfg))
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint yet")
  state = restored.arrays
  variables = (with_saved_mtp(folder, model_cfg, state.train.variables) if state.mtp is None
               else join_mtp(state.train.variables, state.mtp.variables))
  return LoadedModel(
      model_cfg, variables, str(folder / TOKENIZER), cfg.template, hf_files(folder))


def _require_no_runs_inside(folder: pathlib.Path) -> None:
  """Raises ValueError for a folder of several runs, such as a study's; the message names them."""
  inside = sorted(path.parent for pattern in ("*/checkpoints", "runs/*/checkpoints")
                  for path in folder.glob(pattern))
  if inside:
    raise ValueError(f"{folder} holds several runs and is not a run itself: give one of them, "
                     f"{', '.join(map(str, inside))}")
  if (folder / "parts").is_dir():
    raise ValueError(f"{folder} is the folder of a study that keeps no checkpoints of its runs: "
                     "give the folder of a run that --experiment=pretrain or r1_zero wrote")
