"""Countdown: reach a target from given numbers with + - * / and parentheses."""

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
_LONGEST = 200    # characters
_DEEPEST = 20     # parentheses within each other
_LARGEST = 10**12  # numerators and denominators


def evaluate(expression: str) -> tuple[fractions.Fraction, list[int]]:
  """The exact value of an expression, and the numbers in it from left to right.

  The grammar is that of the game: numbers in ASCII digits, `+ - * /`, parentheses, spaces. There
  are no signs, no powers and no names, and nothing is ever given to Python to evaluate.

  Raises:
    ValueError: for anything else, for division by zero, and for what is too long, too deep or has
      too large values.
  """
  if len(expression) > _LONGEST:
    raise ValueError(f"an expression has at most {_LONGEST} characters, not {len(expression)}")
  if not _EXPRESSION.fullmatch(expression):
    raise ValueError(f"{expression!r} has more in it than numbers, + - * / and parentheses")
  parser = _Parser(_TOKEN.findall(expression))
  value = parser.sum()
  if parser.tokens:
    raise ValueError(f"{expression!r} makes no sense at {parser.tokens[0]!r}")
  return value, parser.numbers


class _Parser:
  """Recursive descent; takes tokens as it reads them."""

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
        raise ValueError(f"parentheses are more than {_DEEPEST} deep")
      value = self.sum()
      self._depth -= 1
      if not self.tokens or self.tokens.popleft() != ")":
        raise ValueError("a parenthesis is not closed")
      return value
    if not token.isdigit() or len(token) > len(str(_LARGEST)):
      raise ValueError(f"there is {token!r} where a number, or '(', should be")
    self.numbers.append(int(token))
    return fractions.Fraction(int(token))


def _bounded(left: fractions.Fraction, sign: str, right: fractions.Fraction) -> fractions.Fraction:
  if sign == "/" and not right:
    raise ValueError("it divides by zero")
  value = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[sign](
      right)
  if max(abs(value.numerator), value.denominator) > _LARGEST:
    raise ValueError(f"it has values above {_LARGEST}")
  return value


class _Part(NamedTuple):
  """A number on the table, and how it came there."""

  value: int
  text: str

  def __str__(self):
    return str(self.value)


class Game(NamedTuple):
  """A problem with the moves of one solution."""

  numbers: tuple[int, ...]
  target: int
  moves: tuple[tuple[int, str, int], ...]  # by value


@dataclasses.dataclass(frozen=True)
class Countdown(Generated[Game]):
  """Three to `numbers` numbers, each to be used once or not at all; "harder" has one more.

  An answer is an expression. As in the television game, numbers may be left over; solutions that
  use all of them are right too. Steps are moves; a wrong one is a legal move that leads elsewhere.

  Attributes:
    numbers: how many there are at most, 3..8.
    largest: of them, 4..100.
    seed: of the problems.
  """

  name: ClassVar[str] = "countdown"
  numbers: int = 4
  largest: int = 20
  seed: int = 0

  def __post_init__(self):
    require_range(self, 3, 8, "numbers")
    require_range(self, 4, 100, "largest")

  def draw(self, rng: random.Random, harder: bool) -> Game | None:
    """Numbers, what random moves make of them all, and these moves."""
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
    """The numbers in any order, and the target."""
    return f"{sorted(drawn.numbers)} {drawn.target}"

  def pose(self, drawn: Game) -> tuple[str, str, dict[str, Any]]:
    """`make 44 from 3 5 8 12`, a solution, and both as columns "target" and "numbers"."""
    question = f"make {drawn.target} from {' '.join(map(str, drawn.numbers))}"
    answer = self.work(drawn, Writer(random.Random(0)), detailed=False)
    return question, answer, {"target": drawn.target, "numbers": list(drawn.numbers)}

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether the expression makes the target, and no number serves twice."""
    try:
      value, used = evaluate(answer)
    except ValueError:
      return False
    spare = collections.Counter(columns["numbers"])
    spare.subtract(used)
    return value == columns["target"] and min(spare.values()) >= 0

  def work(self, drawn: Game, write: Writer, detailed: bool) -> str:
    """A move a line; in detail, with the numbers that are left."""
    parts = [_Part(value, str(value)) for value in drawn.numbers]
    for planned in drawn.moves:
      stray = _random_move(write.rng, parts)
      move = _find(parts, planned) or stray
      show = lambda move, parts=parts: _show(move, _after(parts, move) if detailed else ())
      parts = _after(parts, write.step(move, stray, show))
    return _bare(parts[0].text)

  def guess(self, drawn: Game, rng: random.Random) -> str:
    """Random moves."""
    return self.work(drawn, Writer(rng, error=1.0), detailed=False)


_Move = tuple[_Part, str, _Part]


def _result(move: _Move) -> _Part:
  left, sign, right = move
  value, _ = evaluate(f"{left.value}{sign}{right.value}")
  return _Part(int(value), f"({left.text}{sign}{right.text})")


def _random_move(rng: random.Random, parts: list[_Part]) -> _Move:
  """Two numbers and an operation whose result is whole, not negative and below a thousand."""
  left, right = sorted(rng.sample(parts, 2), key=lambda part: -part.value)
  signs = ["+", "-"] + ["*"] * (left.value * right.value < 1000)
  signs += ["/"] * (right.value > 1 and not left.value % right.value)
  return left, rng.choice(signs), right


def _find(parts: list[_Part], planned: tuple[int, str, int]) -> _Move | None:
  """The planned move if its numbers are there."""
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
  return text[1:-1] if text.startswith("(") else text  # `_result` puts a pair around the whole
