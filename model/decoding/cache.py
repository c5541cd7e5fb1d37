"""The key-value cache: an argument and a return value of the model, never hidden state.

Shape letters:  L layers  B batch  S slots  T new tokens  G key heads  K head width  C latent width
"""

import flax.struct
import jax
import jax.numpy as jnp

from model.config import MLAConfig, ModelConfig


@flax.struct.dataclass
class Cache:
  """What attention remembers of the tokens seen so far.

  Slots at and after a row's length hold rubbish that is never attended to, so lowering a length
  rolls a row back. Donate the cache to a jitted step and it is updated in place.

  Attributes:
    lengths_B: int32, tokens held per row.
    entries: `{"latent": [L, B, S, C]}` for MLA (the normed latent and the rotated shared key, 576
      wide in V3), `{"keys": [L, B, S, G, K], "values": [L, B, S, G, K]}` otherwise.
  """

  lengths_B: jax.Array
  entries: dict[str, jax.Array]

  @property
  def num_slots(self) -> int:
    return next(iter(self.entries.values())).shape[2]

  def new_slots_BT(self, num_tokens: int) -> jax.Array:
    """The slots that the next `num_tokens` of each row go to."""
    return self.lengths_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

  def append(self, layer: jax.Array, **entries: jax.Array) -> "Cache":
    """Writes [B, T, ...] entries of one layer after each row's length; past the end they drop."""
    updated = dict(self.entries)
    for name, new in entries.items():
      rows_B1 = jnp.arange(new.shape[0])[:, None]
      where = (layer, rows_B1, self.new_slots_BT(new.shape[1]))
      updated[name] = updated[name].at[where].set(
          new.astype(updated[name].dtype), mode="drop", unique_indices=True)
    return self.replace(entries=updated)

  def layer(self, name: str, layer: jax.Array) -> jax.Array:
    """One layer's [B, S, ...] entries."""
    return jax.lax.dynamic_index_in_dim(self.entries[name], layer, keepdims=False)

  def with_lengths(self, lengths_B: jax.Array) -> "Cache":
    """The cache with each row cut, or completed, to `lengths_B` tokens."""
    return self.replace(lengths_B=jnp.asarray(lengths_B, jnp.int32))


def init_cache(cfg: ModelConfig, batch: int, num_slots: int, dtype=None) -> Cache:
  """Returns an empty cache for `batch` rows of up to `num_slots` tokens.

  Args:
    cfg: the model it is for.
    batch: rows.
    num_slots: the most tokens a row may reach; tokens past it would be lost, so size it to the
      prompt plus all that will be generated.
    dtype: of the entries; None for the compute format.
  """
  if batch < 1 or num_slots < 1:
    raise ValueError(f"a cache needs batch >= 1 and num_slots >= 1, not {batch} and {num_slots}")
  dtype = dtype or cfg.numerics.compute_dtype
  attention = cfg.attention
  if isinstance(attention, MLAConfig):
    widths = {"latent": (attention.cache_elements,)}
  else:
    heads = (attention.num_kv_heads, attention.head_dim)
    widths = {"keys": heads, "values": heads}
  entries = {name: jnp.zeros((cfg.num_layers, batch, num_slots, *width), dtype)
             for name, width in widths.items()}
  return Cache(lengths_B=jnp.zeros(batch, jnp.int32), entries=entries)
