"""A task of questions from a JSONL file, with answers, such as GSM8K, or with tests of programs."""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from absl import logging

from rl.sandbox import check_tests
from rl.tasks.equality import is_parsable, same_answer
from rl.tasks.generated import half_of
from rl.tasks.problem import Problem, Task, require_split
from rl.tasks.programs import check_programs

TIMEOUT_S, MEMORY_MB = 4.0, 512  # limits of programs; of each pair of input and output


@dataclasses.dataclass(frozen=True)
class File(Task):
  """Problems from rows with the columns "question" and "answer" or "tests", in the file's order.

  Of an answer with reasoning, the part after the last `####` is used, as in GSM8K
  (arXiv:2110.14168). It must be a number, in which thousands may be separated by commas, or LaTeX.

  A row with "tests" asks for a program, which is correct if it passes them in the sandbox within
  `TIMEOUT_S` and `MEMORY_MB`; "answer" may hold a program that does. Tests are one of:
  - Python source with asserts that call the program's functions:
    {"question": "Write f(x), the square of x.", "tests": "assert f(3) == 9"}
  - a list of inputs and outputs. The program reads stdin, and what it prints has to equal the
    output up to whitespace at the end of lines and of the whole:
    {"question": "Print the square of each line's number.",
     "tests": [{"input": "3\n4\n", "output": "9\n16\n"}]}
  See `rl.sandbox.judge`.

  A tenth of the questions, selected by hash, is the split "heldout", and the others are "train";
  the split "all" is for files that are a test set as a whole.

  Attributes:
    path: path of the JSONL file.
  """

  name: ClassVar[str] = "file"
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout", "all")
  path: str

  def __post_init__(self):
    if not pathlib.Path(self.path).is_file():
      raise ValueError(f"task file:{self.path}: there is no such file; give the path of a JSONL "
                       "file")

  @functools.cached_property
  def excluded(self) -> dict[str, int]:
    """The number of rows that were left out, by reason."""
    return dict(self._read[1])

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
      raise ValueError(f"task file:{self.path} has no row in split {split!r}; use split 'all'")
    return self._by_split[split][index % self.size(split)]

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether the answer equals the reference as a number or as mathematics; None if unclear.

    In a row with tests, whether the program passes them; None if they are broken.
    """
    return self.check_all([answer], [columns])[0]

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Returns `check` of each answer, running as many programs at a time as there are CPU cores.

    Raises:
      ValueError: if a row has tests, and no sandbox works on this machine.
    """
    tested = [i for i, row in enumerate(rows) if row.get("tests") is not None]
    passed = check_programs([answers[i] for i in tested], [rows[i]["tests"] for i in tested],
                            timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB)
    verdicts = dict(zip(tested, passed, strict=True))
    return [verdicts[i] if i in verdicts else same_answer(answer, row["answer"])
            for i, (answer, row) in enumerate(zip(answers, rows, strict=True))]

  @functools.cached_property
  def _by_split(self) -> dict[str, list[Problem]]:
    rows, excluded = self._read
    summary = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
    if not rows:
      raise ValueError(f"task file:{self.path} has no usable row ({summary or 'it is empty'}); "
                       'every line should be a row {"question": ..., "answer": ...} or '
                       '{"question": ..., "tests": ...}')
    if summary:
      logging.warning("%s: using %d rows; left out: %s", self.path, len(rows), summary)
    splits = {"all": rows, "train": [], "heldout": []}
    for row in rows:
      splits[half_of(row.question)].append(row)
    return splits

  @functools.cached_property
  def _read(self) -> tuple[list[Problem], collections.Counter[str]]:
    rows, excluded = [], collections.Counter()
    for number, line in self._lines():
      row = _row(line)
      if isinstance(row, str):
        excluded[row] += 1
      else:
        question, answer, columns = row
        spec = f"file:{self.path}"
        rows.append(Problem(f"{spec}/{number}", question, answer, spec, columns))
    return rows, excluded

  def _lines(self) -> Iterator[tuple[int, bytes]]:
    with open(self.path, "rb") as file:
      yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _row(line: bytes) -> tuple[str, str, dict[str, Any]] | str:
  """Returns a line's question, answer and further columns, or why the line cannot be used."""
  try:
    row = json.loads(line)
  except ValueError:  # including UnicodeDecodeError
    return "broken"
  question, answer, tests = (row.get(name) if isinstance(row, dict) else None
                             for name in ("question", "answer", "tests"))
  if not isinstance(question, str) or not question.strip():
    return "without a question"
  if tests is not None:
    return _with_tests(question.strip(), answer, tests)
  if isinstance(answer, int | float) and not isinstance(answer, bool):
    answer = str(answer)
  final = answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""
  if not final:
    return "without an answer"
  return (question.strip(), final, {}) if is_parsable(final) else "with an unparsable answer"


def _with_tests(question: str, answer: Any, tests: Any) -> tuple[str, str, dict[str, Any]] | str:
  try:
    check_tests(tests)
  except ValueError:
    return "with broken tests"
  return question, answer if isinstance(answer, str) else "", {"tests": tests}
