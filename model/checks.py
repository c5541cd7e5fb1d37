"""What configs check of their fields when they are made; ours and those of `train`."""

from typing import Any


def require(condition: bool, message: str) -> None:
  """Raises ValueError with the message unless the condition holds."""
  if not condition:
    raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
  """Raises ValueError naming the first of the fields that is not above zero."""
  for name in names:
    value = getattr(config, name)
    require(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


def require_range(config: Any, low: float, high: float, *names: str) -> None:
  """Raises ValueError naming the first of the fields that lies outside `low`..`high`."""
  for name in names:
    value = getattr(config, name)
    require(low <= value <= high,
            f"{type(config).__name__}.{name}={value} must lie in {low:g}..{high:g}")
