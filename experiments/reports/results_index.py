"""The index of committed results, and the generated blocks of README and docs.

A block stands between `<!-- results: KIND ARGUMENTS -->` and `<!-- end of results -->`. The kinds:

    claims FOLDER [FOLDER ...]          every claim of these results
    rows FOLDER: CLAIM; FOLDER: CLAIM   single claims, each identified by the beginning of its text
    table FOLDER NAME                   a table of a benchmark's summary

Everything is generated from the `summary.json` files.
"""

import collections
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.reports.markdown import table, uncommitted
from experiments.reports.summary import claims_table, estimate, metric_of, table_text

Summaries = Mapping[str, Mapping[str, Any]]
_BLOCK = re.compile(r"(<!-- results: (\w+)\s*(.*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_STALE = "> **This result is stale:**"  # the beginning of the note in its report
_RESULTS = "](RESULTS/"  # the beginning of a link, until `fill` knows where the results are


def fill(text: str, summaries: Summaries, results: str = "experiments/results") -> str:
  """Returns a document with all of its blocks generated again.

  Args:
    text: the document, in Markdown.
    summaries: summaries by folder, as `results.summaries` returns them.
    results: path of the folder of results, relative to the document.

  Raises:
    ValueError: if a block names a kind, result, claim or table that does not exist.
  """
  makers = {"claims": _claims, "rows": _rows, "table": _table}

  def replace(match: re.Match) -> str:
    head, kind, arguments, end = match.groups()
    if kind not in makers:
      raise ValueError(f"there is no block {kind!r}; there are: {', '.join(makers)}")
    body = makers[kind](" ".join(arguments.split()), summaries)
    return f"{head}{body.replace(_RESULTS, f']({results}/')}\n{end}"

  return _BLOCK.sub(replace, text)


def blocks(text: str) -> list[str]:
  """Returns the blocks of a document, with the comments that enclose them."""
  return [match[0] for match in _BLOCK.finditer(text)]


def overview(summaries: Summaries, stale: Callable[[str], str]) -> str:
  """Returns a table with a row for every result: verdicts, command, hardware, code, staleness.

  Args:
    summaries: summaries by folder, as `results.summaries` returns them.
    stale: returns, for a result's folder, "no" or how the study has changed since the result was
      made.
  """
  lines = []
  for folder, summary in summaries.items():
    origin = summary["provenance"]
    lines.append([f"[{folder}](#{_anchor(folder)})", _counts([summary]), f"`{origin['command']}`",
                  hardware(origin), code(origin), stale(folder)])
  return table(("result", "claims", "command", "hardware", "code", "stale?"), lines)


def _anchor(heading: str) -> str:
  """Returns the link target of a Markdown heading."""
  return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def _counts(summaries: Iterable[Mapping[str, Any]]) -> str:
  """Returns the number of claims with each verdict, in words."""
  counts = collections.Counter(c["verdict"] for summary in summaries for c in summary["claims"])
  return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "none"


def hardware(origin: Mapping[str, Any]) -> str:
  """Returns device and versions in a few words."""
  device = origin["device"]
  if isinstance(device, Mapping):
    device = ", ".join(device["several"])
  if device.endswith("cpu"):
    device = f"{origin.get('cores', '?')} cores of {origin.get('cpu', 'a CPU')}"
  versions = origin.get("versions", {})
  several = versions.get("several", [versions])
  jax = ", ".join(dict.fromkeys(each["jax"] for each in several if "jax" in each))
  return f"{device}; jax {jax}" if jax else device


def code(origin: Mapping[str, Any]) -> str:
  """Returns the hash of the sources that ran, or the commit if no hash was recorded."""
  sources, commits = origin.get("sources"), origin.get("commit")
  if isinstance(sources, str):
    return f"sources {sources}"
  commits = commits["several"] if isinstance(commits, Mapping) else [commits]
  known = ", ".join(commit[:9] for commit in commits if commit) or "unknown"
  return (f"commit{'s' * (len(commits) > 1)} {known}"
          + uncommitted(origin, " and uncommitted changes"))


def difference(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
  """Returns how a study's definition has changed since a result, for the column "stale?".

  Args:
    then: the definition in the result's summary; None if it is not known.
    now: the present definition of the study, at the same scale.
  """
  if then is None:
    return "unknown"
  changed = [name.replace("_", " ") for name in now if then.get(name) != now[name]]
  return f"yes: changed {', '.join(changed)}" if changed else "no"


def marked(report: str, stale: str) -> str:
  """Returns a report with a note below its title if the result is stale, and else without one.

  Args:
    report: the text of a study's report.md, with or without such a note.
    stale: as `difference` returns it.
  """
  report = re.sub(rf"^{re.escape(_STALE)}.*\n\n", "", report, count=1, flags=re.MULTILINE)
  answer, _, changed = stale.partition(": changed ")
  if answer != "yes":
    return report
  title, rest = report.split("\n\n", 1)
  return f"{title}\n\n{_STALE} since it was made, the study's {changed} have changed.\n\n{rest}"


def _summary(folder: str, summaries: Summaries) -> Mapping[str, Any]:
  if folder not in summaries:
    raise ValueError(f"there is no result {folder}; there are: {', '.join(summaries)}")
  return summaries[folder]


def _claims(arguments: str, summaries: Summaries) -> str:
  folders = arguments.split()
  found = [(folder, c) for folder in folders for c in _summary(folder, summaries)["claims"]]
  names = _short_names(folders)
  return "\n\n".join([
      claims_table([c for _, c in found], [names[folder] for folder, _ in found]
                   if len(folders) > 1 else ()), _sources(folders, summaries)])


def _short_names(folders: list[str]) -> dict[str, str]:
  """Returns the parts of folders in which they differ: "cpu" and "gpu" for "a/cpu" and "a/gpu"."""
  parts = list(zip(*(folder.split("/") for folder in folders), strict=True))
  return {folder: "/".join(part for part, others in zip(folder.split("/"), parts, strict=True)
                           if len(set(others)) > 1) for folder in folders}


def _rows(arguments: str, summaries: Summaries) -> str:
  lines = []
  for item in arguments.split(";"):
    folder, _, beginning = item.strip().partition(": ")
    claims = _summary(folder, summaries)["claims"]
    found = ([c for c in claims if c["claim"] == beginning]
             or [c for c in claims if c["claim"].startswith(beginning)])
    if len(found) != 1:
      names = [c["claim"] for c in claims]
      close = difflib.get_close_matches(beginning, names, n=5, cutoff=0) if names else ["none"]
      raise ValueError(f"{len(found)} of the {len(names)} claims of {folder} begin with "
                       f"{beginning!r}; the closest are: " + "; ".join(close))
    c = found[0]
    lines.append([c["claim"], metric_of(c), c["claimed"] or None, c["reference"] or None,
                  estimate(c), f"**{c['verdict']}**", f"[{folder}{_RESULTS}{folder}/report.md)"])
  header = ("result", "metric", "claimed", "paper or baseline", "measured", "verdict", "evidence")
  used = [i for i in range(len(header)) if any(line[i] is not None for line in lines)]
  return table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def _table(arguments: str, summaries: Summaries) -> str:
  folder, _, name = arguments.partition(" ")
  found = {shown["name"]: shown for shown in _summary(folder, summaries)["tables"]}
  if name not in found:
    raise ValueError(f"{folder} has no table {name!r}; it has: {', '.join(found)}")
  return "\n\n".join([table_text(found[name]), _sources([folder], summaries)])


def _sources(folders: list[str], summaries: Summaries) -> str:
  """Returns the origin of the values: report, hardware and command of each result."""
  return "\n".join(
      f"- [{folder}{_RESULTS}{folder}/report.md): "
      f"{hardware(summaries[folder]['provenance'])}; "
      f"`{summaries[folder]['provenance']['command']}`" for folder in dict.fromkeys(folders))


def index_page(summaries: Summaries, stale: Callable[[str], str]) -> str:
  """Returns `results/README.md`: each claim with the paper's value, ours, verdict and origin."""
  # Studies of papers come first, then benchmarks.
  ordered = dict(sorted(summaries.items(), key=lambda item: (item[0].startswith("bench"), item[0])))
  sections = [_section(folder, summary, stale(folder)) for folder, summary in ordered.items()]
  return "\n\n".join([
      "# Committed results",
      "Generated by `make results` from every `summary.json` below this folder. Each result has a "
      "`report.md` with its figures, and `raw.tar.xz` with the other files of the experiment. A "
      "study is stale if its arms, its claims, the learning rates that it sweeps, or the code that "
      "measured or judged its runs have changed since the result was made; a benchmark has no such "
      "definition.",
      "A claim is reproduced, or a target met, only if the whole 95 % interval agrees with it; it "
      "is contradicted, or missed, only if the whole interval disagrees, and otherwise unresolved. "
      "What has neither claim nor target is measured.",
      "To add a result: `python -m experiments.run --experiment=results --set keep=FOLDER`, where "
      "FOLDER is the output folder of the experiment.",
      f"There are {len(summaries)} results. Verdicts of all claims: {_counts(summaries.values())}.",
      overview(ordered, stale), *sections]) + "\n"


def _section(folder: str, summary: Mapping[str, Any], stale: str) -> str:
  """Returns the section of one result: what it is, its claims, and its origin."""
  origin = summary["provenance"]
  source = f" ({summary['source']})" if "source" in summary else ""
  found = [f"## {folder}", f"{summary['title']}{source}",
           claims_table(summary["claims"]) or f"No claims; see the [report]({folder}/report.md).",
           f"[Report]({folder}/report.md) · `{origin['command']}` · {hardware(origin)} · "
           f"{code(origin)} · stale: {stale}"]
  return "\n\n".join(found)
