"""Finds the experiments that `--experiment` can name, by searching the folders of this package.

A module below `programs/` or `benchmarks/` is an experiment if it defines `main(options)`, a module
below `studies/` if it defines `STUDY`. The experiment is named after the file, and the first line
of the docstring is its summary. The configuration of a program or benchmark is `SCALES`, a dict of
configurations by scale, or `CONFIG`. Modules are only parsed; one is imported when it runs.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
import types
from typing import Any

from model.checks import did_you_mean

_ROOT = pathlib.Path(__file__).parent
_FOLDERS = ("programs", "studies", "benchmarks")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An experiment that the command line can run.

  Attributes:
    name: the name that `--experiment` accepts.
    kind: the folder that the module is in: "programs", "studies" or "benchmarks".
    module: dotted name of the module.
    summary: first line of the module's docstring.
  """

  name: str
  kind: str
  module: str
  summary: str

  def load(self) -> types.ModuleType:
    """Imports the experiment's module and returns it."""
    return importlib.import_module(self.module)

  def configs(self) -> dict[str, Any]:
    """Returns the configurations by scale; an experiment without scales has one, under ""."""
    module = self.load()
    if self.kind == "studies":
      return {name: scale.config for name, scale in module.STUDY.scales.items()}
    if hasattr(module, "SCALES"):
      return dict(module.SCALES)
    return {"": module.CONFIG} if hasattr(module, "CONFIG") else {}

  @property
  def results_folder(self) -> str:
    """Folder of the committed results, relative to `results/`, such as "bench/bench_train"."""
    parents = {"studies": self.module.split(".")[-2], "benchmarks": "bench", "programs": "programs"}
    return f"{parents[self.kind]}/{self.name}"


@functools.cache  # parsing all modules takes a fifth of a second
def experiments() -> dict[str, Experiment]:
  """Returns every experiment by name: first programs, then studies, then benchmarks.

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
  """Returns the experiment called `name`.

  Raises:
    ValueError: if there is no such experiment; the message suggests a similar name if there is one.
  """
  known = experiments()
  if name not in known:
    raise ValueError(f"there is no experiment {name!r}{did_you_mean(name, known)} --list shows all "
                     "experiments")
  return known[name]


def _is_experiment(tree: ast.Module, kind: str) -> bool:
  """Whether a module in the folder `kind` defines an experiment."""
  if kind == "studies":
    return any(isinstance(target, ast.Name) and target.id == "STUDY" for node in tree.body
               if isinstance(node, ast.Assign) for target in node.targets)
  return any(isinstance(node, ast.FunctionDef) and node.name == "main"
             and [arg.arg for arg in node.args.args] == ["options"] for node in tree.body)
