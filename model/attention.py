"""Causal attention, and the grouped-query module, whose config makes it MHA, GQA or MQA.

Shape letters:  B batch  T query tokens  S key slots  D model width  H query heads
                G key heads  Q = H / G queries per key head  K head width  V value width
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.blockwise import Visibility, blockwise_attention
from model.config import ModelConfig
from model.decoding.cache import Cache
from model.layers import RMSNorm, bias, weight
from model.rope import rotate
from pallas_kernels.targets import target

IMPLEMENTATIONS = ("xla", "blockwise", "cudnn")
_MANY_PAIRS = 2**18  # of a query and a key, of a head, from which on blocks are faster on CPUs
_MANY_BYTES = 2**31  # of attention weights


@flax.struct.dataclass
class Context:
  """What all layers of a forward pass need to know about its tokens.

  Attributes:
    cos_BTr, sin_BTr: rotations at the tokens' positions, for R / 2 pairs of dimensions; see
      `model.rope.rotation`.
    slots_BT: int32, each token's own key slot; the token attends to slots up to and including it.
    segment_ids_BT: int32, ids of packed documents, between which there is no attention; None for no
      such limit. Cannot be used with a cache.
    real_BT: false for padding tokens; None if there are none.
    experts_LBTK: int32, experts to use in every MoE layer instead of those that its router would
      choose; None to let routers choose.
    causal: whether the keys are those of whole sequences, so that token t of a row sees all keys
      0..t, or those of them that are in its segment. It is known while tracing, so that kernels for
      whole sequences can be chosen, which need no mask.
  """

  cos_BTr: jax.Array
  sin_BTr: jax.Array
  slots_BT: jax.Array
  segment_ids_BT: jax.Array | None = None
  real_BT: jax.Array | None = None
  experts_LBTK: jax.Array | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def visible_BTS(self, num_slots: int) -> jax.Array:
    """Returns which of the S = num_slots key slots each query attends to, as booleans."""
    seen_BTS = jnp.arange(num_slots) <= self.slots_BT[..., None]
    if self.segment_ids_BT is not None:
      seen_BTS &= self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
    return seen_BTS


def attend(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, context: Context, scale: float,
    cfg: ModelConfig, implementation: str | None = None,
) -> jax.Array:
  """Softmax attention over the visible key slots; scores and their softmax are in float32.

  Args:
    q_BTHK, k_BSGK, v_BSGV: queries, keys and values; all are cast to the compute format.
    context: says which slots are visible to which token.
    scale: multiplies the scores.
    cfg: gives the numerics.
    implementation: "xla", which holds the attention weights of all pairs of tokens; "blockwise"
      (`model.blockwise`) or "cudnn", which do not; None for cuDNN where it supports the device and
      the operands, else "blockwise" where that is faster or the weights would take much memory,
      else "xla", which alone has second derivatives. The device is that of
      `pallas_kernels.targets.target`.

  Returns:
    [B, T, H, V].

  Raises:
    ValueError: if there is no such implementation, or if "cudnn" is named and does not support the
      device or the operands.
  """
  if implementation == "mla_decode":
    raise ValueError("attention by 'mla_decode' needs multi-head latent attention, whose absorbed "
                     "form it computes over a cache; use None for other networks")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"attention has no implementation {implementation!r}; there are: "
                     f"{', '.join(IMPLEMENTATIONS)}")
  if implementation in (None, "cudnn"):
    reason = _cudnn_unsupported_reason(max(q_BTHK.shape[-1], v_BSGV.shape[-1]), context, cfg)
    if not reason:
      return _cudnn(q_BTHK, k_BSGK, v_BSGV, scale, cfg)
    if implementation:
      raise ValueError(f"attention by cuDNN {reason}; use 'xla' or 'blockwise', or None to choose "
                       "automatically")
    implementation = "blockwise" if _many_pairs(q_BTHK, k_BSGK) else "xla"
  if implementation == "blockwise":
    return _blockwise(q_BTHK, k_BSGK, v_BSGV, context, scale, cfg)
  return checkpoint_name(_xla(q_BTHK, k_BSGK, v_BSGV, context, scale, cfg), "attention")


def _many_pairs(q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
  """Whether blocks are faster than the weights of all pairs (CPUs), or these take much memory."""
  batch, queries, heads, _ = q_BTHK.shape
  if target().platform == "cpu":
    return queries * k_BSGK.shape[1] >= _MANY_PAIRS
  return 4 * batch * heads * queries * k_BSGK.shape[1] >= _MANY_BYTES


def _cudnn_unsupported_reason(width: int, context: Context, cfg: ModelConfig) -> str | None:
  """Returns why cuDNN does not support attention with heads of this width, or None if it does."""
  device = target()
  if not device.capability:
    return f"needs an NVIDIA GPU, and this is {device.kind}"
  if device.capability < 8:
    return f"needs compute capability 8.0 or more, and {device.kind} has {device.capability}"
  if cfg.numerics.compute == "float32":
    return "needs numerics that compute in bfloat16 or float16, not float32"
  if not context.causal or context.segment_ids_BT is not None:
    return "supports only whole causal sequences, with neither cache nor segments"
  if width > (widest := 256 if device.capability >= 9 else 128):
    return f"supports heads up to {widest} wide on {device.kind}, and these are {width} wide"
  return None


_MLA_WIDTHS = 192, 128  # of V2's and V3's keys and values, which cuDNN supports without padding


def _cudnn(q_BTHK, k_BSGK, v_BSGV, scale, cfg):
  heads = [x.astype(cfg.numerics.compute_dtype) for x in (q_BTHK, k_BSGK, v_BSGV)]
  if (q_BTHK.shape[-1], v_BSGV.shape[-1]) == _MLA_WIDTHS:
    try:
      return _cudnn_mla(*heads, scale)
    except (ImportError, NotImplementedError):
      pass  # another version of jax has moved the function, or cuDNN is older than 9.10
  # jax.nn needs equal widths, which are multiples of 8. The zeros that pad queries and keys do not
  # change the scores; those that pad values become columns of the output, which are cut off.
  width = -(-max(x.shape[-1] for x in heads) // 8) * 8
  widened = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in heads)
  out = jax.nn.dot_product_attention(*widened, scale=scale, is_causal=True, implementation="cudnn")
  return out[..., :v_BSGV.shape[-1]]


def _cudnn_mla(q_BTHK, k_BSGK, v_BSGV, scale):
  """Calls the function under `jax.nn.dot_product_attention`, which accepts only equal widths.

  Values padded to the width of keys would take a third more time on an H200, forward and backward.
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused
  return fused.dot_product_attention(
      q_BTHK, k_BSGK, v_BSGV, scale=scale, mask_type=fused.MaskType.CAUSAL)


