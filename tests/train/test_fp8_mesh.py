"""FP8 on a mesh: the same weights to the bit, and kernels that see one device's tokens."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
# One rounding to three bits of mantissa; see test_fp8_linear.
LARGEST = 2.0**-4 / 3**0.5


@pytest.fixture(scope="module")
def results():
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, HERE / "fp8_on_eight_devices.py"], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_step_on_eight_devices_differs_by_roundings_that_fall_to_the_other_side(results):
  training = results["training"]
  one, eight = training["losses"]
  # A sum in another order moves a few numbers across a tie, and these others after them; at worst
  # each operand is rounded anew, twelve on the longest way to a gradient. A loss is a mean over
  # 1024 tokens, among which such roundings are independent.
  assert abs(eight - one) < 12**0.5 * LARGEST / 1024**0.5 * one
  assert training["apart"] < 12**0.5 * LARGEST


def test_weights_are_quantised_to_the_same_bits_though_blocks_straddle_shards(results):
  assert results["weights"] == {"width": 64, "same": True}


@pytest.mark.parametrize("ahead", ["False", "True"])
def test_a_layer_on_eight_devices_is_that_on_one(results, ahead):
  seam = results["seam"][ahead]
  # Only the weight gradient is summed over devices: 1024 products in float32, in another order.
  assert seam["dx same"] and seam["apart"] < 1024**0.5 * 2.0**-24


@pytest.mark.parametrize("ahead", ["False", "True"])
def test_kernels_see_the_tokens_of_their_device_and_whole_weights(results, ahead):
  seam = results["seam"][ahead]
  # Quantising x, dy, the kept x and the weight if it was not before; and three products.
  assert seam["kernels"] == (6 if ahead == "True" else 7)
  assert {128, 256, 384} <= set(seam["sizes"]) and max(seam["sizes"]) == 384  # of 1024 tokens, 128


def test_a_kernel_that_the_compiler_would_run_whole_on_every_device_is_refused(results):
  assert "call it in jax.shard_map" in results["seam"]["False"]["refused"]
