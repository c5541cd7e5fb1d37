"""What tests of RL share."""

import pytest

from tests.rl import small


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small.write_task(tmp_path_factory.mktemp("task"))
