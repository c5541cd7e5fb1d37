"""Arithmetic in a line, `37+45-12`, worked by running totals."""

import dataclasses
import operator
import random
from typing import ClassVar

from model.checks import require, require_range
from rl.tasks.documents import Writer, slip
from rl.tasks.generated import Generated

_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_Terms = tuple[tuple[str, int], ...]  # the first operator is "+", and not shown


@dataclasses.dataclass(frozen=True)
class Arithmetic(Generated[_Terms]):
  """Two to `terms` numbers of up to `digits` digits; "harder" has `terms` + 1.

  In detail, what is added or subtracted is taken apart: `37+40=77`, `77+5=82`. A tokenizer that
  keeps digits single makes a digit a token.

  Attributes:
    terms: numbers at most, 2..20.
    digits: digits of each at most, 1..9.
    operators: any of "+-*", each as likely.
    seed: of the problems.
  """

  name: ClassVar[str] = "arithmetic"
  terms: int = 3
  digits: int = 2
  operators: str = "+-"
  seed: int = 0

  def __post_init__(self):
    require_range(self, 2, 20, "terms")
    require_range(self, 1, 9, "digits")
    require(0 < len(self.operators) == len(set(self.operators) & set(_APPLY)),
            f"Arithmetic.operators={self.operators!r} must be some of '+-*', each once")

  def draw(self, rng: random.Random, harder: bool) -> _Terms:
    """Operators with their numbers."""
    count = self.terms + 1 if harder else rng.randint(2, self.terms)
    draws = [(rng.choice(self.operators), rng.randrange(10 ** rng.randint(1, self.digits)))
             for _ in range(count)]
    return (("+", draws[0][1]), *draws[1:])

  def key(self, drawn: _Terms) -> str:
    """Terms in any order."""
    return str(sorted(drawn))

  def pose(self, drawn: _Terms) -> tuple[str, str, dict]:
    """`37+45-12`, "70"."""
    question = "".join(sign + str(value) for sign, value in drawn)[1:]
    return question, self.work(drawn, Writer(random.Random(0)), detailed=False), {}

  def work(self, drawn: _Terms, write: Writer, detailed: bool) -> str:
    """Products first, then the total from the left."""
    sums = []
    for sign, value in drawn:
      if sign == "*":
        before, product = sums.pop()
        sums.append((before, _apply(write, product, "*", value)))
      else:
        sums.append((sign, value))
    total = sums[0][1]
    for sign, value in sums[1:]:
      for part in _places(value) if detailed else (value,):
        total = _apply(write, total, sign, part)
    return str(total)


def _apply(write: Writer, left: int, sign: str, right: int) -> int:
  value = _APPLY[sign](left, right)
  return write.step(value, slip(write.rng, value), lambda shown: f"{left}{sign}{right}={shown}")


def _places(value: int) -> tuple[int, ...]:
  """345 as 300, 40 and 5."""
  digits = str(value)
  parts = tuple(int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits))
  return tuple(part for part in parts if part) or (0,)
