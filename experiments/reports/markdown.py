"""Reports as Markdown: numbers, tables, figures, and the origin of a result.

A number that could not be measured is null in results and a dash in reports.
"""

import itertools
import math
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from train.run_folder import leaves

_FLAGS_LEFT_OUT = ("--out", "--max_minutes", "--alsologtostderr")
# A cell of a right-aligned column: a number, possibly with its unit or interval.
_NUMBER = re.compile(r"[0-9−–∞+][0-9.,e+−]*( ?(%|s|min|h))?( [(\[±][^;]*)?")


def number(value, digits: int = 4) -> str:
  """Formats a cell: floats to significant digits, integers with separators, a dash for none."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "–"
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  if math.isinf(value):
    return "∞" if value > 0 else "−∞"
  text = f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits}g}"
  return text.replace("-", "−", 1) if value < 0 else text


def duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, hours = round(seconds / 60), seconds / 3600
  return f"{seconds / 60:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
  """Returns a Markdown table; columns that hold only numbers are aligned right."""
  cell = lambda value: number(value).replace("|", "\\|").replace("\n", " ")
  header, rows = list(map(cell, header)), [list(map(cell, row)) for row in rows]
  rule = ["---:" if all(map(_NUMBER.fullmatch, column)) else "---"
          for column in zip(*rows, strict=True)]
  return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def flat(value) -> Iterable[tuple[str, str]]:
  """Yields the leaves of nested dicts and lists as dotted path and text, without rounding."""
  return ((path, "none" if leaf is None else str(leaf)) for path, leaf in leaves(value))


def collapsed(summary: str, body: str) -> str:
  return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def fenced(text: str) -> str:
  """Returns a code block whose fence is longer than any run of backticks in the text."""
  longest = max((len(list(run)) for char, run in itertools.groupby(text) if char == "`"), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}text\n{text}\n{fence}"


def document(path: pathlib.Path, title: str, sections: Iterable[tuple[str, str]]) -> pathlib.Path:
  """Writes the sections that have a body; one without a heading continues that before it."""
  parts = [f"# {title}"]
  for heading, body in sections:
    if body:
      parts += [f"## {heading}", body] if heading else [body]
  path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
  return path


def figure(folder: pathlib.Path, name: str, caption: str, draw, *data) -> str:
  """Draws `name`.png next to the report, if there is data, and returns a reference to it."""
  if not all(data):
    return ""
  draw(*data, folder / f"{name}.png")
  return f"![{caption}]({name}.png)"


def origin(provenance: dict) -> str:
  """Returns the command, and the code, versions and hardware that it ran with."""
  if not provenance:
    return ""
  commit = _values(provenance.get("commit") or "unknown")
  facts = [("commit", commit + uncommitted(provenance, " with uncommitted changes"))]
  if provenance.get("sources"):
    facts.append(("hash of the sources", _values(provenance["sources"])))
  facts += [(name, _values(provenance[name])) for name in ("xla_flags", "device", "cpu", "cores")
            if provenance.get(name)]
  versions = provenance.get("versions", {})
  several = versions.get("several", [versions])
  names = dict.fromkeys(name for each in several for name in each)
  facts += [(name, ", ".join(dict.fromkeys(str(each.get(name, "absent")) for each in several)))
            for name in names]
  lines = "\n".join(f"- {name}: {value}" for name, value in facts)
  command = plain_command(provenance.get("command", "unknown")).replace(" && ", " && \\\n  ")
  return f"```bash\n{command}\n```\n\n{lines}"


def uncommitted(provenance: Mapping[str, Any], words: str) -> str:
  """Returns `words` if the code had uncommitted changes, with a note if only some runs had them."""
  dirty = provenance.get("dirty")
  return words + " in some runs" * isinstance(dirty, Mapping) if dirty else ""


def plain_command(command: str) -> str:
  """Returns a command, or several that "&&" joins, without output folders and time limits."""
  kept, skip = [], False
  for word in shlex.split(command):
    flag, equals, _ = word.partition("=")
    if skip:
      skip = False
    elif flag in _FLAGS_LEFT_OUT:
      skip = not equals
    else:
      kept.append(word if word == "&&" else shlex.quote(word))
  return " ".join(kept)


def _values(value) -> str:
  """Returns a fact as text, or its several values if the parts of a result differ."""
  return ", ".join(map(str, value["several"])) if isinstance(value, dict) else str(value)
