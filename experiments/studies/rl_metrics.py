"""Metrics of an RL run that a study compares: of its steps, and of lengths and gains.

Shape letters:  P problems  N samples of each
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The column of a run's rows whose mean over steps the metric is.
_MEANS = {"kl": "kl", "clip_ratio": "clip_ratio/region", "gap": "sampling_gap",
          "routing_agreement": "routing_agreement", "entropy": "entropy"}
_GAINED = ("pass@1", "cons@k", "pass@k", "lenient_pass@1", "format", "length", "reflection")


def powers_of_two(most: int) -> tuple[int, ...]:
  """1, 2, 4 ... up to `most`, a power of two."""
  return tuple(2**i for i in range(most.bit_length()))


def length_pays(correct_PN: np.ndarray, length_PN: np.ndarray) -> float | None:
  """Tokens by which correct completions are longer than incorrect ones of the same problem.

  Within a problem, as advantages are: that hard problems have long solutions which are often wrong
  says nothing about whether writing more helps. None if no problem has both kinds.
  """
  differences = [length_N[correct_N].mean() - length_N[~correct_N].mean()
                 for correct_N, length_N in zip(correct_PN, length_PN, strict=True)
                 if correct_N.any() and not correct_N.all()]
  return float(np.mean(differences)) if differences else None


def metrics_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Metrics of a run's steps.

  "length_slope", tokens per step, by least squares over all steps; the means over steps of "kl"
  (nats per token, to the reference), "clip_ratio" (the fraction of ratios whose gradient was
  clipped), "gap" (nats between the sampler's and the trainer's log-probabilities), "entropy" and
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
  """After minus before, under "NAME_gain"; "harder_*" too."""
  return {f"{name}_gain": after[name] - before[name] for name in before
          if name.removeprefix("harder_") in _GAINED}
