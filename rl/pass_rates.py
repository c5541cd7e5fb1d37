"""Accuracy of a model as pass@1, pass@k and the majority vote cons@k, with bootstrap intervals.

Rates are returned by problem, so that those of two models on the same problems can be paired;
`interval` averages them. A sample that could not be judged (its reward is None) is left out. A
problem of which no sample could be judged has the rate NaN and is left out of the average.

Shape letters:  P problems  N samples of each
"""

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from model.checks import require


class Interval(NamedTuple):
  """A mean over problems and its bootstrap interval.

  Attributes:
    estimate: the mean.
    low: the interval's lower bound.
    high: the interval's upper bound.
  """

  estimate: float
  low: float
  high: float


def pass_at_1(correct_PN: ArrayLike, judged_PN: ArrayLike | None = None) -> np.ndarray:
  """Returns each problem's mean accuracy over its samples (R1 section 3), float [P].

  Args:
    correct_PN: bool, whether each sample is correct.
    judged_PN: bool, False at samples to leave out; None to count all.

  Raises:
    ValueError: for arrays that are not [P, N].
  """
  return pass_at_k(correct_PN, 1, judged_PN)


def pass_at_k(
    correct_PN: ArrayLike, k: int, judged_PN: ArrayLike | None = None) -> np.ndarray:
  """Returns the unbiased estimate of the chance that at least one of k samples is correct.

  For c of n samples correct, it is 1 - C(n - c, k) / C(n, k), computed as a product (Chen et al.
  2021, section 2.1).

  Args:
    correct_PN: bool, whether each sample is correct.
    k: number of samples, at most as many as were judged of any problem.
    judged_PN: bool, False at samples to leave out; None to count all.

  Returns:
    The chance for each problem, float [P].

  Raises:
    ValueError: for a problem with fewer than k judged samples, for k below 1, or for arrays that
      are not [P, N].
  """
  correct_PN, judged_PN = _samples(correct_PN, judged_PN)
  n_P = judged_PN.sum(1)
  fewest = n_P[n_P > 0].min(initial=correct_PN.shape[1])
  require(1 <= k <= fewest, f"k={k} must lie in 1..{fewest}, the smallest number of judged samples "
          "of a problem: draw more samples or choose a smaller k")
  wrong_P1 = (n_P - correct_PN.sum(1))[:, None]
  i_N = np.arange(1, correct_PN.shape[1] + 1)
  factors_PN = np.where((i_N > wrong_P1) & (i_N <= n_P[:, None]), 1 - k / i_N, 1.0)
  return np.where(n_P > 0, 1 - factors_PN.prod(1), np.nan)


def majority_vote(
    answers_PN: Sequence[Sequence[Hashable | None]], correct_PN: ArrayLike,
    judged_PN: ArrayLike | None = None) -> np.ndarray:
  """Returns cons@N, whether the answer that most of N samples give is correct, float [P].

  Ties are broken uniformly at random, and the rate is the expectation: 0.5 if one of two tied
  answers is correct. An answer of None (none was found in the output) does not vote, however
  frequent it is; if all are None, the rate is 0.

  Args:
    answers_PN: the samples' answers in a canonical form: answers that compare equal are one.
    correct_PN: bool, whether each sample is correct.
    judged_PN: bool, False at samples that could not be judged, which do not vote; None to count
      all.

  Raises:
    ValueError: if one of several equal answers to a problem is correct and another is not, or for
      shapes that disagree.
  """
  correct_PN, judged_PN = _samples(correct_PN, judged_PN)
  require([len(answers) for answers in answers_PN] == [correct_PN.shape[1]] * len(correct_PN),
          "answers_PN must have an answer, or None, for each of the samples, whose shape is "
          f"{correct_PN.shape}")
  rate = lambda p: _vote(p, answers_PN[p], correct_PN[p], judged_PN[p])
  return np.array([rate(p) if judged_PN[p].any() else np.nan for p in range(len(correct_PN))])


