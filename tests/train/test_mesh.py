"""A mesh changes the placement of arrays, and nothing else."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import model
from train.mesh import ShardedModel, ShardingRules, make_mesh

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                      "PYTHONPATH": f"{ROOT}:{ROOT}/tests/model", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
      [sys.executable, HERE / "on_eight_devices.py", tmp_path_factory.mktemp("folder")], env=env,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("run", [
    "data x fsdp, token parallel", "data x fsdp, partitioned by the compiler"])
def test_forward_and_gradients_on_eight_devices_equal_those_on_one(results, run):
  run = results[run]
  # Rounding of float32: eight devices add up the tokens in another order.
  assert run["forward"] < 1e-5 and run["gradients"] < 1e-4
  assert run["loads_equal"]


@pytest.mark.parametrize("mesh", ["data", "data fsdp", "fsdp expert tensor"])
def test_text_sampled_on_a_mesh_is_that_of_one_device(results, mesh):
  found = results["generate"][mesh]
  assert found["tokens_equal"] and found["logprobs"] < 1e-5


def test_initialisation_does_not_depend_on_the_mesh(results):
  assert results["init"] == 0


def test_weights_are_loaded_directly_into_their_shards(results):
  load = results["load"]
  assert load["difference"] == 0
  assert load["shard"] == [*load["whole"][:-1], load["whole"][-1] // 4]


def test_rules_that_use_a_mesh_axis_twice_are_refused():
  mesh = make_mesh()
  with pytest.raises(ValueError, match="two of them map to the same mesh axis"):
    model.shardings(model.get_config("nano"), mesh, ShardingRules(mlp="fsdp"))


def test_an_array_that_does_not_divide_over_the_mesh_is_refused_by_name():
  mesh = jax.sharding.AbstractMesh((3,), ("fsdp",))
  with pytest.raises(ValueError, match="moe_layers/attention/w_dkv"):
    model.shardings(model.get_config("nano"), mesh, {"embed": "fsdp"})


@pytest.mark.parametrize(("sizes", "message"), [
    ({"data": 3}, "is a mesh of 3 devices, and there are 1"),
    ({"data": -1, "fsdp": -1}, "at most one -1"),
    ({"data": 0}, "must be positive"),
])
def test_impossible_meshes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(**sizes)


def test_sharding_rules_may_name_mesh_axes_only():
  with pytest.raises(ValueError, match=r"ShardingRules\.embed='rows' names no mesh axis"):
    ShardingRules(embed="rows")


def test_every_variable_of_deepseek_v3_has_a_sharding_that_divides_its_shape():
  cfg = model.get_config("deepseek_v3")
  mesh = jax.sharding.AbstractMesh((2, 8, 4, 2, 1), ("data", "fsdp", "expert", "tensor", "pipe"))
  shardings = model.shardings(cfg, mesh, ShardingRules())
  shapes = model.abstract_variables(cfg)
  parts = jax.tree.map(
      lambda s, leaf: leaf.size // math.prod(s.shard_shape(leaf.shape)), shardings, shapes)
  experts = parts["params"]["moe_layers"]["ffn"]
  assert experts["w_down"] == experts["w_gate_up"] == 8 * 4 * 2
  assert ShardedModel(cfg, mesh).batch().spec == jax.sharding.PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("numerics", ["bf16", "fp32"])
def test_experts_are_gathered_in_the_compute_format(numerics):
  cfg = dataclasses.replace(model.get_config("nano"), numerics=model.NUMERICS[numerics])
  seen = []

  def experts(weights, x_ND, gates_NK, experts_NK):
    seen.append(weights.dtype)
    return x_ND

  weights, x_ND = jnp.ones((2, 4, 4)), jnp.ones((3, 4))
  ShardedModel(cfg, make_mesh()).dispatch()(experts, weights, x_ND, x_ND[:, :2], x_ND[:, :2])
  assert seen == [cfg.numerics.compute_dtype]
