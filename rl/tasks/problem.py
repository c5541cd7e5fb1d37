"""What a task is: problems by split and index, and a check of answers to them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question that has an answer.

  Attributes:
    id: differs between problems, and between tasks.
    question: as it goes into a template.
    answer: the right one, or one of them.
    task: the spec by which `get_task` finds what checks answers.
    columns: what else rewards may ask for, by name: plain data.
  """

  id: str
  question: str
  answer: str
  task: str
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def row(self) -> dict[str, Any]:
    """The columns that rewards are given, "answer" and "task" among them."""
    return {"answer": self.answer, "task": self.task, **self.columns}


class Task(Protocol):
  """Problems, the same ones each time for the same spec, split and index."""

  name: str
  splits: tuple[str, ...]

  def size(self, split: str) -> int | None:
    """How many problems a split has; None if they do not run out."""

  def problem(self, split: str, index: int) -> Problem:
    """The index-th problem; where problems run out they begin again.

    Raises:
      ValueError: for a split that is not one of `splits`.
    """

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether it answers the problem whose `Problem.row` this is; None if nobody can tell."""

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """`check` of each answer; a task that waits for other processes does it side by side."""
    return [self.check(answer, row) for answer, row in zip(answers, rows, strict=True)]


def require_split(task: Task, split: str) -> None:
  """Raises ValueError unless the task has such a split."""
  if split not in task.splits:
    raise ValueError(f"task {task.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
