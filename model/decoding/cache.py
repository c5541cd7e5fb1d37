"""The key-value cache: an argument and a return value of the model, never hidden state.

Shape letters:  L layers  B batch  S slots  T new tokens  G key heads  K head width  C latent width
"""

import flax.struct
import jax
import jax.numpy as jnp

from model.config import MLAConfig, ModelConfig


@flax.struct.dataclass
class Cache:
  """The keys and values, or MLA's latents, of the tokens so far.

  The contents of slots from a row's length on are undefined, and never attended to, so that
  lowering a length rolls the row back. A cache donated to a jitted step is updated in place.

  Attributes:
    lengths_B: int32, the number of tokens in each row.
    entries: `{"latent": [L, B, S, C]}` for MLA (the latent after its norm, then the rotated shared
      key; 576 wide in V3), `{"keys": [L, B, S, G, K], "values": [L, B, S, G, K]}` otherwise. In a
      cache whose layers are `apart`, each is a tuple of L arrays [1, B, S, ...].
  """

  lengths_B: jax.Array
  entries: dict[str, jax.Array | tuple[jax.Array, ...]]

  @property
  def num_slots(self) -> int:
    """S, the most tokens that a row can hold."""
    return jax.tree.leaves(self.entries)[0].shape[2]

  @property
  def is_apart(self) -> bool:
    """Whether every layer has an array of its own, for a network without a loop over layers."""
    return isinstance(next(iter(self.entries.values())), tuple)

  def apart(self) -> "Cache":
    """Returns the cache with an array for every layer, from which nothing has to be copied."""
    return self.replace(entries={
        name: tuple(x[i:i + 1] for i in range(len(x))) for name, x in self.entries.items()})

  def of_layer(self, layer: int) -> "Cache":
    """Returns the cache of one layer, of a cache whose layers are apart."""
    return self.replace(entries={name: each[layer] for name, each in self.entries.items()})

  def with_layer(self, layer: int, cache: "Cache") -> "Cache":
    """Returns the cache, whose layers are apart, with another cache of this layer."""
    return self.replace(entries={
        name: (*each[:layer], cache.entries[name], *each[layer + 1:])
        for name, each in self.entries.items()})

  def new_slots_BT(self, num_tokens: int) -> jax.Array:
    """Returns the slots of the next `num_tokens` tokens of each row, int32 [B, T]."""
    return self.lengths_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

  def require_fit(self, batch: int, num_tokens: int) -> None:
    """Raises ValueError if the cache can never hold `num_tokens` more tokens in `batch` rows."""
    rows = self.lengths_B.shape[0]
    if batch != rows or num_tokens > self.num_slots:
      raise ValueError(f"{batch} row(s) of {num_tokens} token(s) do not fit a cache of {rows} "
                       f"row(s) of {self.num_slots} slot(s): make one of {batch} row(s) and at "
                       f"least {num_tokens} slots with init_cache")

  def append(self, layer: jax.Array, **entries: jax.Array) -> "Cache":
    """Returns the cache with T more entries in every row of one layer, and unchanged lengths.

    Args:
      layer: int32 scalar, the layer's index, which does not matter in a cache of one layer.
      **entries: [B, T, ...] by the names in `entries`. They are written to the slots from each
        row's length on; those that would lie past the last slot are dropped.
    """
    updated = dict(self.entries)
    for name, new in entries.items():
      rows_B1 = jnp.arange(new.shape[0])[:, None]
      where = (0 if len(updated[name]) == 1 else layer, rows_B1, self.new_slots_BT(new.shape[1]))
      updated[name] = updated[name].at[where].set(
          _saturated(new, updated[name].dtype), mode="drop", unique_indices=True)
    return self.replace(entries=updated)

  def layer(self, name: str, layer: jax.Array) -> jax.Array:
    """Returns the entries of this name of one layer, [B, S, ...]; see `append`."""
    if len(self.entries[name]) == 1:
      return self.entries[name][0]
    return jax.lax.dynamic_index_in_dim(self.entries[name], layer, keepdims=False)

  def with_lengths(self, lengths_B: jax.Array) -> "Cache":
    """Returns the cache with other lengths: larger after `append`, smaller to roll rows back."""
    return self.replace(lengths_B=jnp.asarray(lengths_B, jnp.int32))


def _saturated(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Casts, but numbers past the largest one of an 8-bit format become that and not NaN."""
  if jnp.dtype(dtype).itemsize == 1:
    largest = float(jnp.finfo(dtype).max)
    x = jnp.clip(x, -largest, largest)  # NaN stays NaN
  return x.astype(dtype)


def init_cache(cfg: ModelConfig, batch: int, num_slots: int, dtype=None,
               layers: int | None = None) -> Cache:
  """Returns an empty cache for `batch` rows of up to `num_slots` tokens.

  Args:
    cfg: the architecture.
    batch: B, the number of rows.
    num_slots: S, the most tokens of a row. Once a row is full, further tokens are dropped without
      an error, so it should be at least the length of the prompt plus the number of tokens to be
      generated.
    dtype: format of the entries; None for the compute format. "float8_e4m3fn" takes half the bytes
      of bfloat16, and rounds to four significant bits.
    layers: L; None for those of the trunk, without MTP modules.

  Raises:
    ValueError: if `batch` or `num_slots` is below 1.
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
  layers = cfg.num_layers if layers is None else layers
  entries = {name: jnp.zeros((layers, batch, num_slots, *width), dtype)
             for name, width in widths.items()}
  return Cache(lengths_B=jnp.zeros(batch, jnp.int32), entries=entries)
