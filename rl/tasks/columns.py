"""Column addition with carries, in which every step can be checked."""

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
  """A step of a solution.

  Attributes:
    end: offset in the completion, in characters, of the end of the step.
    right: whether the step is correct.
  """

  end: int
  right: bool


@dataclasses.dataclass(frozen=True)
class Columns(Generated[_Pair]):
  """Sums of two numbers with 1 to `digits` digits each; "harder" has `digits` + 1.

  The two numbers have equally many digits. A step is a column, from the right: its two digits, the
  carry, and their sum. A detailed step also says which digit is written and what is carried.

  Attributes:
    digits: largest number of digits of each number, 1..30.
    seed: seed of the problems.
  """

  name: ClassVar[str] = "columns"
  digits: int = 4
  seed: int = 0

  def __post_init__(self):
    require_range(self, 1, 30, "digits")

  def draw(self, rng: random.Random, harder: bool) -> _Pair:
    """Returns the two numbers."""
    length = self.digits + 1 if harder else rng.randint(1, self.digits)
    return tuple(rng.randrange(10 ** (length - 1), 10 ** length) for _ in range(2))

  def key(self, drawn: _Pair) -> str:
    """Returns the numbers in sorted order: the same numbers are one problem in either order."""
    return str(sorted(drawn))

  def pose(self, drawn: _Pair) -> tuple[str, str, dict]:
    """Returns a question such as `4875+3968`, its answer "8843", and the column "operands"."""
    left, right = drawn
    return f"{left}+{right}", str(left + right), {"operands": list(drawn)}

  def work(self, drawn: _Pair, write: Writer, detailed: bool) -> str:
    """Writes a line for each column."""
    carry, answer = 0, ""
    for left, right in _pairs(drawn):
      total = left + right + carry
      # An incorrect sum stays in 0..19 too, so that a digit and a carry follow from it.
      wrong = write.rng.choice([near for near in (total - 1, total + 1) if 0 <= near <= 19])
      show = lambda shown, begin=f"{left}+{right}+{carry}=": f"{begin}{shown}" + (
          f" write {shown % 10} carry {shown // 10}" if detailed else "")
      carry, digit = divmod(write.step(total, wrong, show), 10)
      answer = f"{digit}{answer}"
    return f"{carry or ''}{answer}"

  def steps(self, completion: str, columns: Mapping[str, Any], *,
            thinking_opened: bool = False) -> list[Step]:
    """Returns the steps of a completion's reasoning and whether they are correct.

    For process rewards (DeepSeekMath section 4.1.3). Every line that is not blank is a step. It is
    correct if it adds the next column, with this column's digits and its true carry, whatever the
    steps before it were. A step that begins with "wait" repeats the previous column. Lines of any
    other form are incorrect, as are steps after the last column.

    Args:
      completion: the text sampled.
      columns: the problem's row, with "operands".
      thinking_opened: whether the prompt has already opened the think block.
    """
    thinking = reasoning(completion, thinking_opened=thinking_opened)
    if thinking is None:
      return []
    start = 0 if thinking_opened else completion.index("<think>") + len("<think>")
    truths, at, steps = _truths(columns["operands"]), -1, []
    for line in re.finditer(r"[^\n]*\S[^\n]*", thinking):
      match = _STEP.fullmatch(line[0].strip())
      at += not (match and match[1] and at >= 0)
      correct = match is not None and at < len(truths) and _is_correct(match, truths[at])
      steps.append(Step(start + line.end(), correct))
    return steps


def _is_correct(match: re.Match, truth: tuple[int, int, int]) -> bool:
  written = tuple(int(group) for group in match.groups()[1:5])
  carry, digit = divmod(sum(truth), 10)
  follows = match[6] is None or (int(match[6]), int(match[7])) == (digit, carry)
  return written == (*truth, sum(truth)) and follows


def _pairs(numbers: _Pair) -> list[tuple[int, int]]:
  """Returns the two digits of each column, from the right."""
  return [(int(left), int(right)) for left, right in zip(
      *(reversed(str(value)) for value in numbers), strict=True)]


def _truths(numbers: _Pair) -> list[tuple[int, int, int]]:
  """Returns the two digits of each column and the carry into it, from the right."""
  carry, truths = 0, []
  for left, right in _pairs(numbers):
    truths.append((left, right, carry))
    carry = (left + right + carry) // 10
  return truths
