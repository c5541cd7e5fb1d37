"""Metrics of RL runs that studies compare: of training steps, of lengths, and gains.

Shape letters:  P problems  N samples of each problem
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Metrics that are means over steps, and the columns of `metrics.jsonl` that they average.
_MEANS = {"kl": "kl", "clip_ratio": "clip_ratio/region", "gap": "sampling_gap",
          "routing_agreement": "routing_agreement", "entropy": "entropy"}
_GAINED = ("pass@1", "cons@k", "pass@k", "lenient_pass@1", "format", "length", "reflection")


def powers_of_two(most: int) -> tuple[int, ...]:
  """Returns 1, 2, 4, ... up to `most`, which is a power of two."""
  return tuple(2**i for i in range(most.bit_length()))


def length_pays(correct_PN: np.ndarray, length_PN: np.ndarray) -> float | None:
  """Returns by how many tokens correct completions are longer than incorrect ones on average.

  Completions are compared within a problem, as in advantages: that hard problems have long
  solutions, which are often incorrect, says nothing about whether writing more helps.

  Args:
    correct_PN: bool, whether the completion is correct.
    length_PN: length of the completion in tokens.

  Returns:
    The mean over problems that have both correct and incorrect completions; None if none has.
  """
  differences = [length_N[correct_N].mean() - length_N[~correct_N].mean()
                 for correct_N, length_N in zip(correct_PN, length_PN, strict=True)
                 if correct_N.any() and not correct_N.all()]
  return float(np.mean(differences)) if differences else None


def metrics_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the metrics of a run's training steps.

  Args:
    rows: the rows of the run's `metrics.jsonl`.

  Returns:
    "length_slope", the growth of the mean completion length in tokens per step, by least squares
    over all steps; "max_clip_ratio", the largest "clip_ratio"; "seconds_per_step", the median; and
    means over those steps that have them: "kl", to the reference in nats per token; "clip_ratio",
    the fraction of ratios whose gradient was clipped; "gap", between the log-probabilities of
    sampler and trainer, in nats; "entropy"; and "routing_agreement".
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
  """Returns the differences after - before as "NAME_gain", also of the metrics "harder_*"."""
  return {f"{name}_gain": after[name] - before[name] for name in before
          if name.removeprefix("harder_") in _GAINED}


def by_problem(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
  """Returns the rates of the problems that all seeds share, and their gains, as "by_problem".

  Nothing if seeds have problems of their own. Both evaluations lose their rates.
  """
  first, last = (found.pop("by_problem", {}) for found in (before, after))
  gained = {f"{name}_gain": np.subtract(last[name], first[name]).tolist()
            for name in first if name in _GAINED and name in last}
  return {"by_problem": last | gained} if last else {}
