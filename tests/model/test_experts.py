"""Every implementation of routed experts equals the dense oracle, whatever the routing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model.experts import EXPERTS, ExpertWeights, fastest_experts, slot_experts
from model.numerics import NUMERICS
from model.transformer import REMAT
from pallas_kernels import implementations
from pallas_kernels.targets import Target, compiled_for

TOKENS, WIDTH, NUM_EXPERTS, CHOSEN, EXPERT_WIDTH = 96, 12, 8, 3, 10
IMPLEMENTATIONS = {
    "grouped": EXPERTS["grouped"], "slots": EXPERTS["slots"], "few": EXPERTS["few"],
    # One slot per expert: nearly all rows overflow, into blocks that they do not fill.
    "overflow": functools.partial(slot_experts, capacity_factor=0.0, block=16)}


def distinct(seed: int, pool: int) -> np.ndarray:
  """Returns CHOSEN distinct experts per token, out of the first `pool`."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(pool)[:CHOSEN] for _ in range(TOKENS)])


ROUTINGS = {
    "random": distinct(0, NUM_EXPERTS),
    "same experts for every token": np.tile([5, 0, 3], (TOKENS, 1)),
    "half the experts idle": distinct(1, 4),
    "some tokens without an expert": np.where(
        np.random.default_rng(2).random((TOKENS, CHOSEN)) < 0.4, NUM_EXPERTS,
        distinct(2, NUM_EXPERTS)),
    "no token with an expert": np.full((TOKENS, CHOSEN), -1),
}


@functools.cache
def step(implementation: str | None):
  """Returns a jitted function of the output and its gradients by weights, tokens and gates.

  Args:
    implementation: a name in IMPLEMENTATIONS; None means the dense oracle.
  """
  experts = IMPLEMENTATIONS[implementation] if implementation else EXPERTS["dense"]

  def run(weights, x_ND, gates_NK, experts_NK, dy_ND):
    forward = lambda *args: experts(*args, experts_NK, NUMERICS["fp32"])
    y_ND, vjp = jax.vjp(forward, weights, x_ND, gates_NK)
    return y_ND, vjp(dy_ND)

  return jax.jit(run)


def inputs(seed: int = 0):
  keys = iter(jax.random.split(jax.random.key(seed), 5))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  weights = ExpertWeights(normal(NUM_EXPERTS, WIDTH, 2, EXPERT_WIDTH),
                          normal(NUM_EXPERTS, EXPERT_WIDTH, WIDTH))
  return weights, normal(TOKENS, WIDTH), jax.nn.sigmoid(normal(TOKENS, CHOSEN)), normal(
      TOKENS, WIDTH)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients_equal_the_dense_oracle(implementation, routing):
  weights, x_ND, gates_NK, dy_ND = inputs()
  experts_NK = jnp.asarray(ROUTINGS[routing], jnp.int32)
  ours = step(implementation)(weights, x_ND, gates_NK, experts_NK, dy_ND)
  oracle = step(None)(weights, x_ND, gates_NK, experts_NK, dy_ND)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True):
    # Float32 sums of at most TOKENS * CHOSEN products, each rounded once.
    tolerance = np.finfo(np.float32).eps * np.sqrt(TOKENS * CHOSEN) * float(jnp.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=4 * tolerance + 1e-30)


@pytest.mark.cpu
def test_slots_do_not_compute_every_expert_for_every_token():
  # The work of slots does not depend on the number of experts; that of the dense oracle does.
  def flops(experts, num_experts):
    shapes = (ExpertWeights(jnp.zeros((num_experts, 64, 2, 64)), jnp.zeros((num_experts, 64, 64))),
              jnp.zeros((512, 64)), jnp.zeros((512, 2)), jnp.zeros((512, 2), jnp.int32))
    run = functools.partial(experts, numerics=NUMERICS["fp32"])
    return jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]

  useful = 2 * 512 * 2 * 3 * 64 * 64
  assert flops(EXPERTS["dense"], 32) > 15 * useful
  assert flops(EXPERTS["slots"], 32) < 2 * useful


