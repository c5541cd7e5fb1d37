"""Declarations of studies: arms that differ in their settings, claims, and budgets by scale.

A study is a module below `experiments/studies/<paper>/` that defines `STUDY`;
`experiments.studies.runner` executes it.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from experiments.stats import Claim
from experiments.studies.runs import Runs
from experiments.studies.text.text_runs import TextRuns


@dataclasses.dataclass(frozen=True)
class Arm:
  """One of the configurations that a study compares.

  Attributes:
    name: name of the arm.
    settings: assignments `section.field=value` that are applied to the scale's config.
  """

  name: str
  settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison of two arms on the same seeds, or of one arm with a threshold.

  Attributes:
    name: the claim in a few words.
    metric: name of the metric that is compared.
    arm: the treatment. "group_*" stands for one arm whose name begins with "group_": the one whose
      mean of the metric `matched` is closest to the baseline's or, if `matched` is "sweep", the one
      with the best score in its learning-rate sweep.
    baseline: the arm that the treatment is compared with; None judges the treatment's own value. If
      `matched` is "sweep", it may be a group too.
    claim: the criterion, see `stats.Claim`; it is fixed here, before any run.
    paper: what the paper reports, in words.
    matched: metric by which the arm of a group is chosen, or "sweep", see `arm`.
    at_one_rate: whether the comparison is judged only if the sweeps of both arms chose the same
      learning rate: for metrics that depend on the learning rate itself, such as the KL from the
      base.
    any_rate: whether the claim is about every learning rate, so that it does not matter if the best
      one is at an end of its sweep.
    room: (metric, bound): the comparison is judged only if the treatment's mean of that metric is
      below the bound. This is for claims that something does not rise, which could not be
      contradicted if the base were already at the maximum.
  """

  name: str
  metric: str
  arm: str
  baseline: str | None
  claim: Claim
  paper: str = ""
  matched: str = "max_violation"
  at_one_rate: bool = False
  any_rate: bool = False
  room: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scale:
  """The size of a study's runs, how many there are, and how long they take.

  Attributes:
    config: the configuration that the arms' settings are applied to.
    learning_rates: learning rates of the sweep, at least three in ascending order; empty for no
      sweep, in which case every arm trains at the learning rate of its own settings.
    seeds: number of paired seeds on which arms are compared.
    minutes: duration of one run on `hardware`.
    hardware: the hardware on which `minutes` was measured or for which it was estimated.
    vmapped_runs: largest number of runs that train as one vmapped batch, if one program can train
      them.
    sweep_seeds: number of seeds for each learning rate of the sweep.
    shared_minutes: duration of what is done once for all runs, such as pretraining bases.
    extra_rates: number of learning rates by which an arm's sweep may be extended, one at a time, as
      long as its best rate is at an end of it. Arms whose best rate is still at an end are not
      judged. A smoke run extends nothing.
  """

  config: Any
  learning_rates: tuple[float, ...]
  seeds: int
  minutes: float
  hardware: str
  vmapped_runs: int = 1
  sweep_seeds: int = 1
  shared_minutes: float = 0.0
  extra_rates: int = 3

  def __post_init__(self):
    if 0 < len(self.learning_rates) < 3:
      raise ValueError("Scale.learning_rates: sweep at least three learning rates, as otherwise "
                       "differences in tuning are compared; leave it empty for no sweep")


