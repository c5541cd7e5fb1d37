"""Worked solutions with their faults: what a base model reads before RL.

Documents come in three styles, from short and mostly wrong to long and mostly right: `direct` (an
answer with no working), `brief` (every step) and `detailed` (every step in smaller ones). RL can
gain by choosing among styles that the base has, by keeping to the form, and by erring less.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from model.checks import require, require_range
from rl.templates import Template


@dataclasses.dataclass(frozen=True)
class Noise:
  """How good documents are; all are probabilities.

  The defaults leave a model that learns them perfectly with 10-30 % right answers.

  Attributes:
    direct: of a document to answer without working.
    detailed: of a document to be worked in detail; the rest is worked in brief.
    direct_error: of an answer without working to be wrong.
    step_error: of a step to be wrong; later steps build on it.
    detailed_error: of a step in a detailed document to be wrong.
    self_correction: of a worked document to take steps back with "wait": one at least, and every
      wrong one.
    malformed: of a document to miss a tag, or to have an answer too many or text after it.
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
            f"Noise.direct={self.direct} and Noise.detailed={self.detailed} are shares of all "
            "documents: together at most 1")

  def style(self, rng: random.Random) -> str:
    """"direct", "detailed" or "brief"."""
    draw = rng.random()
    if draw < self.direct:
      return "direct"
    return "detailed" if draw < self.direct + self.detailed else "brief"


class Writer:
  """Writes steps down, some of them wrong.

  Attributes:
    rng: all chance comes from it.
    lines: the steps so far.
  """

  def __init__(self, rng: random.Random, error: float = 0.0, take_back: int | None = None):
    """Of probability `error` a step is wrong; with `take_back`, that step is, and all wrong ones
    are followed by "wait" and the right one."""
    self.rng, self.lines = rng, []
    self._error, self._take_back, self._steps = error, take_back, 0

  def step[T](self, right: T, wrong: T, show: Callable[[T], str], wait: str = "wait ") -> T:
    """Writes `right` or `wrong` as `show` says; returns what later steps are to build on."""
    slips = self.rng.random() < self._error or self._steps == self._take_back
    self._steps += 1
    self.lines.append(show(wrong if slips else right))
    if slips and self._take_back is not None:
      self.lines.append(wait + show(right))
      return right
    return wrong if slips else right


def slip(rng: random.Random, value: int) -> int:
  """Another number near it, of the same sign."""
  near = [value + off for off in (-10, -2, -1, 1, 2, 10)]
  return rng.choice([other for other in near if (other < 0) == (value < 0)])


def worked(work: Callable[[Writer], Any], rng: random.Random, style: str,
           noise: Noise) -> tuple[str, Any]:
  """The steps that `work` writes, as noisy as the style is, and what it returns."""
  take_back = None
  if rng.random() < noise.self_correction:
    rehearsal = Writer(random.Random(0))
    work(rehearsal)
    take_back = rng.randrange(len(rehearsal.lines))
  error = noise.detailed_error if style == "detailed" else noise.step_error
  writer = Writer(rng, error, take_back)
  result = work(writer)
  return "\n".join(writer.lines), result


def complete(template: Template, thinking: str, answer: str, rng: random.Random,
             noise: Noise) -> str:
  """The completion, well-formed or not."""
  completion = template.complete(thinking, answer)
  if rng.random() >= noise.malformed:
    return completion
  return rng.choice([
      completion.replace("</think>", "", 1),
      completion.replace("<answer>", "").replace("</answer>", ""),
      f"{completion}\n{answer}",
      f"{completion}\n<answer>{answer}</answer>",
  ])
