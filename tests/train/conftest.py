"""What tests of training share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
  """For programs that run a few times, which optimising them would not repay."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
