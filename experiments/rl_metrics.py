"""What a study says of an RL run: from its rows, its evaluations and its samples.

Shape letters:  P problems  N samples of each
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl.evaluate import draw, judge, majority_at, verdicts
from rl.sampler import Sampler

# By metric, the column of a run's rows that it is the mean of.
_MEANS = {"kl": "kl", "clip_ratio": "clip_ratio/region", "gap": "sampling_gap",
          "routing_agreement": "routing_agreement", "entropy": "entropy"}
_GAINED = ("pass@1", "cons@k", "pass@k", "lenient_pass@1", "format", "length")


def powers_of_two(most: int) -> tuple[int, ...]:
  """1, 2, 4 ... up to `most`, a power of two."""
  return tuple(2**i for i in range(most.bit_length()))


def judged(sampler: Sampler, variables: dict, *, split: str, problems: int, samples: int,
           temperature: float | None) -> dict[str, Any]:
  """A model's figures on problems of a split.

  Args:
    sampler: says task and model.
    variables: of the model.
    split: of the task.
    problems: how many.
    samples: of each, a power of two.
    temperature: None for the sampler's.

  Returns:
    "metrics": the estimates of `rl.evaluate.evaluate`, with "pass@k" and "cons@k" of all samples,
    and "length_pays"; "pass@K" and "cons@K": [K, rate] for the powers of two up to `samples`.
  """
  ks = powers_of_two(samples)
  drawn = draw(sampler, variables, split=split, problems=problems, samples=samples,
               temperature=temperature)
  accuracy = verdicts(drawn, samples)
  found = judge(drawn, samples, ks, accuracy)
  metrics = {name: value[0] for name, value in found.items() if isinstance(value, list)}
  best, majority = [[k, metrics[f"pass@{k}"]] for k in ks], majority_at(drawn, ks, accuracy)
  kept = ("pass@1", "lenient_pass@1", "format", "length", "clipped", "reflection")
  return {
      "metrics": {name: metrics[name] for name in kept} | {
          "pass@k": best[-1][1], "cons@k": majority[samples],
          "length_pays": length_pays(accuracy.correct_PN,
                                     drawn.lengths_S.reshape(-1, samples))},
      "pass@K": best, "cons@K": [[k, majority[k]] for k in ks]}


def length_pays(right_PN: np.ndarray, length_PN: np.ndarray) -> float | None:
  """Tokens by which right completions are longer than wrong ones of the same problem.

  Within a problem, as advantages are: that hard problems have long solutions and often wrong ones
  says nothing of whether writing more helps. None if no problem has both kinds.
  """
  differences = [length_N[right_N].mean() - length_N[~right_N].mean()
                 for right_N, length_N in zip(right_PN, length_PN, strict=True)
                 if right_N.any() and not right_N.all()]
  return float(np.mean(differences)) if differences else None


def of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Metrics of a run's steps.

  "length_slope", tokens a step, by least squares over all steps; the means over steps of "kl" (nats
  per token, to the reference), "clip_ratio" (the share of ratios whose gradient was clipped), "gap"
  (nats between the sampler's and the trainer's log-probabilities), "entropy" and
  "routing_agreement", where rows have them; "max_clip_ratio", the largest; "seconds_per_step", the
  median.
  """
  column = lambda name: np.array([row[name] for row in rows if row.get(name) is not None], float)
  found = {metric: float(column(name).mean()) for metric, name in _MEANS.items()
           if column(name).size}
  if (clipped := column("clip_ratio/region")).size:
    found["max_clip_ratio"] = float(clipped.max())
  if len(rows) > 1:
    found["length_slope"] = float(
        np.polyfit(column("step"), column("completions/mean_length"), 1)[0])
  return found | {"seconds_per_step": statistics.median(row["seconds/step"] for row in rows)}


def gains(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
  """After less before, under "NAME_gain"; "harder_*" too."""
  return {f"{name}_gain": after[name] - before[name] for name in before
          if name.removeprefix("harder_") in _GAINED}
