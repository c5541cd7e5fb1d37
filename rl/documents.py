"""Writes noisy worked solutions of a task to a JSONL file, on which a base model is pretrained."""

import dataclasses
import json
import os
import pathlib
import random

from rl.tasks import GENERATED, Noise, get_task
from train.config import Source
from train.templates import get_template


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
  """The documents on which a base model is pretrained.

  Attributes:
    count: number of documents.
    noise: how often their solutions are wrong, detailed or malformed.
  """

  count: int = 50_000
  noise: Noise = dataclasses.field(default_factory=Noise)

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f"documents.count={self.count} must be positive")


def write_documents(
    path: str | os.PathLike, task: str, template: str, cfg: DocumentsConfig, seed: int) -> Source:
  """Writes a JSONL file of prompts and noisy completions, unless the file exists already.

  Args:
    path: the file to write. A row is {"prompt": ..., "text": ...}.
    task: spec of a generated task, see `rl.tasks.get_task`.
    template: name of the prompt template, see `train.templates.get_template`.
    cfg: number of documents and their noise.
    seed: seed of the problems and of the noise.

  Returns:
    The file as a source of training data; there is no loss on the prompts.

  Raises:
    ValueError: for a task that cannot write documents, or an unknown task or template.
  """
  generator = get_task(task)
  if not hasattr(generator, "document"):
    raise ValueError(f"task {task!r} has no worked solutions to write; the tasks that have are: "
                     + ", ".join(GENERATED))
  path = pathlib.Path(path)
  if not path.exists():
    rng, style = random.Random(seed), get_template(template)
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
      for _ in range(cfg.count):
        prompt, completion = generator.document(rng, cfg.noise, style)
        file.write(json.dumps({"prompt": prompt, "text": completion}, ensure_ascii=False) + "\n")
    unfinished.replace(path)
  return Source(str(path), domain=task.partition(":")[0], prompt_field="prompt")
