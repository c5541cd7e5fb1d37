"""Loads models from run folders of training on text and from Hugging Face folders."""

import dataclasses
import os
import pathlib

import model
from train.chat import PromptFormat
from train.checkpoint import read_newest
from train.config import MeshConfig, RunConfig
from train.config_io import from_dict
from train.program import Program, first_run
from train.run_folder import read_json_object, write_json_atomic
from train.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model in memory, and the path of its tokenizer.

  Attributes:
    cfg: the architecture.
    variables: the collections "params" and, with experts, "router".
    tokenizer_path: the folder's `tokenizer.json`; None if it has none.
    hf_folder: the folder, if it is a Hugging Face folder; None for a run folder.
  """

  cfg: model.ModelConfig
  variables: dict
  tokenizer_path: str | None
  hf_folder: str | None = None

  def tokenizer(self, path: str | None = None) -> Tokenizer:
    """Returns the tokenizer at `path` or, if that is None, the model's own.

    Raises:
      ValueError: if there is neither, or if it cannot be read.
    """
    path = path or self.tokenizer_path
    if path is None:
      raise ValueError(f"the checkpoint's folder has no {TOKENIZER}: copy it there")
    return Tokenizer.load(path)

  def prompt_format(self) -> PromptFormat:
    """Returns how the model is prompted, and which tokens end its text, as its folder says.

    A run folder says nothing about that.

    Raises:
      ValueError: if the folder's files cannot be read.
    """
    return PromptFormat.load(self.hf_folder) if self.hf_folder else PromptFormat()


def load_model(path: str | os.PathLike) -> LoadedModel:
  """Loads the newest checkpoint of a run folder, or a Hugging Face folder.

  If several seeds were trained as a vmapped batch, the model is that of the first.

  Raises:
    ValueError: if the folder is neither of these, or has no checkpoint.
    CheckpointError: if every checkpoint is damaged.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder: give one that --experiment=pretrain wrote, or a "
                     "Hugging Face folder")
  if (folder / "checkpoints").is_dir():
    hf_folder, (cfg, variables) = None, _load_run(folder)
  elif (folder / "config.json").exists():
    hf_folder, (cfg, variables) = str(folder), model.hf.load(folder)
  else:
    raise ValueError(f"{folder} has neither checkpoints/ nor config.json: give a folder that "
                     "--experiment=pretrain wrote, or a Hugging Face folder")
  tokenizer = folder / TOKENIZER
  return LoadedModel(cfg, variables, str(tokenizer) if tokenizer.exists() else None, hf_folder)


def _load_run(folder: pathlib.Path) -> tuple[model.ModelConfig, dict]:
  plain = read_json_object(folder / "config.json")
  cfg = from_dict(RunConfig, plain["config"])
  one_device = dataclasses.replace(cfg, mesh=MeshConfig())
  program = Program([one_device] * len(plain["seeds"]), {})
  restored = read_newest(folder / "checkpoints", program.abstract_state())
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint yet")
  return cfg.model, first_run(restored.arrays.variables, len(plain["seeds"]))


def export(path: str | os.PathLike, cfg: model.ModelConfig, variables: dict,
           tokenizer: Tokenizer) -> None:
  """Writes a model and its tokenizer as a Hugging Face folder.

  A `generation_config.json` names the token that ends a document: without it, transformers would
  end texts at the ids that are usual for the architecture.
  """
  model.hf.save(path, cfg, variables)
  tokenizer.save(pathlib.Path(path) / TOKENIZER)
  write_json_atomic(pathlib.Path(path) / "generation_config.json",
                    {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad})
