"""Committed results: `results/<paper, bench or programs>/<experiment>/<scale>/`.

Each folder has `report.md` with its figures; `summary.json`, a small file from which the index and
the tables of README and docs are generated; and `raw.tar.xz` with everything else that the
experiment wrote and a reader may want: its results.json, parts and metrics.
"""

import contextlib
import io
import json
import pathlib
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.reports import provenance
from experiments.reports.markdown import document, origin
from experiments.reports.summary import claims_table, table_text
from train.run_folder import write_json_atomic

ROOT = pathlib.Path(__file__).parents[1] / "results"
SUMMARY, RAW = "summary.json", "raw.tar.xz"
_OUT = re.compile(r"""(--out[= ])[^\s"'\\]+""")  # a path of the machine that ran the command
# Contents of a run folder that are not worth keeping.
_LEFT_OUT = {"checkpoints", "events", "runs", "lock", "cost", "profile", "making", SUMMARY,
             "tokenizer.json", "documents.jsonl"}

Result = Mapping[str, Any]


def record(folder: pathlib.Path, result: Result, summarise: Callable[[Result], dict],
           sections: Callable[[pathlib.Path, Result], list[tuple[str, str]]] | None = None
           ) -> pathlib.Path:
  """Writes a benchmark's results.json, with its provenance, summary.json and report.md.

  Args:
    folder: the output folder; existing files with these names are replaced.
    result: the measurements, as a JSON object.
    summarise: makes the summary from the content of results.json.
    sections: makes further sections of the report, (heading, body), and draws their figures in the
      folder.

  Returns:
    The path of report.md.
  """
  path = provenance.record(folder, result)
  return write_report(folder, json.loads(path.read_text(encoding="utf-8")), summarise, sections)


def write_report(folder: pathlib.Path, result: Result, summarise: Callable[[Result], dict],
                 sections: Callable[[pathlib.Path, Result], list[tuple[str, str]]] | None = None
                 ) -> pathlib.Path:
  """Writes summary.json and report.md, as `record` does, for an existing results.json."""
  summary = summarise(result)
  write_json_atomic(folder / SUMMARY, summary)
  return document(folder / "report.md", f"{summary['experiment']}, {summary['scale']}", [
      ("", summary["title"]),
      ("Claims", claims_table(summary["claims"])),
      *((shown["caption"], table_text(shown)) for shown in summary["tables"]),
      *(sections(folder, result) if sections else []),
      ("How to run it again", origin(summary["provenance"]))])


def keep(folder: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
  """Copies a finished experiment's report to the committed results, and archives the rest.

  Args:
    folder: the output folder of the experiment, with report.md and summary.json.
    destination: a folder below `ROOT`; its previous content is replaced.

  Returns:
    `destination`.

  Raises:
    ValueError: if the experiment has not written a report and a summary.
  """
  for name in ("report.md", SUMMARY):
    if not (folder / name).exists():
      raise ValueError(f"{folder} has no {name}: give the folder of a finished study or benchmark")
  destination.parent.mkdir(parents=True, exist_ok=True)
  # Copied completely before the previous result is removed.
  with tempfile.TemporaryDirectory(prefix=".", dir=destination.parent) as place:
    copied = pathlib.Path(place) / destination.name
    copied.mkdir()
    _copy(folder, copied)
    shutil.rmtree(destination, ignore_errors=True)
    copied.replace(destination)
  return destination


def _copy(folder: pathlib.Path, destination: pathlib.Path) -> None:
  """Copies the report, its figures and the summary, and archives the rest."""
  report = (folder / "report.md").read_text(encoding="utf-8")
  shown = {folder / name for name in re.findall(r"\]\(([\w.-]+)\)", report)}
  (destination / "report.md").write_text(_OUT.sub(r"\1DIR", report), encoding="utf-8")
  for path in (folder / SUMMARY, *sorted(shown)):
    shutil.copy(path, destination)
  kept = {folder / "report.md", *shown}
  with tarfile.open(destination / RAW, "w:xz", preset=9) as archive:
    for path in sorted(folder.rglob("*")):
      relative = path.relative_to(folder)
      if path.is_file() and path not in kept and not _LEFT_OUT & set(relative.parts):
        content = path.read_bytes()
        if path.suffix == ".json":
          content = _OUT.sub(r"\1DIR", content.decode()).encode()
        info = tarfile.TarInfo(str(relative))  # without owner and time: equal contents, equal bytes
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


@contextlib.contextmanager
def raw(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder with the content of a committed result's archive."""
  with tempfile.TemporaryDirectory() as place:
    with tarfile.open(folder / RAW) as archive:
      archive.extractall(place, filter="data")
    yield pathlib.Path(place)


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the summary in a folder.

  Raises:
    ValueError: if the folder has none.
  """
  path = folder / SUMMARY
  if not path.exists():
    raise ValueError(f"{folder} has no {SUMMARY}: give the folder of a finished study or benchmark")
  return json.loads(path.read_text(encoding="utf-8"))


def summaries(root: pathlib.Path = ROOT) -> dict[str, dict[str, Any]]:
  """Returns all committed summaries by folder, such as "v3/load_balancing/cpu"."""
  return {path.parent.relative_to(root).as_posix(): json.loads(path.read_text(encoding="utf-8"))
          for path in sorted(root.rglob(SUMMARY))}
