"""Evaluation of a model on a task: pass@1, pass@k, cons@k, format and length, with intervals.

Shape letters:  P problems  N samples of each
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl import rewards
from rl.extraction import lenient_answer, reflects, strict_answer
from rl.pass_rates import estimate, majority_vote, pass_at_1, pass_at_k
from rl.sampler import Sampler, Samples
from rl.tasks import get_task
from rl.tasks.equality import same_answer
from rl.tasks.problem import Problem
from train.hardware import host_memory_bytes

# No training step reaches this number, so evaluation has random keys of its own. They are the same
# at every evaluation, which removes noise from the difference between two of them.
_STEP = 2**31 - 1
_TOKEN_BYTES = 8  # an int32 id and a float32 log-probability


class Verdicts(NamedTuple):
  """Judgements of the N samples of P problems.

  Attributes:
    correct_PN: bool, whether the sample's reward is 1.
    judged_PN: bool, whether the sample could be judged, its reward being other than None.
  """

  correct_PN: np.ndarray
  judged_PN: np.ndarray


def evaluate(
    sampler: Sampler, variables: dict, *, split: str, problems: int, samples: int,
    ks: Sequence[int] = (), temperature: float | None = None, top_p: float = 1.0,
) -> tuple[dict[str, Any], Samples]:
  """Samples completions of the first problems of a split, and judges them.

  Args:
    sampler: the sampler, which has the task, the template and the network.
    variables: the network's variables.
    split: a split of the task, such as "heldout" or "harder".
    problems: number of problems.
    samples: completions of each problem.
    ks: values of k, at most `samples`, for which to report pass@k.
    temperature: sampling temperature; None for the sampler's configuration.
    top_p: probability mass of nucleus sampling, in (0, 1].

  Returns:
    The figures by name, and the completions. The rates are [estimate, low, high], with a 95 %
    bootstrap interval over questions: "pass@1"; "pass@K" for each K of `ks`; "cons@N", the accuracy
    of the majority vote of all N = `samples` completions, in which the task says which answers are
    the same (`rl.tasks.problem.Task.same`); "lenient_pass@1" and "lenient_cons", with answers found
    by lenient matching (`rl.extraction.lenient_answer`); "format", the fraction that has the
    template's format; "length", in tokens; "clipped", the fraction that was truncated; and
    "reflection", the fraction that takes a step back with "wait". The counts are "unjudged"
    completions; "problems"; "questions", the distinct ones, as several problems may ask the same;
    and "samples" of each problem.

  Raises:
    ValueError: for an unknown split, or more problems than a finite split has.
  """
  drawn = draw(sampler, variables, split=split, problems=problems, samples=samples,
               temperature=temperature, top_p=top_p)
  return judge(drawn, samples, ks), drawn


def require_memory(problems: int, samples: int, max_length: int) -> None:
  """Raises ValueError if this machine's memory does not hold the completions of an evaluation.

  Args:
    problems: number of problems.
    samples: completions of each problem.
    max_length: largest length of a completion, in tokens.
  """
  needed, available = problems * samples * max_length * _TOKEN_BYTES, host_memory_bytes()
  if available is not None and needed > available:
    raise ValueError(
        f"{problems:,} problems with {samples:,} samples of up to {max_length:,} tokens need "
        f"{needed / 1e9:,.0f} GB, and this machine has {available / 1e9:,.0f}: ask for fewer")


def draw(sampler: Sampler, variables: dict, *, split: str, problems: int, samples: int,
         temperature: float | None = None, top_p: float = 1.0, first: int = 0) -> Samples:
  """Samples the completions that `evaluate` judges, with its arguments and errors.

  Args:
    first: index of the first problem; after the last one of a finite split, its first follows.
  """
  require_memory(problems, samples, sampler.cfg.sampling.max_completion_length)
  size = sampler.size(split)
  if size == 0:
    sampler.task.problem(split, 0)  # raises an error that says why
  if size is not None and problems > size:
    raise ValueError(f"the split {split!r} has {size} problems, not {problems}: ask for fewer")
  indices = [i if size is None else i % size for i in range(first, first + problems)]
  return sampler.sample(variables, split, indices, samples, step=_STEP, temperature=temperature,
                        top_p=top_p)


def verdicts(drawn: Samples, samples: int, reward: rewards.Reward = rewards.accuracy) -> Verdicts:
  """Judges completions by a reward; each run of `samples` consecutive rows is one problem.

  Programs are slow to judge: a caller that needs their verdicts twice should keep them.

  Args:
    drawn: P x N completions.
    samples: N, the completions of each problem.
    reward: a reward whose value is 1 for a correct completion.
  """
  values = reward(drawn.prompts, drawn.completions, **drawn.columns())
  by_problem = lambda values: np.array(values).reshape(-1, samples)
  return Verdicts(by_problem([value == 1 for value in values]),
                  by_problem([value is not None for value in values]))


def judge(drawn: Samples, samples: int, ks: Sequence[int] = (),
          accuracy: Verdicts | None = None) -> dict[str, Any]:
  """Returns the figures of `evaluate`, by name.

  Args:
    drawn: completions; each run of `samples` consecutive rows is one problem.
    samples: completions of each problem.
    ks: values of k for which to report pass@k.
    accuracy: verdicts of `drawn`, if they are known already.
  """
  accuracy = accuracy or verdicts(drawn, samples)
  return figures(drawn, samples, rates(drawn, samples, ks, accuracy), accuracy)


def figures(drawn: Samples, samples: int, of_problems: Mapping[str, np.ndarray],
            accuracy: Verdicts) -> dict[str, Any]:
  """Returns what `judge` does, from the rates of the problems that `rates` returned."""
  questions = [problem.question for problem in drawn.problems[::samples]]
  return {name: list(estimate(rate_P, questions)) for name, rate_P in of_problems.items()} | {
      "unjudged": int((~accuracy.judged_PN).sum()), "problems": len(questions),
      "questions": len(set(questions)), "samples": samples}


def rates(drawn: Samples, samples: int, ks: Sequence[int],
          accuracy: Verdicts) -> dict[str, np.ndarray]:
  """Returns each problem's rate, [P], for every rate of `evaluate`; NaN where nothing was judged.

  The arguments are those of `judge`.
  """
  by_problem = lambda values: np.asarray(values).reshape(-1, samples)
  correct, judged = accuracy
  lenient, _ = verdicts(drawn, samples, rewards.lenient_accuracy)
  well_formed = rewards.well_formed(drawn.prompts, drawn.completions)
  return {
      "pass@1": pass_at_1(correct, judged),
      **{f"pass@{k}": pass_at_k(correct, k, judged) for k in ks if k > 1},
      f"cons@{samples}": majority_vote(
          _votes(drawn, strict_answer, correct), correct, judged),
      "lenient_pass@1": pass_at_1(lenient, judged),
      "lenient_cons": majority_vote(
          _votes(drawn, lenient_answer, lenient), lenient, judged),
      "format": by_problem(well_formed).mean(1),
      "length": by_problem(drawn.lengths_S).mean(1),
      "clipped": 1 - by_problem(drawn.ended_S).mean(1),
      "reflection": by_problem([reflects(text) for text in drawn.completions]).mean(1)}


def majority_at(drawn: Samples, ks: Sequence[int], accuracy: Verdicts) -> dict[int, float]:
  """Returns the mean over problems of `majority_by_problem`, by k; NaN if nothing was judged."""
  found = majority_by_problem(drawn, ks, accuracy)
  return {k: float(np.nanmean(rate_P)) if np.isfinite(rate_P).any() else float("nan")
          for k, rate_P in found.items()}


def majority_by_problem(
    drawn: Samples, ks: Sequence[int], accuracy: Verdicts) -> dict[int, np.ndarray]:
  """Returns cons@k of each problem, [P], for several k, averaged over disjoint groups of k samples.

  Args:
    drawn: completions; the samples of a problem are consecutive rows.
    ks: values of k, each of which must divide the number of samples of a problem.
    accuracy: verdicts of the completions.

  Returns:
    The rates by k; NaN for problems of which no sample could be judged.
  """
  answers = [answer for row in _votes(drawn, strict_answer, accuracy.correct_PN) for answer in row]
  samples = accuracy.correct_PN.shape[1]

  def rate(k: int) -> np.ndarray:
    rows = [answers[i:i + k] for i in range(0, len(answers), k)]
    found = majority_vote(rows, *(verdict_PN.reshape(-1, k) for verdict_PN in accuracy))
    return np.array([group[~np.isnan(group)].mean() if not np.isnan(group).all() else np.nan
                     for group in found.reshape(-1, samples // k)])

  return {k: rate(k) for k in ks}


def _votes(drawn: Samples, extract: Callable[[str], str | None],
           correct_PN: np.ndarray) -> list[list[int | None]]:
  """Returns for each problem the class of each sample's answer; None for a sample without one.

  Two answers are in a class if the problem's task takes them for the same and their verdicts agree.
  The verdicts decide, since sameness need not be transitive: two decimals may each be a rounding of
  the reference but not of one another.
  """
  samples = correct_PN.shape[1]
  return [_classes(drawn.problems[i],
                   [extract(text) for text in drawn.completions[i:i + samples]], correct_N)
          for i, correct_N in zip(range(0, len(drawn), samples), correct_PN, strict=True)]


def _classes(problem: Problem, answers_N: Sequence[str | None],
             correct_N: np.ndarray) -> list[int | None]:
  same = get_task(problem.task).same if problem.task else (
      lambda first, second, _: first.strip() == second.strip()
      or same_answer(first, second) is True or same_answer(second, first) is True)
  columns = problem.row()
  # The reference is the first class, so that all answers that equal it are in one.
  members, found = [(problem.answer, True)], {}
  votes_N = list(zip(answers_N, correct_N.tolist(), strict=True))
  # Sorted, so that the classes do not depend on the order of the samples.
  for answer, correct in sorted({vote for vote in votes_N if vote[0] is not None}):
    known = (at for at, (other, verdict) in enumerate(members)
             if verdict == correct and same(answer, other, columns))
    found[answer, correct] = next(known, len(members))
    if found[answer, correct] == len(members):
      members.append((answer, correct))
  return [None if answer is None else found[answer, correct] for answer, correct in votes_N]
