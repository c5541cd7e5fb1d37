"""Loads models from run folders of training on text and from Hugging Face folders."""

import dataclasses
import os
import pathlib
import shutil

import model
from train.chat import PromptFormat
from train.checkpoint import read_newest
from train.config import MeshConfig, RunConfig
from train.config_io import from_dict
from train.program import Program, split_runs
from train.renamed import template_name
from train.run_folder import read_json_object, read_run_json
from train.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
HF_FILES = "huggingface"  # folder of a run, for the files of the Hugging Face folder it starts from
# What a Hugging Face folder says of its tokenizer and of generation.
_CARRIED = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
            "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
            "chat_template.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model in memory, and the path of its tokenizer.

  Attributes:
    cfg: the architecture.
    variables: the collections "params" and, with experts, "router".
    tokenizer_path: the folder's `tokenizer.json`; None if it has none.
    template: name of the prompt template with which the model was fine-tuned or trained by RL; None
      if it was not, or if the folder does not say.
    hf_files: folder of the files that the Hugging Face folder had in which the model's training
      began, except weights; None if it began from random weights.
  """

  cfg: model.ModelConfig
  variables: dict
  tokenizer_path: str | None
  template: str | None = None
  hf_files: pathlib.Path | None = None

  def tokenizer(self, path: str | None = None) -> Tokenizer:
    """Returns the tokenizer at `path` or, if that is None, the model's own.

    Raises:
      ValueError: if there is neither, if it cannot be read, or if it has more tokens than the
        model.
    """
    path = path or self.tokenizer_path
    if path is None:
      raise ValueError(f"the checkpoint's folder has no {TOKENIZER}: copy it there")
    tokenizer = Tokenizer.load(path)
    more = tokenizer.vocab_size - self.cfg.vocab_size
    if more > 0:
      raise ValueError(f"the tokenizer {path} has {tokenizer.vocab_size} tokens, {more} more than "
                       f"the model's vocabulary of {self.cfg.vocab_size}: give the tokenizer that "
                       "the model was trained with")
    return tokenizer

  def prompt_format(self) -> PromptFormat:
    """Returns how the model is prompted, and which tokens end its text, as `hf_files` say.

    Raises:
      ValueError: if the files cannot be read.
    """
    return PromptFormat.load(self.hf_files) if self.hf_files else PromptFormat()


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
    cfg, variables = _load_run(folder)
    variables = variables[0]
  elif (folder / "config.json").exists():
    cfg, variables = model.hf.load(folder)
  else:
    raise ValueError(f"{folder} has neither checkpoints/ nor config.json: give a folder that "
                     "--experiment=pretrain wrote, or a Hugging Face folder")
  tokenizer = folder / TOKENIZER
  return LoadedModel(cfg, variables, str(tokenizer) if tokenizer.exists() else None,
                     stored_template(folder), hf_files(folder))


def hf_files(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns `LoadedModel.hf_files` of the model in a run folder or a Hugging Face folder."""
  if (folder / "checkpoints").is_dir():
    return folder / HF_FILES if (folder / HF_FILES).is_dir() else None
  return folder


def keep_hf_files(start: LoadedModel | None, folder: pathlib.Path) -> None:
  """Copies `hf_files` of the model that a run starts from into the run's folder.

  Nothing is changed once the run has a checkpoint.
  """
  if any(folder.glob("checkpoints/step_*")):
    return
  shutil.rmtree(folder / HF_FILES, ignore_errors=True)
  if start and start.hf_files:
    copy_hf_files(start.hf_files, folder / HF_FILES)
    shutil.copyfile(start.hf_files / "config.json", folder / HF_FILES / "config.json")


def copy_hf_files(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what a Hugging Face folder says of its tokenizer and of generation."""
  target.mkdir(exist_ok=True)
  for name in _CARRIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def prompt_format(folder: str | os.PathLike) -> PromptFormat:
  """Returns `LoadedModel.prompt_format` of the model in a folder, without loading it.

  Raises:
    ValueError: if the files cannot be read.
  """
  files = hf_files(pathlib.Path(folder))
  return PromptFormat.load(files) if files else PromptFormat(source=str(folder))


def stored_template(folder: str | os.PathLike) -> str | None:
  """Returns the name of the prompt template that a run folder's model was trained with.

  None for a model that was not trained on prompts, and for a Hugging Face folder.
  """
  return stored_prompting(folder)[0]


def stored_prompting(folder: str | os.PathLike) -> tuple[str | None, str]:
  """Returns `stored_template` of a folder, and the system's message of that training."""
  path = pathlib.Path(folder) / "config.json"
  stored = read_json_object(path) if path.exists() else {}
  if stored:
    parts = {"rl", "requested", "config"} & stored.keys()
    read_run_json(path, **dict.fromkeys(parts, dict))
  if "rl" in stored:
    return template_name("RLConfig", stored["rl"]), stored["rl"].get("system", "")
  if "requested" in stored and "template" in stored["requested"]:  # a base for RL
    return template_name("BaseConfig", stored["requested"]), ""
  if "config" not in stored or "seeds" not in stored:
    return None, ""
  data = parse_config(path, RunConfig, stored["config"]).data
  prompted = any(source.prompt_field or source.messages_field for source in data.sources)
  return (data.template, data.system) if prompted else (None, "")


def load_seeds(folder: pathlib.Path) -> list[tuple[int, dict]]:
  """Returns the seed and the variables of every run that was trained in a folder.

  Raises:
    ValueError: if the folder has no checkpoint.
    CheckpointError: if every checkpoint is damaged.
  """
  seeds = read_run_json(folder / "config.json", seeds=list)["seeds"]
  return list(zip(seeds, _load_run(folder)[1], strict=True))


def parse_config[T](path: pathlib.Path, cls: type[T], plain: dict) -> T:
  """Returns a configuration that a file of a run's folder holds, as its dataclass.

  Raises:
    ValueError: if it is not valid; the message names the file.
  """
  try:
    return from_dict(cls, plain)
  except ValueError as error:
    raise ValueError(f"{path} is damaged, or of another version: {error}") from error


def _load_run(folder: pathlib.Path) -> tuple[model.ModelConfig, list[dict]]:
  plain = read_run_json(folder / "config.json", config=dict, seeds=list)
  cfg = parse_config(folder / "config.json", RunConfig, plain["config"])
  one_device = dataclasses.replace(cfg, mesh=MeshConfig())
  program = Program([one_device] * len(plain["seeds"]), {})
  restored = read_newest(folder / "checkpoints", program.abstract_state())
  if restored is None:
    raise ValueError(f"{folder} has no checkpoint yet")
  return cfg.model, split_runs(restored.arrays.variables, len(plain["seeds"]))
