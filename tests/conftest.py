"""Shared by all tests: a compilation cache, and a summary of the tests that were deselected."""

import collections
import os
import pathlib

# JAX reads these when it starts, so they are set first; processes that tests start inherit them.
if pathlib.Path("/dev/nvidiactl").exists():
  # Some tests compare results bit for bit.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
  # By default XLA rounds the operands of float32 products to TF32.
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
else:
  # Programs run a few times only, so that most of XLA's optimisations cost more than they save.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_deselected: dict[str, int] = {}


@pytest.fixture(scope="module")
def all_optimizations():
  """Compiles a module's programs as users do, for tests of compiled programs or of exactness."""
  before = jax.config.jax_disable_most_optimizations
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def pytest_collection_modifyitems(items):
  if jax.default_backend() == "cpu":
    return
  skip = pytest.mark.skip(reason="checks how XLA compiles or rounds on a CPU")
  for item in items:
    if item.get_closest_marker("cpu"):
      item.add_marker(skip)


def pytest_deselected(items):
  reasons = collections.Counter()
  for item in items:
    marker = item.get_closest_marker("long")
    reasons[f"{item.location[0]}: {marker.args[0] if marker else 'deselected on request'}"] += 1
  _deselected.update(reasons)


def pytest_sessionfinish(session):
  if hasattr(session.config, "workeroutput"):  # a pytest-xdist worker: reports to the controller
    session.config.workeroutput["deselected"] = _deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  _deselected.update(getattr(node, "workeroutput", {}).get("deselected", {}))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
  if not _deselected:
    return
  terminalreporter.section("not run here; `make test-all` runs them")
  for reason, count in sorted(_deselected.items()):
    terminalreporter.write_line(f"{count:4} of {reason}")
