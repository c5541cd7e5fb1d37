"""The small parts that every block is made of.

Shape letters:  B batch  T tokens  D model width  F feed-forward width  V vocabulary
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from pallas_kernels import Weight


def weight(
    module: nn.Module, name: str, cfg: ModelConfig, axes: tuple, shape: tuple,
) -> jax.Array | Weight:
  """A matrix with V3's initialisation (normal, one std for all) and logical axis names.

  Where the collection "quantized" has it, too, with that: see `model.quantize_weights`.
  """
  init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), axes)
  master = module.param(name, init, shape, cfg.numerics.param_dtype)
  operands = module.get_variable("quantized", name)
  return master if operands is None else Weight(master, operands)


def bias(module: nn.Module, name: str, cfg: ModelConfig, axes: tuple, shape: tuple) -> jax.Array:
  """A bias parameter, zero at first, with logical axis names."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  return module.param(name, init, shape, cfg.numerics.param_dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, computed in float32."""

  cfg: ModelConfig
  eps: float | None = None  # None: the model's

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), self.cfg.numerics.param_dtype)
    return _normed(x, scale, self.cfg.norm_eps if self.eps is None else self.eps)


# Computed again on the way back: kept values would be several times as large as what they are of.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@recomputed
def _normed(x, scale, eps):
  wide = x.astype(jnp.float32)
  inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


@recomputed
def gated(gate_up: jax.Array) -> jax.Array:
  """SwiGLU's non-linearity: [..., 2, F] to [..., F]."""
  return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


class SwiGLU(nn.Module):
  """`W_down (silu(W_gate x) * W_up x)`: the dense FFN, and all shared experts as one."""

  cfg: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    d_model, linear = x_BTD.shape[-1], self.cfg.numerics.linear
    w_gate_up = weight(
        self, "w_gate_up", self.cfg, ("embed", None, "mlp"), (d_model, 2, self.width))
    w_down = weight(self, "w_down", self.cfg, ("mlp", "embed"), (self.width, d_model))
    gate_up = checkpoint_name(linear("btd,dgf->btgf", x_BTD, w_gate_up), "ffn_gate_up")
    return linear("btf,fd->btd", gated(gate_up), w_down)


class Embedding(nn.Module):
  """Input embedding and output head, which may be one matrix."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embedding = weight(
        self, "embedding", cfg, ("vocab", "embed"), (cfg.vocab_size, cfg.d_model))
    if not cfg.tie_embeddings:
      self.head = weight(self, "head", cfg, ("embed", "vocab"), (cfg.d_model, cfg.vocab_size))

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    return self.embedding[tokens_BT].astype(self.cfg.numerics.compute_dtype)

  def head_DV(self) -> jax.Array:
    return self.embedding.T if self.cfg.tie_embeddings else self.head
