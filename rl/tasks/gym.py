"""Tasks from reasoning-gym's data sets, whose own scorers check the answers."""

import atexit
import base64
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import random
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from model.checks import did_you_mean
from rl.tasks.child import Child
from rl.tasks.generated import half_of
from rl.tasks.problem import Problem, Task, require_split

_INDICES = 2**31
_ATTEMPTS = 1000
_CHILD = pathlib.Path(__file__).with_name("gym_child.py")
_scorer, _lock = Child(_CHILD), threading.Lock()


@dataclasses.dataclass(frozen=True)
class Gym(Task):
  """A data set of reasoning-gym with its default settings, such as `gym:chain_sum`.

  An answer is correct only if its score is 1, as the scorers give partial credit for incorrect
  answers. The scorers are third-party code, and some evaluate answers or pass them to a computer
  algebra system. They run in a process that is killed after 5 s of CPU time, or beyond 4 GiB of
  memory, for an answer, which is then incorrect. It is not a sandbox: if the results matter, or the
  answers may be adversarial, prefer this package's own tasks.

  Attributes:
    dataset: name of the data set in reasoning-gym.
    seed: seed of the problems.
  """

  name: ClassVar[str] = "gym"
  splits: ClassVar[tuple[str, ...]] = ("train", "heldout")
  dataset: str
  seed: int = 0

  def __post_init__(self):
    names = _factory().DATASETS
    if self.dataset not in names:
      raise ValueError(f"reasoning-gym has no data set {self.dataset!r}"
                       f"{did_you_mean(self.dataset, names)} Its data sets are: "
                       f"{', '.join(sorted(names))}")

  @property
  def spec(self) -> str:
    """The task's spec, see `rl.tasks.get_task`."""
    return f"gym:{self.dataset}" + f":seed={self.seed}" * bool(self.seed)

  def size(self, split: str) -> None:
    """Returns None, as the number of problems is unlimited."""
    require_split(self, split)

  def problem(self, split: str, index: int) -> Problem:
    """Returns the problem at an index of a split; a question's split is decided by its hash.

    Raises:
      ValueError: for an unknown split, or if the data set has too few questions for it.
    """
    require_split(self, split)
    rng = random.Random(f"{self.spec} {split} {index}")
    for _ in range(_ATTEMPTS):
      entry = self._data[rng.randrange(_INDICES)]
      if half_of(entry["question"]) == split:
        return Problem(f"{self.spec}/{split}/{index}", entry["question"], str(entry["answer"]),
                       self.spec, {"gym_entry": entry})
    raise ValueError(f"{self.spec} has too few questions for a split {split!r}: use another data "
                     "set")

  def check(self, answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether the data set's scorer gives the answer a score of exactly 1."""
    return self._accepts(answer, columns["gym_entry"])

  def same(self, first: str, second: str, columns: Mapping[str, Any]) -> bool:
    """Whether two answers are the same text, or the scorer accepts each as the other's reference.

    Some scorers ignore the reference, as their problems have several solutions. For these, all
    correct answers are one.
    """
    if first.strip() == second.strip():
      return True
    entry = lambda answer: {**columns["gym_entry"], "answer": answer}
    return self._accepts(first, entry(second)) and self._accepts(second, entry(first))

  def _accepts(self, answer: str, entry: Mapping[str, Any]) -> bool:
    request = pickle.dumps((self.dataset, self.seed, _INDICES, answer, dict(entry)))
    with _lock:
      reply = _scorer.ask(base64.b64encode(request))
    return bool(reply) and json.loads(reply)

  @functools.cached_property
  def _data(self) -> Any:
    return _factory().create_dataset(self.dataset, seed=self.seed, size=_INDICES)


def _factory() -> Any:
  try:
    import reasoning_gym.factory
  except ImportError as error:
    raise ValueError("tasks gym:NAME need the package reasoning-gym: install it by pip install "
                     "reasoning-gym") from error
  return reasoning_gym.factory


def _forget() -> None:
  """Leaves the process to the parent: two that share it would read each other's replies."""
  global _scorer, _lock
  _scorer, _lock = Child(_CHILD), threading.Lock()


atexit.register(lambda: _scorer.kill())
os.register_at_fork(after_in_child=_forget)
