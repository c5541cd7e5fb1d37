"""Write a trained model as a Hugging Face folder, with its tokenizer and chat template."""

import dataclasses
import os
import pathlib

from experiments import settings
from experiments.options import Options
from rl.loading import load_model
from train.export import check_target, export, run_identity
from train.loading import load_seeds
from train.run_folder import read_json_object
from train.stages import upgrade_run


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """The model and the folder to write.

  Attributes:
    checkpoint: the model: a folder that pretrain or r1_zero wrote, or a Hugging Face folder.
    to: the folder to write. If the checkpoint was trained with several seeds, it gets a folder for
      each, such as `seed0`.
    overwrite_export: whether that folder may hold other files than an export of this run.
    tokenizer: path of a tokenizer.json, for folders without one.
  """

  checkpoint: str = ""
  to: str = ""
  overwrite_export: bool = False
  tokenizer: str | None = None


CONFIG = ExportConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  for name, what in (("checkpoint", "model to export"), ("to", "folder to export it to")):
    if not getattr(cfg, name):
      raise ValueError(f"no {what}: give it by --set {name}=DIR")
  if os.path.realpath(cfg.to) == os.path.realpath(cfg.checkpoint):
    raise ValueError(f"to={cfg.to} is the checkpoint itself: give another folder")
  start = load_model(cfg.checkpoint)
  tokenizer = start.tokenizer(cfg.tokenizer)
  stored = upgrade_run(read_json_object(pathlib.Path(cfg.checkpoint) / "config.json"))
  seeds = stored.get("seeds", [None])
  several = len(seeds) > 1
  runs = load_seeds(pathlib.Path(cfg.checkpoint)) if several else [(seeds[0], start.variables)]
  for seed, variables in runs:
    folder = pathlib.Path(cfg.to) / f"seed{seed}" if several else pathlib.Path(cfg.to)
    run = run_identity(stored, seed)
    check_target(folder, run, overwrite=cfg.overwrite_export, setting="to")
    export(folder, dataclasses.replace(start, variables=variables), tokenizer, run)
    print(f"exported to {folder}")
