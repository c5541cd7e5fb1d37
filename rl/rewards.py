"""Rewards by rule, in the form `reward(prompts, completions, **columns) -> list[float | None]`.

Columns are lists as long as the prompts, such as "answer", "task", "language", "tests" or
"num_tokens"; a reward takes those that it names and lets the others pass. None says that a row
cannot be judged: it leaves its group and is learned from neither way.
"""

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model.checks import require
from rl.extraction import (
  is_well_formed,
  lenient_answer,
  opens_thinking,
  reasoning,
  strict_answer,
  unfenced,
)
from rl.tasks import get_task
from rl.tasks.equality import same_answer

Reward = Callable[..., list[float | None]]
_LATEX = re.compile(r"\\[A-Za-z]+")
_HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
_WORD = re.compile(rf"{_HAN}|(?:(?!{_HAN})[^\W\d_])+(?:['’](?:(?!{_HAN})[^\W\d_])+)*")


def accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list:
  """1 if the answer block, with which the completion must end, holds the right answer; else 0.

  R1's accuracy reward (arXiv:2501.12948v1, §2.2.2). Column "task" says by its spec who checks;
  where there is none, column "answer" is compared as mathematics. None where the right answer
  cannot be read: it is never taken for matched.
  """
  return _judge(strict_answer, completions, columns)


def lenient_accuracy(prompts: Sequence[str], completions: Sequence[str],
                     **columns: Sequence) -> list:
  """`accuracy` of the answer that a kind reader finds; for evaluation, not for training.

  What RL gains in `accuracy` but not here, it gained in form.
  """
  return _judge(lenient_answer, completions, columns)


