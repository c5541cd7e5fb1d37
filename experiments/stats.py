"""Statistics of studies whose arms share their seeds, and the verdicts on claims.

Shape letters:  n seeds  Q quantiles
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

Verdict = Literal["reproduced", "contradicted", "unresolved"]
SIGNIFICANCE, _POWER = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class Paired:
  """Statistics of the differences treatment - baseline between arms that share seeds.

  All but the counts are in the metric's unit.

  Attributes:
    n: number of pairs, one per seed.
    mean: mean difference.
    std: sample standard deviation of the differences, with n - 1 in the denominator; NaN for one
      pair.
    stderr: standard error of the mean difference; NaN for one pair.
    low, high: Student-t confidence interval of the mean difference; infinite for one pair.
    sign: sign of the expected effect or, if none was given, of the mean; 0 for a mean of 0.
    same_sign: number of pairs whose difference has that sign.
    detectable: minimum detectable effect, the smallest true difference that a two-sided test at the
      5 % level finds with a power of 80 %, for this number of pairs and this standard deviation;
      infinite for one pair.
  """

  n: int
  mean: float
  std: float
  stderr: float
  low: float
  high: float
  sign: int
  same_sign: int
  detectable: float


@dataclasses.dataclass(frozen=True)
class Claim:
  """A paper's claim as a criterion that is fixed before any run.

  Attributes:
    kind: "sign": treatment - baseline has the sign `sign` and exceeds `margin` in magnitude.
      "equivalent": treatment - baseline lies within +-`margin`. "threshold": one arm's value lies
      above or below `threshold`, as `sign` says.
    sign: +1 for larger or above, -1 for smaller or below; "equivalent" does not use it.
    margin: for "sign", what the difference must exceed; for "equivalent", the largest difference
      that counts as equal; in the metric's unit. 0 for "threshold".
    threshold: bound of the kind "threshold", in the metric's unit; None for the other kinds.
    single_run: whether a "threshold" may be judged by a single run, for metrics that do not depend
      on the seed.
    paper: the paper's own effect or value, shown for comparison; no verdict depends on it.
  """

  kind: Literal["sign", "equivalent", "threshold"]
  sign: Literal[-1, 1] = 1
  margin: float = 0.0
  threshold: float | None = None
  single_run: bool = False
  paper: float | None = None

  def __post_init__(self):
    kinds = ("sign", "equivalent", "threshold")
    if self.kind not in kinds:
      raise ValueError(f"Claim.kind={self.kind!r} must be one of {kinds}")
    if self.sign not in (-1, 1):
      raise ValueError(f"Claim.sign={self.sign} must be -1 or 1")
    if not 0 <= self.margin < np.inf:
      raise ValueError(f"Claim.margin={self.margin} must be finite and at least 0")
    if self.kind == "equivalent" and not self.margin:
      raise ValueError("Claim.margin=0 cannot show equivalence: fix a positive margin")
    if (self.kind == "threshold") != (self.threshold is not None):
      raise ValueError(f"Claim.threshold={self.threshold} with kind={self.kind!r}: give one for "
                       "the kind 'threshold', and for no other kind")
    if self.kind == "threshold" and self.margin:
      raise ValueError(f"Claim.margin={self.margin} does not apply to the kind 'threshold': move "
                       "`threshold` by the margin instead")
    if self.single_run and self.kind != "threshold":
      raise ValueError(f"Claim.single_run is for the kind 'threshold', not {self.kind!r}: one pair "
                       "says nothing about the variation between seeds")


def paired(treatment: ArrayLike, baseline: ArrayLike, confidence: float = 0.95,
           sign: Literal[-1, 1] | None = None, by_problem: ArrayLike | None = None) -> Paired:
  """Returns the mean difference of two arms with its Student-t interval.

  Seeds that share a fixed set of problems do not show how the difference varies between problems.
  That variance is estimated from the differences by problem, as the component of problems in a
  crossed design of seeds and problems, and added to that between seeds.

  Args:
    treatment: [n], one value per seed.
    baseline: [n], values of the same seeds in the same order; or 0, for the value of a single arm.
    confidence: coverage of the interval, in (0, 1).
    sign: sign of the expected effect, which `same_sign` counts; None for the sign of the mean.
    by_problem: [n, problems], the difference at each problem, whose means are those of the seeds;
      None if seeds have problems of their own.

  Raises:
    ValueError: if there are no pairs, the arms differ in length, or a value is not finite.
  """
  treatment_n, baseline_n = np.asarray(treatment, float), np.asarray(baseline, float)
  if treatment_n.ndim != 1 or not treatment_n.size:
    raise ValueError(f"treatment has shape {treatment_n.shape}, expected one value for each seed")
  if baseline_n.shape not in ((), treatment_n.shape):
    raise ValueError(f"treatment has {treatment_n.size} seeds and baseline has shape "
                     f"{baseline_n.shape}: pair them, seed by seed")
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must lie between 0 and 1")
  difference_n = treatment_n - baseline_n
  if not np.isfinite(difference_n).all():
    raise ValueError(f"differences {difference_n.tolist()} are not all finite: leave failed runs "
                     "out, and the other arm's runs of the same seeds, and report that")
  n, mean = difference_n.size, float(difference_n.mean())
  expected = sign or int(np.sign(mean))
  same_sign = int((np.sign(difference_n) == expected).sum())
  if n == 1:
    return Paired(1, mean, np.nan, np.nan, -np.inf, np.inf, expected, same_sign, np.inf)
  std = _deviation(difference_n, (treatment_n, baseline_n))
  if by_problem is not None:
    std = math.sqrt(std**2 + n * problem_variance(by_problem))
  stderr = std / n**0.5
  half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * stderr
  needed = special.stdtrit(n - 1, 1 - SIGNIFICANCE / 2) + special.stdtrit(n - 1, _POWER)
  return Paired(n, mean, std, stderr, mean - half, mean + half, expected, same_sign,
                float(needed) * stderr)


def problem_variance(values_nP: ArrayLike) -> float:
  """Returns the variance of a mean over seeds and problems that is due to the choice of problems.

  It is the mean square between problems less that of the interaction, divided by the number of
  values (two-way random effects without replication); 0 if that is negative.

  Args:
    values_nP: [n, problems], a value for each seed and problem.

  Raises:
    ValueError: if there are not at least two seeds and two problems.
  """
  values_nP = np.asarray(values_nP, float)
  if values_nP.ndim != 2 or min(values_nP.shape) < 2:
    raise ValueError(f"problem_variance needs at least two seeds and two problems, as an array "
                     f"[n, problems], got shape {values_nP.shape}")
  n, problems = values_nP.shape
  mean_P = values_nP.mean(0)
  residual_nP = values_nP - mean_P - values_nP.mean(1, keepdims=True) + values_nP.mean()
  between = n * float(mean_P.var(ddof=1))
  interaction = float((residual_nP**2).sum()) / ((n - 1) * (problems - 1))
  return max(0.0, between - interaction) / values_nP.size


def _deviation(values_n: np.ndarray, computed_from: Sequence[np.ndarray]) -> float:
  """Returns the sample standard deviation; 0 where values differ by no more than their rounding."""
  largest = max(float(np.abs(each).max()) for each in computed_from)
  if np.ptp(values_n) <= 8 * np.finfo(float).eps * largest:
    return 0.0
  return float(values_n.std(ddof=1))


def judge(result: Paired, claim: Claim) -> Verdict:
  """Returns the verdict: whether the whole interval supports the claim, opposes it, or neither.

  The claim of a sign is contradicted if the whole interval lies beyond the margin in the opposite
  direction, so that it is contradicted exactly where the claim of the opposite sign is reproduced.
  A single seed decides nothing, unless the claim is declared `single_run`.
  """
  low, high = result.low, result.high
  if result.n < 2:
    if not claim.single_run:
      return "unresolved"
    low = high = result.mean
  if claim.kind == "equivalent":
    supports = -claim.margin <= low and high <= claim.margin
    opposes = low > claim.margin or high < -claim.margin
  else:
    centre = claim.threshold or 0.0
    above, below = low > centre + claim.margin, high < centre - claim.margin
    supports, opposes = (above, below) if claim.sign > 0 else (below, above)
  return "reproduced" if supports else "contradicted" if opposes else "unresolved"


class Evidence(NamedTuple):
  """How strongly a result supports and opposes a claim, as two-sided p-values of Student's t.

  `judge` says "reproduced" where `supports`, and "contradicted" where `opposes`, is below 5 %.
  """

  supports: float
  opposes: float


def evidence(result: Paired, claim: Claim) -> Evidence | None:
  """Returns the p-values for and against a claim; None for a single seed, or without noise."""
  if result.n < 2 or not result.std > 0:
    return None
  tail = lambda distance: 2 * float(special.stdtr(result.n - 1, -distance / result.stderr))
  if claim.kind == "equivalent":
    supports = max(tail(claim.margin - result.mean), tail(result.mean + claim.margin))
    opposes = min(tail(result.mean - claim.margin), tail(-claim.margin - result.mean))
  else:
    distance = claim.sign * (result.mean - (claim.threshold or 0.0))
    supports, opposes = tail(distance - claim.margin), tail(-distance - claim.margin)
  return Evidence(min(1.0, supports), min(1.0, opposes))


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values of one family of tests, corrected for their number.

  That any of them falls below a bound by chance is as likely as the bound, or less (Holm, 1979).

  Args:
    p_values: one for each test.
  """
  corrected, largest = [1.0] * len(p_values), 0.0
  for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
    largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
    corrected[index] = largest
  return corrected


