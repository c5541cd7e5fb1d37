"""The values of the command line's flags, as a dataclass."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection

from train.run_folder import RunFolder, read_json_object


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
  reuse_runs: bool = False
  processes: int | None = None

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


def writes_results(main: Callable[[Options], None]) -> Callable[[Options], None]:
  """Decorates the main function of an experiment that only writes results to `--out`.

  The folder is locked while the function runs, and later belongs to this experiment: what the same
  experiment has written there is replaced. Without `--out`, the function is called as it is.
  """
  @functools.wraps(main)
  def claiming(options: Options) -> None:
    if options.out is None:
      main(options)
      return
    with contextlib.closing(RunFolder(options.out)) as folder:
      if not (folder.path / "config.json").exists():
        _require_results_of(options.experiment, folder.path)
      folder.check_config({"results_of": options.experiment})
      main(options)

  return claiming


def _require_results_of(experiment: str, folder: pathlib.Path) -> None:
  """Raises ValueError if a folder holds results of another experiment, but no `config.json`."""
  path = folder / "results.json"
  found = next((name for name in ("checkpoints", "parts", "summary.json", "report.md")
                if (folder / name).exists()), None)
  if path.exists():
    command = str(read_json_object(path).get("command"))
    found = None if re.search(rf"--?experiment[= ]{experiment}(\s|$)", command) else path.name
  if found:
    raise ValueError(f"{folder} holds {found} of something else than {experiment}: give another "
                     "--out")
