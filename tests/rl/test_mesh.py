"""RL on a mesh: the same completions, the same update, and a run that moves between devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.rl import small
from train.config import MeshConfig

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mesh")
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu",
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  done = subprocess.run(
      [sys.executable, HERE / "on_eight_devices.py", small.write_task(folder), folder], env=env,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_completions_on_eight_devices_differ_from_one_devices_at_unsure_choices_only(results):
  run = results["rollouts"]
  print(f"{run['differ']} of {run['sequences']} completions differ")
  assert run["at_sure_choices"] == ""
  assert run["differ"] <= 2
  assert run["experts_differ"] == 0


def test_devices_decode_side_by_side(results):
  one, eight = results["rollouts"]["decode_steps"]
  assert one / 8 <= eight < one / 4


def test_an_update_on_eight_devices_equals_one_devices(results):
  run = results["update"]
  # Float32, the sums over tokens split in eight, twice; what is learned is a smooth function of
  # them. `small.OPTIMIZER` says why.
  assert run["train"] < 2e-5 and max(run["metrics"].values()) < 2e-5
  assert run["moved"] > 1e-2
  assert run["reference"] == 0


def test_devices_share_an_updates_work(results):
  one, eight = results["update"]["flops"]
  # An eighth is each one's; what all do, such as reading the batch, must stay small beside it.
  assert eight < one / 6


def test_the_balancing_bias_comes_from_all_devices_loads(results):
  run = results["update"]
  assert run["router"] == 0 and run["copies_equal"]


def test_the_state_stays_where_it_was_placed(results):
  run = results["update"]
  assert run["stays"]
  assert run["shard"] == [*run["whole"][:-1], run["whole"][-1] // 4]


def test_a_run_on_a_mesh_is_resumed_with_the_same_bits(results):
  run = results["loop"]
  assert run["stopped"] == "stopped" and run["same_bits"]
  assert run["learned"] > 1e-2
  assert run["rewards"][0] == run["rewards"][1]
  assert run["evaluations"][0] == run["evaluations"][1]


def test_a_run_goes_on_on_another_number_of_devices(results):
  run = results["loop"]
  assert run["devices"] == [8, 8, 1]
  assert run["moved_apart"] < 2e-5  # as for one update
  assert run["rewards"][0] == run["rewards"][2]
  assert run["evaluations"][0] == run["evaluations"][2]


def test_what_does_not_divide_over_the_devices_is_refused(results):
  assert results["rollouts"]["refusal"].startswith("12 sequences do not divide over 8 devices")
  assert results["update"]["refusal"].startswith(
      "4 sequences at a time do not divide over the devices of MeshConfig(data=2, fsdp=4, ")
  assert "does not fit 8 device(s)" in results["update"]["misfit"]


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "tensor"])
def test_axes_are_positive_or_all_that_is_left(axis):
  assert getattr(MeshConfig(**{axis: -1}), axis) == -1
  with pytest.raises(ValueError, match=f"MeshConfig.{axis}=0 must be positive, or -1"):
    MeshConfig(**{axis: 0})
