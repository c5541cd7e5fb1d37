"""Rule-based rewards, functions `reward(prompts, completions, **columns) -> list[float | None]`.

Columns are lists as long as the prompts, such as "answer", "task", "language", "tests" or
"num_tokens"; a reward uses those that it names and ignores the others. None means that a row cannot
be judged: it leaves its group, and nothing is learned from it.
"""

import dataclasses
import importlib
import inspect
import itertools
import math
import numbers
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from model.checks import require
from rl.advantages import LARGEST_REWARD, is_usable, shown
from rl.extraction import (
  is_well_formed,
  joined,
  lenient_answer,
  reasoning,
  strict_answer,
  unfenced,
)
from rl.tasks import get_task
from rl.tasks.equality import same_answers
from train.templates import opens_thinking

Reward = Callable[..., list[float | None]]
_LATEX = re.compile(r"\\[A-Za-z]+")
_HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
_WORD = re.compile(rf"{_HAN}|(?:(?!{_HAN})[^\W\d_])+(?:['’](?:(?!{_HAN})[^\W\d_])+)*")


def accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list:
  """1 if the answer block, with which the completion must end, has a correct answer; else 0.

  R1's accuracy reward (arXiv:2501.12948v1, section 2.2.2). The column "task" holds the spec of the
  task that checks the answer; where it is missing or None, the answer is compared with the column
  "answer" as mathematics.

  Returns:
    1.0, 0.0, or None where the reference answer cannot be parsed, which never counts as a match.

  Raises:
    ValueError: without a column "answer", or for an unknown task.
  """
  return _judge(strict_answer, completions, columns)


def lenient_accuracy(prompts: Sequence[str], completions: Sequence[str],
                     **columns: Sequence) -> list:
  """`accuracy` with answers found by lenient matching; for evaluation, not for training.

  An improvement that `accuracy` shows and this does not is one of format. See
  `rl.extraction.lenient_answer`.
  """
  return _judge(lenient_answer, completions, columns)


