"""Noisy worked solutions, on which a base model is pretrained before RL.

Documents have three styles, from short and mostly incorrect to long and mostly correct: `direct`
(an answer without working), `brief` (every step) and `detailed` (every step in smaller steps). RL
can improve the model by choosing among the styles that the base has learned, by keeping to the
format, and by making fewer errors.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from model.checks import require, require_range
from train.templates import Template


@dataclasses.dataclass(frozen=True)
class Noise:
  """Probabilities that decide the style and the errors of documents.

  With the defaults, a model that learns the documents perfectly gives 10-30 % correct answers.

  Attributes:
    direct: probability that a document answers without working.
    detailed: probability that a document is worked in detail; all that are neither direct nor
      detailed are worked in brief.
    direct_error: probability that an answer without working is incorrect.
    step_error: probability that a step of a brief document is incorrect; later steps build on it.
    detailed_error: probability that a step of a detailed document is incorrect; later steps build
      on it.
    self_correction: probability that a worked document corrects itself: it contains at least one
      incorrect step, and after every such step it says "wait" and gives the correct one.
    malformed: probability that a document violates the format: it lacks a tag or the answer tags,
      gives a second answer, or has text after the answer.
  """

  direct: float = 0.6
  detailed: float = 0.05
  direct_error: float = 0.9
  step_error: float = 0.3
  detailed_error: float = 0.02
  self_correction: float = 0.01
  malformed: float = 0.2

  def __post_init__(self):
    require_range(self, 0, 1, *(field.name for field in dataclasses.fields(self)))
    require(self.direct + self.detailed <= 1,
            f"Noise.direct={self.direct} and Noise.detailed={self.detailed} are fractions of all "
            "documents: their sum must be at most 1")

  def style(self, rng: random.Random) -> str:
    """Draws the style of a document: "direct", "detailed" or "brief"."""
    draw = rng.random()
    if draw < self.direct:
      return "direct"
    return "detailed" if draw < self.direct + self.detailed else "brief"


class Writer:
  """Writes the steps of a solution, some of them incorrect.

  Args:
    rng: the source of all randomness.
    error: probability that a step is incorrect.
    corrected: index of a step that is certainly incorrect. If it is given, every incorrect step is
      followed by "wait" and the correct one. None for no corrections.

  Attributes:
    rng: the source of all randomness.
    lines: the lines written so far.
  """

  def __init__(self, rng: random.Random, error: float = 0.0, corrected: int | None = None):
    self.rng, self.lines = rng, []
    self._error, self._corrected, self._steps = error, corrected, 0

  def step[T](self, correct: T, wrong: T, show: Callable[[T], str], wait: str = "wait ") -> T:
    """Writes a step, at random the correct or the incorrect one.

    Args:
      correct: the correct value of the step.
      wrong: an incorrect value of the step.
      show: returns the line for a value.
      wait: the words that precede a correction.

    Returns:
      The value on which later steps build.
    """
    slips = self.rng.random() < self._error or self._steps == self._corrected
    self._steps += 1
    self.lines.append(show(wrong if slips else correct))
    if slips and self._corrected is not None:
      self.lines.append(wait + show(correct))
      return correct
    return wrong if slips else correct


def slip(rng: random.Random, value: int) -> int:
  """Returns another integer near `value` and of the same sign, to serve as an incorrect result."""
  near = [value + offset for offset in (-10, -2, -1, 1, 2, 10)]
  return rng.choice([other for other in near if (other < 0) == (value < 0)])


def worked(work: Callable[[Writer], Any], rng: random.Random, style: str,
           noise: Noise) -> tuple[str, Any]:
  """Returns the text that `work` writes with the errors of a style, and the answer it returns.

  Args:
    work: writes the steps of a solution with the Writer that it is given, and returns the answer.
    rng: the source of all randomness.
    style: "brief" or "detailed".
    noise: the probabilities of errors.
  """
  corrected = None
  if rng.random() < noise.self_correction:
    rehearsal = Writer(random.Random(0))
    work(rehearsal)
    corrected = rng.randrange(len(rehearsal.lines))
  error = noise.detailed_error if style == "detailed" else noise.step_error
  writer = Writer(rng, error, corrected)
  result = work(writer)
  return "\n".join(writer.lines), result


def complete(template: Template, thinking: str, answer: str, rng: random.Random,
             noise: Noise) -> str:
  """Returns the completion, malformed with probability `noise.malformed`."""
  completion = template.complete(thinking, answer)
  if rng.random() >= noise.malformed:
    return completion
  return rng.choice([
      completion.replace("</think>", "", 1),
      completion.replace("<answer>", "").replace("</answer>", ""),
      f"{completion}\n{answer}",
      f"{completion}\n<answer>{answer}</answer>",
  ])
