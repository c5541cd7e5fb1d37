"""Small programming tasks: functions of a list of integers, described in words, with unit tests."""

import dataclasses
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from model.checks import require_range
from rl.extraction import unfenced
from rl.sandbox import LEAST_MEMORY_MB, Tests, judge_many
from rl.tasks.documents import Writer
from rl.tasks.generated import Generated


class _Piece(NamedTuple):
  """A piece of a program.

  Attributes:
    words: the piece in words, as questions describe it.
    source: the piece as Python source.
    apply: the piece as a function.
  """

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
_CASES = 12  # unit tests with non-empty lists
_LOWEST, _HIGHEST = -9, 20  # range of the numbers in unit tests


class Function(NamedTuple):
  """A function that filters a list, changes each number kept, and returns an aggregate of them.

  Attributes:
    keep: conditions that a number must all fulfil to be kept.
    change: the change made to each number that is kept.
    give: the aggregate that is returned.
  """

  keep: tuple[_Piece, ...]
  change: _Piece
  give: _Piece

  def source(self) -> str:
    """Returns the function as Python source."""
    conditions = " and ".join(piece.source for piece in self.keep)
    inner = f"{self.change.source} for x in xs if {conditions}"
    inner = f"({inner})" if "," in self.give.source else inner
    return f"def f(xs): return {self.give.source.format(inner)}"

  def __call__(self, xs: list[int]) -> Any:
    return self.give.apply([self.change.apply(x) for x in xs if _keeps(self.keep, x)])


@dataclasses.dataclass(frozen=True)
class Programs(Generated[Function]):
  """Functions of the numbers that meet 1 to `conditions` conditions; "harder" has one more.

  An answer is Python source that defines `f`, with or without a Markdown fence. It is correct if it
  passes the tests of the column "tests" in the sandbox: asserts for this task's own problems, or,
  for any row that is given to `check`, pairs of input and output, see `rl.sandbox.judge`.

  Attributes:
    conditions: largest number of conditions in a problem, 1..3.
    timeout_s: wall-clock limit on running a program with its tests, in seconds.
    memory_mb: memory limit of each of the two processes that run them, in MiB, at least 64.
    seed: seed of the problems.
  """

  name: ClassVar[str] = "programs"
  conditions: int = 1
  timeout_s: float = 2.0
  memory_mb: int = 256
  seed: int = 0

  def __post_init__(self):
    require_range(self, 1, 3, "conditions")
    require_range(self, 0.1, 600, "timeout_s")
    require_range(self, LEAST_MEMORY_MB, 65536, "memory_mb")

  def draw(self, rng: random.Random, harder: bool) -> Function | None:
    """Returns a random function; None if its conditions contradict or imply one another."""
    count = self.conditions + 1 if harder else rng.randint(1, self.conditions)
    keep = tuple(rng.sample(_KEEP, count))
    without = [keep[:i] + keep[i + 1:] for i in range(count)]
    kept = _count_kept(keep)
    if kept < 3 or any(_count_kept(fewer) == kept for fewer in without):
      return None
    return Function(keep, rng.choice(_CHANGE), rng.choice(_RETURN))

  def key(self, drawn: Function) -> str:
    """Returns the function in words, its conditions sorted: their order makes no difference."""
    return str([sorted(piece.words for piece in drawn.keep), drawn.change.words, drawn.give.words])

  def pose(self, drawn: Function) -> tuple[str, str, dict[str, Any]]:
    """Returns a description of `f`, its source, and the column "tests" with its asserts."""
    kept = " and ".join(piece.words for piece in drawn.keep)
    question = (f"write f(xs): the {drawn.give.words} of those in xs that are {kept}, "
                f"each {drawn.change.words}")
    return question, drawn.source(), {"tests": _tests(drawn, self.key(drawn))}

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether the program passes its tests in the sandbox; None if these are broken."""
    return self.check_all([answer], [columns])[0]

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Returns `check` of each program, running as many at a time as there are CPU cores.

    Raises:
      ValueError: if no sandbox works on this machine.
    """
    return check_programs(answers, [row["tests"] for row in rows], timeout_s=self.timeout_s,
                          memory_mb=self.memory_mb)

  def work(self, drawn: Function, write: Writer, detailed: bool) -> str:
    """Writes a line for each piece; a detailed solution also quotes the words it stands for."""
    def step(what: str, correct: _Piece, pieces: tuple[_Piece, ...]) -> _Piece:
      wrong = write.rng.choice([piece for piece in pieces if piece is not correct])
      words = f"{correct.words}: " if detailed else ""
      return write.step(correct, wrong, lambda piece: f"{what} {words}{piece.source.format('...')}")

    keep = tuple(step("if", piece, _KEEP) for piece in drawn.keep)
    return Function(keep, step("take", drawn.change, _CHANGE),
                    step("return", drawn.give, _RETURN)).source()

  def guess(self, drawn: Function, rng: random.Random) -> str:
    """Returns a program in which every piece is incorrect."""
    return self.work(drawn, Writer(rng, error=1.0), detailed=False)


def check_programs(answers: Sequence[str], tests: Sequence[Tests], *, timeout_s: float,
                   memory_mb: int) -> list[bool | None]:
  """Returns whether each program passes its tests, in the sandbox; None where these are broken.

  Args:
    answers: programs, with or without a Markdown fence.
    tests: for each program, asserts or pairs of input and output, see `rl.sandbox.judge`.
    timeout_s: wall-clock limit per program, or per pair of input and output, in seconds.
    memory_mb: memory limit of each process, in MiB.

  Raises:
    ValueError: if no sandbox works on this machine.
  """
  pairs = [(unfenced(answer), test) for answer, test in zip(answers, tests, strict=True)]
  verdicts = judge_many(pairs, timeout_s=timeout_s, memory_mb=memory_mb)
  return [verdict.passed for verdict in verdicts]


def _keeps(pieces: tuple[_Piece, ...], x: int) -> bool:
  return all(piece.apply(x) for piece in pieces)


def _count_kept(pieces: tuple[_Piece, ...]) -> int:
  """Returns how many of the numbers that may occur in unit tests fulfil all conditions."""
  return sum(_keeps(pieces, x) for x in range(_LOWEST, _HIGHEST + 1))


def _tests(function: Function, key: str) -> str:
  rng = random.Random(zlib.crc32(key.encode()))
  cases = [[], *([rng.randint(_LOWEST, _HIGHEST) for _ in range(rng.randint(1, 10))]
                 for _ in range(_CASES))]
  return "\n".join(f"assert f({xs}) == {function(xs)!r}" for xs in cases)
