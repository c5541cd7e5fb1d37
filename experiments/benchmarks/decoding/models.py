"""The trained models that benchmarks of decoding use."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

from rl.loading import load_model
from train.config import DataConfig, RunConfig
from train.data import HeldOut, load
from train.loading import LoadedModel
from train.stages import train_on_text


@contextlib.contextmanager
def loaded_or_trained(checkpoint: str, cfg: RunConfig) -> Iterator[LoadedModel]:
  """Loads the model of a folder or, if that is empty, trains one and deletes it after its use.

  Args:
    checkpoint: the folder; empty to train.
    cfg: how to train; a benchmark's own settings are left out.
  """
  with tempfile.TemporaryDirectory() as folder:
    yield load_model(checkpoint or train_on_text(
        cfg.without_extras(), None, out=pathlib.Path(folder) / "model"))


def heldout(cfg: DataConfig, start: LoadedModel) -> dict[str, HeldOut]:
  """Returns held-out text by domain, in the tokens of a model."""
  return load(dataclasses.replace(cfg, tokenizer=start.tokenizer_path)).heldout