@pytest.mark.parametrize("implementation", ["slots", "grouped"])
def test_vmapped_experts_equal_separate_calls(implementation):
  stacked = [jax.tree.map(lambda *xs: jnp.stack(xs), *[inputs(seed)[i] for seed in (0, 1)])
             for i in range(3)]
  experts = jnp.stack([ROUTINGS["random"], ROUTINGS["same experts for every token"]]).astype(
      jnp.int32)
  run = functools.partial(IMPLEMENTATIONS[implementation], numerics=NUMERICS["fp32"])
  both = jax.jit(jax.vmap(run))(*stacked, experts)
  for seed in (0, 1):
    alone = jax.jit(run)(*inputs(seed)[:3], experts[seed])
    np.testing.assert_allclose(both[seed], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["slots", "grouped"])
def test_bfloat16_results_are_bfloat16_and_close_to_float32(implementation):
  weights, x_ND, gates_NK, _ = inputs()
  experts_NK = jnp.asarray(ROUTINGS["random"], jnp.int32)
  wide = IMPLEMENTATIONS[implementation](weights, x_ND, gates_NK, experts_NK, NUMERICS["fp32"])
  narrow = IMPLEMENTATIONS[implementation](weights, x_ND, gates_NK, experts_NK, NUMERICS["bf16"])
  assert narrow.dtype == jnp.bfloat16
  # Four roundings of relative size 2^-9 each, on sums of a hundred terms of similar magnitude.
  assert float(jnp.abs(narrow - wide).max() / jnp.abs(wide).max()) < 4 * 2**-8


@pytest.mark.parametrize(("remat", "recomputed"), [("none", 0), ("v3", 0), ("full", 1)])
def test_no_grouped_product_is_recomputed_where_remat_saves_gate_and_up(remat, recomputed):
  weights, x_ND, gates_NK, dy_ND = inputs()
  experts_NK = jnp.asarray(ROUTINGS["random"], jnp.int32)
  experts = lambda *args: EXPERTS["grouped"](*args, experts_NK, NUMERICS["bf16"])
  if REMAT[remat]:
    experts = jax.checkpoint(experts, policy=REMAT[remat])
  step = lambda *args: jax.vjp(experts, *args)[1](dy_ND.astype(jnp.bfloat16))
  program = str(jax.make_jaxpr(step)(weights, x_ND, gates_NK))
  assert program.count("ragged_dot_general[") == 6 + recomputed


@pytest.mark.parametrize(("name", "numerics", "implementation"), [
    ("small", "bf16", "grouped"), ("nano", "bf16", "slots"),  # its experts are 32 wide
    ("small", "fp32", "slots"), ("nano", "fp8", "grouped")])
def test_on_hopper_experts_are_grouped_where_a_kernel_supports_them(
    monkeypatch, name, numerics, implementation):
  monkeypatch.setattr(implementations, "local_backend", lambda: "mosaic_gpu")
  cfg = dataclasses.replace(model.get_config(name), numerics=NUMERICS[numerics])
  assert fastest_experts(cfg, 4096) == implementation


@pytest.mark.parametrize(("backend", "most"), [("cpu", 64), ("gpu", 16), ("tpu", 0)])
def test_few_tokens_read_the_weights_of_their_own_experts_only(backend, most):
  cfg = model.get_config("small")
  assert cfg.moe.num_experts == 64
  tokens = most // cfg.moe.experts_per_token
  with compiled_for(Target(backend, "a device")):
    assert tokens == 0 or fastest_experts(cfg, tokens) == "few"
    assert fastest_experts(cfg, tokens + 1) == "slots"
    assert fastest_experts(dataclasses.replace(cfg, numerics=NUMERICS["fp8"]), 1) == "grouped"


def test_few_tokens_at_once_equal_the_dense_oracle():
  weights, x_ND, gates_NK, _ = inputs()
  experts_NK = jnp.asarray(ROUTINGS["some tokens without an expert"], jnp.int32)
  run = lambda name: EXPERTS[name](weights, x_ND, gates_NK, experts_NK, NUMERICS["fp32"])
  with compiled_for(Target("gpu", "a GPU")):
    np.testing.assert_allclose(run("few"), run("dense"), rtol=0, atol=1e-4)