class Power(NamedTuple):
  """How likely a claim is to be reproduced, if an assumed effect is the true one.

  Attributes:
    effect: the assumed mean difference, or value for a "threshold", in the metric's unit.
    probability: probability of the verdict "reproduced" with as many seeds as there are.
    seeds: smallest number of seeds with which it is at least 80 %; None if 4096 are too few.
  """

  effect: float
  probability: float
  seeds: int | None


def power(claim: Claim, std: float, n: int, effect: float | None = None,
          family: int = 1) -> Power | None:
  """Returns the power of judging a claim, for normal differences.

  Args:
    claim: the claim.
    std: standard deviation of the differences between pairs, or of an arm's values for a
      "threshold".
    n: number of pairs.
    effect: the true effect to assume; None for the paper's, or for none where a claim says that
      there is none.
    family: number of claims that are corrected together (`holm`): the power is that of a claim
      of which all others are unresolved, and no less otherwise.

  Returns:
    None if no effect is known, or the deviation is zero or unknown.
  """
  if effect is None:
    effect = 0.0 if claim.kind == "equivalent" else claim.paper
  if effect is None or not std > 0:
    return None
  probability = functools.partial(_reproduced, claim, effect, std, SIGNIFICANCE / family)
  enough = next((2**i for i in range(1, 13) if probability(2**i) >= _POWER), None)
  if enough is not None:
    enough = next(m for m in range(max(2, enough // 2), enough + 1) if probability(m) >= _POWER)
  return Power(effect, probability(n), enough)


def _reproduced(claim: Claim, effect: float, std: float, significance: float, n: int) -> float:
  """Returns the probability that a claim is supported at a significance, for normal differences.

  The mean and the sample deviation, which sets the interval's width, are independent. So this is a
  mean over quantiles of the deviation.
  """
  if n < 2:
    return 0.0
  quantiles_Q = (np.arange(1000) + 0.5) / 1000
  deviation_Q = std * np.sqrt(2 * special.gammaincinv((n - 1) / 2, quantiles_Q) / (n - 1))
  stderr = std / n**0.5
  half_Q = special.stdtrit(n - 1, 1 - significance / 2) * deviation_Q / n**0.5
  below = lambda bound: special.ndtr((bound - effect) / stderr)  # P(mean < bound)
  if claim.kind == "equivalent":
    found_Q = np.maximum(below(claim.margin - half_Q) - below(half_Q - claim.margin), 0)
  else:
    centre = claim.threshold or 0.0
    found_Q = (1 - below(centre + claim.margin + half_Q) if claim.sign > 0
               else below(centre - claim.margin - half_Q))
  return float(found_Q.mean())


def noise(values: ArrayLike) -> float:
  """Returns the sample standard deviation of runs that differ only in their seed.

  Args:
    values: [n], one value per run.

  Raises:
    ValueError: if there are fewer than two values.
  """
  values_n = np.asarray(values, float)
  if values_n.ndim != 1 or values_n.size < 2:
    raise ValueError(f"noise needs at least two runs, as an array [n], got shape {values_n.shape}")
  return _deviation(values_n, (values_n,))
