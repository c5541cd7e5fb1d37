"""Training on text as a stage, which makes a run folder of a configuration and a start model.

Every stage has the form `stage(config, start, *, out, max_seconds) -> folder`, so that stages can
be chained: the folder of one is the `start` of the next (`rl.stages.run_stages`). Pretraining and
SFT are the same stage with different configurations.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

from train.chat import require_chat
from train.config import RunConfig
from train.config_io import to_dict, upgrade
from train.data import Data, load
from train.hardware import memory_bytes
from train.loading import TOKENIZER, LoadedModel, keep_hf_files, load_model, prompt_format
from train.loop import train
from train.optimizer import learning_rate
from train.run_folder import RunFolder, read_json_object, write_json_atomic
from train.templates import CHAT

_FINISHED = "finished"  # an empty file that marks the folder of a finished stage


def fit_vocabulary[T: RunConfig](cfg: T, data: Data, *, keep: bool) -> T:
  """Returns the config with the model's vocabulary size set to the tokenizer's.

  Args:
    cfg: config of the run.
    data: the run's data, with its tokenizer.
    keep: whether to leave the vocabulary size as it is, because the start model or the user has
      determined it, and only check it.

  Raises:
    ValueError: if a vocabulary size that is kept is smaller than the tokenizer's.
  """
  needed = data.tokenizer.vocab_size
  if keep:
    if cfg.model.vocab_size < needed:
      raise ValueError(f"model.vocab_size={cfg.model.vocab_size} is too small for the tokenizer's "
                       f"{needed} tokens: leave it out, or set it to at least that number")
    return cfg
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=needed))


def with_seeds(cfg: RunConfig, seeds: list[int]) -> list[RunConfig]:
  """Returns a copy of the config for every seed."""
  return [dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
          for seed in seeds]


def start_from[T: RunConfig](cfg: T, start: LoadedModel, *, keep_tokenizer: bool = False) -> T:
  """Returns the config with the start model's architecture and, if it has one, its tokenizer.

  Args:
    cfg: config of the run.
    start: the model from which the run starts.
    keep_tokenizer: whether to keep the config's tokenizer even if the start model has one.
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
  """Trains on text, resumes the stage in `out`, or does nothing if that stage has finished.

  Args:
    cfg: config of the run.
    start: folder of the model to start from, which then determines the architecture and the
      tokenizer; None for random weights.
    out: the run folder.
    keep_vocabulary: whether `model.vocab_size` is left as it is; see `fit_vocabulary`. Implied by
      `start`.
    max_seconds: stop, after saving, once this much time has passed; None for no limit.
    load_model: loads `start`; `rl.loading.load_model` loads RL run folders, too.

  Returns:
    The path of the run folder; None if the stage was stopped before its end.

  Raises:
    ValueError: if `out` holds a run with another configuration.
  """
  requested = {"run": to_dict(cfg), "start": None if start is None else str(start)}
  with open_stage(out, requested) as folder:
    if folder is None:
      return pathlib.Path(out)
    if cfg.data.template == CHAT:
      require_chat(start and prompt_format(start))
    model = None if start is None else load_model(start)
    if model:
      cfg = start_from(cfg, model)
    data = load(cfg.data, model and model.prompt_format())
    cfg = fit_vocabulary(cfg, data, keep=keep_vocabulary or model is not None)
    check_fits(cfg)
    claim_folder(folder, {"config": to_dict(cfg), "seeds": [cfg.train.seed],
                          "requested": requested}, data)
    data.tokenizer.save(folder.path / TOKENIZER)
    keep_hf_files(model, folder.path)
    result = train([cfg], data, folder, variables=model and model.variables,
                   max_seconds=max_seconds)
    return close_stage(folder) if result.status == "finished" else None


