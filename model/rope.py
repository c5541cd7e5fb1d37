"""Rotary position embeddings in two layouts, and their scaling to longer contexts.

V3 (arXiv:2412.19437) uses them in section 2.1.1, and extends its context in section 4.3.

Shape letters:  B batch  T tokens  H heads  R rotated width  r = R / 2 frequencies
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def frequencies(cfg: RopeConfig, dim: int) -> np.ndarray:
  """Returns the angle, in radians, by which each pair of dimensions rotates per position.

  Args:
    cfg: the base and the scaling.
    dim: R, the rotated width, an even number.

  Returns:
    float32 [R / 2].
  """
  plain_r = cfg.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  match cfg.scaling:
    case YarnScaling():
      scaled_r = _yarn(plain_r, cfg.theta, dim, cfg.scaling)
    case Llama3Scaling():
      scaled_r = _llama3(plain_r, cfg.scaling)
    case LinearScaling():
      scaled_r = plain_r / cfg.scaling.factor
    case None:
      scaled_r = plain_r
  return scaled_r.astype(np.float32)


def _yarn(plain_r: np.ndarray, theta: float, dim: int, cfg: YarnScaling) -> np.ndarray:
  """YaRN (arXiv:2309.00071): keeps high frequencies, and divides low ones by `factor`.

  Between the two there is a linear ramp over the index of the pair.
  """
  def pair_index(rotations: float) -> float:
    """The fractional index of the pair that rotates this often over the original context."""
    return dim * math.log(cfg.original_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  low, high = pair_index(cfg.beta_fast), pair_index(cfg.beta_slow)
  if cfg.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  # An empty ramp becomes a step, and the clipped bounds of a context that is very short (or very
  # long) for theta may be in reverse order: both as in the released code and in transformers.
  ramp_r = np.clip((np.arange(dim // 2) - low) / ((high - low) or 1e-3), 0, 1)
  return plain_r / cfg.factor * ramp_r + plain_r * (1 - ramp_r)


def _llama3(plain_r: np.ndarray, cfg: Llama3Scaling) -> np.ndarray:
  """Keeps high frequencies, divides low ones by `factor`, and interpolates between the two."""
  rotations_r = cfg.original_seq_len * plain_r / (2 * math.pi)
  smooth_r = np.clip(
      (rotations_r - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor), 0, 1)
  return plain_r * (smooth_r + (1 - smooth_r) / cfg.factor)


def rotation(cfg: RopeConfig, dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the cosine and sine of every token's rotations, times YaRN's scale if there is one.

  Args:
    cfg: the base and the scaling.
    dim: R, the rotated width.
    positions_BT: int32, positions of the tokens.

  Returns:
    cos_BTr and sin_BTr, float32.
  """
  angles_BTr = positions_BT[..., None].astype(jnp.float32) * frequencies(cfg, dim)
  scale = cfg.scaling.rotation_scale if isinstance(cfg.scaling, YarnScaling) else 1.0
  return jnp.cos(angles_BTr) * scale, jnp.sin(angles_BTr) * scale


def rotate(x_BTHR: jax.Array, cos_BTr: jax.Array, sin_BTr: jax.Array, layout: str) -> jax.Array:
  """Rotates pairs of dimensions of every head, in float32.

  Args:
    x_BTHR: queries or keys of H heads.
    cos_BTr, sin_BTr: as `rotation` returns them.
    layout: which dimensions form a pair: "interleaved" for 2i and 2i + 1, "half" for i and i + R/2.

  Returns:
    [B, T, H, R] in the format of `x_BTHR`.
  """
  cos, sin = cos_BTr[..., None, :], sin_BTr[..., None, :]
  x = x_BTHR.astype(jnp.float32)
  if layout == "half":
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  else:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.reshape(x.shape).astype(x_BTHR.dtype)
