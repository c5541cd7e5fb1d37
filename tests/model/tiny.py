"""Small models that tests share, with weights large enough for mistakes to show."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import model

V3 = model.ModelConfig(
    vocab_size=37, d_model=24, num_layers=3, ffn_dim=22, num_dense_layers=1,
    attention=model.MLAConfig(num_heads=3, q_lora_rank=10, kv_lora_rank=14, qk_nope_head_dim=6,
                              qk_rope_head_dim=4, v_head_dim=8),
    moe=model.MoEConfig(num_experts=8, experts_per_token=3, expert_dim=9, num_groups=4,
                        groups_per_token=2),
    mtp=model.MTPConfig(depth=2), rope=model.RopeConfig(theta=100.0))
PLAIN_MLA = dataclasses.replace(
    V3, mtp=None, moe=None, num_dense_layers=0, num_layers=2,
    attention=dataclasses.replace(V3.attention, q_lora_rank=None),
    rope=model.RopeConfig(100.0, scaling=model.YarnScaling(4.0, 16, 2.0, 0.5)))
GQA = dataclasses.replace(
    PLAIN_MLA, attention=model.GQAConfig(num_heads=6, num_kv_heads=2, head_dim=8, qkv_bias=True),
    rope=model.RopeConfig(100.0, "half"), tie_embeddings=True)
MHA = dataclasses.replace(GQA, attention=model.GQAConfig(num_heads=3, num_kv_heads=3, head_dim=8))
MQA = dataclasses.replace(GQA, attention=model.GQAConfig(num_heads=3, num_kv_heads=1, head_dim=8))
QK_NORM = dataclasses.replace(
    GQA, attention=model.GQAConfig(num_heads=4, num_kv_heads=2, head_dim=10, qk_norm=True))
ALL = {"v3": V3, "plain mla": PLAIN_MLA, "gqa": GQA, "mha": MHA, "mqa": MQA,
       "qk norm": QK_NORM}


@functools.cache
def variables(cfg: model.ModelConfig) -> dict:
  """Returns random variables: norms around one, all else (router biases too) around zero.

  Drawn by numpy: compiling a random draw for every shape would take longer than most tests.
  """
  def draw(path, leaf):
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(centre + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, model.abstract_variables(cfg))


def tokens(cfg: model.ModelConfig, batch: int = 2, length: int = 12, seed: int = 2) -> jax.Array:
  ids = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length))
  return jnp.asarray(ids, jnp.int32)


@functools.cache
def apply(cfg: model.ModelConfig, **fields):
  """Returns a jitted forward pass, which is compiled once for all tests of a process."""
  return jax.jit(model.Transformer(cfg, **fields).apply, static_argnames=("logits", "mtp"))