def well_formed(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list:
  """1 for one think block, then one answer block, and nothing else; else 0.

  R1's format reward (arXiv:2501.12948v1, section 2.2.2). A prompt that ends with `<think>` has
  already opened the think block.
  """
  return [float(is_well_formed(completion, thinking_opened=opens_thinking(prompt)))
          for prompt, completion in zip(prompts, completions, strict=True)]


def language_consistency(prompts: Sequence[str], completions: Sequence[str], *,
                         language: Sequence[str | None], **columns: Sequence) -> list:
  """The fraction of the reasoning's words that are in the target language (Nature 2025, eq. 7).

  A word is a run of letters, or a single Chinese character. Words of ASCII letters are English,
  Chinese characters are Chinese, and words in other scripts are in neither language. Numbers,
  symbols, single ASCII letters other than "a", "A" and "I", and LaTeX commands are not words.

  Args:
    prompts: one prompt per row.
    completions: one completion per row.
    language: the target language of each row, "en" or "zh", or None.
    columns: ignored.

  Returns:
    A fraction in 0..1; 0 for reasoning that has no words or is not closed, so that a model cannot
    be consistent by saying nothing; None where the row has no target language.

  Raises:
    ValueError: for a language other than "en" and "zh".
  """
  return [None if target is None else _fraction_in(
      target, reasoning(completion, thinking_opened=opens_thinking(prompt)) or "")
      for prompt, completion, target in zip(prompts, completions, language, strict=True)]


def brevity(max_tokens: int) -> Reward:
  """Returns a reward that falls linearly from 1 for 0 tokens to 0 for `max_tokens` or more.

  The reward uses the column "num_tokens", the completion's length.

  Args:
    max_tokens: length from which the reward is 0, in tokens.

  Raises:
    ValueError: unless `max_tokens` is positive.
  """
  require(max_tokens > 0, f"brevity: max_tokens={max_tokens} must be positive")

  def reward(prompts, completions, *, num_tokens, **columns):
    return [max(0.0, 1 - tokens / max_tokens) for tokens in num_tokens]

  return reward


def overlong(max_tokens: int, cache_tokens: int) -> Reward:
  """Returns DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) as a reward.

  It is 0 for up to `max_tokens - cache_tokens` tokens, falls linearly to -1 at `max_tokens`, and
  stays -1 beyond. The reward uses the column "num_tokens", the completion's length.

  Args:
    max_tokens: length from which the reward is -1, in tokens.
    cache_tokens: number of tokens before `max_tokens` over which the reward falls.

  Raises:
    ValueError: unless 0 < cache_tokens <= max_tokens.
  """
  require(0 < cache_tokens <= max_tokens,
          f"overlong: cache_tokens={cache_tokens} must lie in 1..max_tokens={max_tokens}")

  def reward(prompts, completions, *, num_tokens, **columns):
    free = max_tokens - cache_tokens
    return [-min(max(tokens - free, 0) / cache_tokens, 1.0) for tokens in num_tokens]

  return reward


def unit_tests(timeout_s: float = 2.0, memory_mb: int = 256) -> Reward:
  """Returns a reward of 1 for a program that passes its unit tests in the sandbox, else 0.

  The program is the text of the answer block, with or without a Markdown fence. The column "tests"
  holds each row's tests: Python asserts, as one text or a list of texts, or a list of inputs and
  outputs (see `rl.sandbox.judge`). The reward is None for a row without tests (None), and for one
  whose tests are broken.

  Args:
    timeout_s: wall-clock limit per program, in seconds.
    memory_mb: memory limit per process, in MiB.

  Raises:
    ValueError: for limits that the sandbox does not support.
  """
  from rl.sandbox import check_limits, judge_many

  check_limits(timeout_s=timeout_s, memory_mb=memory_mb)

  def reward(prompts, completions, *, tests, **columns):
    rows = [i for i, asserts in enumerate(tests) if asserts is not None]
    verdicts = dict(zip(rows, judge_many(
        [(unfenced(strict_answer(completions[i]) or ""), joined(tests[i])) for i in rows],
        timeout_s=timeout_s, memory_mb=memory_mb), strict=True))
    passed = [verdicts[i].passed if i in verdicts else None for i in range(len(tests))]
    return [None if verdict is None else float(verdict) for verdict in passed]

  return reward


def load(name: str) -> Reward:
  """Returns the reward that `module:function` names, which has the signature of this file's.

  Raises:
    ValueError: if the module cannot be imported, whatever it raises, or has no such function.
  """
  module, _, function = name.partition(":")
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise ValueError(f"reward {name!r}: the module {module!r} cannot be imported ({error}); it must"
                     " be installed, or lie in the working directory or on PYTHONPATH") from error
  except (Exception, SystemExit) as error:  # a module may raise anything, or end the program
    raise ValueError(f"reward {name!r}: the module {module!r} cannot be imported: "
                     f"{_described(error)}") from error
  # Modules that are built into Python have no __file__, and namespace packages have None.
  file = getattr(found, "__file__", None) or "which has no file"
  reward = getattr(found, function, None)
  require(callable(reward),
          f"reward {name!r}: the module {module!r} ({file}) has no function {function!r}")
  return reward


@dataclasses.dataclass(frozen=True)
class Scored:
  """The rewards of a batch.

  Attributes:
    rewards: each row's weighted sum of rewards; None if any of its rewards is None.
    by_name: for each reward, by name, the unweighted values of all rows.
    scales: each row's sum of absolute weighted rewards, of which the rounding of the sum is a
      fraction, see `rl.advantages.are_equal`; 0 where the reward is None.
  """

  rewards: list[float | None]
  by_name: dict[str, list[float | None]]
  scales: list[float]

  def rows(self, chosen: Sequence[int]) -> "Scored":
    """Returns the rewards of the rows with the indices `chosen`, in that order."""
    pick = lambda values: [values[i] for i in chosen]
    return Scored(pick(self.rewards), {name: pick(row) for name, row in self.by_name.items()},
                  pick(self.scales))

  @classmethod
  def join(cls, parts: Sequence["Scored"]) -> "Scored":
    """Concatenates the rows of all parts, which must have the same rewards."""
    chain = lambda columns: list(itertools.chain.from_iterable(columns))
    return cls(chain(part.rewards for part in parts),
               {name: chain(part.by_name[name] for part in parts) for name in parts[0].by_name},
               chain(part.scales for part in parts))

  def metrics(self) -> dict[str, float]:
    """Returns the metrics of each reward, under the reward's name.

    `rewards/NAME/mean` is its mean over judged rows, NaN if there are none, and
    `rewards/NAME/unjudged` the number of rows for which it is None.
    """
    metrics = {}
    for name, values in self.by_name.items():
      judged = [value for value in values if value is not None]
      metrics[f"rewards/{name}/mean"] = sum(judged) / len(judged) if judged else math.nan
      metrics[f"rewards/{name}/unjudged"] = float(len(values) - len(judged))
    return metrics


def combine(functions: Mapping[str, Reward],
            weights: Mapping[str, float] | None = None) -> Callable[..., Scored]:
  """Combines several rewards into one function `(prompts, completions, **columns) -> Scored`.

  Args:
    functions: rewards by name.
    weights: the rewards' weights, by the same names; None to weight each by 1, as R1 does accuracy
      and format (Nature 2025, eq. 4).

  Raises:
    ValueError: for no rewards, weights of other names than the rewards, or weights that are not
      finite. The returned function raises ValueError for columns of another length than the
      prompts, and, naming the reward, for one that needs a column that there is not, raises, or
      does not return None or a number of at most 1e20, weighted or not, for every row.
  """
  weights = dict.fromkeys(functions, 1.0) if weights is None else weights
  require(bool(functions), "combine needs at least one reward")
  require(set(weights) == set(functions),
          f"weights are for {sorted(weights)}, but the rewards are {sorted(functions)}: name the "
          "same")
  for name, weight in weights.items():
    require(math.isfinite(weight), f"the weight of reward {name!r} is {weight}; it must be finite")

  def score(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> Scored:
    for name, column in {"completions": completions, **columns}.items():
      require(len(column) == len(prompts),
              f"{name} has {len(column)} rows, but there are {len(prompts)} prompts")
    by_name = {name: _checked(name, weights[name], function, prompts, completions, columns)
               for name, function in functions.items()}
    rows = [dict(zip(by_name, row, strict=True)) for row in zip(*by_name.values(), strict=True)]
    total = lambda row, size: sum(size(weights[name] * value) for name, value in row.items())
    judged = lambda size, missing: [missing if None in row.values() else total(row, size)
                                    for row in rows]
    return Scored(judged(float, None), by_name, judged(abs, 0.0))

  return score


def _checked(name: str, weight: float, function: Reward, prompts: Sequence[str],
             completions: Sequence[str], columns: Mapping[str, Sequence]) -> list[float | None]:
  missing = _required_columns(function) - columns.keys()
  require(not missing, f"reward {name!r} needs the column {', '.join(sorted(missing))}, which the "
          f"task's problems do not have; they have {', '.join(columns) or 'none'}")
  try:
    values = function(prompts, completions, **columns)
  except (Exception, SystemExit) as error:  # sys.exit would end the run without a message
    raise ValueError(f"reward {name!r} failed on a batch of {len(prompts)} completions: "
                     f"{_described(error)}") from error
  require(isinstance(values, list), f"reward {name!r} must return a list, not "
                                    f"{type(values).__name__}")
  require(len(values) == len(prompts),
          f"reward {name!r} returned {len(values)} values for {len(prompts)} completions")
  for row, value in enumerate(values):
    require(value is None or (isinstance(value, numbers.Real | np.bool_) and is_usable(value)
                              and is_usable(weight * float(value))),
            f"reward {name!r} must return finite numbers or None, and with its weight {weight} none"
            f" above {LARGEST_REWARD:g}; row {row} is {shown(value)}")
  return [None if value is None else float(value) for value in values]


def _described(error: BaseException) -> str:
  """Returns the type and the message of an error of the user's code, and its line."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  place = f" (at {frame.filename}:{frame.lineno})" * (not frame.filename.startswith("<frozen"))
  if isinstance(error, SystemExit):
    return f"it calls sys.exit({error.code!r}){place}; raise an exception instead"
  return f"{type(error).__name__}: {error}{place}"


def _required_columns(function: Reward) -> set[str]:
  """Returns the keyword arguments without a default that a reward has besides the first two."""
  try:
    parameters = list(inspect.signature(function).parameters.values())
  except (TypeError, ValueError):  # a builtin may have no signature
    return set()
  return {parameter.name for parameter in parameters
          if parameter.default is parameter.empty and (
              parameter.kind is parameter.KEYWORD_ONLY
              or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in (
                  "prompts", "completions") and parameters.index(parameter) > 1))}


def _judge(extract: Callable[[str], str | None], completions: Sequence[str],
           columns: Mapping[str, Sequence]) -> list[float | None]:
  require("answer" in columns, "accuracy needs the column 'answer'")
  # Rows without an answer are checked too, with "": the verdict on an incorrect answer still shows
  # whether the reference answer can be parsed.
  answers = [extract(completion) or "" for completion in completions]
  rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
  indices_by_task = {}
  for index, row in enumerate(rows):
    indices_by_task.setdefault(row.get("task"), []).append(index)
  rewards = [None] * len(rows)
  for spec, indices in indices_by_task.items():
    check_all = get_task(spec).check_all if spec else _compare
    verdicts = check_all([answers[i] for i in indices], [rows[i] for i in indices])
    for i, verdict in zip(indices, verdicts, strict=True):
      rewards[i] = None if verdict is None else float(verdict)
  return rewards


def _compare(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
  return same_answers([(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)])


def _fraction_in(language: str, text: str) -> float:
  """Returns the fraction of the text's words that are in the language; 0 if it has no words."""
  require(language in ("en", "zh"),
          f"language_consistency supports 'en' and 'zh', not {language!r}")
  words = [word for word in _WORD.findall(_LATEX.sub(" ", text))
           if len(word) > 1 or not word.isascii() or word in "aAI"]
  chinese = re.compile(_HAN)
  inside = [bool(chinese.fullmatch(word)) if language == "zh" else
            word.replace("’", "'").isascii() for word in words]
  return sum(inside) / len(inside) if inside else 0.0
