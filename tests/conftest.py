"""What all tests share: a compilation cache, and an account of what was not run."""

import collections
import os
import pathlib

if pathlib.Path("/dev/nvidiactl").exists():  # tests compare bits; must be set before jax starts
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_left_out: dict[str, int] = {}


@pytest.fixture(scope="module")
def quick_compiles():
  """For programs that run a few times, which optimising them would not repay."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def pytest_deselected(items):
  reasons = collections.Counter()
  for item in items:
    marker = item.get_closest_marker("long")
    reasons[f"{item.location[0]}: {marker.args[0] if marker else 'deselected by hand'}"] += 1
  _left_out.update(reasons)


def pytest_sessionfinish(session):
  if hasattr(session.config, "workeroutput"):  # one of several processes: tell the first
    session.config.workeroutput["left_out"] = _left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
  if not _left_out:
    return
  terminalreporter.section("not run here; `make test-all` runs them")
  for what, count in sorted(_left_out.items()):
    terminalreporter.write_line(f"{count:4} of {what}")
