"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1, eq. 1-11).

It is computed in one of two equivalent forms. *Expanded* computes every head's keys and values from
the latent, which takes the fewest operations when many queries share them. *Absorbed* moves W^UK
into the query, and applies W^UV after the weighted sum, so that attention runs on the latent
itself, as a single key head. That suits decoding, where the cache is then read once for all heads.

Shape letters:  B batch  T query tokens  S key slots  D model width  H heads  Q query latent
                C key-value latent  K content width of a head (nope)  R rotated width  V value width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.attention import Context, attend
from model.config import MLAConfig, ModelConfig
from model.decoding.cache import Cache
from model.layers import RMSNorm, weight
from model.rope import rotate
from pallas_kernels import mla_decode

# The latent norms use this epsilon whatever the model's, as the released code and transformers do.
LATENT_NORM_EPS = 1e-6


def softmax_scale(cfg: ModelConfig) -> float:
  """Returns 1 / sqrt(head width), times the temperature of the scaling of RoPE if there is any.

  In V3 it is 0.1352 with YaRN's temperature, and 0.0722 without.
  """
  temperature = cfg.rope.scaling.softmax_scale if cfg.rope.scaling else 1.0
  return cfg.attention.score_dim**-0.5 * temperature


def choose_form(attention: MLAConfig, num_queries: int, num_slots: int) -> str:
  """Returns the form that takes fewer multiply-adds, "expanded" or "absorbed".

  Args:
    attention: the widths.
    num_queries: T, query tokens in a row of the batch.
    num_slots: S, key slots in a row of the batch.
  """
  a = attention
  expanding = num_slots * a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
  expanded = expanding + num_queries * num_slots * (a.score_dim + a.v_head_dim)
  absorbing = num_queries * a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
  absorbed = absorbing + 2 * num_queries * num_slots * a.cache_elements
  return "absorbed" if absorbed < expanded else "expanded"


def attend_expanded(
    q_BTHK: jax.Array, q_BTHR: jax.Array, latent_BSC: jax.Array, k_BSR: jax.Array,
    w_uk_CHK: jax.Array, w_uv_CHV: jax.Array, context: Context, cfg: ModelConfig,
    implementation: str | None = None,
) -> jax.Array:
  """MLA with keys and values of every head, as it is written in eq. 2, 4, 5, 9 and 10.

  Args:
    q_BTHK: content part of the queries.
    q_BTHR: rotated part of the queries.
    latent_BSC: key-value latents, after their norm.
    k_BSR: rotated keys, which all heads share.
    w_uk_CHK: W^UK, from latents to content keys.
    w_uv_CHV: W^UV, from latents to values.
    context: says which slots are visible to which token.
    cfg: gives the softmax scale and the numerics.
    implementation: see `model.attention.attend`.

  Returns:
    [B, T, H, V].
  """
  linear = cfg.numerics.linear
  k_BSHK = linear("bsc,chk->bshk", latent_BSC, w_uk_CHK)
  v_BSHV = linear("bsc,chv->bshv", latent_BSC, w_uv_CHV)
  shared_BSHR = jnp.broadcast_to(k_BSR[:, :, None], (*k_BSHK.shape[:3], k_BSR.shape[-1]))
  queries = jnp.concatenate([q_BTHK, q_BTHR], axis=-1)
  keys = jnp.concatenate([k_BSHK, shared_BSHR.astype(k_BSHK.dtype)], axis=-1)
  return attend(queries, keys, v_BSHV, context, softmax_scale(cfg), cfg, implementation)


def _absorbed_queries(q_BTHK, q_BTHR, w_uk_CHK, cfg):
  """Returns the queries of the absorbed form: those of latents, then the rotated ones."""
  q_BTHC = cfg.numerics.einsum("bthk,chk->bthc", q_BTHK, w_uk_CHK)
  return jnp.concatenate([q_BTHC, q_BTHR.astype(q_BTHC.dtype)], axis=-1)


def attend_absorbed(
    q_BTHK: jax.Array, q_BTHR: jax.Array, latent_BSC: jax.Array, k_BSR: jax.Array,
    w_uk_CHK: jax.Array, w_uv_CHV: jax.Array, context: Context, cfg: ModelConfig,
    implementation: str | None = None,
) -> jax.Array:
  """MLA as multi-query attention over the latents, without keys or values of heads.

  It returns what `attend_expanded` does, up to rounding (V2, arXiv:2405.04434, section 2.1.2). W^UK
  multiplies queries here, and W^UV weighted sums of latents, as a part of attention: these products
  are never in FP8.

  Args:
    q_BTHK, q_BTHR, latent_BSC, k_BSR, w_uk_CHK, w_uv_CHV: as in `attend_expanded`.
    context, cfg, implementation: as in `attend_expanded`.

  Returns:
    [B, T, H, V].
  """
  queries = _absorbed_queries(q_BTHK, q_BTHR, w_uk_CHK, cfg)
  keys_BS1C = jnp.concatenate([latent_BSC, k_BSR], axis=-1)[:, :, None]
  # The keys are the values, too: summing the rotated ones as well takes less time than copying the
  # others out of the cache.
  mixed_BTHC = attend(
      queries, keys_BS1C, keys_BS1C, context, softmax_scale(cfg), cfg, implementation)
  return cfg.numerics.einsum(
      "bthc,chv->bthv", mixed_BTHC[..., :latent_BSC.shape[-1]], w_uv_CHV)


