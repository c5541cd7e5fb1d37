"""Causal attention, and the grouped-query module: MHA, GQA and MQA are values of its config.

Shape letters:  B batch  T query tokens  S key slots  D model width  H query heads
                G key heads  Q = H / G queries per key head  K head width  V value width
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.decoding.cache import Cache
from model.layers import bias, weight
from model.rope import rotate


@flax.struct.dataclass
class Context:
  """What all layers share about the tokens at hand.

  Attributes:
    causal: whether token t sees keys 0..t of its row, and all of them unless segments part them.
      Known while tracing: kernels for whole sequences need no mask then.
    cos_BTr, sin_BTr: rotations of these tokens' positions.
    slots_BT: each token's own slot; it sees the keys in slots up to that.
    segment_ids_BT: packed documents to be kept apart, or None; without a cache only.
    real_BT: false where a token is padding, or None.
    experts_LBTK: experts to use, by MoE layer, in place of what the routers would choose, or None.
  """

  cos_BTr: jax.Array
  sin_BTr: jax.Array
  slots_BT: jax.Array
  segment_ids_BT: jax.Array | None = None
  real_BT: jax.Array | None = None
  experts_LBTK: jax.Array | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def visible_BTS(self, num_slots: int) -> jax.Array:
    """Which key slots each query attends to."""
    seen_BTS = jnp.arange(num_slots) <= self.slots_BT[..., None]
    if self.segment_ids_BT is not None:
      seen_BTS &= self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
    return seen_BTS


def attend(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, context: Context, scale: float,
    cfg: ModelConfig, implementation: str | None = None,
) -> jax.Array:
  """Softmax attention over the visible slots, in float32 between the two products.

  Args:
    q_BTHK, k_BSGK, v_BSGV: in the compute format, or what is cast to it.
    context: says which slots are visible.
    scale: multiplies the scores.
    cfg: its numerics count.
    implementation: "xla", which holds the weights of all pairs; "cudnn", which does not; None for
      cuDNN where it can do it. What it can do is asked of this process' first device while tracing.

  Returns:
    [B, T, H, V].

  Raises:
    ValueError: if cuDNN is named, and cannot do it.
  """
  if implementation not in (None, "xla", "cudnn"):
    raise ValueError(f"attention has no implementation {implementation!r}; there are: xla, cudnn")
  if implementation != "xla":
    reason = _refuse_cudnn(max(q_BTHK.shape[-1], v_BSGV.shape[-1]), context, cfg)
    if not reason:
      return _cudnn(q_BTHK, k_BSGK, v_BSGV, scale, cfg)
    if implementation:
      raise ValueError(f"attention by cuDNN {reason}; 'xla' takes it, and None takes what can")
  return checkpoint_name(_xla(q_BTHK, k_BSGK, v_BSGV, context, scale, cfg), "attention")


def _refuse_cudnn(width: int, context: Context, cfg: ModelConfig) -> str | None:
  """Why cuDNN cannot attend with heads of this width, or None if it can."""
  device = jax.devices()[0]
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return f"needs an NVIDIA GPU, and this is {device.device_kind}"
  capability = float(device.compute_capability)
  if capability < 8:
    return f"needs compute capability 8.0, and {device.device_kind} has {capability}"
  if cfg.numerics.compute == "float32":
    return "needs numerics that compute in bfloat16 or float16, not float32"
  if not context.causal or context.segment_ids_BT is not None:
    return "takes whole causal sequences, with neither cache nor segments"
  if width > (widest := 256 if capability >= 9 else 128):
    return f"takes heads up to {widest} wide on {device.device_kind}, and these have {width}"
  return None


_MLA_WIDTHS = 192, 128  # of V2's and V3's keys and values, which cuDNN takes as they are


def _cudnn(q_BTHK, k_BSGK, v_BSGV, scale, cfg):
  heads = [x.astype(cfg.numerics.compute_dtype) for x in (q_BTHK, k_BSGK, v_BSGV)]
  if (q_BTHK.shape[-1], v_BSGV.shape[-1]) == _MLA_WIDTHS:
    try:
      return _cudnn_mla(*heads, scale)
    except (ImportError, NotImplementedError):
      pass  # a jax that has it elsewhere, or a cuDNN before 9.10
  # Equal widths, multiples of 8; zeros add nothing to scores, and columns of zeros to the output.
  width = -(-max(x.shape[-1] for x in heads) // 8) * 8
  widened = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in heads)
  out = jax.nn.dot_product_attention(*widened, scale=scale, is_causal=True, implementation="cudnn")
  return out[..., :v_BSGV.shape[-1]]


def _cudnn_mla(q_BTHK, k_BSGK, v_BSGV, scale):
  """What jax.nn calls, which checks first that keys are as wide as values.

  Padded values would take a third more time both ways, on an H200.
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused
  return fused.dot_product_attention(
      q_BTHK, k_BSGK, v_BSGV, scale=scale, mask_type=fused.MaskType.CAUSAL)


def is_fused_forward(primitive: Any, *_: Any, **__: Any) -> bool:
  """A checkpoint policy that keeps what cuDNN's attention gave: its backward pass reads that.

  A name would not do: it would be of a copy, beside what the backward pass reads.
  """
  return primitive.name.startswith("dot_product_attention_fwd")


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
  """Attention with `num_kv_heads` shared key and value heads, rotated over their whole width."""

  cfg: ModelConfig
  implementation: str | None = None  # see `attend`

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, context: Context, cache: Cache | None, layer: jax.Array,
  ) -> tuple[jax.Array, Cache | None]:
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

    turn = lambda x: rotate(x, context.cos_BTr, context.sin_BTr, cfg.rope.layout)
    q_BTHK = turn(project("q", attention.num_heads, "heads"))
    k_BSGK = turn(project("k", attention.num_kv_heads, "kv_heads"))
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
