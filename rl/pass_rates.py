"""How often a model is right: one try, the best of k, or the majority's; with intervals.

Each rate is given by problem, so that rates of the same problems can be paired; `interval` averages
them. A sample that could not be judged (its reward is None) counts nowhere, and a problem without
any that could has the rate NaN and is left out of the average.

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
  """A mean over problems and its bootstrap interval."""

  estimate: float
  low: float
  high: float


def pass_at_1(correct_PN: ArrayLike, judged_PN: ArrayLike | None = None) -> np.ndarray:
  """The mean over a problem's samples (R1 section 3), float [P].

  Args:
    correct_PN: bool.
    judged_PN: bool, false at samples to leave out; None if there are none such.

  Raises:
    ValueError: shapes other than these.
  """
  return pass_at_k(correct_PN, 1, judged_PN)


def pass_at_k(
    correct_PN: ArrayLike, k: int, judged_PN: ArrayLike | None = None) -> np.ndarray:
  """The chance that one of k samples at least is correct, without bias; float [P].

  1 - C(n - c, k) / C(n, k) for c of n correct, as a product (Chen et al. 2021, section 2.1).

  Args:
    correct_PN: bool.
    k: at most the samples judged of each problem.
    judged_PN: as in `pass_at_1`.

  Raises:
    ValueError: fewer than k samples of a problem, k below 1, or shapes other than these.
  """
  correct_PN, judged_PN = _samples(correct_PN, judged_PN)
  n_P = judged_PN.sum(1)
  fewest = n_P[n_P > 0].min(initial=correct_PN.shape[1])
  require(1 <= k <= fewest, f"k={k} must lie in 1..{fewest}, as many as were judged of the problem "
          "with the fewest: take more samples or a smaller k")
  wrong_P1 = (n_P - correct_PN.sum(1))[:, None]
  i_N = np.arange(1, correct_PN.shape[1] + 1)
  factors_PN = np.where((i_N > wrong_P1) & (i_N <= n_P[:, None]), 1 - k / i_N, 1.0)
  return np.where(n_P > 0, 1 - factors_PN.prod(1), np.nan)


def majority_vote(
    answers_PN: Sequence[Sequence[Hashable | None]], correct_PN: ArrayLike,
    judged_PN: ArrayLike | None = None) -> np.ndarray:
  """cons@N: whether the answer given most often by all N samples is correct, float [P].

  Of answers that tie, each is taken with the same chance, and the rate is the expectation: 0.5 if
  one of two is correct. An answer of None (none was found in the output) does not vote, however
  frequent; if all are None the problem is lost, with rate 0.

  Args:
    answers_PN: in a canonical form: those that compare equal are one.
    correct_PN: bool, of each sample.
    judged_PN: as in `pass_at_1`; samples not judged do not vote.

  Raises:
    ValueError: equal answers of a problem of which one is correct and one is not, or shapes that
      disagree.
  """
  correct_PN, judged_PN = _samples(correct_PN, judged_PN)
  require([len(answers) for answers in answers_PN] == [correct_PN.shape[1]] * len(correct_PN),
          f"answers_PN must have an answer, or None, for each of {correct_PN.shape} samples")
  rate = lambda p: _vote(p, answers_PN[p], correct_PN[p], judged_PN[p])
  return np.array([rate(p) if judged_PN[p].any() else np.nan for p in range(len(correct_PN))])


def estimate(rates_P: ArrayLike, questions_P: Sequence[Hashable] | None = None) -> Interval:
  """`interval` with bounds that are the mean where resampling cannot move it; NaN of all NaN."""
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
  """The mean over problems, with a percentile bootstrap interval over problems.

  The interval is for other problems of the same kind: samples of one problem are not resampled, and
  more of them narrow it only by making each rate more exact. Nor are problems that ask the same:
  such are drawn together or not at all.

  Args:
    rates_P: by problem; NaN is left out. Pair two models by the difference of their rates.
    questions_P: equal for problems that ask the same; None if no two do.
    confidence: coverage.
    resamples: of the bootstrap.
    seed: of the bootstrap; the same seed gives the same interval.

  Raises:
    ValueError: fewer than two different problems, or a confidence outside 0..1.
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
  require(len(counts) > 1, f"{len(counts)} different problems have a rate: an interval over "
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
          f"judged_PN has shape {judged_PN.shape}, expected that of correct_PN, {correct_PN.shape}")
  return correct_PN & judged_PN, judged_PN


def _vote(problem, answers_N, correct_N, judged_N) -> float:
  votes, verdicts = collections.Counter(), {}
  for answer, correct, judged in zip(answers_N, correct_N, judged_N, strict=True):
    if answer is None or not judged:
      continue
    votes[answer] += 1
    require(verdicts.setdefault(answer, bool(correct)) == correct,
            f"problem {problem}: the answer {answer!r} is both correct and not: give equal answers "
            "the same verdict")
  most = max(votes.values(), default=0)
  tied = [verdicts[answer] for answer, count in votes.items() if count == most]
  return float(np.mean(tied)) if tied else 0.0
