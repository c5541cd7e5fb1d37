"""What a completion of a sum is worth. The same rule for this project and for its peers.

Peers run it in an interpreter of their own, so it needs the standard library alone.
"""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?[0-9]+")


def rewards(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
  """1 where the last number of a completion is the right answer; else 0, as without a number."""
  return [float(_last_number(completion) == int(answer))
          for completion, answer in zip(completions, answers, strict=True)]


def _last_number(text: str) -> int | None:
  numbers = _NUMBER.findall(text)
  return int(numbers[-1]) if numbers else None
