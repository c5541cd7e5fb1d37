"""Code structure: imports follow the layers, and files, functions and folders stay small."""

import ast
import importlib
import pathlib
import pkgutil
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "model", "train", "rl", "experiments")
# From the lowest layer to the highest, each a tuple of groups. A module may import from its own
# group and from lower layers, but not from another group of its layer.
LAYERS = (*(({package},) for package in PACKAGES[:-1]),
          ({"experiments.settings", "experiments.options", "experiments.stats",
            "experiments.workers", "experiments.catalogue"},),
          ({"experiments.reports"},), ({"experiments.studies"},),
          ({"experiments.programs"}, {"experiments.benchmarks"}), ({"experiments.run"},))
PEERS = ROOT / "experiments" / "benchmarks" / "peers"  # run by interpreters with their libraries
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
           for path in SOURCES}


def module_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST):
  """Yields the modules that a file imports, including those named in `import_module` calls."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports must be absolute"
      yield from (name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                  for alias in node.names)
    elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
          and node.func.attr == "import_module" and isinstance(node.args[0], ast.Constant)):
      yield node.args[0].value


def place(module: str) -> tuple[int, int] | None:
  """Returns the indices of a module's layer and of its group in that layer; None if it has none."""
  for layer, groups in enumerate(LAYERS):
    for group, members in enumerate(groups):
      if any(module == name or module.startswith(f"{name}.") for name in members):
        return layer, group
  return None


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_modules_import_only_from_their_own_group_and_from_lower_layers(path):
  own = place(module_of(path))
  assert own is not None or module_of(path) == "experiments", "add the module to LAYERS"
  for module in imported(ast.parse(path.read_text())):
    assert module.split(".")[0] != "tests"
    other = place(module)
    if other is None or own is None:
      continue
    assert other[0] < own[0] or other == own, f"{module_of(path)} imports {module}"


def test_all_groups_have_modules_and_imports_of_higher_layers_are_detected():
  """The test of imports cannot pass vacuously."""
  for groups in LAYERS:
    for members in groups:
      for name in members:
        assert any(module == name or module.startswith(f"{name}.") for module in MODULES), name
  source = ("import rl.loop\nfrom experiments.programs import pretrain\n"
            "importlib.import_module('experiments.run')")
  assert list(imported(ast.parse(source))) == [
      "rl.loop", "experiments.programs.pretrain", "experiments.run"]
  assert place("train.loop") < place("rl.loop") < place("experiments.programs.pretrain")
  assert place("experiments.benchmarks.timing") != place("experiments.programs.pretrain")


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_only_peers_import_libraries_of_extras_and_no_import_statement_names_a_peer(path):
  if PEERS in path.parents:
    return
  tree = ast.parse(path.read_text())
  statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
  for module in imported(ast.Module(statements, [])):
    assert module.split(".")[0] not in ("torch", "transformers", "trl", "libtpu")
    assert not module.startswith("experiments.benchmarks.peers")


def test_peers_import_torch_transformers_and_trl():
  found = {module.split(".")[0] for path in PEERS.glob("*.py")
           for module in imported(ast.parse(path.read_text()))}
  assert {"torch", "transformers", "trl"} <= found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_have_at_most_500_lines_and_functions_at_most_80(path):
  source = path.read_text()
  assert source.count("\n") <= 500
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 80, node.name


def test_folders_have_at_most_28_files_and_those_of_experiments_15():
  for folder in {path.parent for path in SOURCES}:
    files = [path.name for path in folder.glob("*.py")]
    assert len(files) <= 28, folder
    assert ROOT / "experiments" not in (folder, *folder.parents) or len(files) <= 15, folder


@pytest.mark.parametrize("package", sorted(
    module for module in MODULES if (ROOT.joinpath(*module.split(".")) / "__init__.py").exists()
    and PEERS.name not in module))
def test_exports_exist_and_none_has_the_name_of_a_submodule(package):
  """`package.name` is then either a submodule or an export, whatever was imported before."""
  loaded = importlib.import_module(package)
  for module in pkgutil.iter_modules(loaded.__path__):
    value = getattr(loaded, module.name, None)
    assert value is None or isinstance(value, types.ModuleType), f"{package}.{module.name}"
  assert not [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
