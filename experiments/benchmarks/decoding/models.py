"""The trained models that benchmarks of decoding use."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from rl.loading import load_model
from train.config import RunConfig
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