def estimate(rates_P: ArrayLike, questions_P: Sequence[Hashable] | None = None) -> Interval:
  """Returns `interval`, or the mean as all three values where resampling cannot change it.

  That is the case for equal rates and for fewer than two different questions with a rate.

  Args:
    rates_P: rate of each problem; NaN is left out, and if all are NaN so is the result.
    questions_P: equal for problems that ask the same; None if no two do.
  """
  rates_P = np.asarray(rates_P, float)
  known_P = ~np.isnan(rates_P)
  known = rates_P[known_P]
  questions = None if questions_P is None else [
      question for question, keep in zip(questions_P, known_P, strict=True) if keep]
  if known.size > 1 and np.ptp(known) > 0 and (questions is None or len(set(questions)) > 1):
    return interval(known, questions)
  value = float(known.mean()) if known.size else float("nan")
  return Interval(value, value, value)


def interval(
    rates_P: ArrayLike, questions_P: Sequence[Hashable] | None = None, *, confidence: float = 0.95,
    resamples: int = 9999, seed: int = 0) -> Interval:
  """Returns the mean over problems, with a percentile bootstrap interval over problems.

  The interval accounts for the choice of problems: samples of one problem are not resampled, and
  more of them narrow it only by making each rate more exact. Problems that ask the same question
  are resampled as one.

  Args:
    rates_P: rate of each problem; NaN is left out. To compare two models, give the difference of
      their rates.
    questions_P: equal for problems that ask the same; None if no two do.
    confidence: nominal coverage of the interval, between 0 and 1.
    resamples: number of bootstrap resamples.
    seed: seed of the bootstrap; the same seed gives the same interval.

  Raises:
    ValueError: for fewer than two different problems with a rate, or a confidence outside 0..1.
  """
  rates_P = np.asarray(rates_P, float)
  known_P = ~np.isnan(rates_P)
  names = range(len(rates_P)) if questions_P is None else questions_P
  sums, counts = collections.Counter(), collections.Counter()
  for name, rate, known in zip(names, rates_P, known_P, strict=True):
    if known:
      sums[name] += rate
      counts[name] += 1
  rates_P = rates_P[known_P]
  require(len(counts) > 1, f"{len(counts)} different problems have a rate, but an interval over "
          "problems needs at least 2")
  require(0 < confidence < 1, f"confidence={confidence} must lie between 0 and 1")
  found = stats.bootstrap(
      ([sums[name] for name in counts], [counts[name] for name in counts]),
      lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis), paired=True,
      n_resamples=resamples, confidence_level=confidence, method="percentile",
      rng=np.random.default_rng(seed)).confidence_interval
  return Interval(float(rates_P.mean()), float(found.low), float(found.high))


def _samples(correct, judged):
  correct_PN = np.asarray(correct, bool)
  require(correct_PN.ndim == 2,
          f"correct_PN has shape {correct_PN.shape}, expected [problems, samples]")
  judged_PN = np.ones_like(correct_PN) if judged is None else np.asarray(judged, bool)
  require(judged_PN.shape == correct_PN.shape,
          f"judged_PN has shape {judged_PN.shape}, expected correct_PN's shape {correct_PN.shape}")
  return correct_PN & judged_PN, judged_PN


def _vote(problem, answers_N, correct_N, judged_N) -> float:
  votes, verdicts = collections.Counter(), {}
  for answer, correct, judged in zip(answers_N, correct_N, judged_N, strict=True):
    if answer is None or not judged:
      continue
    votes[answer] += 1
    require(verdicts.setdefault(answer, bool(correct)) == correct,
            f"problem {problem}: the answer {answer!r} is both correct and incorrect: give equal "
            "answers the same verdict")
  most = max(votes.values(), default=0)
  tied = [verdicts[answer] for answer, count in votes.items() if count == most]
  return float(np.mean(tied)) if tied else 0.0
