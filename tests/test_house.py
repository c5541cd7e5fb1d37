"""The shape of the house: imports go one way, and files, functions and folders stay readable."""

import ast
import importlib
import pathlib
import pkgutil
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "model", "train", "rl", "experiments")
# From the bottom to the top; a module may import from its own place and from those before it, and
# of the last two groups, places side by side may not import each other.
ORDER = (*(({package},) for package in PACKAGES[:-1]),
         ({"experiments.settings", "experiments.options", "experiments.stats",
           "experiments.catalogue"},),
         ({"experiments.reports"},), ({"experiments.studies"},),
         ({"experiments.programs"}, {"experiments.benchmarks"}), ({"experiments.run"},))
PEERS = ROOT / "experiments" / "benchmarks" / "peers"  # run where their libraries are
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
           for path in SOURCES}


def module_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST):
  """The modules that a file imports, those named in `import_module` calls among them."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      yield from (name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                  for alias in node.names)
    elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
          and node.func.attr == "import_module" and isinstance(node.args[0], ast.Constant)):
      yield node.args[0].value


def place(module: str) -> tuple[int, int] | None:
  """Where a module is in ORDER: its floor, and which of the places side by side there."""
  for floor, beside in enumerate(ORDER):
    for room, members in enumerate(beside):
      if any(module == name or module.startswith(f"{name}.") for name in members):
        return floor, room
  return None


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_go_one_way(path):
  own = place(module_of(path))
  assert own is not None or module_of(path) == "experiments", "a module without a place in ORDER"
  for module in imported(ast.parse(path.read_text())):
    assert module.split(".")[0] != "tests"
    other = place(module)
    if other is None or own is None:
      continue
    assert other[0] < own[0] or other == own, f"{module_of(path)} imports {module}"


def test_the_guard_of_imports_sees_what_it_is_to_refuse():
  """So that it cannot pass on nothing: every place has modules, and arrows up are found."""
  for beside in ORDER:
    for members in beside:
      for name in members:
        assert any(module == name or module.startswith(f"{name}.") for module in MODULES), name
  source = ("import rl.loop\nfrom experiments.programs import pretrain\n"
            "importlib.import_module('experiments.run')")
  assert list(imported(ast.parse(source))) == [
      "rl.loop", "experiments.programs.pretrain", "experiments.run"]
  assert place("train.loop") < place("rl.loop") < place("experiments.programs.pretrain")
  assert place("experiments.benchmarks.timing") != place("experiments.programs.pretrain")


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_peers_are_started_or_loaded_by_name_and_only_they_import_what_extras_install(path):
  if PEERS in path.parents:
    return
  tree = ast.parse(path.read_text())
  plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
  for module in imported(ast.Module(plain, [])):
    assert module.split(".")[0] not in ("torch", "transformers", "trl", "libtpu")
    assert not module.startswith("experiments.benchmarks.peers")


def test_there_are_peers_that_import_what_extras_install():
  found = {module.split(".")[0] for path in PEERS.glob("*.py")
           for module in imported(ast.parse(path.read_text()))}
  assert {"torch", "transformers", "trl"} <= found


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_and_functions_stay_readable(path):
  source = path.read_text()
  assert source.count("\n") <= 500
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 80, node.name


def test_folders_stay_readable():
  for folder in {path.parent for path in SOURCES}:
    files = [path.name for path in folder.glob("*.py")]
    assert len(files) <= 25, folder
    assert ROOT / "experiments" not in (folder, *folder.parents) or len(files) <= 15, folder


@pytest.mark.parametrize("package", sorted(
    module for module in MODULES if (ROOT.joinpath(*module.split(".")) / "__init__.py").exists()
    and PEERS.name not in module))
def test_no_export_has_the_name_of_a_module_beside_it(package):
  """One name, one thing: `package.name` is a module, or what the package exports."""
  loaded = importlib.import_module(package)
  for module in pkgutil.iter_modules(loaded.__path__):
    value = getattr(loaded, module.name, None)
    assert value is None or isinstance(value, types.ModuleType), f"{package}.{module.name}"
  assert not [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
