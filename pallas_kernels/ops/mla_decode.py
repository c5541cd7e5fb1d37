"""Attention of multi-head latent attention's absorbed form over a cache of latents.

All heads of a row attend to the same entries, whose first numbers are also the values, so that each
entry has to be read only once (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

Shape letters:  L layers  B batch  S slots  T query positions  H heads
                C width of an entry: the latent, then the rotated key  V width of the latent
"""

import jax
import jax.numpy as jnp

from pallas_kernels import implementations

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.mla_decode")}


def mla_decode(
    q_BTHC: jax.Array, cache: jax.Array, layer: jax.Array | int, lengths_B: jax.Array, *,
    value_width: int, scale: float, scales: jax.Array | None = None,
    implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns softmax(scale * q k^T) v over the visible entries of one layer of the cache.

  The entries of the T new tokens must be in the cache already, from slot lengths_B on. Position t
  of row b sees the slots before lengths_B[b] + t + 1: those of earlier tokens, and of new ones up
  to itself. What slots after the T new tokens hold does not matter, even if it is NaN; NaN in the
  entry of a new token reaches the results of all new tokens of its row. New tokens past slot S - 1
  have no entry.

  Scores and their softmax are in float32.

  Args:
    q_BTHC: absorbed queries, bfloat16 for the kernels: the part for latents, then the rotated part.
    cache: [L, B, S, C], in the queries' format or an 8-bit one. The kernels read one layer of it in
      place; do not slice it, as slices may be copied.
    layer: int32 scalar, at least 0 and less than L; it may be traced.
    lengths_B: int32, number of tokens in each row before the T new ones, at least 0.
    value_width: V; the first V numbers of an entry are its value.
    scale: multiplies the scores.
    scales: reserved for entries with scales; must be None, as 8-bit entries are plainly cast.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    The weighted sums of values [B, T, H, V] in the queries' dtype, and the natural logarithm of the
    sum of exp(score) over visible slots, float32 [B, T, H].

  Raises:
    ValueError: if the shapes do not match, `scales` are given, or the named implementation cannot
      run here.
  """
  lengths_B = jnp.asarray(lengths_B)
  if (q_BTHC.ndim != 4 or not q_BTHC.shape[1] or cache.ndim != 4
      or lengths_B.shape != q_BTHC.shape[:1] or cache.shape[1] != q_BTHC.shape[0]
      or cache.shape[3] != q_BTHC.shape[3]):
    raise ValueError(
        "mla_decode takes queries [B, T, H, C], a cache [L, B, S, C] and lengths [B], not "
        f"{q_BTHC.shape}, {cache.shape} and {lengths_B.shape}")
  if not jnp.issubdtype(lengths_B.dtype, jnp.integer) or not jnp.issubdtype(
      q_BTHC.dtype, jnp.floating):
    raise ValueError("mla_decode takes lengths of integers and queries of floating-point numbers, "
                     f"not {lengths_B.dtype} and {q_BTHC.dtype}")
  if jnp.ndim(layer) or (isinstance(layer, int) and not 0 <= layer < len(cache)):
    raise ValueError(f"layer={layer} should be a scalar, at least 0 and below {len(cache)}, the "
                     "layers of the cache")
  if not 0 < value_width <= cache.shape[3]:
    raise ValueError(f"value_width={value_width} must be positive and at most the width of an "
                     f"entry, which is {cache.shape[3]}")
  if scales is not None:
    raise ValueError("mla_decode does not support scales of entries yet: 8-bit entries are cast")
  return implementations.run(
      "mla_decode", implementation, _xla, _KERNELS, q_BTHC, cache, jnp.asarray(layer, jnp.int32),
      lengths_B.astype(jnp.int32), value_width=value_width, scale=float(scale))


def _xla(q_BTHC, cache, layer, lengths_B, *, value_width: int, scale: float):
  positions, slots = q_BTHC.shape[1], cache.shape[2]
  entries_BSC = (cache[0] if len(cache) == 1 else
                 jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False))
  entries_BSC = entries_BSC.astype(q_BTHC.dtype)
  ends_BT = lengths_B[:, None] + jnp.arange(1, positions + 1)
  seen_BTS = jnp.arange(slots) < ends_BT[..., None]
  precision = jax.lax.Precision.HIGHEST if q_BTHC.dtype == jnp.float32 else None
  scores_BHTS = scale * jnp.einsum("bthc,bsc->bhts", q_BTHC, entries_BSC, precision=precision,
                                   preferred_element_type=jnp.float32)
  scores_BHTS = jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf)
  lse_BHT = jax.nn.logsumexp(scores_BHTS, axis=-1)
  weights_BHTS = jnp.exp(scores_BHTS - lse_BHT[..., None]).astype(q_BTHC.dtype)
  # A weight of zero does not remove NaN.
  values_BSV = jnp.where(seen_BTS[:, -1, :, None], entries_BSC[..., :value_width], 0)
  out_BHTV = jnp.einsum("bhts,bsv->bhtv", weights_BHTS, values_BSV, precision=precision,
                        preferred_element_type=jnp.float32).astype(q_BTHC.dtype)
  return jnp.moveaxis(out_BHTV, 1, 2), jnp.moveaxis(lse_BHT, 1, 2)
