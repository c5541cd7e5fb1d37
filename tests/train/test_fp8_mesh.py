"""FP8 on a mesh: bit-identical quantised weights, and kernels that see one device's tokens."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
# The error of one rounding to three bits of mantissa; test_fp8_linear.py derives it.
LARGEST = 2.0**-4 / 3**0.5


@pytest.fixture(scope="module")
def results():
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, HERE / "fp8_on_eight_devices.py"], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_step_on_eight_devices_differs_from_that_on_one_only_by_fp8_rounding(results):
  training = results["training"]
  one, eight = training["losses"]
  # Sums in another order move a few values across a rounding tie, and these move later values. At
  # worst, every operand is rounded differently, and the longest path to a gradient has twelve. A
  # loss is a mean over 1024 tokens, between which such roundings are independent.
  assert abs(eight - one) < 12**0.5 * LARGEST / 1024**0.5 * one
  assert training["difference"] < 12**0.5 * LARGEST


def test_quantised_weights_are_bit_identical_although_blocks_straddle_shards(results):
  assert results["weights"] == {"width": 64, "same": True}


@pytest.mark.parametrize("ahead", ["False", "True"])
def test_a_linear_layer_on_eight_devices_equals_that_on_one(results, ahead):
  layer = results["layer"][ahead]
  # Only the weight gradient is summed over devices: 1024 products in float32, in another order.
  assert layer["dx same"] and layer["difference"] < 1024**0.5 * 2.0**-24


@pytest.mark.parametrize("ahead", ["False", "True"])
def test_kernels_see_the_tokens_of_their_device_and_complete_weights(results, ahead):
  layer = results["layer"][ahead]
  # Three products, and the quantisation of x, dy, the saved x and, unless done ahead, the weight.
  assert layer["kernels"] == (6 if ahead == "True" else 7)
  # A device has 128 of the 1024 tokens.
  assert {128, 256, 384} <= set(layer["sizes"]) and max(layer["sizes"]) == 384


def test_a_kernel_that_the_compiler_would_replicate_on_every_device_is_refused(results):
  assert "inside jax.shard_map" in results["layer"]["False"]["refused"]
