"""Regenerate the index of committed results and the figures of README and docs; keep new results.

`--set keep=FOLDER` first adds what a study or a benchmark has written to FOLDER. With
`--set check=true` nothing is written, and files that are not current are an error.
"""

import dataclasses
import pathlib

from experiments import catalogue, settings
from experiments.options import Options
from experiments.reports import config_reference, results, results_index
from train.run_folder import write_text_atomic

_ROOT = results.ROOT.parents[1]


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
  """What to do with committed results.

  Attributes:
    keep: the folder of a finished study or benchmark to add to the results.
    name: of the kept result's folder; None for the scale that it ran at.
    check: change nothing, and fail if a generated file is not current.
  """

  keep: str | None = None
  name: str | None = None
  check: bool = False


CONFIG = ResultsConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  if cfg.keep:
    print(f"kept in {_keep(pathlib.Path(cfg.keep), cfg.name)}")
  changed = []
  for path, text in generated().items():
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      changed.append(path.relative_to(_ROOT).as_posix())
      if not cfg.check:
        write_text_atomic(path, text)
  if changed and cfg.check:
    raise ValueError(f"not current, run `make results`: {', '.join(changed)}")
  print(f"{len(changed)} files changed: {', '.join(changed)}" if changed
        else "everything is current")


def _keep(folder: pathlib.Path, name: str | None) -> pathlib.Path:
  summary = results.read_summary(folder)
  place = results.ROOT / catalogue.find(summary["experiment"]).results_folder
  return results.keep(folder, place / (name or summary["scale"]))


def generated() -> dict[pathlib.Path, str]:
  """Every generated file with the content that it should have."""
  found = results.summaries()
  files = {results.ROOT / "README.md": results_index.index_page(found, stale),
           _ROOT / "docs" / "configuration.md": config_reference.reference()}
  for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))):
    if path not in files:
      files[path] = results_index.fill(path.read_text(encoding="utf-8"), found, stale)
  return files


def stale(folder: str) -> str:
  """Whether the study that made a result has another definition now, and how it differs."""
  summary = results.read_summary(results.ROOT / folder)
  if "definition" not in summary:
    return "–"
  study = catalogue.find(summary["experiment"]).load().STUDY
  return results_index.difference(summary["definition"], study.definition(summary["scale"]))
