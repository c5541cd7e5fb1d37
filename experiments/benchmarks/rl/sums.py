"""What this project and its peers share in `bench_rl`: the reward of sums, and names.

Peers import it in their own interpreters, so it needs nothing but the standard library.
"""

import re
from collections.abc import Sequence

PHASES = ("rollout", "reward", "update")  # of a training step
# Methods by which TRL can sample; see `experiments.benchmarks.peers.grpo`.
GENERATION = {
    "generate": "transformers' generate under autocast, over float32 weights",
    "generate_bf16": "transformers' generate over bfloat16 weights",
    "compiled": "generate with a static cache under torch.compile, over bfloat16 weights",
    "continuous": "transformers' continuous batching; it casts the weights to bfloat16",
}
_NUMBER = re.compile(r"-?[0-9]+")


def is_number(answer: str) -> bool:
  """Whether the answer is an integer, as `rewards` requires."""
  return _NUMBER.fullmatch(answer) is not None


def rewards(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
  """Returns 1 for each completion whose last integer is the correct answer, and 0 for others."""
  return [float(_last_number(completion) == int(answer))
          for completion, answer in zip(completions, answers, strict=True)]


def _last_number(text: str) -> int | None:
  numbers = _NUMBER.findall(text)
  return int(numbers[-1]) if numbers else None
