"""Writes models as Hugging Face folders, with their tokenizers and chat templates."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

from safetensors import SafetensorError

import model
from train.chat import ChatTemplate
from train.loading import TOKENIZER, LoadedModel, copy_hf_files
from train.run_folder import read_json_object, write_json_atomic
from train.templates import CHAT, get_template
from train.tokenizer import Tokenizer

_RECORD = "export.json"  # says which run a folder was exported from, and which files it has
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run_identity(config: dict, seed: int | None = None) -> str:
  """Returns a hash that identifies a run.

  Args:
    config: the content of its folder's `config.json`.
    seed: the seed, for a folder with several.
  """
  settings = {name: value for name, value in config.items() if name != "contents"}
  text = json.dumps([settings, seed], sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_target(path: str | os.PathLike, *runs: str, overwrite: bool = False,
                 setting: str = "export") -> None:
  """Checks that a model can be exported to a folder, which may not exist yet.

  Args:
    path: the folder.
    *runs: identities of the run that is exported, and of the run that it extends.
    overwrite: whether a folder that holds other files is allowed. They are not deleted, except
      those that an export replaces.
    setting: name of the setting that gives the folder, for the messages.

  Raises:
    ValueError: if the folder holds anything but an export of this run, or cannot be written to.
  """
  folder = pathlib.Path(path)
  if os.path.lexists(folder) and not folder.is_dir():
    what = "a file" if folder.exists() else "a symbolic link to nothing"
    raise ValueError(f"{setting}={path} is {what}: give a folder")
  if folder.is_dir() and not overwrite:
    there = {file.name for file in folder.iterdir() if not file.name.startswith(".saving-")}
    recorded = _record(folder)
    foreign = sorted(there - set(recorded.get("files", ())) - {_RECORD})
    if there and (recorded.get("run") not in runs or foreign):
      what = ("the export of another run" if recorded and not foreign else
              f"other files, such as {(foreign or sorted(there))[0]}")
      raise ValueError(f"{setting}={path} holds {what}: give an empty or a new folder, or set "
                       "overwrite_export=true to write over it")
  try:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with tempfile.NamedTemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ValueError(f"{setting}={path} cannot be written ({error.strerror}): give another folder"
                     ) from error


def export(path: str | os.PathLike, start: LoadedModel, tokenizer: Tokenizer,
           run: str | None = None) -> None:
  """Writes a model as a Hugging Face folder, with its tokenizer and how it is prompted.

  If the model's training began from a Hugging Face folder and its tokenizer is still in use, that
  folder's tokenizer, chat template, special tokens and generation settings are written as they
  were. Otherwise they are those of this project: the end-of-document token ends a generation, and
  the chat template is the prompt template that the model was fine-tuned with, if it was.

  Args:
    path: the folder; see `check_target`.
    start: the model.
    tokenizer: its tokenizer.
    run: identity of the run that is exported, see `run_identity`.

  Raises:
    ValueError: if no Hugging Face architecture computes what the model does, if the tokenizer has
      more tokens than the model, or if the folder cannot be written, such as on a full disk. A
      folder that did not exist is then removed.
  """
  if tokenizer.vocab_size > start.cfg.vocab_size:
    raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
                     f"vocabulary of {start.cfg.vocab_size}")
  folder = pathlib.Path(path)
  is_new = not os.path.lexists(folder)
  try:
    _write(folder, start, tokenizer, run)
  except BaseException as error:
    if is_new:
      shutil.rmtree(folder, ignore_errors=True)
    if isinstance(error, OSError | SafetensorError):
      reason = getattr(error, "strerror", None) or error
      raise ValueError(f"the model could not be exported to {folder} ({reason}): free space, or "
                       "give another folder") from error
    raise


def _write(folder: pathlib.Path, start: LoadedModel, tokenizer: Tokenizer,
           run: str | None) -> None:
  model.hf.save(folder, start.cfg, start.variables)
  config = read_json_object(folder / "config.json")
  if kept := _same_tokenizer(start.hf_files, tokenizer):
    given = read_json_object(kept / "config.json")
    copy_hf_files(kept, folder)
    ids = {name: given[name] for name in _IDS if name in given}
    if start.template:
      ids |= _ends_at(folder, ids, _ends(start, tokenizer))
  else:
    tokenizer.save(folder / TOKENIZER)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    write_json_atomic(folder / "generation_config.json", ids)
    write_json_atomic(folder / "tokenizer_config.json", _tokenizer_config(start, tokenizer))
  write_json_atomic(folder / "config.json", config | ids)
  files = sorted({file.name for file in folder.iterdir()} - {_RECORD})
  write_json_atomic(folder / _RECORD, {"run": run, "files": files})


def _ends(start: LoadedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that ended the documents or the answers of the fine-tuning."""
  if start.template == CHAT:
    return ChatTemplate(start.prompt_format(), tokenizer).stop_tokens
  return (tokenizer.eos,)


def _ends_at(folder: pathlib.Path, ids: dict, stops: tuple[int, ...]) -> dict:
  """Adds tokens at which the fine-tuning's texts ended to those that end a generation.

  Returns:
    The ids of `config.json` that change.
  """
  path = folder / "generation_config.json"
  generation = read_json_object(path) if path.exists() else {}
  ends = generation.get("eos_token_id", ids.get("eos_token_id"))
  ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
  more = [stop for stop in stops if stop not in ends]
  if not more:
    return {}
  both = [*ends, *more]
  value = both if len(both) > 1 else both[0]
  write_json_atomic(path, generation | {"eos_token_id": value})
  return {"eos_token_id": value}


def _same_tokenizer(files: pathlib.Path | None, tokenizer: Tokenizer) -> pathlib.Path | None:
  """Returns the folder if its tokenizer is `tokenizer`, and None otherwise."""
  if files is None or not (files / TOKENIZER).is_file() or not (files / "config.json").is_file():
    return None
  with contextlib.suppress(ValueError):
    if Tokenizer.load(files / TOKENIZER).content_hash == tokenizer.content_hash:
      return files
  return None


def _tokenizer_config(start: LoadedModel, tokenizer: Tokenizer) -> dict:
  """Returns the content of `tokenizer_config.json` for a tokenizer of this project."""
  text = lambda token: tokenizer.decode([token])
  config = {
      "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": start.cfg.max_seq_len,
      "clean_up_tokenization_spaces": False, "eos_token": text(tokenizer.eos),
      "pad_token": text(tokenizer.pad)}
  if start.template == CHAT:
    config["chat_template"] = start.prompt_format().chat_template
  elif start.template:
    config["chat_template"] = get_template(start.template).jinja()
  return config


def _record(folder: pathlib.Path) -> dict:
  with contextlib.suppress(ValueError):
    return read_json_object(folder / _RECORD)
  return {}
