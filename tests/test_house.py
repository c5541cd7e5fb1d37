"""The shape of the house: imports go one way, and files and functions stay readable."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ("pallas_kernels", "model", "train", "rl", "experiments")  # each may import those before
SOURCES = sorted(path for package in LAYERS for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]


def imported(tree: ast.AST):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_go_one_way(path):
  here = LAYERS.index(path.relative_to(ROOT).parts[0])
  for module in imported(ast.parse(path.read_text())):
    package = module.split(".")[0]
    assert package != "tests"
    assert module.split(".")[1:2] != ["peers"]
    assert package not in LAYERS or LAYERS.index(package) <= here, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_needs_what_only_extras_install(path):
  if path.parent.name == "peers":  # run by another interpreter, or loaded where their library is
    return
  for module in imported(ast.parse(path.read_text())):
    assert module.split(".")[0] not in ("torch", "transformers", "libtpu")


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_and_functions_stay_readable(path):
  source = path.read_text()
  assert source.count("\n") <= 500
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 80, node.name
