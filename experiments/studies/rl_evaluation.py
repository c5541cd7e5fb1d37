"""Evaluation of a model on a study's task, before and after RL."""

import dataclasses
from typing import Any

import numpy as np

from experiments.studies.rl_metrics import length_pays, powers_of_two
from model.checks import require, require_positive
from rl import reflection
from rl.evaluate import draw, figures, majority_at, rates, verdicts
from rl.sampler import Sampler, Samples

_HARDER = ("pass@1", "cons@k", "pass@k")
_METRICS = ("pass@1", "lenient_pass@1", "format", "length", "clipped", "reflection")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The evaluations of a model before and after RL.

  Attributes:
    problems: number of held-out problems. Runs with other seeds have other problems, as far as the
      task has enough of them: otherwise what varies between seeds would say nothing about other
      problems.
    samples: number of completions of each problem, a power of two; pass@k and cons@k have this k.
    temperature: sampling temperature; None for that of training.
    harder: whether to evaluate also on the task's harder problems, if it has any; the metrics are
      then named "harder_*".
    base_temperatures: further sampling temperatures at which the base is evaluated; 0 for greedy
      decoding.
    reflection: whether to measure also how cutting out reflections changes the accuracy; see
      `rl.reflection`.
  """

  problems: int = 200
  samples: int = 16
  temperature: float | None = None
  harder: bool = False
  base_temperatures: tuple[float, ...] = ()
  reflection: bool = False

  def __post_init__(self):
    require_positive(self, "samples")
    require(self.problems >= 2, f"evaluation.problems={self.problems} must be at least 2, as "
            "intervals need several problems")
    require(self.samples.bit_count() == 1,
            f"evaluation.samples={self.samples} must be a power of two: 1, 2, 4 ...")
    require(self.temperature is None or self.temperature > 0,
            f"evaluation.temperature={self.temperature} must be positive, or none for that "
            "of training")
    require(min(self.base_temperatures, default=0) >= 0,
            f"evaluation.base_temperatures={self.base_temperatures} must not be negative")


class Evaluator:
  """Evaluates a model on the task of a sampler.

  Args:
    cfg: the evaluations.
    sampler: the sampler, which has the task and the network.
    seed: seed of the run, which selects the problems.
  """

  def __init__(self, cfg: EvaluationConfig, sampler: Sampler, seed: int = 0):
    self._cfg, self._sampler, self._first = cfg, sampler, seed * cfg.problems

  def __call__(self, variables: dict) -> dict[str, Any]:
    """Evaluates the variables of a model.

    Returns:
      "metrics": metrics of the held-out problems by name, including "pass@k" and "cons@k" with k =
      `samples` and "length_pays", and metrics "harder_*" of the harder problems; "pass@K" and
      "cons@K": [K, rate] for the powers of two up to `samples`; "heldout" and "harder": what
      `rl.evaluate.evaluate` returns, with intervals; "reflection": what `rl.reflection.effect`
      returns, if the config requests it; and "by_problem": the rate of each held-out problem by
      metric, if the task has no others, so that all seeds have the same ones.
    """
    found, drawn = self._split(variables, "heldout", self._cfg.temperature)
    if self._cfg.harder and "harder" in self._sampler.task.splits:
      harder, _ = self._split(variables, "harder", self._cfg.temperature)
      found["harder"] = harder["heldout"]
      found["metrics"] |= {f"harder_{name}": harder["metrics"][name] for name in _HARDER}
    if self._cfg.reflection:
      found["reflection"] = reflection.effect(self._sampler, variables, drawn)
    return found

  def base(self, variables: dict) -> dict[str, Any]:
    """Evaluates a base, also at the further sampling temperatures, as "temperatures"."""
    at = {str(temperature): self._split(variables, "heldout", temperature)[0]["heldout"]
          for temperature in self._cfg.base_temperatures}
    return self(variables) | ({"temperatures": at} if at else {})

  def _split(self, variables: dict, split: str,
             temperature: float | None) -> tuple[dict[str, Any], Samples]:
    samples = 1 if temperature == 0 else self._cfg.samples
    ks = powers_of_two(samples)
    drawn = draw(self._sampler, variables, split=split, problems=self._cfg.problems,
                 samples=samples, temperature=temperature, first=self._first)
    accuracy = verdicts(drawn, samples)
    of_problems = rates(drawn, samples, ks, accuracy)
    found = figures(drawn, samples, of_problems, accuracy)
    metrics = {name: value[0] for name, value in found.items() if isinstance(value, list)}
    best, majority = [[k, metrics[f"pass@{k}"]] for k in ks], majority_at(drawn, ks, accuracy)
    lengths_PN = drawn.lengths_S.reshape(-1, samples)
    shared = {} if self._sampler.size(split) != self._cfg.problems else {"by_problem": {
        name: rate_P.tolist() for name, rate_P in of_problems.items()
        if name in _METRICS and np.isfinite(rate_P).all()}}
    return shared | {
        "metrics": {name: metrics[name] for name in _METRICS} | {
            "pass@k": best[-1][1], "cons@k": majority[samples],
            "length_pays": length_pays(accuracy.correct_PN, lengths_PN)},
        "pass@K": best, "cons@K": [[k, majority[k]] for k in ks], "heldout": found}, drawn