@dataclasses.dataclass(frozen=True)
class Study:
  """A test of a paper's claim.

  Attributes:
    name: name of the study for `--experiment`, which must be the module's.
    claim: the paper's claim in a sentence or two.
    source: where the paper makes it.
    arms: the configurations that are compared.
    baseline: the arm whose seed standard deviation is reported, and which runs once more (`again`).
    comparisons: the comparisons of the arms, each with its criterion.
    scales: budgets by name.
    kind: the class that trains and measures the runs.
    one_rate: whether all arms train at the learning rate that is best for the baseline, the only
      arm that is then swept: for claims about a change that leaves everything else the same.
    default_arms: arms that run unless `--arms` names others; None for all.
    keep_runs: whether run folders are kept directly below `--out`, with their checkpoints.
  """

  name: str
  claim: str
  source: str
  arms: tuple[Arm, ...]
  baseline: str
  comparisons: tuple[Comparison, ...]
  scales: dict[str, Scale]
  kind: type[Runs] = TextRuns
  one_rate: bool = False
  default_arms: tuple[str, ...] | None = None
  keep_runs: bool = False

  def again(self) -> Arm:
    """Returns the arm that is the baseline again, started one rounding of its weights away.

    It runs at the baseline's learning rate on the same seeds. What it differs by from the baseline
    is what rounding alone makes of a run, and smaller differences between arms say nothing.
    """
    settings, = (arm.settings for arm in self.arms if arm.name == self.baseline)
    return Arm(f"{self.baseline}_again", (*settings, f"{self.kind.nudge}=true"))

  def swept_arms(self, scale: Scale) -> tuple[str, ...]:
    """Returns the arms whose learning rates are swept."""
    if not scale.learning_rates:
      return ()
    return (self.baseline,) if self.one_rate else tuple(arm.name for arm in self.arms)

  def arms_to_run(self) -> tuple[str, ...]:
    """Returns the arms that run unless `--arms` names others."""
    return self.default_arms or tuple(arm.name for arm in self.arms)

  def cost(self, scale_name: str, arms: Collection[str] | None = None,
           num_seeds: int | None = None) -> str:
    """Returns the number of runs and the duration of a study, in words.

    Args:
      scale_name: name of the scale.
      arms: names of the arms that run; None for those that run by default.
      num_seeds: number of compared seeds; None for that of the scale.
    """
    scale, names = self.scales[scale_name], arms or self.arms_to_run()
    num_seeds = num_seeds or scale.seeds
    arms = len(names) + (self.baseline in names and num_seeds > 1)
    needed = {*names, self.baseline} if self.one_rate else set(names)
    sweeps = len(needed & set(self.swept_arms(scale)))
    swept = sweeps * len(scale.learning_rates) * scale.sweep_seeds
    runs = swept + arms * num_seeds
    minutes = runs / scale.vmapped_runs * scale.minutes + scale.shared_minutes
    count = lambda number, what: f"{number} {what}{'s' * (number != 1)}"
    total = count(round(minutes), "minute") if minutes < 120 else f"{minutes / 60:.1f} hours"
    vmapped = f", {scale.vmapped_runs} at a time" if scale.vmapped_runs > 1 else ""
    rates, seeds = count(len(scale.learning_rates), "learning rate"), count(num_seeds, "seed")
    parts = f"{count(arms, 'arm')} x {seeds}"
    if swept:
      parts = f"{count(sweeps, 'arm')} x {rates} + {parts}"
    return f"{count(runs, 'run')} ({parts}){vmapped}, {total} on {scale.hardware}"

  def definition(self, scale_name: str) -> dict[str, Any]:
    """Returns what decides the outcome, as JSON: a result with another definition is stale.

    Args:
      scale_name: name of the scale.

    Returns:
      "arms", the settings by arm; "learning_rates", those of the sweep; and "claims", the
      `claim_identity` of every comparison.
    """
    return {
        "arms": {arm.name: list(arm.settings) for arm in self.arms},
        "learning_rates": list(self.scales[scale_name].learning_rates),
        "claims": list(map(claim_identity, self.comparisons))}


def claim_identity(comparison: Comparison) -> str:
  """Returns all that a comparison's verdict depends on as one line, without wording and paper."""
  claim, conditions = comparison.claim, []
  against = f" - {comparison.baseline}" if comparison.baseline else ""
  bound = claim.threshold if claim.kind == "threshold" else claim.margin
  sign = "" if claim.kind == "equivalent" else {1: "+", -1: "-"}[claim.sign]
  if comparison.arm.endswith("*"):
    conditions.append(f"matched by {comparison.matched}")
  if comparison.at_one_rate:
    conditions.append("at one rate")
  if comparison.any_rate:
    conditions.append("at any rate")
  if comparison.room:
    conditions.append("if {} < {:g}".format(*comparison.room))
  if claim.single_run:
    conditions.append("single run")
  text = f"{comparison.metric} of {comparison.arm}{against}: {claim.kind} {sign}{bound:g}"
  return ", ".join([text, *conditions])
