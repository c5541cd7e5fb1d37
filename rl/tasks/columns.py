"""Addition by columns with carries, of which every step can be checked."""

import dataclasses
import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from model.checks import require_range
from rl.extraction import reasoning
from rl.tasks.documents import Writer
from rl.tasks.generated import Generated

_STEP = re.compile(r"(wait )?([0-9])\+([0-9])\+([01])=([0-9]{1,2})(?: write ([0-9]) carry ([01]))?")
_Pair = tuple[int, int]


class Step(NamedTuple):
  """A step of a solution."""

  end: int     # of its characters in the completion: the offset after the last of them
  right: bool


@dataclasses.dataclass(frozen=True)
class Columns(Generated[_Pair]):
  """Two numbers of the same number of digits, up to `digits`; "harder" has one digit more.

  A step is a column, from the right: its two digits, the carry, their sum. In detail it also says
  what is written down and what is carried.

  Attributes:
    digits: of each number, at most, 1..30.
    seed: of the problems.
  """

  name: ClassVar[str] = "columns"
  digits: int = 4
  seed: int = 0

  def __post_init__(self):
    require_range(self, 1, 30, "digits")

  def draw(self, rng: random.Random, harder: bool) -> _Pair:
    """The two numbers."""
    length = self.digits + 1 if harder else rng.randint(1, self.digits)
    return tuple(rng.randrange(10 ** (length - 1), 10 ** length) for _ in range(2))

  def key(self, drawn: _Pair) -> str:
    """The numbers in any order."""
    return str(sorted(drawn))

  def pose(self, drawn: _Pair) -> tuple[str, str, dict]:
    """`4875+3968`, "8843", and the numbers as column "operands"."""
    left, right = drawn
    return f"{left}+{right}", str(left + right), {"operands": list(drawn)}

  def work(self, drawn: _Pair, write: Writer, detailed: bool) -> str:
    """A line a column."""
    carry, answer = 0, ""
    for left, right in _pairs(drawn):
      total = left + right + carry
      # Stays in 0..19, so that a digit and a carry are what follows.
      wrong = write.rng.choice([near for near in (total - 1, total + 1) if 0 <= near <= 19])
      show = lambda shown, begin=f"{left}+{right}+{carry}=": f"{begin}{shown}" + (
          f" write {shown % 10} carry {shown // 10}" if detailed else "")
      carry, digit = divmod(write.step(total, wrong, show), 10)
      answer = f"{digit}{answer}"
    return f"{carry or ''}{answer}"

  def steps(self, completion: str, columns: Mapping[str, Any], *,
            thinking_opened: bool = False) -> list[Step]:
    """The steps of a completion's reasoning, each with whether it is right, for process rewards.

    A step is a line that is not empty. It is right if it is what the next column needs, whatever
    came before: with that column's digits and its true carry. "wait" takes the last column again.
    Lines that are no steps are wrong, as are steps after the last column.
    """
    thinking = reasoning(completion, thinking_opened=thinking_opened)
    if thinking is None:
      return []
    start = 0 if thinking_opened else completion.index("<think>") + len("<think>")
    truths, at, steps = _truths(columns["operands"]), -1, []
    for line in re.finditer(r"[^\n]*\S[^\n]*", thinking):
      match = _STEP.fullmatch(line[0].strip())
      at += not (match and match[1] and at >= 0)
      right = match is not None and at < len(truths) and _is_right(match, truths[at])
      steps.append(Step(start + line.end(), right))
    return steps


def _is_right(match: re.Match, truth: tuple[int, int, int]) -> bool:
  written = tuple(int(group) for group in match.groups()[1:5])
  carry, digit = divmod(sum(truth), 10)
  follows = match[6] is None or (int(match[6]), int(match[7])) == (digit, carry)
  return written == (*truth, sum(truth)) and follows


def _pairs(numbers: _Pair) -> list[tuple[int, int]]:
  """The digits by column, from the right."""
  return [(int(left), int(right)) for left, right in zip(
      *(reversed(str(value)) for value in numbers), strict=True)]


def _truths(numbers: _Pair) -> list[tuple[int, int, int]]:
  """By column, from the right: both digits and the carry into it."""
  carry, truths = 0, []
  for left, right in _pairs(numbers):
    truths.append((left, right, carry))
    carry = (left + right + carry) // 10
  return truths
