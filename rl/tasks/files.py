"""A task of questions and answers from a JSONL file, such as GSM8K's in its original format."""

import collections
import dataclasses
import decimal
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from absl import logging

from rl.extraction import joined, unfenced
from rl.tasks.equality import are_parsable, same_answer, same_answers
from rl.tasks.generated import half_of
from rl.tasks.problem import Problem, Task, require_split

# Names of columns that do not come from the file, see `Problem.row` and `rl.sampler.Samples`.
_RESERVED = frozenset({"task", "prompts", "completions", "num_tokens", "row"})
_TIMEOUT_S, _MEMORY_MB = 2.0, 256  # limits on a program and its tests


@dataclasses.dataclass(frozen=True)
class File(Task):
  """Problems from rows `{"question": ..., "answer": ...}`.

  Of an answer with reasoning, the part after the last `####` is used, as in GSM8K
  (arXiv:2110.14168). It must be a number, in which thousands may be separated by commas, or LaTeX.
  All other columns of a row are passed to rewards. A row without an answer but with `tests`, Python
  asserts as one text or a list, is a programming problem: an answer is correct if it passes them.

  A tenth of the questions, selected by hash, is the split "heldout", and the others are "train";
  both are in an order that the seed decides. The split "all", for files that are a test set as a
  whole, is in the file's order.

  Attributes:
    path: path of the JSONL file.
    seed: seed of the order of "train" and "heldout".
  """

  name: ClassVar[str] = "file"
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout", "all")
  path: str
  seed: int = 0

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

  def where(self, problem: Problem) -> str:
    """Returns the problem's line in the file, counted from 1."""
    return f"line {problem.id.rpartition('/')[2]} of {self.path}"

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether the answer equals the reference, or passes the tests of a row without a reference."""
    return self.check_all([answer], [columns])[0]

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Returns `check` of each answer, comparing several at a time."""
    programs = [i for i, row in enumerate(rows) if not row["answer"] and row.get("tests")]
    golds = [row["answer"] for row in rows]
    verdicts = same_answers(list(zip(answers, golds, strict=True)))
    if programs:
      from rl.sandbox import passes_many
      passed = passes_many([(unfenced(answers[i]), joined(rows[i]["tests"])) for i in programs],
                           timeout_s=_TIMEOUT_S, memory_mb=_MEMORY_MB)
      for i, verdict in zip(programs, passed, strict=True):
        verdicts[i] = verdict
    return verdicts

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two answers are the same text, or equal as numbers or as mathematics."""
    if first.strip() == second.strip():
      return True
    return bool(columns["answer"]) and same_answer(first, second) is True

  @functools.cached_property
  def _by_split(self) -> dict[str, list[Problem]]:
    rows, excluded = self._read
    summary = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
    if not rows:
      raise ValueError(f"task file:{self.path} has no usable row ({summary or 'it is empty'}); "
                       'every line should be a row {"question": ..., "answer": ...}')
    if summary:
      logging.warning("%s: using %d rows; left out: %s", self.path, len(rows), summary)
    splits = {"all": rows, "train": [], "heldout": []}
    place = lambda row: hashlib.sha256(f"{self.seed} {row.question}".encode()).digest()
    for row in sorted(rows, key=place):
      splits[half_of(row.question)].append(row)
    return splits

  @functools.cached_property
  def _read(self) -> tuple[list[Problem], collections.Counter[str]]:
    rows, excluded, reserved = [], collections.Counter(), set()
    for number, line in self._lines():
      row = _row(line)
      if isinstance(row, str):
        excluded[row] += 1
      else:
        reserved |= _RESERVED & row[2].keys()
        columns = {name: value for name, value in row[2].items() if name not in _RESERVED}
        rows.append(Problem(f"file:{self.path}/{number}", row[0], row[1], self.spec, columns))
    if reserved:
      logging.warning("%s: the columns %s are not passed to rewards, as these names have another "
                      "meaning: rename them", self.path, ", ".join(sorted(reserved)))
    parsable = are_parsable([row.answer for row in rows])
    usable = [row for row, parses in zip(rows, parsable, strict=True) if parses or not row.answer]
    excluded["with an unparsable answer"] = len(rows) - len(usable)
    return usable, +excluded

  def _lines(self) -> Iterator[tuple[int, bytes]]:
    with open(self.path, "rb") as file:
      yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _row(line: bytes) -> tuple[str, str, dict[str, Any]] | str:
  """Returns a line's question, answer and other columns, or why the line cannot be used."""
  try:
    row = json.loads(line)
  except ValueError:  # including UnicodeDecodeError
    return "broken"
  question, answer = (row.pop(name, None) if isinstance(row, dict) else None
                      for name in ("question", "answer"))
  if not isinstance(question, str) or not question.strip():
    return "without a question"
  if isinstance(answer, int | float) and not isinstance(answer, bool):
    answer = _digits(answer)
  final = answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""
  return (question.strip(), final, row) if final or row.get("tests") else "without an answer"


def _digits(value: float) -> str:
  """Returns a JSON number in digits where Python would write an exponent, as for 0.00001."""
  return f"{decimal.Decimal(repr(value)):f}" if 1e-20 < abs(value) < 1e30 else repr(value)
