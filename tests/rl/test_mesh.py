"""RL on a mesh: the same completions, the same update, and runs that resume on other devices."""

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
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  done = subprocess.run(
      [sys.executable, HERE / "on_eight_devices.py", small.write_task(folder), folder], env=env,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_completions_on_eight_devices_differ_from_those_on_one_at_near_ties_only(results):
  run = results["rollouts"]
  print(f"{run['differ']} of {run['sequences']} completions differ")
  assert run["beyond_near_ties"] == ""
  assert run["differ"] <= 2
  assert run["experts_differ"] == 0


def test_devices_decode_in_parallel(results):
  one, eight = results["rollouts"]["decode_steps"]
  assert one / 8 <= eight < one / 4


def test_an_update_on_eight_devices_equals_that_on_one(results):
  run = results["update"]
  # Rounding of float32: in each of the two steps, eight devices add up the tokens in another order.
  # The update is a smooth function of these sums; `OPTIMIZER` in tests/train/small.py says why.
  assert run["train"] < 2e-5 and max(run["metrics"].values()) < 2e-5
  assert run["moved"] > 1e-2
  assert run["reference"] == 0
  assert run["mtp"] < 2e-5 and run["mtp_router"] == 0 and run["mtp_moved"] > 1e-2


def test_devices_divide_the_work_of_an_update(results):
  one, eight = results["update"]["flops"]
  # Each does an eighth; work that all of them do, such as reading the batch, must be small.
  assert eight < one / 6


def test_the_balancing_bias_follows_the_loads_of_all_devices(results):
  run = results["update"]
  assert run["router"] == 0 and run["copies_equal"]


def test_an_update_keeps_the_shardings_of_the_state(results):
  run = results["update"]
  assert run["stays"]
  layers, experts, *widths = run["whole"]
  assert run["shard"] == [layers, experts // 4, *widths]


def test_a_run_on_a_mesh_resumes_bit_identically(results):
  run = results["loop"]
  assert run["stopped"] == "stopped" and run["same_bits"]
  assert run["learned"] > 1e-2
  assert run["rewards"][0] == run["rewards"][1]
  assert run["evaluations"][0] == run["evaluations"][1]


def test_a_run_resumes_on_another_number_of_devices(results):
  run = results["loop"]
  assert run["devices"] == [8, 8, 1]
  assert run["difference_after_move"] < 2e-5  # the tolerance of one update
  assert run["rewards"][0] == run["rewards"][2]
  assert run["evaluations"][0] == run["evaluations"][2]


def test_batches_and_meshes_that_do_not_fit_the_devices_are_refused(results):
  assert results["rollouts"]["refusal"].startswith("12 sequences do not divide over 8 devices")
  assert results["update"]["refusal"].startswith(
      "4 sequences at a time do not divide over the devices of MeshConfig(data=2, fsdp=4, ")
  assert "is a mesh of 3 devices, and there are 8" in results["update"]["misfit"]


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "tensor"])
def test_mesh_axes_must_be_positive_or_minus_one(axis):
  assert getattr(MeshConfig(**{axis: -1}), axis) == -1
  with pytest.raises(ValueError, match=f"MeshConfig.{axis}=0 must be positive, or -1"):
    MeshConfig(**{axis: 0})
