"""The experiments that `--experiment` can name, found by folder.

A module below `programs/` or `benchmarks/` is an experiment if it defines `main(options)`, a module
below `studies/` if it defines `STUDY`. Its name is the file's, its summary the first line of its
docstring, and its settings are `SCALES`, configurations by scale, or `CONFIG`. Modules are parsed,
not imported, until one of them runs.
"""

import ast
import dataclasses
import difflib
import importlib
import pathlib
import types
from typing import Any

_ROOT = pathlib.Path(__file__).parent
_FOLDERS = ("programs", "studies", "benchmarks")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One entry.

  Attributes:
    name: as `--experiment` takes it.
    kind: the folder it was found in: "programs", "studies" or "benchmarks".
    module: its dotted name.
    summary: the first line of its docstring.
  """

  name: str
  kind: str
  module: str
  summary: str

  def load(self) -> types.ModuleType:
    """The imported module."""
    return importlib.import_module(self.module)

  def configs(self) -> dict[str, Any]:
    """The configuration at every scale, by the scale's name; under "" where there are no scales."""
    module = self.load()
    if self.kind == "studies":
      return {name: scale.config for name, scale in module.STUDY.scales.items()}
    if hasattr(module, "SCALES"):
      return dict(module.SCALES)
    return {"": module.CONFIG} if hasattr(module, "CONFIG") else {}

  @property
  def results_folder(self) -> str:
    """Where its results are committed, below `results/`: such as "v3/fp8" or "bench/bench_train".
    """
    above = {"studies": self.module.split(".")[-2], "benchmarks": "bench", "programs": "programs"}
    return f"{above[self.kind]}/{self.name}"


def experiments() -> dict[str, Experiment]:
  """Every experiment by name: programs first, then studies, then benchmarks.

  Raises:
    ValueError: if two modules have the same name.
  """
  found: dict[str, Experiment] = {}
  for kind in _FOLDERS:
    for path in sorted((_ROOT / kind).rglob("*.py")):
      tree = ast.parse(path.read_text(encoding="utf-8"))
      if not _is_experiment(tree, kind):
        continue
      module = ".".join(path.relative_to(_ROOT.parent).with_suffix("").parts)
      if path.stem in found:
        raise ValueError(f"{module} and {found[path.stem].module} are both called {path.stem}: "
                         "rename one of the files")
      summary = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
      found[path.stem] = Experiment(path.stem, kind, module, summary)
  return found


def find(name: str) -> Experiment:
  """The experiment of that name.

  Raises:
    ValueError: if there is none, naming the closest.
  """
  known = experiments()
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no experiment {name!r}; did you mean {near!r}? --list shows them "
                     "all")
  return known[name]


def _is_experiment(tree: ast.Module, kind: str) -> bool:
  if kind == "studies":
    return any(isinstance(target, ast.Name) and target.id == "STUDY" for node in tree.body
               if isinstance(node, ast.Assign) for target in node.targets)
  return any(isinstance(node, ast.FunctionDef) and node.name == "main"
             and [arg.arg for arg in node.args.args] == ["options"] for node in tree.body)
