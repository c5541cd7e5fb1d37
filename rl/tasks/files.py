"""A task of questions and answers from a JSONL file, such as GSM8K's in its original format."""

import dataclasses
import decimal
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from absl import logging

from rl.extraction import joined
from rl.sandbox import check_tests
from rl.tasks.equality import are_parsable, same_answer, same_answers
from rl.tasks.generated import half_of
from rl.tasks.problem import Problem, Task, require_split
from rl.tasks.programs import check_programs
from train.sources import BOM, BadRowError, Tally, parse_row

# Names of columns that do not come from the file, see `Problem.row` and `rl.sampler.Samples`.
_RESERVED = frozenset({"task", "prompts", "completions", "num_tokens", "row"})
_UNPARSABLE = "with an unparsable answer"
_ADVICE = (". Answers that are neither numbers nor LaTeX are for rewards of your own: add one to "
           "rewards.custom, and set rewards.accuracy=0")
TIMEOUT_S, MEMORY_MB = 4.0, 512  # limits of programs; of each pair of input and output


@dataclasses.dataclass(frozen=True)
class File(Task):
  """Problems from rows with the columns "question" and "answer" or "tests".

  Of an answer with reasoning, the part after the last `####` is used, as in GSM8K
  (arXiv:2110.14168). It must be a number, in which thousands may be separated by commas, or LaTeX,
  unless `any_answer` is set. All other columns of a row are passed to rewards.

  A row with "tests" asks for a program, which is correct if it passes them in the sandbox within
  `TIMEOUT_S` and `MEMORY_MB`; "answer" may hold a program that does. Tests are one of:
  - Python source with asserts that call the program's functions, as one text or a list of texts:
    {"question": "Write f(x), the square of x.", "tests": "assert f(3) == 9"}
  - a list of inputs and outputs. The program reads stdin, and what it prints has to equal the
    output up to whitespace at the end of lines and of the whole:
    {"question": "Print the square of each line's number.",
     "tests": [{"input": "3\\n4\\n", "output": "9\\n16\\n"}]}
  See `rl.sandbox.judge`.

  A tenth of the questions, selected by hash, is the split "heldout", and the others are "train";
  both are in an order that the seed decides. The split "all", for files that are a test set as a
  whole, is in the file's order.

  Attributes:
    path: path of the JSONL file.
    seed: seed of the order of "train" and "heldout".
    any_answer: use rows whose answer is any text, or missing, for rewards that do not ask `check`,
      which is None for them. A missing answer is "", and one that is neither text nor a number is
      its JSON.
  """

  name: ClassVar[str] = "file"
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout", "all")
  path: str
  seed: int = 0
  any_answer: bool = False

  def __post_init__(self):
    if not pathlib.Path(self.path).is_file():
      raise ValueError(f"task file:{self.path}: there is no such file; give the path of a JSONL "
                       "file")

  @property
  def spec(self) -> str:
    """The task's spec, see `rl.tasks.get_task`."""
    return f"file:{self.path}" + f":seed={self.seed}" * bool(self.seed)

  @functools.cached_property
  def excluded(self) -> dict[str, int]:
    """The number of rows that were left out, by reason."""
    return dict(self._read[1].bad)

  def size(self, split: str) -> int:
    """Returns the number of problems in a split."""
    require_split(self, split)
    return len(self._by_split[split])

  def problem(self, split: str, index: int) -> Problem:
    """Returns the problem at an index of a split; after the last one, the first follows again.

    Raises:
      ValueError: for an unknown or empty split, or if no row of the file can be used.
    """
    if not self.size(split):
      raise ValueError(
          f"task file:{self.path} has no row in split {split!r}, as every row is in a split that "
          "its question decides; add rows with other questions, or use split 'all'")
    return self._by_split[split][index % self.size(split)]

  def where(self, problem: Problem) -> str:
    """Returns the problem's line in the file, counted from 1."""
    return f"line {problem.id.rpartition('/')[2]} of {self.path}"

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether the answer equals the reference as a number or as mathematics; None if unclear.

    In a row with tests, whether the program passes them; None if they are broken.
    """
    return self.check_all([answer], [columns])[0]

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Returns `check` of each answer, comparing several and running several programs at a time.

    Raises:
      ValueError: if a row has tests, and no sandbox works on this machine.
    """
    tested = {i for i, row in enumerate(rows) if row.get("tests") is not None}
    passed = iter(check_programs(
        [answers[i] for i in sorted(tested)], [rows[i]["tests"] for i in sorted(tested)],
        timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB))
    equal = iter(same_answers([(answer, row["answer"]) for i, (answer, row) in
                               enumerate(zip(answers, rows, strict=True)) if i not in tested]))
    return [next(passed if i in tested else equal) for i in range(len(answers))]

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two answers are the same text, or equal as numbers or as mathematics.

    They are equal if either is correct with the other as the reference, in which order is free.
    """
    if first.strip() == second.strip():
      return True
    return columns.get("tests") is None and (
        same_answer(first, second) is True or same_answer(second, first) is True)

  @functools.cached_property
  def _by_split(self) -> dict[str, list[Problem]]:
    rows, tally = self._read
    found = f"{tally.kinds}. {tally.first_examples}" if tally.bad else "it is empty"
    advice = _ADVICE * (_UNPARSABLE in tally.bad)
    if not rows:
      raise ValueError(f"task file:{self.path} has no usable row: {found}. Every line should be a "
                       'row {"question": ..., "answer": ...} or {"question": ..., "tests": ...}'
                       + advice)
    if tally.bad:
      logging.warning("%s: using %d rows; left out: %s%s", self.path, len(rows), found, advice)
    splits = {"all": rows, "train": [], "heldout": []}
    place = lambda row: hashlib.sha256(f"{self.seed} {row.question}".encode()).digest()
    for row in sorted(rows, key=place):
      splits[half_of(row.question)].append(row)
    return splits

  @functools.cached_property
  def _read(self) -> tuple[list[Problem], Tally]:
    rows, tally, reserved = [], Tally(), set()
    for number, line in self._lines():
      try:
        question, answer, row = _row(line, self.any_answer)
      except BadRowError as bad:
        tally.add_bad(f"line {number}", bad)
        continue
      reserved |= _RESERVED & row.keys()
      columns = {name: value for name, value in row.items() if name not in _RESERVED}
      rows.append(Problem(f"file:{self.path}/{number}", question, answer, self.spec, columns))
    if reserved:
      logging.warning("%s: the columns %s are not passed to rewards, as these names have another "
                      "meaning: rename them", self.path, ", ".join(sorted(reserved)))
    if self.any_answer:
      return rows, tally
    tested = [row.columns.get("tests") is not None for row in rows]
    parsable = are_parsable(["0" if skip else row.answer
                             for row, skip in zip(rows, tested, strict=True)])
    for row, parses in zip(rows, parsable, strict=True):
      if not parses:
        tally.add_bad(f"line {row.id.rpartition('/')[2]}", BadRowError(
            _UNPARSABLE, f"the answer {row.answer!r:.60} is neither a number nor "
            "mathematics"))
    return [row for row, parses in zip(rows, parsable, strict=True) if parses], tally

  def _lines(self) -> Iterator[tuple[int, bytes]]:
    with open(self.path, "rb") as file:
      for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
          yield number, line


def _row(line: bytes, any_answer: bool) -> tuple[str, str, dict[str, Any]]:
  """Returns a line's question, answer and other columns.

  Raises:
    BadRowError: if the line cannot be used.
  """
  row = parse_row(line)
  question, answer = row.pop("question", None), row.pop("answer", None)
  if not isinstance(question, str) or not question.strip():
    raise BadRowError("without a question", "there is no text \"question\"")
  try:
    f"{question}{answer}".encode()
  except UnicodeEncodeError as error:  # JSON can express a lone surrogate
    raise BadRowError("invalid UTF-8", str(error)) from error
  if row.get("tests") is not None:
    return _with_tests(question.strip(), answer, row)
  if isinstance(answer, int | float) and not isinstance(answer, bool):
    answer = _digits(answer)
  if any_answer and not isinstance(answer, str):
    return question.strip(), "" if answer is None else json.dumps(answer), row
  final = answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""
  if not final and not any_answer:
    raise BadRowError("without an answer", "there is neither an \"answer\" nor \"tests\"")
  return question.strip(), final, row


def _with_tests(question: str, answer: Any, row: dict) -> tuple[str, str, dict[str, Any]]:
  tests = joined(row["tests"])
  try:
    check_tests(tests)
  except ValueError as error:
    raise BadRowError("with broken tests", f"broken tests: {error}") from error
  return question, answer if isinstance(answer, str) else "", row | {"tests": tests}


def _digits(value: float) -> str:
  """Returns a JSON number in digits where Python would write an exponent, as for 0.00001."""
  return f"{decimal.Decimal(repr(value)):f}" if 1e-20 < abs(value) < 1e30 else repr(value)
