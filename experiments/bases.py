"""Base models for RL: pretrained on noisy worked solutions, or loaded from a folder."""

import contextlib
import dataclasses
import json
import pathlib
import sys

import rl.start
from experiments.pretrain import fit_vocabulary
from rl.documents import write_documents
from rl.tasks import Noise
from train.config import RunConfig
from train.config_io import to_dict
from train.data import load
from train.loop import train
from train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
  """What a base reads.

  Attributes:
    count: documents.
    noise: how good their solutions are.
  """

  count: int = 50_000
  noise: Noise = dataclasses.field(default_factory=Noise)

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f"documents.count={self.count} must be positive")


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that RL begins with, made when it is first needed.

  Attributes:
    run: how it is pretrained; its sources are the documents.
    documents: see there.
    task: of the documents.
    template: of the documents.
    seed: of the documents and of pretraining.
    path: the folder that it is in, or will be.
    told: whether the user has named a vocabulary size.
  """

  run: RunConfig
  documents: DocumentsConfig
  task: str
  template: str
  seed: int
  path: pathlib.Path
  told: bool = False

  def load(self, max_seconds: float | None = None) -> rl.start.Start | None:
    """Pretrains it unless that is done; None if pretraining was stopped before its end.

    Raises:
      ValueError: if another base is in the folder.
    """
    finished = self.path / "finished"
    if finished.exists():
      self._check()
    else:
      with contextlib.closing(RunFolder(self.path)) as folder:
        if self._pretrain(folder, max_seconds) == "stopped":
          return None
      finished.touch()
    return rl.start.load(str(self.path))

  def _asked(self) -> dict:
    return {"run": to_dict(self.run), "documents": to_dict(self.documents), "task": self.task,
            "template": self.template, "seed": self.seed, "told": self.told}

  def _check(self) -> None:
    """Raises ValueError if the finished base is another than is asked for."""
    config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
    with contextlib.closing(RunFolder(self.path)) as folder:
      folder.check_config(config | {"asked": self._asked()})

  def _pretrain(self, folder: RunFolder, max_seconds: float | None) -> str:
    source = write_documents(
        self.path / "documents.jsonl", self.task, self.template, self.documents.noise,
        self.documents.count, self.seed)
    run = dataclasses.replace(
        self.run, data=dataclasses.replace(self.run.data, sources=(source,)),
        train=dataclasses.replace(self.run.train, seed=self.seed))
    data = load(run.data)
    run = fit_vocabulary(run, data, told=self.told)
    folder.check_config({"config": to_dict(run), "seeds": [self.seed], "asked": self._asked()})
    data.tokenizer.save(self.path / rl.start.TOKENIZER)
    print(f"pretraining the base on {self.documents.count:,} documents", file=sys.stderr)
    return train([run], data, folder, max_seconds=max_seconds).status