def well_formed(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list:
  """1 for one think block and then one answer block, and nothing else; else 0.

  R1's format reward (arXiv:2501.12948v1, §2.2.2). A prompt that ends with `<think>` has opened the
  think block.
  """
  return [float(is_well_formed(completion, thinking_opened=opens_thinking(prompt)))
          for prompt, completion in zip(prompts, completions, strict=True)]


def language_consistency(prompts: Sequence[str], completions: Sequence[str], *,
                         language: Sequence[str | None], **columns: Sequence) -> list:
  """The share of the reasoning's words that are in the target language: R1, Nature 2025, eq. 7.

  A word is a run of letters, or a Chinese character. Of column "language", "en" takes words of
  ASCII letters and "zh" Chinese characters; words in other scripts are in neither. Numbers,
  symbols, single letters but "a" and "I", and LaTeX commands are no words. Reasoning without any
  word, or that does not end, gets 0: silence is not to be a way to be consistent. None where the
  row has no language.
  """
  return [None if target is None else _share(
      target, reasoning(completion, thinking_opened=opens_thinking(prompt)) or "")
      for prompt, completion, target in zip(prompts, completions, language, strict=True)]


def brevity(max_tokens: int) -> Reward:
  """A reward that falls evenly from 1 for no token to 0 for `max_tokens`, in tokens ("num_tokens").

  Raises:
    ValueError: unless `max_tokens` is positive.
  """
  require(max_tokens > 0, f"brevity: max_tokens={max_tokens} must be positive")

  def reward(prompts, completions, *, num_tokens, **columns):
    return [max(0.0, 1 - tokens / max_tokens) for tokens in num_tokens]

  return reward


def overlong(max_tokens: int, cache_tokens: int) -> Reward:
  """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), of column "num_tokens".

  0 up to `max_tokens - cache_tokens`, from there evenly down to -1 at `max_tokens`, -1 beyond.

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
  """A reward of 1 for a program in the answer block that passes its tests in the sandbox; else 0.

  Column "tests" has Python asserts; None where a row has none. The limits are seconds of wall
  clock and MiB of memory.
  """
  def reward(prompts, completions, *, tests, **columns):
    from rl.sandbox import passes_many

    passed = passes_many(
        [(unfenced(strict_answer(completion) or "") if asserts else "", asserts)
         for completion, asserts in zip(completions, tests, strict=True)],
        timeout_s=timeout_s, memory_mb=memory_mb)
    return [None if asserts is None else float(verdict)
            for verdict, asserts in zip(passed, tests, strict=True)]

  return reward


@dataclasses.dataclass(frozen=True)
class Scored:
  """What rewards say of a batch.

  Attributes:
    rewards: by row the weighted sum, None if any reward was None.
    by_name: by reward and row, unweighted.
  """

  rewards: list[float | None]
  by_name: dict[str, list[float | None]]

  def rows(self, chosen: Sequence[int]) -> "Scored":
    """Of some rows, in that order."""
    pick = lambda values: [values[i] for i in chosen]
    return Scored(pick(self.rewards), {name: pick(row) for name, row in self.by_name.items()})

  @classmethod
  def join(cls, parts: Sequence["Scored"]) -> "Scored":
    """Of all rows of all parts."""
    chain = lambda columns: list(itertools.chain.from_iterable(columns))
    return cls(chain(part.rewards for part in parts),
               {name: chain(part.by_name[name] for part in parts) for name in parts[0].by_name})

  def metrics(self) -> dict[str, float]:
    """`rewards/NAME/mean` over judged rows (NaN if there is none) and `rewards/NAME/unjudged`."""
    metrics = {}
    for name, values in self.by_name.items():
      judged = [value for value in values if value is not None]
      metrics[f"rewards/{name}/mean"] = sum(judged) / len(judged) if judged else math.nan
      metrics[f"rewards/{name}/unjudged"] = float(len(values) - len(judged))
    return metrics


def combine(functions: Mapping[str, Reward],
            weights: Mapping[str, float] | None = None) -> Callable[..., Scored]:
  """One function of several rewards: `(prompts, completions, **columns) -> Scored`.

  Args:
    functions: rewards by name.
    weights: by the same names; without them each weighs 1, as accuracy and format do in R1
      (Nature 2025, eq. 4).

  Raises:
    ValueError: for no reward, names that differ or weights that are not finite. Of the function
      returned: for columns of another length than the prompts, and naming any reward that raises
      or does not return a finite number or None for every row.
  """
  weights = dict.fromkeys(functions, 1.0) if weights is None else weights
  require(bool(functions), "combine needs a reward")
  require(set(weights) == set(functions),
          f"weights are for {sorted(weights)}, rewards are {sorted(functions)}: name the same")
  for name, weight in weights.items():
    require(math.isfinite(weight), f"the weight of reward {name!r} is {weight}; it must be finite")

  def score(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> Scored:
    for name, column in {"completions": completions, **columns}.items():
      require(len(column) == len(prompts),
              f"{name} has {len(column)} rows, but there are {len(prompts)} prompts")
    by_name = {name: _checked(name, function, prompts, completions, columns)
               for name, function in functions.items()}
    rows = [dict(zip(by_name, row, strict=True)) for row in zip(*by_name.values(), strict=True)]
    return Scored([None if None in row.values() else
                   sum(weights[name] * value for name, value in row.items()) for row in rows],
                  by_name)

  return score


def _checked(name: str, function: Reward, prompts: Sequence[str], completions: Sequence[str],
             columns: Mapping[str, Sequence]) -> list[float | None]:
  try:
    values = function(prompts, completions, **columns)
  except Exception as error:
    raise ValueError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
  require(isinstance(values, list), f"reward {name!r} must return a list, not "
                                    f"{type(values).__name__}")
  require(len(values) == len(prompts),
          f"reward {name!r} returned {len(values)} values for {len(prompts)} completions")
  for row, value in enumerate(values):
    require(value is None or (isinstance(value, numbers.Real) and math.isfinite(value)),
            f"reward {name!r} must return finite numbers or None; row {row} is {value!r}")
  return [None if value is None else float(value) for value in values]


def _judge(extract: Callable[[str], str | None], completions: Sequence[str],
           columns: Mapping[str, Sequence]) -> list[float | None]:
  require("answer" in columns, "accuracy needs the column 'answer'")
  # A wrong answer shows whether the right one can be read, even if the completion has none.
  answers = [extract(completion) or "" for completion in completions]
  rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
  of_task = {}
  for index, row in enumerate(rows):
    of_task.setdefault(row.get("task"), []).append(index)
  rewards = [None] * len(rows)
  for spec, indices in of_task.items():
    check_all = get_task(spec).check_all if spec else _same
    verdicts = check_all([answers[i] for i in indices], [rows[i] for i in indices])
    for i, verdict in zip(indices, verdicts, strict=True):
      rewards[i] = None if verdict is None else float(verdict)
  return rewards


def _same(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool | None]:
  return [same_answer(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]


def _share(language: str, text: str) -> float:
  require(language in ("en", "zh"), f"language_consistency knows 'en' and 'zh', not {language!r}")
  words = [word for word in _WORD.findall(_LATEX.sub(" ", text))
           if len(word) > 1 or not word.isascii() or word in "aAI"]
  chinese = re.compile(_HAN)
  inside = [bool(chinese.fullmatch(word)) if language == "zh" else
            word.replace("’", "'").isascii() for word in words]
  return sum(inside) / len(inside) if inside else 0.0