def is_fused_forward(primitive: Any, *_: Any, **__: Any) -> bool:
  """A checkpoint policy that keeps the results of cuDNN's attention, which its backward pass reads.

  A `checkpoint_name` would not do: it would name a copy, to be kept in addition to what the
  backward pass reads.
  """
  return primitive.name.startswith("dot_product_attention_fwd")


def _blockwise(q_BTHK, k_BSGK, v_BSGV, context, scale, cfg):
  batch, num_tokens, heads, _ = q_BTHK.shape
  groups = k_BSGK.shape[2]
  q, k, v = (x.astype(cfg.numerics.compute_dtype) for x in (q_BTHK, k_BSGK, v_BSGV))
  slots_BT = jnp.broadcast_to(context.slots_BT, (batch, num_tokens))
  segments = context.segment_ids_BT
  out = blockwise_attention(
      q.reshape(batch, num_tokens, groups, heads // groups, -1), k, v,
      Visibility(slots_BT, segments, segments), scale=scale, numerics=cfg.numerics)
  return out.reshape(batch, num_tokens, heads, -1)


def _xla(q_BTHK, k_BSGK, v_BSGV, context, scale, cfg):
  batch, num_tokens, heads, _ = q_BTHK.shape
  groups = k_BSGK.shape[2]
  q_BTGQK = q_BTHK.reshape(batch, num_tokens, groups, heads // groups, -1)
  scores = cfg.numerics.einsum_f32("btgqk,bsgk->bgqts", q_BTGQK, k_BSGK) * scale
  visible_BTS = context.visible_BTS(k_BSGK.shape[1])
  scores = jnp.where(visible_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  out_BTGQV = cfg.numerics.einsum("bgqts,bsgv->btgqv", jax.nn.softmax(scores), v_BSGV)
  return out_BTGQV.reshape(batch, num_tokens, heads, -1)


class GroupedQueryAttention(nn.Module):
  """Attention whose key and value heads are shared by groups of query heads, with its parameters.

  Queries and keys are rotated over their whole width, after their norm if there is one.

  Attributes:
    cfg: the architecture; its `attention` must be a GQAConfig.
    implementation: implementation of attention; see `attend`.
  """

  cfg: ModelConfig
  implementation: str | None = None

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, context: Context, cache: Cache | None, layer: jax.Array,
  ) -> tuple[jax.Array, Cache | None]:
    """Computes attention, over the cache if there is one.

    Args:
      x_BTD: the block's input, after its norm.
      context: the tokens' positions and slots.
      cache: keys and values of earlier tokens, to which those of these tokens are added; or None.
      layer: int32 scalar, the layer's index in the cache.

    Returns:
      The output [B, T, D], and the cache.
    """
    cfg, attention = self.cfg, self.cfg.attention
    d_model, head_dim = x_BTD.shape[-1], attention.head_dim

    def project(name, heads, axis):
      w_DHK = weight(
          self, f"w_{name}", cfg, ("embed", axis, "head_dim"), (d_model, heads, head_dim))
      out_BTHK = cfg.numerics.linear("btd,dhk->bthk", x_BTD, w_DHK)
      if attention.qkv_bias:
        b_HK = bias(self, f"b_{name}", cfg, (axis, "head_dim"), (heads, head_dim))
        out_BTHK += b_HK.astype(out_BTHK.dtype)
      return checkpoint_name(out_BTHK, "qkv")

    def normed_and_rotated(name, x_BTHK):
      if attention.qk_norm:
        x_BTHK = RMSNorm(cfg, name=f"{name}_norm")(x_BTHK)
      return rotate(x_BTHK, context.cos_BTr, context.sin_BTr, cfg.rope.layout)

    q_BTHK = normed_and_rotated("q", project("q", attention.num_heads, "heads"))
    k_BSGK = normed_and_rotated("k", project("k", attention.num_kv_heads, "kv_heads"))
    v_BSGK = project("v", attention.num_kv_heads, "kv_heads")
    if cache is not None:
      cache = cache.append(layer, keys=k_BSGK, values=v_BSGK)
      k_BSGK, v_BSGK = cache.layer("keys", layer), cache.layer("values", layer)

    out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, context, head_dim**-0.5, cfg,
                      self.implementation)
    w_HKD = weight(self, "w_o", cfg, ("heads", "head_dim", "embed"),
                   (attention.num_heads, head_dim, d_model))
    out_BTD = cfg.numerics.linear("bthk,hkd->btd", out_BTHK, w_HKD, after_attention=True)
    if attention.out_bias:
      out_BTD += bias(self, "b_o", cfg, ("norm",), (d_model,)).astype(out_BTD.dtype)
    return out_BTD, cache
