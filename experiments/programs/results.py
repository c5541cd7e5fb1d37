"""Regenerate the index of committed results and the result tables in README and docs.

`--set keep=FOLDER` first adds the results that a study or benchmark has written to FOLDER, and
`--set judge=true` first judges the runs of all committed studies again, by today's rules. With
`--set check=true`, no generated file is written, and it is an error if one is out of date.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments import catalogue, settings
from experiments.options import Options
from experiments.reports import config_reference, results, results_index
from experiments.studies.judging import rules
from experiments.studies.judging.again import judge_again
from experiments.studies.runner import judging
from train.run_folder import write_text_atomic

_ROOT = results.ROOT.parents[1]


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
  """What the program does with committed results.

  Attributes:
    keep: folder of a finished study or benchmark whose results are added to the committed ones;
      None to add nothing.
    name: name of the folder in which they are committed, of letters, digits, "_", "-" and "."; None
      for the scale at which they ran. A result that has that name is replaced.
    judge: whether to judge the committed studies again, without training anything.
    check: whether to write no generated file, and fail if one is out of date.
  """

  keep: str | None = None
  name: str | None = None
  judge: bool = False
  check: bool = False

  def __post_init__(self):
    if self.name is not None:
      _require_folder_name(self.name)


def _require_folder_name(name: str) -> None:
  if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
    raise ValueError(f"name={name!r} must be the name of one folder, of letters, digits, '_', '-' "
                     "and '.', such as gpu-busy")


CONFIG = ResultsConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  if (cfg.keep or cfg.judge) and cfg.check:
    raise ValueError("keep and judge change results and check writes nothing: leave one out")
  if cfg.keep:
    print(f"results added in {_keep(pathlib.Path(cfg.keep), cfg.name)}")
  if cfg.judge:
    for folder, summary in results.summaries().items():
      if "definition" in summary:
        _judge(results.ROOT / folder, summary)
  changed = []
  for path, text in generated().items():
    if not path.exists() or path.read_text(encoding="utf-8") != text:
      changed.append(path.relative_to(_ROOT).as_posix())
      if not cfg.check:
        write_text_atomic(path, text)
  if changed and cfg.check:
    raise ValueError(f"out of date, run `make results`: {', '.join(changed)}")
  print(f"{len(changed)} files changed: {', '.join(changed)}" if changed
        else "all generated files are up to date")


def _keep(folder: pathlib.Path, name: str | None) -> pathlib.Path:
  """Adds the results in `folder` to the committed ones, and returns where they are."""
  summary = results.read_summary(folder)
  experiment = catalogue.find(summary["experiment"])
  if "definition" in summary:
    _require_study(experiment, summary["scale"], folder)
  name = name or summary["scale"]
  _require_folder_name(name)
  return results.keep(folder, results.ROOT / experiment.results_folder / name)


def _judge(committed: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """Replaces the verdicts of a committed study by those of today's rules."""
  study = catalogue.find(summary["experiment"]).load().STUDY
  if summary["scale"] not in study.scales:  # the index says so
    return
  with results.raw(committed) as folder:
    judge_again(study, folder, summary["provenance"])
    results.keep(folder, committed)


def _require_study(experiment: catalogue.Experiment, scale: str, folder: pathlib.Path) -> None:
  """Raises ValueError unless a folder of runs is that of a finished study in the catalogue."""
  if experiment.kind != "studies":
    raise ValueError(f"{folder} is a comparison by {experiment.name}, whose arms are defined by a "
                     "command: only studies are kept, so write it as one (docs/how_to_add.md)")
  scales = experiment.load().STUDY.scales
  if scale not in scales:
    raise ValueError(f"{folder} ran at the scale {scale!r}, which {experiment.name} does not have: "
                     f"there are {', '.join(scales)}")
  missing = _result(folder).get("missing")
  if missing is None:
    raise ValueError(f"{folder} does not say whether runs are missing, as an earlier version wrote "
                     "it: repeat its command, which adds that without training anything again")
  if missing:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise ValueError(f"{folder} is not finished: {', '.join(missing[:3])}{more} have not run. "
                     "Repeat its command, or ask for fewer --arms or --seeds in it")


def _result(folder: pathlib.Path) -> Mapping[str, Any]:
  path = folder / "results.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def generated() -> dict[pathlib.Path, str]:
  """Returns the content that every generated file should have, by path."""
  found = results.summaries()
  files = {results.ROOT / "README.md": results_index.index_page(found, stale),
           _ROOT / "docs" / "configuration.md": config_reference.reference()}
  for folder in found:
    report = results.ROOT / folder / "report.md"
    files[report] = results_index.marked(report.read_text(encoding="utf-8"), stale(folder))
  for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))):
    if path not in files:
      above = "" if path.parent == _ROOT else "../"
      files[path] = results_index.fill(
          path.read_text(encoding="utf-8"), found, f"{above}experiments/results")
  return files


def stale(folder: str) -> str:
  """Returns whether a study has changed since a result, and in what; "–" for other results.

  That is its definition, the code that judges runs, or the code that measured them, if it is known.

  Args:
    folder: folder of the result, relative to `results/`.
  """
  summary = results.read_summary(results.ROOT / folder)
  experiment = catalogue.find(summary["experiment"])
  if "definition" not in summary or experiment.kind != "studies":
    return "–"
  study = experiment.load().STUDY
  if summary["scale"] not in study.scales:
    return f"yes: there is no scale {summary['scale']}"
  known = {"judging": judging(), "metrics": rules.syntax_hash(study.kind.measuring)}
  measured = set(summary.get("measured_by", ())) - {None, known["metrics"]}
  then = {"judging": summary.get("judged_by"), "metrics": measured or known["metrics"]}
  return results_index.difference(
      summary["definition"] | then, study.definition(summary["scale"]) | known)
