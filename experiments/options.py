"""The values of the command line's flags, as a dataclass."""

import dataclasses
import pathlib
from collections.abc import Collection


def _is_count(text: str) -> bool:
  """Whether a text is a whole number that a seed, which has 31 bits, can be."""
  return text.isdecimal() and len(text) <= 10 and int(text) < 2**31


@dataclasses.dataclass(frozen=True)
class Options:
  """The values of the flags of `experiments.run`, which documents them.

  `settings` holds those of `--set`; every other field has the name of its flag.
  """

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
    """Returns `--out`, or the folder `default` below `runs/` if it is not given."""
    return self.out or pathlib.Path("runs") / default

  def scale_of(self, scales: Collection[str]) -> str:
    """Returns `--scale`, or "smoke" if it is not given.

    Raises:
      ValueError: if that is not one of `scales`.
    """
    scale = self.scale or "smoke"
    if scale not in scales:
      raise ValueError(f"--scale={scale} does not exist for {self.experiment}; there are "
                       + ", ".join(scales))
    return scale

  def num_seeds(self, default: int = 1) -> int:
    """Returns `--seeds` as a number of seeds, or `default` if it is not given.

    Raises:
      ValueError: if `--seeds` is not a positive number.
    """
    if self.seeds is None:
      return default
    if not _is_count(self.seeds) or int(self.seeds) < 1:
      raise ValueError(f"--seeds={self.seeds:.40} must be a positive number for "
                       f"--experiment={self.experiment}")
    return int(self.seeds)

  def seed_range(self, default: int) -> range:
    """Returns the seeds that `--seeds` gives as `N` (0 to N - 1) or as `A:B` (A to B - 1).

    Args:
      default: the number of seeds if `--seeds` is not given.

    Raises:
      ValueError: if `--seeds` has neither form, or is empty.
    """
    first, colon, last = (str(default) if self.seeds is None else self.seeds).partition(":")
    if not colon:
      first, last = "0", first
    if not (_is_count(first) and _is_count(last) and int(first) < int(last)):
      raise ValueError(f"--seeds={self.seeds:.40} must be a number N > 0, or a range A:B with "
                       "A < B")
    return range(int(first), int(last))

  def require_supported(self, *unsupported: str) -> None:
    """Raises ValueError if a flag was given that this experiment does not support.

    Args:
      *unsupported: names of the fields whose flags are not supported.
    """
    for name in unsupported:
      if getattr(self, name):
        flag = "set" if name == "settings" else name
        raise ValueError(f"--{flag} is not supported by --experiment={self.experiment}")
