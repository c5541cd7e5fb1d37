"""Programs are traced for this process's device, or for the one that they are compiled for."""

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import implementations, targets
from pallas_kernels.targets import Target, compiled_for, target


def device(platform, kind, **fields):
  return types.SimpleNamespace(platform=platform, device_kind=kind, **fields)


def test_the_target_is_this_processs_first_device_unless_another_is_named():
  here = Target.of(jax.devices()[0])
  assert target() == here
  with compiled_for(device("tpu", "TPU v5p")) as named:
    assert named == target() == Target("tpu", "TPU v5p")
    assert implementations.local_backend() == "mosaic_tpu"
    with compiled_for(Target("gpu", "NVIDIA H100", 9.0)):
      assert implementations.local_backend() == "mosaic_gpu"
    assert target() == named
  assert target() == here
  with pytest.raises(RuntimeError), compiled_for(named):
    raise RuntimeError
  assert target() == here


@pytest.mark.parametrize(("fields", "capability"), [
    ({"compute_capability": "9.0"}, 9.0), ({"compute_capability": "gfx942"}, 0.0), ({}, 0.0)])
def test_only_nvidia_gpus_have_a_compute_capability(fields, capability):
  assert Target.of(device("gpu", "a GPU", **fields)).capability == capability


def test_a_function_that_was_traced_for_one_device_is_traced_again_for_another():
  seen = jax.jit(lambda x: x + (1 if targets.target().platform == "tpu" else 0))
  here = target().platform == "tpu"
  assert seen(jnp.int32(0)) == here
  with compiled_for(Target("tpu", "TPU v5p")):
    assert seen(jnp.int32(0)) == 1
  assert seen(jnp.int32(0)) == here
