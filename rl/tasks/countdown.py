"""Countdown: make a target from given numbers with + - * / and parentheses."""

import collections
import dataclasses
import fractions
import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from model.checks import require_range
from rl.tasks.documents import Writer
from rl.tasks.generated import Generated

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_EXPRESSION = re.compile(r"(?:[0-9]+|[-+*/() ])*")
_LONGEST = 200    # characters in an expression
_DEEPEST = 20     # nested parentheses
_LARGEST = 10**12  # numerator and denominator of any value


def evaluate(expression: str) -> tuple[fractions.Fraction, list[int]]:
  """Returns the exact value of an expression, and the numbers in it from left to right.

  The grammar is that of the game: numbers in ASCII digits, `+ - * /`, parentheses and spaces. There
  are no signs, powers or names, and nothing is ever evaluated by Python.

  Raises:
    ValueError: for any other text, for division by zero, for an expression of more than 200
      characters or 20 nested parentheses, and for numerators or denominators above 10^12.
  """
  if len(expression) > _LONGEST:
    raise ValueError(f"an expression may have at most {_LONGEST} characters, not "
                     f"{len(expression)}")
  if not _EXPRESSION.fullmatch(expression):
    raise ValueError(f"{expression!r} contains more than numbers, + - * / and parentheses")
  parser = _Parser(_TOKEN.findall(expression))
  value = parser.sum()
  if parser.tokens:
    raise ValueError(f"{expression!r} has an unexpected {parser.tokens[0]!r}")
  return value, parser.numbers


class _Parser:
  """A recursive-descent parser, which removes tokens from the front as it reads them."""

  def __init__(self, tokens: list[str]):
    self.tokens, self.numbers, self._depth = collections.deque(tokens), [], 0

  def sum(self) -> fractions.Fraction:
    value = self._product()
    while self.tokens and self.tokens[0] in "+-":
      value = _bounded(value, self.tokens.popleft(), self._product())
    return value

  def _product(self) -> fractions.Fraction:
    value = self._atom()
    while self.tokens and self.tokens[0] in "*/":
      value = _bounded(value, self.tokens.popleft(), self._atom())
    return value

  def _atom(self) -> fractions.Fraction:
    token = self.tokens.popleft() if self.tokens else "the end"
    if token == "(":
      self._depth += 1
      if self._depth > _DEEPEST:
        raise ValueError(f"parentheses are nested more than {_DEEPEST} deep")
      value = self.sum()
      self._depth -= 1
      if not self.tokens or self.tokens.popleft() != ")":
        raise ValueError("a parenthesis is not closed")
      return value
    if not token.isdigit() or len(token) > len(str(_LARGEST)):
      raise ValueError(f"expected a number or '(', found {token!r}")
    self.numbers.append(int(token))
    return fractions.Fraction(int(token))


def _bounded(left: fractions.Fraction, sign: str, right: fractions.Fraction) -> fractions.Fraction:
  if sign == "/" and not right:
    raise ValueError("the expression divides by zero")
  value = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[sign](
      right)
  if max(abs(value.numerator), value.denominator) > _LARGEST:
    raise ValueError(f"the expression has a numerator or denominator above {_LARGEST}")
  return value


class _Part(NamedTuple):
  """A number that moves may still use.

  Attributes:
    value: the number.
    text: the expression that made it from the given numbers.
  """

  value: int
  text: str

  def __str__(self):
    return str(self.value)


class Game(NamedTuple):
  """A problem with one solution.

  Attributes:
    numbers: the given numbers.
    target: the number to make.
    moves: the moves of a solution, each the value on the left, the operator and the value on the
      right.
  """

  numbers: tuple[int, ...]
  target: int
  moves: tuple[tuple[int, str, int], ...]


