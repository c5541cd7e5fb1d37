"""Checks of what decoding is called with.

Values that a transformation such as `jax.jit` traces are unknown; only shapes are checked then.

Shape letters:  B rows  T prompt tokens  K stop tokens
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.decoding.cache import Cache


def known(value: Any) -> np.ndarray | None:
  """Returns the values of an array or a number; None if they are traced or on other hosts."""
  if isinstance(value, jax.core.Tracer):
    return None
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return None
  return np.asarray(value)


def as_prompts(cfg: ModelConfig, prompts_BT: Any, lengths_B: Any) -> tuple[jax.Array, jax.Array]:
  """Returns prompts and their lengths as int32 arrays.

  Args:
    cfg: gives the size of the vocabulary.
    prompts_BT: token ids, right-padded; those past a prompt's length may have any value.
    lengths_B: the prompts' lengths.

  Raises:
    ValueError: if the shapes do not fit, or values are not integers or out of range. The message
      names the first such row.
  """
  prompts_BT, lengths_B = (_integers(name, value) for name, value in (
      ("prompts", prompts_BT), ("lengths", lengths_B)))
  if prompts_BT.ndim != 2 or 0 in prompts_BT.shape or lengths_B.shape != prompts_BT.shape[:1]:
    raise ValueError("prompts should have the shape [B >= 1, T >= 1] and lengths the shape [B], "
                     f"and have {prompts_BT.shape} and {lengths_B.shape}")
  # Within a jitted function an array made of known values counts as traced: check them before.
  tokens, lengths = known(prompts_BT), known(lengths_B)
  if lengths is not None:
    _check_prompts(cfg, tokens, lengths, prompts_BT.shape[1])
  return jnp.asarray(prompts_BT, jnp.int32), jnp.asarray(lengths_B, jnp.int32)


def _check_prompts(cfg, tokens, lengths, num_tokens) -> None:
  for row, length in enumerate(lengths.tolist()):
    if not 1 <= length <= num_tokens:
      raise ValueError(f"row {row}: the prompt's length is {length}, and must lie in "
                       f"1..{num_tokens}, the width of the prompts")
  if tokens is not None:
    inside = np.arange(num_tokens) < lengths[:, None]
    invalid = np.argwhere(inside & ((tokens < 0) | (tokens >= cfg.vocab_size)))
    if len(invalid):
      row, column = invalid[0].tolist()
      raise ValueError(f"row {row}: token {column} of the prompt is {tokens[row, column]}, and ids "
                       f"must lie in 0..{cfg.vocab_size - 1}, the model's vocabulary")


def _integers(name: str, value: Any) -> jax.Array | np.ndarray:
  value = value if isinstance(value, jax.Array) else np.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{name} should be integers, and are of type {value.dtype}")
  if isinstance(value, np.ndarray):
    # Values that int32 cannot hold are out of range too, and must not wrap to some that are not.
    value = np.clip(value.astype(np.int64), -(2**31), 2**31 - 1)
  return value


def check_room(cache: Cache, lengths_B: jax.Array) -> None:
  """Raises ValueError, naming the row, if the cache has no room for this many more tokens."""
  used, new = known(cache.lengths_B), known(lengths_B)
  if used is None or new is None:
    return
  for row, (have, more) in enumerate(zip(used.tolist(), new.tolist(), strict=True)):
    if have + more > cache.num_slots:
      raise ValueError(f"row {row}: the cache holds {have} tokens, and its {cache.num_slots} slots "
                       f"have no room for {more} more: make a cache of more slots")


def check_sampling(
    temperature: Any, limits: Any, max_new_tokens: int, key: jax.Array | None) -> bool:
  """Checks how tokens are to be sampled.

  Args:
    temperature: divides the logits.
    limits: the `sampling.Limits` of what may be sampled.
    max_new_tokens: largest number of new tokens.
    key: the random key, if any.

  Returns:
    Whether the most likely token is taken, because the temperature is known to be 0.

  Raises:
    ValueError: if an argument is out of range, or the key is missing.
  """
  if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens!r} should be an integer >= 1")
  for name, value, kinds, valid, expected in (
      ("temperature", temperature, "iuf", lambda x: 0 <= x < math.inf, "a number >= 0"),
      ("top_p", limits.top_p, "iuf", lambda x: 0 < x <= 1, "a number with 0 < top_p <= 1"),
      ("top_k", limits.top_k, "iu", lambda x: 0 <= x < 2**31, "an integer >= 0"),
      ("min_p", limits.min_p, "iuf", lambda x: 0 <= x <= 1, "a number with 0 <= min_p <= 1")):
    values = known(value)
    if values is None:
      continue
    if values.ndim or values.dtype.kind not in kinds or not valid(values.item()):
      raise ValueError(f"{name}={value!r} should be {expected}")
  value = known(temperature)
  greedy = value is not None and value.item() == 0
  if not greedy and key is None:
    raise ValueError("sampling at a temperature above 0 needs a key: pass a jax.random key")
  return greedy


def may_exclude(limits: Any) -> bool:
  """Whether the `sampling.Limits` may exclude a token; true if they are not known while tracing."""
  return any(value is None or value.item() != default for value, default in zip(
      map(known, limits), type(limits)(), strict=True))


def as_stop_tokens(stop_token: int | Sequence[int] | jax.Array | None) -> jax.Array:
  """Returns the ids of the tokens that end a row, int32 [K]; K is 0 for None.

  Raises:
    ValueError: if it is neither an id nor a sequence of ids.
  """
  if stop_token is None:
    return jnp.zeros(0, jnp.int32)
  if isinstance(stop_token, set | frozenset):
    stop_token = sorted(stop_token)
  ids = known(stop_token)
  if ids is None:
    return jnp.asarray(stop_token, jnp.int32).reshape(-1)
  if ids.ndim > 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0)):
    raise ValueError(f"stop_token={stop_token!r} should be the id of a token, several of them, or "
                     "None")
  return jnp.asarray(np.minimum(ids.reshape(-1), 2**31 - 1), jnp.int32)


def as_cache_dtype(dtype: Any) -> str | None:
  """Returns the name of a cache's format, or None.

  Raises:
    ValueError: if it is not one in which a cache can be kept.
  """
  known_formats = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2")
  name = None if dtype is None else getattr(dtype, "__name__", str(dtype))
  if name is not None and name not in known_formats:
    raise ValueError(f"cache_dtype={dtype!r} should be one of {', '.join(known_formats)}, or None "
                     "for the compute format")
  return name


def as_chunk(chunk: Any) -> int | None:
  """Returns the number of prompt tokens that are read at a time, or None.

  Raises:
    ValueError: if it is not an integer of at least 1.
  """
  if chunk is None:
    return None
  if not isinstance(chunk, int | np.integer) or chunk < 1:
    raise ValueError(f"prefill_chunk={chunk!r} should be an integer >= 1, or None")
  return int(chunk)


def warn_past_context(cfg: ModelConfig, lengths_B: jax.Array, num_tokens: int, new: int) -> None:
  """Warns if rows may become longer than the context that the model's positions were made for.

  Args:
    cfg: gives the context.
    lengths_B: the prompts' lengths.
    num_tokens: T, what they are at most.
    new: the largest number of new tokens.
  """
  lengths = known(lengths_B)
  longest = num_tokens if lengths is None else int(lengths.max())
  if longest + new > cfg.max_seq_len:
    warnings.warn(
        f"a prompt of {longest} tokens and {new} new ones exceed the model's context of "
        f"{cfg.max_seq_len} (max_seq_len): text past it may be of poor quality. Shorten the prompt "
        "or lower max_new_tokens", stacklevel=3)
