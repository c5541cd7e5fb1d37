"""Noisy worked solutions of a task as a JSONL file, which a base model is pretrained on."""

import dataclasses
import json
import os
import pathlib
import random

from rl.tasks import GENERATED, Noise, get_task
from rl.templates import get_template
from train.config import Source


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


def write_documents(
    path: str | os.PathLike, task: str, template: str, cfg: DocumentsConfig, seed: int) -> Source:
  """Writes a JSONL file of prompts and completions, unless it is there already.

  Args:
    path: of the file.
    task: the spec of a generated task.
    template: its name.
    cfg: how many documents, and how good.
    seed: of everything random.

  Returns:
    The file as a source for training, in which prompts are read and not learned.

  Raises:
    ValueError: for a task that has no documents.
  """
  generator = get_task(task)
  if not hasattr(generator, "document"):
    raise ValueError(f"task {task!r} has no worked solutions to write down; these have: "
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