@dataclasses.dataclass(frozen=True)
class Countdown(Generated[Game]):
  """Targets to make from 3 to `numbers` numbers; "harder" has `numbers` + 1.

  An answer is an expression that uses each number at most once. As in the television game, numbers
  may be left over; expressions that use all of them are correct too. A step is a move, and an
  incorrect step is a random legal move.

  Attributes:
    numbers: largest count of given numbers, 3..8.
    largest: largest value of a given number, 4..100.
    seed: seed of the problems.
  """

  name: ClassVar[str] = "countdown"
  numbers: int = 4
  largest: int = 20
  seed: int = 0

  def __post_init__(self):
    require_range(self, 3, 8, "numbers")
    require_range(self, 4, 100, "largest")

  def draw(self, rng: random.Random, harder: bool) -> Game | None:
    """Returns random numbers, random moves that use them all, and their result as the target.

    None if the target is 0 or one of the numbers.
    """
    count = self.numbers + 1 if harder else rng.randint(3, self.numbers)
    numbers = tuple(rng.randint(1, self.largest) for _ in range(count))
    parts, moves = [_Part(value, str(value)) for value in numbers], []
    while len(parts) > 1:
      move = _random_move(rng, parts)
      moves.append((move[0].value, move[1], move[2].value))
      parts = _after(parts, move)
    target = parts[0].value
    return Game(numbers, target, tuple(moves)) if target not in (0, *numbers) else None

  def key(self, drawn: Game) -> str:
    """Returns the sorted numbers and the target: the order of the numbers makes no difference."""
    return f"{sorted(drawn.numbers)} {drawn.target}"

  def pose(self, drawn: Game) -> tuple[str, str, dict[str, Any]]:
    """Returns a question such as `make 44 from 3 5 8 12`, a solution, and the columns.

    The columns are "target" and "numbers".
    """
    question = f"make {drawn.target} from {' '.join(map(str, drawn.numbers))}"
    answer = self.work(drawn, Writer(random.Random(0)), detailed=False)
    return question, answer, {"target": drawn.target, "numbers": list(drawn.numbers)}

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether the expression makes the target and uses each given number at most once."""
    try:
      value, used = evaluate(answer)
    except ValueError:
      return False
    spare = collections.Counter(columns["numbers"])
    spare.subtract(used)
    return value == columns["target"] and min(spare.values()) >= 0

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two expressions differ by spaces at most: `6/2` and `3` use other numbers."""
    return "".join(first.split()) == "".join(second.split())

  def work(self, drawn: Game, write: Writer, detailed: bool) -> str:
    """Writes a line for each move; a detailed solution adds the numbers that are left."""
    parts = [_Part(value, str(value)) for value in drawn.numbers]
    for planned in drawn.moves:
      stray = _random_move(write.rng, parts)
      move = _find(parts, planned) or stray
      show = lambda move, parts=parts: _show(move, _after(parts, move) if detailed else ())
      parts = _after(parts, write.step(move, stray, show))
    return _bare(parts[0].text)

  def guess(self, drawn: Game, rng: random.Random) -> str:
    """Returns the expression that random moves make."""
    return self.work(drawn, Writer(rng, error=1.0), detailed=False)


_Move = tuple[_Part, str, _Part]


def _result(move: _Move) -> _Part:
  left, sign, right = move
  value, _ = evaluate(f"{left.value}{sign}{right.value}")
  return _Part(int(value), f"({left.text}{sign}{right.text})")


def _random_move(rng: random.Random, parts: list[_Part]) -> _Move:
  """Returns a move at random whose result is a non-negative integer.

  Products are below 1000.
  """
  left, right = sorted(rng.sample(parts, 2), key=lambda part: -part.value)
  signs = ["+", "-"] + ["*"] * (left.value * right.value < 1000)
  signs += ["/"] * (right.value > 1 and not left.value % right.value)
  return left, rng.choice(signs), right


def _find(parts: list[_Part], planned: tuple[int, str, int]) -> _Move | None:
  """Returns the planned move, or None if its numbers are not among the parts."""
  left_value, sign, right_value = planned
  for left in parts:
    for right in parts:
      if left is not right and (left.value, right.value) == (left_value, right_value):
        return left, sign, right
  return None


def _after(parts: list[_Part], move: _Move) -> list[_Part]:
  return [part for part in parts if part is not move[0] and part is not move[2]] + [_result(move)]


def _show(move: _Move, left_over: list[_Part]) -> str:
  text = f"{move[0]}{move[1]}{move[2]}={_result(move)}"
  return f"{text} left {' '.join(map(str, left_over))}" if left_over else text


def _bare(text: str) -> str:
  # `_result` puts parentheses around the whole expression.
  return text[1:-1] if text.startswith("(") else text
