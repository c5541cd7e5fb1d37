"""The README is true: its names and paths exist, every equation has its place, snippets run."""

import ast
import pathlib
import pkgutil
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = "pallas_kernels|model|train|rl|experiments"
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S))
NAMES = sorted({code for code in CODE if re.fullmatch(rf"({PACKAGES})(\.\w+)+", code)})
PATHS = sorted({code for code in CODE if re.match(rf"({PACKAGES}|tests)/", code)})


def rows_of_the_map() -> list[tuple[range, str]]:
  """Each row's equations, and the cell that says what computes them."""
  rows = re.findall(r"^\| (\d+)(?:-(\d+))? \|[^|]+\| ([^|]+) \|$", TEXT, re.M)
  return [(range(int(first), int(last or first) + 1), cell) for first, last, cell in rows]


def names_used(source: str) -> set[str]:
  """What a snippet imports, and what it reaches through modules that it or an earlier one did."""
  modules, used = {}, set()
  for node in ast.walk(ast.parse("".join(SNIPPETS))):
    if isinstance(node, ast.Import):
      modules |= {alias.asname or alias.name: alias.name for alias in node.names}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      used |= {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Attribute):
      root, *rest = ast.unparse(node).split(".")
      if root in modules and all(part.isidentifier() for part in rest):
        used.add(".".join([modules[root], *rest]))
  return used


def test_the_map_has_equations_1_to_25_once_each_in_order():
  assert [n for numbers, _ in rows_of_the_map() for n in numbers] == list(range(1, 26))


@pytest.mark.parametrize("cell", [cell for _, cell in rows_of_the_map()])
def test_every_equation_is_computed_by_code_that_exists(cell):
  names = re.findall(r"`(\w+(?:\.\w+)+)`", cell)
  assert names
  for name in names:
    assert callable(pkgutil.resolve_name(name)), name


@pytest.mark.parametrize("name", NAMES)
def test_every_dotted_name_exists(name):
  pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
  assert (ROOT / path).exists()


@pytest.mark.parametrize("source", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_compile_and_use_names_that_exist(source):
  for name in names_used(source):
    pkgutil.resolve_name(name)


@pytest.mark.long("compiles what the README's snippets compute")
def test_snippets_run_one_after_the_other(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile("".join(SNIPPETS), "README.md", "exec"), {})
