"""What this project and its peers share: what a completion of a sum is worth, and names.

Peers run it in an interpreter of their own, so it needs the standard library alone.
"""

import re
from collections.abc import Sequence

PHASES = ("rollout", "reward", "update")  # of a step
# The ways in which TRL samples; see `experiments.benchmarks.peers.grpo`.
GENERATION = {
    "generate": "transformers' generate under autocast, over float32 weights",
    "generate_bf16": "transformers' generate over bfloat16 weights",
    "compiled": "generate with a static cache under torch.compile, over bfloat16 weights",
    "continuous": "transformers' continuous batching; it casts the weights to bfloat16",
}
_NUMBER = re.compile(r"-?[0-9]+")


def is_number(answer: str) -> bool:
  """Whether completions can be compared with it."""
  return _NUMBER.fullmatch(answer) is not None


def rewards(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
  """1 where the last number of a completion is the right answer; else 0, as without a number."""
  return [float(_last_number(completion) == int(answer))
          for completion, answer in zip(completions, answers, strict=True)]


def _last_number(text: str) -> int | None:
  numbers = _NUMBER.findall(text)
  return int(numbers[-1]) if numbers else None
