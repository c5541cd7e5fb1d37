"""What a study declares: arms that differ in a setting, claims about them, budgets by scale.

A study is a module below `experiments/studies/<paper>/` that defines `STUDY`;
`experiments.studies.runner` executes it.
"""

import dataclasses
from typing import Any

from experiments.stats import Claim
from experiments.studies.runs import Runs
from experiments.studies.text_runs import TextRuns


@dataclasses.dataclass(frozen=True)
class Arm:
  """One treatment: its name, and the settings that make it."""

  name: str
  settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A question, and how its answer is judged.

  Attributes:
    name: the claim in a few words.
    metric: of the runs' metrics.
    arm: the treatment. "group_*" stands for the arm of that group whose mean `matched` metric is
      closest to the baseline's; or, where `matched` is "sweep", for the one that swept best.
    baseline: what it is compared with on the same seeds; None judges the arm's own value. With
      `matched` "sweep" it may be a group too.
    claim: see `stats.Claim`; its margin is fixed here, before any run.
    paper: what the paper reports, in words.
    matched: see `arm`.
    at_one_rate: the comparison is judged only if both arms swept the same best learning rate: for
      metrics that the learning rate itself moves, such as the distance from the base.
    room: a metric and a bound that the arm's mean of it must stay below for the comparison to be
      judged: for claims that something does not rise, which a base that is already at the top could
      not contradict.
  """

  name: str
  metric: str
  arm: str
  baseline: str | None
  claim: Claim
  paper: str = ""
  matched: str = "max_violation"
  at_one_rate: bool = False
  room: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scale:
  """A budget.

  Attributes:
    config: what the arms' settings apply to.
    learning_rates: those swept, ascending, at least three; empty if nothing is swept and every arm
      trains at the rate of its own settings.
    seeds: paired seeds that are compared.
    minutes: of one run, on `hardware`.
    hardware: where that was measured.
    vmapped_runs: runs that train together as one vmapped batch, where they can.
    sweep_seeds: for each learning rate.
    shared_minutes: of what is made once for all runs, such as bases.
  """

  config: Any
  learning_rates: tuple[float, ...]
  seeds: int
  minutes: float
  hardware: str
  vmapped_runs: int = 1
  sweep_seeds: int = 1
  shared_minutes: float = 0.0

  def __post_init__(self):
    if 0 < len(self.learning_rates) < 3:
      raise ValueError("compare arms at their best of at least three learning rates, or it is the "
                       "tuning that is compared; leave learning_rates empty to sweep nothing")


@dataclasses.dataclass(frozen=True)
class Study:
  """A paper's claim, made testable.

  Attributes:
    name: as `--experiment` takes it, and the module's.
    claim: the paper's, in a sentence or two.
    source: where the paper makes it.
    arms: the treatments.
    baseline: the arm whose seed standard deviation is reported.
    comparisons: the questions.
    scales: budgets by name.
    kind: what a run is.
    one_rate: all arms train at the learning rate that the baseline swept best, for claims that
      everything else is left alone.
    default_arms: those that run unless `--arms` says otherwise; None for all.
    keep_runs: run folders stay directly below `--out`, with their checkpoints.
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

  def swept_arms(self, scale: Scale) -> tuple[str, ...]:
    """The arms whose learning rates are swept."""
    if not scale.learning_rates:
      return ()
    return (self.baseline,) if self.one_rate else tuple(arm.name for arm in self.arms)

  def arms_to_run(self) -> tuple[str, ...]:
    """The arms that run unless the user names others."""
    return self.default_arms or tuple(arm.name for arm in self.arms)

  def cost(self, scale_name: str) -> str:
    """The price of the whole study, in words."""
    scale, arms = self.scales[scale_name], len(self.arms_to_run())
    swept = len(self.swept_arms(scale)) * len(scale.learning_rates) * scale.sweep_seeds
    runs = swept + arms * scale.seeds
    minutes = runs / scale.vmapped_runs * scale.minutes + scale.shared_minutes
    total = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    together = f", {scale.vmapped_runs} at a time" if scale.vmapped_runs > 1 else ""
    count = lambda number, what: f"{number} {what}{'s' * (number != 1)}"
    rates, seeds = count(len(scale.learning_rates), "learning rate"), count(scale.seeds, "seed")
    arms = count(arms, "arm")
    if not swept:
      parts = f"{arms} x {seeds}"
    elif self.one_rate:
      parts = f"{rates} + {arms} x {seeds}"
    else:
      parts = f"{arms} x ({rates} + {seeds})"
    return f"{count(runs, 'run')} ({parts}){together}, {total} on {scale.hardware}"

  def definition(self, scale_name: str) -> dict[str, Any]:
    """What decides the outcome, as JSON: a result with another definition is stale.

    "arms": settings by arm; "learning_rates": those swept; "claims": of each comparison all that
    its verdict depends on.
    """
    return {
        "arms": {arm.name: list(arm.settings) for arm in self.arms},
        "learning_rates": list(self.scales[scale_name].learning_rates),
        "claims": [claim_identity(question.metric, question.arm, question.baseline,
                                  dataclasses.asdict(question.claim))
                   for question in self.comparisons]}


def claim_identity(metric: str, arm: str, baseline: str | None, claim: dict[str, Any]) -> str:
  """What is asked and what answers it, as one line; the paper's figure and the wording left out."""
  against = f" - {baseline}" if baseline else ""
  bound = claim["threshold"] if claim["kind"] == "threshold" else claim["margin"]
  sign = "" if claim["kind"] == "equivalent" else {1: "+", -1: "-"}[claim["sign"]]
  return f"{metric} of {arm}{against}: {claim['kind']} {sign}{bound:g}"