def attend_cached(
    q_BTHK: jax.Array, q_BTHR: jax.Array, cache: Cache, layer: jax.Array, w_uk_CHK: jax.Array,
    w_uv_CHV: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Computes `attend_absorbed` of the newest tokens over the cache, by `mla_decode`.

  It reads the entries where they are, up to each row's length, and a latent once for all heads.

  Args:
    q_BTHK, q_BTHR, w_uk_CHK, w_uv_CHV: as in `attend_expanded`.
    cache: latents, to which those of these tokens have been added, with the lengths from before.
    layer: int32 scalar, the layer's index in the cache.
    cfg: gives the softmax scale and the numerics.

  Returns:
    [B, T, H, V].
  """
  queries = _absorbed_queries(q_BTHK, q_BTHR, w_uk_CHK, cfg)
  entries = cache.entries["latent"]
  mixed_BTHC, _ = mla_decode(
      queries, entries, 0 if len(entries) == 1 else layer, cache.lengths_B,
      value_width=w_uk_CHK.shape[0], scale=softmax_scale(cfg))
  return cfg.numerics.einsum("bthc,chv->bthv", mixed_BTHC, w_uv_CHV)


_FORMS = {"expanded": attend_expanded, "absorbed": attend_absorbed}


class MultiHeadLatentAttention(nn.Module):
  """Multi-head latent attention with its parameters.

  W^DKV and W^KR are one matrix, `w_dkv`; W^UQ and W^QR are one matrix, `w_uq`.

  Attributes:
    cfg: the architecture; its `attention` must be an MLAConfig.
    form: "expanded" or "absorbed"; None for the one that `choose_form` returns.
    implementation: implementation of attention, see `model.attention.attend`; or "mla_decode" for
      that kernel where the absorbed form reads a cache, and the default elsewhere.
  """

  cfg: ModelConfig
  form: str | None = None
  implementation: str | None = None

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, context: Context, cache: Cache | None, layer: jax.Array,
  ) -> tuple[jax.Array, Cache | None]:
    """Computes attention, over the cache if there is one.

    Args:
      x_BTD: the block's input, after its norm.
      context: the tokens' positions and slots.
      cache: latents of earlier tokens, to which those of these tokens are added; or None.
      layer: int32 scalar, the layer's index in the cache.

    Returns:
      The output [B, T, D], and the cache.
    """
    cfg, a = self.cfg, self.cfg.attention
    apply_rope = lambda x: rotate(x, context.cos_BTr, context.sin_BTr, cfg.rope.layout)

    queries = self._queries(x_BTD)
    q_BTHK, q_BTHR = (
        queries[..., :a.qk_nope_head_dim], apply_rope(queries[..., a.qk_nope_head_dim:]))

    w_dkv = weight(self, "w_dkv", cfg, ("embed", "kv_lora"), (x_BTD.shape[-1], a.cache_elements))
    joint = checkpoint_name(cfg.numerics.linear("btd,dc->btc", x_BTD, w_dkv), "latent")
    latent_BSC = self._norm("kv_norm", joint[..., :a.kv_lora_rank])
    k_BSR = apply_rope(joint[..., None, a.kv_lora_rank:])[..., 0, :]
    if cache is not None:
      cache = cache.append(layer, latent=jnp.concatenate([latent_BSC, k_BSR], axis=-1))
      cached = cache.layer("latent", layer)
      latent_BSC, k_BSR = cached[..., :a.kv_lora_rank], cached[..., a.kv_lora_rank:]

    up = lambda name, width: weight(
        self, name, cfg, ("kv_lora", "heads", "head_dim"), (a.kv_lora_rank, a.num_heads, width))
    w_uk, w_uv = up("w_uk", a.qk_nope_head_dim), up("w_uv", a.v_head_dim)
    form = self.form or choose_form(a, x_BTD.shape[1], latent_BSC.shape[1])
    kernel = self.implementation == "mla_decode"
    if kernel and form == "absorbed" and cache is not None:
      out_BTHV = attend_cached(q_BTHK, q_BTHR, cache, layer, w_uk, w_uv, cfg)
    else:
      out_BTHV = _FORMS[form](q_BTHK, q_BTHR, latent_BSC, k_BSR, w_uk, w_uv, context, cfg,
                              None if kernel else self.implementation)

    w_o = weight(self, "w_o", cfg, ("heads", "head_dim", "embed"),
                 (a.num_heads, a.v_head_dim, x_BTD.shape[-1]))
    out_BTD = cfg.numerics.linear("bthv,hvd->btd", out_BTHV, w_o, after_attention=True)
    return out_BTD, cache

  def _norm(self, name: str, x: jax.Array) -> jax.Array:
    if not self.cfg.attention.latent_norm:
      return x
    return RMSNorm(self.cfg, eps=LATENT_NORM_EPS, name=name)(x)

  def _queries(self, x_BTD: jax.Array) -> jax.Array:
    """Returns queries (eq. 6-8) whose last R dimensions are not yet rotated: [B, T, H, K + R]."""
    cfg, a = self.cfg, self.cfg.attention
    heads = (a.num_heads, a.score_dim)
    if a.q_lora_rank is None:
      w_q = weight(self, "w_q", cfg, ("embed", "heads", "head_dim"), (x_BTD.shape[-1], *heads))
      return checkpoint_name(cfg.numerics.linear("btd,dhk->bthk", x_BTD, w_q), "latent")
    w_dq = weight(self, "w_dq", cfg, ("embed", "q_lora"), (x_BTD.shape[-1], a.q_lora_rank))
    latent_BTQ = checkpoint_name(cfg.numerics.linear("btd,dq->btq", x_BTD, w_dq), "latent")
    w_uq = weight(self, "w_uq", cfg, ("q_lora", "heads", "head_dim"), (a.q_lora_rank, *heads))
    return cfg.numerics.linear("btq,qhk->bthk", self._norm("q_norm", latent_BTQ), w_uq)
