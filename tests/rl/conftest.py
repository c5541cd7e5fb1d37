"""Shared by the tests of RL: a task that its tests' model can solve."""

import pytest

from tests.rl import small


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small.write_task(tmp_path_factory.mktemp("task"))
