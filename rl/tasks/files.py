"""A task of questions and answers from a JSONL file, such as GSM8K's in its original format."""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from rl.tasks.equality import is_parsable, same_answer
from rl.tasks.generated import half_of
from rl.tasks.problem import Problem, Task, require_split


@dataclasses.dataclass(frozen=True)
class File(Task):
  """Problems from rows `{"question": ..., "answer": ...}`, in the file's order.

  Of an answer with reasoning, the part after the last `####` is used, as in GSM8K
  (arXiv:2110.14168). It must be a number, in which thousands may be separated by commas, or LaTeX.
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
    """Whether the answer equals the reference as a number or as mathematics; None if unclear."""
    return same_answer(answer, columns["answer"])

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
        rows.append(Problem(f"file:{self.path}/{number}", *row, f"file:{self.path}"))
    return rows, excluded

  def _lines(self) -> Iterator[tuple[int, bytes]]:
    with open(self.path, "rb") as file:
      yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _row(line: bytes) -> tuple[str, str] | str:
  """Returns a line's question and answer, or the reason why the line cannot be used."""
  try:
    row = json.loads(line)
  except ValueError:  # including UnicodeDecodeError
    return "broken"
  question, answer = (row.get(name) if isinstance(row, dict) else None
                      for name in ("question", "answer"))
  if not isinstance(question, str) or not question.strip():
    return "without a question"
  if isinstance(answer, int | float) and not isinstance(answer, bool):
    answer = str(answer)
  final = answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""
  if not final:
    return "without an answer"
  return (question.strip(), final) if is_parsable(final) else "with an unparsable answer"
