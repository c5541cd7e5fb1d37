"""Tasks of randomly generated problems: an unlimited number, each with a worked solution."""

import abc
import dataclasses
import hashlib
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from rl.tasks.documents import Noise, Writer, complete, slip, worked
from rl.tasks.equality import number
from rl.tasks.problem import Problem, Task, require_split
from train.templates import Template

_ATTEMPTS = 10_000


def half_of(key: str) -> str:
  """Returns "heldout" for a tenth of all keys and "train" for the others, by the key's hash."""
  return "train" if hashlib.sha256(key.encode()).digest()[0] % 10 else "heldout"


def spec_of(config: Any) -> str:
  """Returns a task's spec, `name:field=value,...`, with the fields that are not the default."""
  changed = [f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)
             if getattr(config, field.name) != field.default]
  return config.name + ":" * bool(changed) + ",".join(changed)


class Generated[Q](Task, abc.ABC):
  """A task defined by how a problem, of type Q, is drawn, posed and worked out.

  A hash of the problem decides whether it is held out, whatever the seed, and "harder" problems are
  larger than any of the others. Hence no question is in two splits, and documents contain only
  questions of "train".
  """

  name: ClassVar[str]
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout", "harder")
  seed: int

  @abc.abstractmethod
  def draw(self, rng: random.Random, harder: bool) -> Q | None:
    """Draws a problem at random; None if the draws do not make a valid one.

    Args:
      rng: the source of all randomness.
      harder: whether the problem is for the split "harder".
    """

  @abc.abstractmethod
  def key(self, drawn: Q) -> str:
    """Returns a key that is equal for problems so similar that they must be in the same split."""

  @abc.abstractmethod
  def pose(self, drawn: Q) -> tuple[str, str, dict[str, Any]]:
    """Returns the question, a correct answer, and the columns for rewards."""

  @abc.abstractmethod
  def work(self, drawn: Q, write: Writer, detailed: bool) -> str:
    """Writes the steps of a solution, and returns the answer to which they lead.

    Args:
      drawn: the problem.
      write: writes the steps, and decides which are incorrect.
      detailed: whether to write a detailed solution instead of a brief one.
    """

  def guess(self, drawn: Q, rng: random.Random) -> str:
    """Returns an incorrect answer, for documents without working.

    This implementation is for tasks whose answers are integers, and returns one nearby.
    """
    return str(slip(rng, int(self.pose(drawn)[1])))

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether the answer is the same number as the reference answer."""
    return number(answer) == number(columns["answer"])

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two answers are the same text, or the same number for a task of numbers."""
    if first.strip() == second.strip():
      return True
    # Tasks with another `check` have answers such as expressions, whose value is not the answer.
    return (type(self).check is Generated.check and number(first) is not None
            and number(first) == number(second))

  def size(self, split: str) -> None:
    """Returns None, as the number of problems is unlimited."""
    require_split(self, split)

  def problem(self, split: str, index: int) -> Problem:
    """Returns the problem at an index, the same one for the same task, seed and split.

    Raises:
      ValueError: for an unknown split, or if the task has so few problems that the split is empty.
    """
    require_split(self, split)
    rng = random.Random(f"{self.name} {self.seed} {split} {index}")
    question, answer, columns = self.pose(self._draw_in(split, rng))
    spec = spec_of(self)
    return Problem(f"{spec}/{split}/{index}", question, answer, spec, columns)

  def document(
      self, rng: random.Random, noise: Noise, template: Template) -> tuple[str, str]:
    """Returns the prompt of a "train" problem and a noisy completion, in the template's format.

    Args:
      rng: the source of all randomness.
      noise: probabilities of the completion's style and errors.
      template: the prompt template.
    """
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
    raise ValueError(f"{spec_of(self)} has too few problems for a split {split!r}: choose settings "
                     "that allow more")
