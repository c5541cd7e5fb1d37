"""How good a model is at a task: pass@1, pass@k, cons@k, format and length, with intervals.

Shape letters:  P problems  N samples of each
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rl import rewards
from rl.extraction import lenient_answer, reflects, strict_answer
from rl.pass_rates import estimate, majority_vote, pass_at_1, pass_at_k
from rl.sampler import Sampler, Samples
from rl.tasks.equality import number

# Training's steps never come here, so evaluation has random keys of its own; and they are the same
# at each evaluation, which takes noise out of the difference of two.
_STEP = 2**31 - 1


class Verdicts(NamedTuple):
  """Of P problems' N samples, which are right, and which could be judged: [P, N] both."""

  correct_PN: np.ndarray
  judged_PN: np.ndarray


def evaluate(
    sampler: Sampler, variables: dict, *, split: str, problems: int, samples: int,
    ks: Sequence[int] = (), temperature: float | None = None, top_p: float = 1.0,
) -> tuple[dict[str, Any], Samples]:
  """Samples the first problems of a split, and judges.

  Args:
    sampler: says task and model.
    variables: of the model.
    split: "heldout", "harder" or what the task has.
    problems: how many.
    samples: of each.
    ks: pass@k for these, at most `samples`.
    temperature: None for the sampler's.
    top_p: nucleus mass.

  Returns:
    By name [estimate, low, high], 95 % bootstrap intervals over questions: "pass@1", "pass@k",
    "cons@samples" (the majority of all samples), "lenient_pass@1" and "lenient_cons" by a kind
    reading of completions, "format", "length" in tokens, "clipped" (cut off), "reflection" (takes
    something back); and "unjudged", a count, "problems", of which some may ask the same
    ("questions" that differ), "samples". And what was sampled.

  Raises:
    ValueError: for an unknown split, or more problems than a finite one has.
  """
  drawn = draw(sampler, variables, split=split, problems=problems, samples=samples,
               temperature=temperature, top_p=top_p)
  return judge(drawn, samples, ks), drawn


def draw(sampler: Sampler, variables: dict, *, split: str, problems: int, samples: int,
         temperature: float | None = None, top_p: float = 1.0) -> Samples:
  """What `evaluate` judges; see there."""
  size = sampler.task.size(split)
  if size is not None and problems > size:
    raise ValueError(f"the split {split!r} has {size} problems, not {problems}")
  return sampler.sample(variables, split, range(problems), samples, step=_STEP,
                        temperature=temperature, top_p=top_p)


def verdicts(drawn: Samples, samples: int, reward: rewards.Reward = rewards.accuracy) -> Verdicts:
  """A reward of completions of which `samples` side by side are a problem's.

  Programs are slow to judge: whoever needs their verdicts twice keeps them.
  """
  values = reward(drawn.prompts, drawn.completions, **drawn.columns())
  by_problem = lambda values: np.array(values).reshape(-1, samples)
  return Verdicts(by_problem([value == 1 for value in values]),
                  by_problem([value is not None for value in values]))


def judge(drawn: Samples, samples: int, ks: Sequence[int] = (),
          accuracy: Verdicts | None = None) -> dict[str, Any]:
  """The figures of `evaluate`, for completions of which `samples` side by side are a problem's.

  `accuracy` has their verdicts, where they are known.
  """
  by_problem = lambda values: np.asarray(values).reshape(-1, samples)
  correct, judged = accuracy or verdicts(drawn, samples)
  kindly, _ = verdicts(drawn, samples, rewards.lenient_accuracy)
  formed = rewards.well_formed(drawn.prompts, drawn.completions)
  answers = lambda extract: [[_canonical(extract(text)) for text in row] for row in
                             np.array(drawn.completions, object).reshape(-1, samples)]
  rates = {
      "pass@1": pass_at_1(correct, judged),
      **{f"pass@{k}": pass_at_k(correct, k, judged) for k in ks if k > 1},
      f"cons@{samples}": majority_vote(answers(strict_answer), correct, judged),
      "lenient_pass@1": pass_at_1(kindly, judged),
      "lenient_cons": majority_vote(answers(lenient_answer), kindly, judged),
      "format": by_problem(formed).mean(1),
      "length": by_problem(drawn.lengths_S).mean(1),
      "clipped": 1 - by_problem(drawn.ended_S).mean(1),
      "reflection": by_problem([reflects(text) for text in drawn.completions]).mean(1)}
  questions = [problem.question for problem in drawn.problems[::samples]]
  return {name: list(estimate(rate, questions)) for name, rate in rates.items()} | {
      "unjudged": int((~judged).sum()), "problems": len(correct),
      "questions": len(set(questions)), "samples": samples}


def majority_at(drawn: Samples, ks: Sequence[int], accuracy: Verdicts) -> dict[int, float]:
  """cons@k for several k: the majority's rate over disjoint groups of k, and over problems.

  Args:
    drawn: completions.
    ks: divisors of the samples of a problem.
    accuracy: their verdicts.
  """
  answers = [_canonical(strict_answer(text)) for text in drawn.completions]
  samples = accuracy.correct_PN.shape[1]

  def rate(k: int) -> float:
    rows = [answers[i:i + k] for i in range(0, len(answers), k)]
    found = majority_vote(rows, *(of_PN.reshape(-1, k) for of_PN in accuracy))
    by_problem = np.array([group[~np.isnan(group)].mean() for group in
                           found.reshape(-1, samples // k) if not np.isnan(group).all()])
    return float(by_problem.mean()) if by_problem.size else float("nan")

  return {k: rate(k) for k in ks}


def _canonical(answer: str | None) -> Fraction | str | None:
  """Equal for answers that a vote should count as one: 7, 7.0 and 07."""
  if answer is None:
    return None
  value = number(answer)
  return answer.strip() if value is None else value

