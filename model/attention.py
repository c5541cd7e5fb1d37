"""Causal attention, and the grouped-query module: MHA, GQA and MQA are values of its config.

Shape letters:  B batch  T query tokens  S key slots  D model width  H query heads
                G key heads  Q = H / G queries per key head  K head width  V value width
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.cache import Cache
from model.config import ModelConfig
from model.layers import bias, weight
from model.rope import rotate


@flax.struct.dataclass
class Context:
  """What all layers share about the tokens at hand.

  Attributes:
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

  def visible_BTS(self, num_slots: int) -> jax.Array:
    """Which key slots each query attends to."""
    seen_BTS = jnp.arange(num_slots) <= self.slots_BT[..., None]
    if self.segment_ids_BT is not None:
      seen_BTS &= self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
    return seen_BTS


def attend(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, context: Context, scale: float,
    cfg: ModelConfig,
) -> jax.Array:
  """Softmax attention over the visible slots, in float32 between the two products.

  Returns:
    [B, T, H, V].
  """
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

    out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, context, head_dim**-0.5, cfg)
    out_BTHK = checkpoint_name(out_BTHK, "attention")
    w_HKD = weight(self, "w_o", cfg, ("heads", "head_dim", "embed"),
                   (attention.num_heads, head_dim, d_model))
    out_BTD = cfg.numerics.linear("bthk,hkd->btd", out_BTHK, w_HKD, after_attention=True)
    if attention.out_bias:
      out_BTD += bias(self, "b_o", cfg, ("norm",), (d_model,)).astype(out_BTD.dtype)
    return out_BTD, cache
