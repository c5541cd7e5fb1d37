"""Compile time does not grow with depth, because layers are scanned."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest

import model

V3 = model.get_config("deepseek_v3")


@pytest.fixture
def no_compilation_cache():
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def narrow(num_layers: int) -> model.ModelConfig:
  """Returns V3 with small widths and the given depth, keeping its MTP module and dense layers."""
  return dataclasses.replace(
      V3, num_layers=num_layers, vocab_size=256, d_model=64, ffn_dim=96,
      attention=model.MLAConfig(num_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
                                qk_rope_head_dim=8, v_head_dim=16),
      moe=dataclasses.replace(V3.moe, num_experts=16, expert_dim=32))


def gradient_step(num_layers: int):
  cfg = narrow(num_layers)
  transformer = model.Transformer(cfg, remat="v3")

  def loss(params, router, tokens_BT):
    out = transformer.apply({"params": params, "router": router}, tokens_BT)
    return (out.logits_BTV**2).mean() + 0.3 * (out.mtp_logits[0]**2).mean()

  variables = model.abstract_variables(cfg)
  tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
  return jax.jit(jax.grad(loss)).lower(variables["params"], variables["router"], tokens)


def decode_step(num_layers: int):
  cfg = narrow(num_layers)
  cache = jax.eval_shape(lambda: model.init_cache(cfg, 2, 64))
  step = jax.jit(lambda v, t, c: model.Transformer(cfg).apply(v, t, cache=c), donate_argnums=2)
  return step.lower(
      model.abstract_variables(cfg), jax.ShapeDtypeStruct((2, 1), jnp.int32), cache)


@pytest.mark.parametrize("step", [gradient_step, decode_step])
def test_the_program_of_61_layers_is_no_longer_than_that_of_4(step):
  assert len(step(61).as_text()) < 1.05 * len(step(4).as_text())


@pytest.mark.long("times several compilations of V3's depth")
@pytest.mark.parametrize("step", [gradient_step, decode_step])
def test_compiling_61_layers_takes_less_than_1_5_times_as_long_as_4(step, no_compilation_cache):
  def seconds(num_layers):
    lowered, started = step(num_layers), time.perf_counter()
    lowered.compile()
    return time.perf_counter() - started

  # Alternate, so that a busy machine slows both.
  runs = [(seconds(61), seconds(4)) for _ in range(3)]
  assert min(deep for deep, _ in runs) < 1.5 * min(shallow for _, shallow in runs)
