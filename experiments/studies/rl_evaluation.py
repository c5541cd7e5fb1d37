"""How a study evaluates a model on its task, before and after RL."""

import dataclasses
from typing import Any

from experiments.studies.rl_metrics import length_pays, powers_of_two
from model.checks import require, require_positive
from rl import reflection
from rl.evaluate import draw, judge, majority_at, verdicts
from rl.sampler import Sampler, Samples

_HARDER = ("pass@1", "cons@k", "pass@k")
_METRICS = ("pass@1", "lenient_pass@1", "format", "length", "clipped", "reflection")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluations before and after RL.

  Attributes:
    problems: held-out ones.
    samples: of each, a power of two: pass@k and cons@k are of all of them.
    temperature: None for the training's.
    harder: also evaluate on the task's harder problems, if it has some; their metrics are
      "harder_*".
    base_temperatures: at which the base is sampled besides; 0 is greedy.
    reflection: also measure what cutting reflections out does to accuracy; see `rl.reflection`.
  """

  problems: int = 200
  samples: int = 16
  temperature: float | None = None
  harder: bool = False
  base_temperatures: tuple[float, ...] = ()
  reflection: bool = False

  def __post_init__(self):
    require_positive(self, "problems", "samples")
    require(self.samples.bit_count() == 1,
            f"evaluation.samples={self.samples} must be a power of two: 1, 2, 4 ...")
    require(self.temperature is None or self.temperature > 0,
            f"evaluation.temperature={self.temperature} must be positive, or none for the "
            "training's")
    require(min(self.base_temperatures, default=0) >= 0,
            f"evaluation.base_temperatures={self.base_temperatures} must not be negative")


class Evaluator:
  """Evaluates variables as the config says.

  Args:
    cfg: what to evaluate.
    sampler: of the task and the model.
  """

  def __init__(self, cfg: EvaluationConfig, sampler: Sampler):
    self._cfg, self._sampler = cfg, sampler

  def __call__(self, variables: dict) -> dict[str, Any]:
    """A model's figures.

    Returns:
      "metrics": numbers by name, of held-out problems, "pass@k" and "cons@k" of all samples and
      "length_pays" among them, and "harder_*"; "pass@K" and "cons@K": [K, rate] for the powers of
      two up to all samples; "heldout" and "harder": the estimates of `rl.evaluate.evaluate` with
      intervals; "reflection": of `rl.reflection.effect`, where that is asked for.
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
    """The figures of a base, and "temperatures": estimates at other sampling temperatures."""
    at = {str(temperature): self._split(variables, "heldout", temperature)[0]["heldout"]
          for temperature in self._cfg.base_temperatures}
    return self(variables) | ({"temperatures": at} if at else {})

  def _split(self, variables: dict, split: str,
             temperature: float | None) -> tuple[dict[str, Any], Samples]:
    samples = 1 if temperature == 0 else self._cfg.samples
    ks = powers_of_two(samples)
    drawn = draw(self._sampler, variables, split=split, problems=self._cfg.problems,
                 samples=samples, temperature=temperature)
    accuracy = verdicts(drawn, samples)
    found = judge(drawn, samples, ks, accuracy)
    metrics = {name: value[0] for name, value in found.items() if isinstance(value, list)}
    best, majority = [[k, metrics[f"pass@{k}"]] for k in ks], majority_at(drawn, ks, accuracy)
    lengths_PN = drawn.lengths_S.reshape(-1, samples)
    return {
        "metrics": {name: metrics[name] for name in _METRICS} | {
            "pass@k": best[-1][1], "cons@k": majority[samples],
            "length_pays": length_pays(accuracy.correct_PN, lengths_PN)},
        "pass@K": best, "cons@K": [[k, majority[k]] for k in ks], "heldout": found}, drawn
