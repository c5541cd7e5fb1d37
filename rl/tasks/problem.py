"""The interface of tasks: problems by split and index, and checks of answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with a reference answer.

  Attributes:
    id: an id that is unique among the problems of all tasks.
    question: the text that is inserted into a prompt template.
    answer: a correct answer, of which there may be several.
    task: spec of the task that checks answers, see `rl.tasks.get_task`.
    columns: further columns for rewards, by name; plain data.
  """

  id: str
  question: str
  answer: str
  task: str
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def row(self) -> dict[str, Any]:
    """Returns the columns that rewards are given, including "answer" and "task"."""
    return {"answer": self.answer, "task": self.task, **self.columns}


class Task(Protocol):
  """Problems that are determined by the spec, the split and an index.

  Attributes:
    name: the task's name in specs.
    splits: names of the splits.
  """

  name: str
  splits: tuple[str, ...]

  def size(self, split: str) -> int | None:
    """Returns the number of problems in a split; None if it is unlimited."""

  def problem(self, split: str, index: int) -> Problem:
    """Returns the problem at an index; in a finite split, the first follows the last again.

    Raises:
      ValueError: for a split that is not one of `splits`.
    """

  def where(self, problem: Problem) -> str:
    """Returns where a problem comes from, for messages."""
    return f"problem {problem.id}"

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether an answer is correct; None if that cannot be decided.

    Args:
      answer: the answer's text.
      columns: the problem's `Problem.row`.
    """

  def check_all(
      self, answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Returns `check` of each answer; a task that waits for other processes checks in parallel."""
    return [self.check(answer, row) for answer, row in zip(answers, rows, strict=True)]

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two answers to a problem count as one in a majority vote.

    They do if they are the same text, or if `check` says so; a task whose `check` compares an
    answer with the reference gives it the other answer as the reference.

    Args:
      first: an answer's text.
      second: another answer's text, or the reference answer.
      columns: the problem's `Problem.row`.
    """
    return first.strip() == second.strip()


def require_split(task: Task, split: str) -> None:
  """Raises ValueError unless the task has such a split."""
  if split not in task.splits:
    raise ValueError(f"task {task.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
