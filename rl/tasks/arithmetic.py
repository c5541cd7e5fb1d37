"""Arithmetic expressions such as `37+45-12`, worked by running totals."""

import dataclasses
import operator
import random
from typing import ClassVar

from model.checks import require, require_range
from rl.tasks.documents import Writer, slip
from rl.tasks.generated import Generated

_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_Terms = tuple[tuple[str, int], ...]  # (operator, number); the first operator is "+", not shown


@dataclasses.dataclass(frozen=True)
class Arithmetic(Generated[_Terms]):
  """Expressions of 2 to `terms` numbers; the split "harder" has `terms` + 1.

  A detailed solution adds or subtracts a number digit by digit: `37+40=77`, `77+5=82`. With a
  tokenizer that does not merge digits, each digit is a token.

  Attributes:
    terms: largest number of terms in an expression, 2..20.
    digits: largest number of digits of each term, 1..9.
    operators: the operators, any of "+-*", each of which is equally likely.
    seed: seed of the problems.
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
            f"Arithmetic.operators={self.operators!r} must be some of '+-*', each at most once")

  def draw(self, rng: random.Random, harder: bool) -> _Terms:
    """Returns the terms, each an operator and a number."""
    count = self.terms + 1 if harder else rng.randint(2, self.terms)
    draws = [(rng.choice(self.operators), rng.randrange(10 ** rng.randint(1, self.digits)))
             for _ in range(count)]
    return (("+", draws[0][1]), *draws[1:])

  def key(self, drawn: _Terms) -> str:
    """Returns the terms in sorted order: expressions with the same terms are one problem."""
    return str(sorted(drawn))

  def pose(self, drawn: _Terms) -> tuple[str, str, dict]:
    """Returns a question such as `37+45-12`, its answer "70", and no columns."""
    question = "".join(sign + str(value) for sign, value in drawn)[1:]
    return question, self.work(drawn, Writer(random.Random(0)), detailed=False), {}

  def work(self, drawn: _Terms, write: Writer, detailed: bool) -> str:
    """Works out the products first, then the sum from the left."""
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
  """Splits a number by its non-zero digits: 345 into 300, 40 and 5."""
  digits = str(value)
  parts = tuple(int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits))
  return tuple(part for part in parts if part) or (0,)
