"""The command line's flags as data."""

import dataclasses
import pathlib
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of `experiments.run`, where they are documented."""

  experiment: str
  scale: str | None = None
  out: pathlib.Path | None = None
  seeds: str | None = None
  settings: tuple[str, ...] = ()
  a: tuple[str, ...] = ()
  b: tuple[str, ...] = ()
  arms: tuple[str, ...] = ()
  max_minutes: float | None = None
  profile: bool = False

  def folder(self, default: str) -> pathlib.Path:
    return self.out or pathlib.Path("runs") / default

  def scale_of(self, scales: Collection[str]) -> str:
    """`--scale`, or "smoke".

    Raises:
      ValueError: if it is not one of `scales`.
    """
    scale = self.scale or "smoke"
    if scale not in scales:
      raise ValueError(f"--scale={scale} does not exist for {self.experiment}; there are "
                       + ", ".join(scales))
    return scale

  def num_seeds(self, default: int = 1) -> int:
    """`--seeds` as a count."""
    if self.seeds is None:
      return default
    if not self.seeds.isdecimal() or int(self.seeds) < 1:
      raise ValueError(f"--seeds={self.seeds} must be a positive number for "
                       f"--experiment={self.experiment}")
    return int(self.seeds)

  def seed_range(self, default: int) -> range:
    """`--seeds` as `N` (0 to N - 1) or `A:B` (A to B - 1)."""
    first, colon, last = (self.seeds or str(default)).partition(":")
    if not colon:
      first, last = "0", first
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
      raise ValueError(f"--seeds={self.seeds} must be N, or A:B with A < B")
    return range(int(first), int(last))

  def require_supported(self, *unsupported: str) -> None:
    """Raises ValueError for a flag that was given and is not supported by this experiment.

    Args:
      *unsupported: names of fields.
    """
    for name in unsupported:
      if getattr(self, name):
        flag = "set" if name == "settings" else name
        raise ValueError(f"--{flag} is not supported by --experiment={self.experiment}")
