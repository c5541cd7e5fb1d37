"""Small programming tasks: what a function of a list of integers is to return, and unit tests."""

import dataclasses
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from model.checks import require_range
from rl.extraction import unfenced
from rl.tasks.documents import Writer
from rl.tasks.generated import Generated


class _Piece(NamedTuple):
  """A piece of a program, in words, in Python as source, and as a function."""

  words: str
  source: str
  apply: Callable


_KEEP = (
    _Piece("even", "x % 2 == 0", lambda x: x % 2 == 0),
    _Piece("odd", "x % 2 == 1", lambda x: x % 2 == 1),
    _Piece("positive", "x > 0", lambda x: x > 0),
    _Piece("negative", "x < 0", lambda x: x < 0),
    *(_Piece(f"above {k}", f"x > {k}", lambda x, k=k: x > k) for k in range(1, 6)),
    *(_Piece(f"below {k}", f"x < {k}", lambda x, k=k: x < k) for k in range(1, 6)),
    *(_Piece(f"divisible by {k}", f"x % {k} == 0", lambda x, k=k: x % k == 0) for k in (3, 4, 5)),
)
_CHANGE = (
    _Piece("squared", "x * x", lambda x: x * x),
    _Piece("doubled", "2 * x", lambda x: 2 * x),
    _Piece("negated", "-x", lambda x: -x),
    *(_Piece(f"plus {k}", f"x + {k}", lambda x, k=k: x + k) for k in range(1, 10)),
    *(_Piece(f"minus {k}", f"x - {k}", lambda x, k=k: x - k) for k in range(1, 10)),
)
_RETURN = (
    _Piece("sum", "sum({})", sum),
    _Piece("largest, or 0,", "max({}, default=0)", lambda values: max(values, default=0)),
    _Piece("smallest, or 0,", "min({}, default=0)", lambda values: min(values, default=0)),
    _Piece("sorted list", "sorted({})", sorted),
)
_CASES = 12
_LOWEST, _HIGHEST = -9, 20


class Function(NamedTuple):
  """What a function does with a list: keeps what passes all, changes each, makes one of them."""

  keep: tuple[_Piece, ...]
  change: _Piece
  give: _Piece

  def source(self) -> str:
    """In Python."""
    conditions = " and ".join(piece.source for piece in self.keep)
    inner = f"{self.change.source} for x in xs if {conditions}"
    inner = f"({inner})" if "," in self.give.source else inner
    return f"def f(xs): return {self.give.source.format(inner)}"

  def __call__(self, xs: list[int]) -> Any:
    return self.give.apply([self.change.apply(x) for x in xs if _keeps(self.keep, x)])


@dataclasses.dataclass(frozen=True)
class Programs(Generated[Function]):
  """One to `conditions` conditions on the numbers that count; "harder" has one more.

  An answer is Python that defines `f`, in a Markdown fence or not; it is right if it passes the
  asserts of column "tests" in the sandbox.

  Attributes:
    conditions: at most, 1..3.
    timeout_s: wall-clock limit of the tests, in seconds.
    memory_mb: memory limit, in MiB.
    seed: of the problems.
  """

  name: ClassVar[str] = "programs"
  conditions: int = 1
  timeout_s: float = 2.0
  memory_mb: int = 256
  seed: int = 0

  def __post_init__(self):
    require_range(self, 1, 3, "conditions")
    require_range(self, 0.1, 600, "timeout_s")
    require_range(self, 16, 65536, "memory_mb")

  def draw(self, rng: random.Random, harder: bool) -> Function | None:
    """The pieces of a function, if conditions neither contradict nor contain each other."""
    count = self.conditions + 1 if harder else rng.randint(1, self.conditions)
    keep = tuple(rng.sample(_KEEP, count))
    without = [keep[:i] + keep[i + 1:] for i in range(count)]
    kept = _count_kept(keep)
    if kept < 3 or any(_count_kept(fewer) == kept for fewer in without):
      return None
    return Function(keep, rng.choice(_CHANGE), rng.choice(_RETURN))

  def key(self, drawn: Function) -> str:
    """Conditions in any order, the rest as it is."""
    return str([sorted(piece.words for piece in drawn.keep), drawn.change.words, drawn.give.words])

  def pose(self, drawn: Function) -> tuple[str, str, dict[str, Any]]:
    """What `f` returns, its source, and asserts in column "tests"."""
    kept = " and ".join(piece.words for piece in drawn.keep)
    question = (f"write f(xs): the {drawn.give.words} of those in xs that are {kept}, "
                f"each {drawn.change.words}")
    return question, drawn.source(), {"tests": _tests(drawn, self.key(drawn))}

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether the program passes its tests in the sandbox."""
    return self.check_all([answer], [columns])[0]

  def check_all(self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """`check` of each program, as many at a time as there are CPU cores."""
    from rl.sandbox import passes_many
    pairs = [(unfenced(answer), row["tests"]) for answer, row in zip(answers, rows, strict=True)]
    return passes_many(pairs, timeout_s=self.timeout_s, memory_mb=self.memory_mb)

  def work(self, drawn: Function, write: Writer, detailed: bool) -> str:
    """A line a piece; in detail, with the words that it stands for."""
    def sample_token(what: str, right: _Piece, pieces: tuple[_Piece, ...]) -> _Piece:
      wrong = write.rng.choice([piece for piece in pieces if piece is not right])
      said = f"{right.words}: " if detailed else ""
      return write.step(right, wrong, lambda piece: f"{what} {said}{piece.source.format('...')}")

    keep = tuple(sample_token("if", piece, _KEEP) for piece in drawn.keep)
    return Function(keep, sample_token("take", drawn.change, _CHANGE),
                    sample_token("return", drawn.give, _RETURN)).source()

  def guess(self, drawn: Function, rng: random.Random) -> str:
    """A program with every piece wrong."""
    return self.work(drawn, Writer(rng, error=1.0), detailed=False)


def _keeps(pieces: tuple[_Piece, ...], x: int) -> bool:
  return all(piece.apply(x) for piece in pieces)


def _count_kept(pieces: tuple[_Piece, ...]) -> int:
  """Of all the numbers that tests have."""
  return sum(_keeps(pieces, x) for x in range(_LOWEST, _HIGHEST + 1))


def _tests(function: Function, key: str) -> str:
  rng = random.Random(zlib.crc32(key.encode()))
  cases = [[], *([rng.randint(_LOWEST, _HIGHEST) for _ in range(rng.randint(1, 10))]
                 for _ in range(_CASES))]
  return "\n".join(f"assert f({xs}) == {function(xs)!r}" for xs in cases)
