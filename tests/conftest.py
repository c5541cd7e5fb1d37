"""What all tests share: a compilation cache, and an account of what was not run."""

import collections
import pathlib

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_left_out = collections.Counter()


def pytest_deselected(items):
  for item in items:
    marker = item.get_closest_marker("long")
    reason = marker.args[0] if marker else "deselected by hand"
    _left_out[(item.location[0], reason)] += 1


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
  if not _left_out:
    return
  terminalreporter.section("not run here; `make test-all` runs them")
  for (path, reason), count in sorted(_left_out.items()):
    terminalreporter.write_line(f"{path}: {count} test(s): {reason}")
