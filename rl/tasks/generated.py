"""Tasks whose problems come from chance: never used up, and every one with a worked solution."""

import abc
import dataclasses
import hashlib
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from rl.tasks.documents import Noise, Writer, complete, slip, worked
from rl.tasks.equality import number
from rl.tasks.problem import Problem, Task, require_split
from rl.templates import Template

_ATTEMPTS = 10_000


def half_of(key: str) -> str:
  """"heldout" for a tenth of all keys, else "train"; the same in every run."""
  return "train" if hashlib.sha256(key.encode()).digest()[0] % 10 else "heldout"


def spec_of(config: Any) -> str:
  """`name:field=value,...` with the fields that are not the default."""
  changed = [f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)
             if getattr(config, field.name) != field.default]
  return config.name + ":" * bool(changed) + ",".join(changed)


class Generated[Q](Task, abc.ABC):
  """A task by how a problem, a Q, is drawn, posed and worked.

  The hash of a problem decides whether it is held out, whatever the seed; "harder" problems are
  larger than any of the others. Hence no question is in two splits, and documents show only
  questions of "train".
  """

  name: ClassVar[str]
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout", "harder")
  seed: int

  @abc.abstractmethod
  def draw(self, rng: random.Random, harder: bool) -> Q | None:
    """A problem, or None if these draws made none."""

  @abc.abstractmethod
  def key(self, drawn: Q) -> str:
    """The same for problems so alike that they belong into one split."""

  @abc.abstractmethod
  def pose(self, drawn: Q) -> tuple[str, str, dict[str, Any]]:
    """Question, answer, and columns."""

  @abc.abstractmethod
  def work(self, drawn: Q, write: Writer, detailed: bool) -> str:
    """Writes the steps and returns the answer to which they lead."""

  def guess(self, drawn: Q, rng: random.Random) -> str:
    """A wrong answer, near the right one if that is a number."""
    return str(slip(rng, int(self.pose(drawn)[1])))

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether it is the number that is the right answer."""
    return number(answer) == number(columns["answer"])

  def size(self, split: str) -> None:
    """None: problems do not run out."""
    require_split(self, split)

  def problem(self, split: str, index: int) -> Problem:
    """The problem at an index, the same for the same task, seed and split.

    Raises:
      ValueError: for an unknown split, or if the task is so small that the split is empty.
    """
    require_split(self, split)
    rng = random.Random(f"{self.name} {self.seed} {split} {index}")
    question, answer, columns = self.pose(self._draw_in(split, rng))
    spec = spec_of(self)
    return Problem(f"{spec}/{split}/{index}", question, answer, spec, columns)

  def document(
      self, rng: random.Random, noise: Noise, template: Template) -> tuple[str, str]:
    """A prompt of "train" and a noisy completion, as the template has them."""
    drawn = self._draw_in("train", rng)
    question, answer, _ = self.pose(drawn)
    style, thinking = noise.style(rng), ""
    if style != "direct":
      thinking, answer = worked(
          lambda write: self.work(drawn, write, style == "detailed"), rng, style, noise)
    elif rng.random() < noise.direct_error:
      answer = self.guess(drawn, rng)
    return template.render(question), complete(template, thinking, answer, rng, noise)

  def _draw_in(self, split: str, rng: random.Random) -> Q:
    for _ in range(_ATTEMPTS):
      drawn = self.draw(rng, split == "harder")
      if drawn is not None and split in ("harder", half_of(self.key(drawn))):
        return drawn
    raise ValueError(f"{spec_of(self)} has too few problems for a split {split!r}; make it larger")
