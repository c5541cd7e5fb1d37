"""The MTP modules of a policy, which RL leaves as they are.

RL's objectives use the main model alone. The modules of the model that a run starts from are saved
once in the run's folder, and belong to every model that is loaded from it.
"""

import contextlib
import dataclasses
import pathlib
import shutil

import jax

import model
from train.checkpoint import Checkpoints, read_newest

_FOLDER = "mtp_modules"


def split_mtp(variables: dict) -> tuple[dict, dict]:
  """Returns a model's variables without its MTP modules, and the variables of these.

  Args:
    variables: collections of variables, such as "params" and "router".
  """
  is_mtp = lambda name: name.startswith("mtp_")
  pick = lambda wanted: {
      collection: {name: value for name, value in tree.items() if is_mtp(name) == wanted}
      for collection, tree in variables.items()}
  return pick(False), pick(True)


def policy_config(cfg: model.ModelConfig) -> model.ModelConfig:
  """Returns the architecture without MTP modules."""
  return dataclasses.replace(cfg, mtp=None)


def save_mtp(folder: pathlib.Path, variables: dict) -> None:
  """Saves the MTP modules of the model that a run starts from in the run's folder.

  Args:
    folder: the run's folder, which has no checkpoint yet.
    variables: the model's variables. Nothing is saved if it has no MTP modules.
  """
  shutil.rmtree(folder / _FOLDER, ignore_errors=True)
  modules = split_mtp(variables)[1]
  if jax.tree.leaves(modules):
    with contextlib.closing(Checkpoints(folder / _FOLDER, keep=1)) as checkpoints:
      checkpoints.save(0, jax.tree.map(jax.numpy.asarray, modules), {})


def with_saved_mtp(folder: pathlib.Path, cfg: model.ModelConfig, variables: dict) -> dict:
  """Returns a policy's variables with the MTP modules that `save_mtp` saved in the run's folder.

  Raises:
    ValueError: if the architecture has MTP modules and the folder has none.
    CheckpointError: if they are damaged.
  """
  if cfg.mtp is None:
    return variables
  modules = read_newest(folder / _FOLDER, split_mtp(model.abstract_variables(cfg))[1])
  if modules is None:
    raise ValueError(f"{folder / _FOLDER} with the model's MTP modules is missing")
  return {collection: {**tree, **modules.arrays.get(collection, {})}
          for collection, tree in variables.items()}