def check_fits(cfg: RunConfig, num_seeds: int = 1) -> None:
  """Raises ValueError if a run's sequences, training state or decay are too large.

  Args:
    cfg: config of the run.
    num_seeds: number of seeds that train as a vmapped batch.
  """
  if cfg.data.seq_len > cfg.model.max_seq_len:
    raise ValueError(f"data.seq_len={cfg.data.seq_len} exceeds the model's context, "
                     f"model.max_seq_len={cfg.model.max_seq_len}: lower the one or raise the other")
  learning_rate(cfg.optimizer, cfg.train.steps)
  moment = 2 if cfg.optimizer.moments == "bfloat16" else 4
  per_parameter = 8 + 2 * moment + (4 if cfg.optimizer.ema_decay else 0)
  params = cfg.model.param_count(mtp=True)
  replicas = max(1, cfg.mesh.data)
  needed, available = params * per_parameter * num_seeds * replicas, memory_bytes()
  if available is not None and needed > available:
    copies = "".join(f" x {count} {what}" for count, what in (
        (num_seeds, "seeds"), (replicas, "data-parallel replicas")) if count > 1)
    raise ValueError(
        f"the training state alone needs {needed / 1e9:,.1f} GB: {params:,} parameters x "
        f"{per_parameter} bytes (weights and gradients in float32, two moments in "
        f"{cfg.optimizer.moments}){copies}. There are {available / 1e9:,.1f} GB: choose a smaller "
        "model, or more devices and mesh.fsdp")


def claim_folder(folder: RunFolder, config: dict, data: Data, *,
                 accept_changed_data: bool = False) -> None:
  """Writes `config.json` of a run on text, or requires that of the folder to be the same.

  The file also holds hashes of the sources' contents.

  Args:
    folder: the run's folder.
    config: everything that determines the run's results, except the contents of its sources.
    data: the run's data.
    accept_changed_data: whether the contents may differ from those that the run began with.

  Raises:
    ValueError: if the folder holds a run with another configuration or with other data.
  """
  contents = data.fingerprints()
  folder.check_config({**config, "contents": contents},
                      lambda stored: {**upgrade_run(stored), "contents": contents})
  path = folder.path / "config.json"
  stored = read_json_object(path)
  before = stored.get("contents", contents)
  changed = [name for name in contents if before.get(name) != contents[name]]
  if changed and not accept_changed_data and folder.has_begun():
    raise ValueError(
        f"{', '.join(changed)} changed since the run in {folder.path} began: to train on what is "
        "there now, give another --out, or set accept_changed_data=true to resume with it")
  if before != contents or "contents" not in stored:
    write_json_atomic(path, {**stored, "contents": contents})


def upgrade_run(stored: dict) -> dict:
  """Returns the `config.json` of a run on text, of any version, as this version would write it."""
  upgraded = upgrade(stored, {"config": RunConfig})
  if isinstance(stored.get("requested"), dict):
    upgraded["requested"] = upgrade(stored["requested"], {"run": RunConfig})
  return upgraded


@contextlib.contextmanager
def open_stage(
    out: str | os.PathLike, requested: dict, upgrade: Callable[[dict], dict] = upgrade_run,
) -> Iterator[RunFolder | None]:
  """Opens and locks a stage's run folder; yields None instead if the stage has finished there.

  Args:
    out: the run folder.
    requested: the stage's configuration, as it is stored in `config.json` under "requested".
    upgrade: translates the content of a `config.json` that an earlier version wrote.

  Raises:
    ValueError: if the finished stage had another configuration, or if the folder cannot be used.
  """
  with contextlib.closing(RunFolder(out)) as folder:
    if not (folder.path / _FINISHED).exists():
      yield folder
      return
    config = read_json_object(folder.path / "config.json")
    folder.check_config(upgrade(config) | {"requested": requested}, upgrade)
    yield None


def close_stage(folder: RunFolder) -> pathlib.Path:
  """Marks the stage in a folder as finished, and returns the folder's path."""
  (folder.path / _FINISHED).touch()
  return folder.path
