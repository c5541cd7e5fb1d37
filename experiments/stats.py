"""Statistics of studies whose arms share their seeds, and the verdicts that follow from them.

Shape letters:  n seeds
"""

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

Verdict = Literal["reproduced", "contradicted", "unresolved"]
_SIGNIFICANCE, _POWER = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class Paired:
  """Differences of arms that share seeds, in the metric's unit.

  Attributes:
    n: pairs, that is seeds.
    mean: of treatment - baseline.
    std: of the differences, n - 1 in the denominator; NaN for one pair, like `stderr`.
    stderr: of the mean.
    low, high: Student-t interval of the mean; infinite for one pair.
    sign: of the expected effect, or if none was named, of the mean; 0 for a mean of 0.
    same_sign: pairs whose difference has that sign.
    detectable: the smallest true effect that as many pairs with this spread would show, two-sided
      at 5 %, four times of five; infinite for one pair.
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
  """What a paper says, made decidable before the runs.

  Attributes:
    kind: "sign": treatment - baseline has `sign`, by more than `margin`. "equivalent": it is within
      +-`margin`. "threshold": one arm's value is on the `sign` side of `threshold`.
    sign: +1 for larger or above, -1 for smaller or below; "equivalent" does not use it.
    margin: in the metric's unit.
    threshold: in the metric's unit, for "threshold" only.
    single_run: a "threshold" may be judged by one run, for metrics that seeds do not move.
    paper: the paper's own effect or value, for comparison; no verdict depends on it.
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
      raise ValueError("Claim.margin=0 makes no claim of equivalence: fix a positive margin")
    if (self.kind == "threshold") != (self.threshold is not None):
      raise ValueError(f"Claim.threshold={self.threshold} with kind={self.kind!r}: give it for the "
                       "kind 'threshold' and for no other")
    if self.kind == "threshold" and self.margin:
      raise ValueError(f"Claim.margin={self.margin}: move `threshold` by it instead")
    if self.single_run and self.kind != "threshold":
      raise ValueError(f"Claim.single_run is for the kind 'threshold', not {self.kind!r}: one pair "
                       "says nothing about the spread between seeds")


def paired(treatment: ArrayLike, baseline: ArrayLike, confidence: float = 0.95,
           sign: Literal[-1, 1] | None = None) -> Paired:
  """The mean difference of two arms with its Student-t interval.

  Args:
    treatment: [n], one value a seed.
    baseline: [n], the same seeds in the same order; or 0 for the value of a single arm.
    confidence: coverage of the interval.
    sign: of the expected effect, which `same_sign` counts; None for that of the mean.

  Raises:
    ValueError: no pairs, arms of different length, or a value that is not finite.
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
                     "out, with their partners, and say so")
  n, mean = difference_n.size, float(difference_n.mean())
  expected = sign or int(np.sign(mean))
  same_sign = int((np.sign(difference_n) == expected).sum())
  if n == 1:
    return Paired(1, mean, np.nan, np.nan, -np.inf, np.inf, expected, same_sign, np.inf)
  std = float(difference_n.std(ddof=1))
  stderr = std / n**0.5
  half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * stderr
  needed = special.stdtrit(n - 1, 1 - _SIGNIFICANCE / 2) + special.stdtrit(n - 1, _POWER)
  return Paired(n, mean, std, stderr, mean - half, mean + half, expected, same_sign,
                float(needed) * stderr)


def judge(result: Paired, claim: Claim) -> Verdict:
  """Whether the whole interval supports the claim, opposes it, or does neither.

  A sign is contradicted beyond the margin on the other side, so that a claim and its opposite
  trade verdicts. One seed decides nothing, unless the claim is declared `single_run`.
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


def noise(values: ArrayLike) -> float:
  """Standard deviation between runs that differ in nothing but the seed: [n] -> metric's unit."""
  values_n = np.asarray(values, float)
  if values_n.ndim != 1 or values_n.size < 2:
    raise ValueError(f"noise needs at least two runs in one row, got shape {values_n.shape}")
  return float(values_n.std(ddof=1))
