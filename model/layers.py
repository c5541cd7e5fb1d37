"""Layers that all blocks share: weights, RMSNorm, SwiGLU, the embedding and the output head.

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
  """Declares a weight matrix: normally distributed, with one std for all matrices (V3 section 4.2).

  Args:
    module: the module that owns the parameter.
    name: name of the parameter within the module.
    cfg: gives the standard deviation, `init_std`, and the format of parameters.
    axes: a logical axis name, or None, for every axis of `shape`.
    shape: shape of the parameter.

  Returns:
    The parameter. If the variable collection "quantized" has an entry of this name (see
    `model.quantize_weights`), a `pallas_kernels.Weight` of the parameter and its FP8 operands.
  """
  init = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), axes)
  master = module.param(name, init, shape, cfg.numerics.param_dtype)
  operands = module.get_variable("quantized", name)
  return master if operands is None else Weight(master, operands)


def bias(module: nn.Module, name: str, cfg: ModelConfig, axes: tuple, shape: tuple) -> jax.Array:
  """Declares a bias, initialised to zero. The arguments are those of `weight`."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  return module.param(name, init, shape, cfg.numerics.param_dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation of the last axis, with a learned scale, computed in float32.

  Attributes:
    cfg: gives the format of the scale, and the default of `eps`.
    eps: added to the mean square; None for `cfg.norm_eps`.
  """

  cfg: ModelConfig
  eps: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), self.cfg.numerics.param_dtype)
    return _normed(x, scale, self.cfg.norm_eps if self.eps is None else self.eps)


# Recomputed in the backward pass: the residuals would be several times larger than the inputs.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@recomputed
def _normed(x, scale, eps):
  wide = x.astype(jnp.float32)
  inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


@recomputed
def gated(gate_up: jax.Array) -> jax.Array:
  """SwiGLU's activation, silu(gate) * up: [..., 2, F], gate first, to [..., F]."""
  return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


class SwiGLU(nn.Module):
  """`W_down (silu(W_gate x) * W_up x)`: the FFN of dense layers, and all shared experts as one.

  Attributes:
    cfg: gives the initialisation and the numerics.
    width: F, the number of hidden units.
  """

  cfg: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    d_model, numerics = x_BTD.shape[-1], self.cfg.numerics
    w_gate_up = weight(
        self, "w_gate_up", self.cfg, ("embed", None, "mlp"), (d_model, 2, self.width))
    w_down = weight(self, "w_down", self.cfg, ("mlp", "embed"), (self.width, d_model))
    if numerics.recipe:
      return numerics.swiglu(x_BTD, w_gate_up, w_down)
    gate_up = checkpoint_name(numerics.einsum("btd,dgf->btgf", x_BTD, w_gate_up), "ffn_gate_up")
    return numerics.einsum("btf,fd->btd", gated(gate_up), w_down)


class Embedding(nn.Module):
  """The input embedding and the output head, which are one matrix if `cfg.tie_embeddings`."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embedding = weight(
        self, "embedding", cfg, ("vocab", "embed"), (cfg.vocab_size, cfg.d_model))
    if not cfg.tie_embeddings:
      self.head = weight(self, "head", cfg, ("embed", "vocab"), (cfg.d_model, cfg.vocab_size))

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Returns the tokens' embeddings, [B, T, D], in the compute format."""
    return self.embedding[tokens_BT].astype(self.cfg.numerics.compute_dtype)

  def head_DV(self) -> jax.Array:
    """Returns the weights of the output head, [D, V]."""
    return self.embedding.T if self.cfg.tie_embeddings else self.head
