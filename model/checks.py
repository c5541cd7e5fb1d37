"""Checks that configuration dataclasses, here and in `train` and `rl`, make, and suggestions."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean ...?" with the most similar name, or "." if none is similar."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f"; did you mean {near[0]!r}?" if near else "."


def require(condition: bool, message: str) -> None:
  """Raises ValueError with this message unless the condition holds."""
  if not condition:
    raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
  """Raises ValueError, naming the field, if one of the named fields is not above zero."""
  for name in names:
    value = getattr(config, name)
    require(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


def require_range(config: Any, low: float, high: float, *names: str) -> None:
  """Raises ValueError, naming the field, if one of the named fields lies outside `low`..`high`."""
  for name in names:
    value = getattr(config, name)
    require(low <= value <= high,
            f"{type(config).__name__}.{name}={value} must lie in {low:g}..{high:g}")
