"""Quantisation with one scale per tile: in V3, 1x128 for activations and 128x128 for weights.

Shape letters:  M rows  K columns  m, k tiles along them  F hidden units
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import implementations
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized, num_tiles, round_to

# V3's code takes a tile's largest magnitude to be at least this. It suits activations; gradients
# may be much smaller.
SMALLEST_AMAX = 1e-4
TILES = {"1x128": (1, BLOCK), "128x1": (BLOCK, 1), "128x128": (BLOCK, BLOCK)}
_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.quantize"),
            "mosaic_tpu": implementations.lazy("mosaic_tpu.quantize")}
_SWIGLU_KERNELS = {
    "mosaic_gpu": implementations.lazy("mosaic_gpu.quantize_fused", "SWIGLU_KERNEL")}
_WITH_INPUTS_KERNELS = {
    "mosaic_gpu": implementations.lazy("mosaic_gpu.quantize_fused", "WITH_INPUTS_KERNEL")}
_BOTH_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.quantize_fused", "BOTH_KERNEL")}


def quantize(
    x_MK: jax.Array, tile: str = "1x128", *, format: str = "e4m3", power_of_two: bool = False,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None) -> Quantized:
  """Divides each tile by its scale and rounds it to a format (arXiv:2412.19437, section 3.3.2).

  The scale of a tile is its largest magnitude divided by the format's, so that nothing overflows.

  Args:
    x_MK: [..., M, K], float32 or bfloat16, finite.
    tile: the elements that share a scale: "1x128", "128x1", "128x128", "row" (1 x K) or "tensor"
      (M x K, so each matrix of a stack has its own scale).
    format: "e4m3", "e5m2" or "e5m6".
    power_of_two: whether to round scales up to powers of two. Scaling is then exact, so the result
      can be requantised with other tiles without loss as long as its values stay within the
      format's range.
    smallest_amax: lower bound for the largest magnitude of a tile when its scale is computed.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    Values of x's shape in the format's dtype, and one scale per tile.

  Raises:
    ValueError: if the tile or the format is unknown, if x has another dtype or fewer than two axes,
      or if the named implementation cannot run here.
  """
  check(x_MK, format)
  return implementations.run(
      "quantize", implementation, _quantize, _KERNELS, x_MK, tile=tile_of(tile, x_MK.shape),
      format=format, power_of_two=power_of_two, smallest_amax=smallest_amax)


def swiglu(gate_up_M2F: jax.Array) -> jax.Array:
  """Returns silu(gate) * up, [..., M, F], computed in float32 and cast to the input's dtype.

  Args:
    gate_up_M2F: [..., M, 2, F], gate and up.
  """
  gate_MF, up_MF = (gate_up_M2F[..., i, :].astype(jnp.float32) for i in range(2))
  return (jax.nn.silu(gate_MF) * up_MF).astype(gate_up_M2F.dtype)


def swiglu_quantize(
    gate_up_M2F: jax.Array, *, format: str = "e4m3", power_of_two: bool = False,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None) -> Quantized:
  """Computes silu(gate) * up in float32 and quantises it with tiles of 1x128.

  The product is not rounded to another dtype before it is quantised.

  Args:
    gate_up_M2F: [..., M, 2, F], gate and up, float32 or bfloat16, finite.
    format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    The hidden units, [..., M, F].

  Raises:
    ValueError: if the format is unknown, if gate_up has another dtype or shape, or if the named
      implementation cannot run here.
  """
  return _run_swiglu(
      "swiglu_quantize", gate_up_M2F, implementation, _SWIGLU_KERNELS, _swiglu_quantize,
      format=format, power_of_two=power_of_two, smallest_amax=smallest_amax)


def _run_swiglu(name, gate_up_M2F, implementation, kernels, xla, *, format, **options):
  check(gate_up_M2F, format)
  if gate_up_M2F.ndim < 3 or gate_up_M2F.shape[-2] != 2:
    raise ValueError(f"{name} takes gate and up as [..., M, 2, F], not {gate_up_M2F.shape}")
  return implementations.run(name, implementation, xla, kernels, gate_up_M2F, format=format,
                             **options)


def swiglu_quantize_with_inputs(
    gate_up_M2F: jax.Array, *, format: str = "e4m3", power_of_two: bool = False,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None,
) -> tuple[Quantized, Quantized]:
  """Computes `swiglu_quantize` and quantises its inputs, too, to keep them for the backward pass.

  Both are quantised with tiles of 1x128 and the same options.

  Args:
    gate_up_M2F: [..., M, 2, F], gate and up, float32 or bfloat16, finite.
    format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    The hidden units, [..., M, F], and gate and up, [..., M, 2 F].

  Raises:
    ValueError: if the format is unknown, if gate_up has another dtype or shape, if F is not a
      multiple of 128, or if the named implementation cannot run here.
  """
  if gate_up_M2F.shape[-1] % BLOCK:
    raise ValueError("swiglu_quantize_with_inputs needs F to be a multiple of 128, so that no tile "
                     f"holds gate and up, and the shape is {gate_up_M2F.shape}")
  return _run_swiglu(
      "swiglu_quantize_with_inputs", gate_up_M2F, implementation, _WITH_INPUTS_KERNELS,
      lambda x, **options: (_swiglu_quantize(x, **options), _quantize(
          x.reshape(*x.shape[:-2], -1), (1, BLOCK), **options)),
      format=format, power_of_two=power_of_two, smallest_amax=smallest_amax)


def quantize_both(
    x_MK: jax.Array, tile: str = "1x128", *, format: str = "e4m3", power_of_two: bool = False,
    smallest_amax: float = SMALLEST_AMAX, implementation: str | None = None,
) -> tuple[Quantized, Quantized]:
  """Quantises x and its transpose, reading x once.

  Hardware contracts FP8 over the last axis only. An array that is contracted over columns in one
  product and over rows in another, such as an activation or its gradient, is therefore needed in
  both layouts (arXiv:2412.19437, section 3.5.2).

  Args:
    x_MK: [..., M, K], float32 or bfloat16, finite.
    tile: the elements that share a scale, in x and in its transpose alike: "1x128", "128x128" or
      "tensor".
    format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    x, [..., M, K], and its transpose, [..., K, M], both quantised.

  Raises:
    ValueError: if the tile or the format is unknown, if x has another dtype or fewer than two axes,
      or if the named implementation cannot run here.
  """
  check(x_MK, format)
  tiles = "1x128", "128x128", "tensor"
  if tile not in tiles:
    raise ValueError(f"quantize_both has no tile {tile!r}; there are: {', '.join(tiles)}")
  return implementations.run(
      "quantize_both", implementation, _quantize_both, _BOTH_KERNELS, x_MK,
      tile=tile_of(tile, x_MK.shape), format=format, power_of_two=power_of_two,
      smallest_amax=smallest_amax)


def tile_of(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns the rows and columns of the tile called `name`, for an array of this shape.

  Raises:
    ValueError: if there is no tile of that name.
  """
  tiles = TILES | {"row": (1, shape[-1]), "tensor": tuple(shape[-2:])}
  if name not in tiles:
    raise ValueError(f"quantize has no tile {name!r}; there are: {', '.join(tiles)}")
  return tiles[name]


def scales_of(
    amax: jax.Array, *, format: str, power_of_two: bool, smallest_amax: float) -> jax.Array:
  """Returns the float32 scales of tiles whose largest magnitudes are `amax`; see `quantize`."""
  scale = jnp.maximum(amax.astype(jnp.float32), smallest_amax) / FORMATS[format].largest
  if not power_of_two:
    return scale
  mantissa, exponent = jnp.frexp(scale)  # 0.5: already a power of two
  return jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))


def _quantize(x_MK, tile, *, format, power_of_two, smallest_amax) -> Quantized:
  tiles = _cut(x_MK.astype(jnp.float32), tile)
  scales_mk = scales_of(jnp.abs(tiles).max((-3, -1)), format=format, power_of_two=power_of_two,
                        smallest_amax=smallest_amax)
  values = round_to(tiles / scales_mk[..., :, None, :, None], format)
  return Quantized.of(_join(values, x_MK.shape), scales_mk, tile)


def _swiglu_quantize(gate_up_M2F, **options) -> Quantized:
  return _quantize(swiglu(gate_up_M2F.astype(jnp.float32)), (1, BLOCK), **options)


def _quantize_both(x_MK, tile, **options) -> tuple[Quantized, Quantized]:
  straight = _quantize(x_MK, tile, **options)
  return straight, _quantize(x_MK.mT, tile, **options) if tile == (1, BLOCK) else straight.mT


def _cut(x_MK: jax.Array, tile: tuple[int, int]) -> jax.Array:
  """Pads with zeros to whole tiles: [..., m, rows of a tile, k, columns of a tile]."""
  counts = num_tiles(x_MK.shape, tile)
  ends = [(0, count * size - n)
          for count, size, n in zip(counts, tile, x_MK.shape[-2:], strict=True)]
  padded = jnp.pad(x_MK, [(0, 0)] * (x_MK.ndim - 2) + ends)
  return padded.reshape(*x_MK.shape[:-2], counts[0], tile[0], counts[1], tile[1])


def _join(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverts `_cut` for an array of this shape, without the padding."""
  *batch, m, rows, k, columns = tiles.shape
  joined = tiles.reshape(*batch, m * rows, k * columns)
  return lax.slice(joined, (0,) * len(shape), shape)


def check(x_MK: jax.Array | Quantized, format: str) -> None:
  """Raises ValueError for arrays and formats that no implementation can quantise."""
  if not isinstance(x_MK, Quantized) and (
      x_MK.ndim < 2 or x_MK.dtype not in (jnp.float32, jnp.bfloat16)):
    raise ValueError("quantize takes a float32 or bfloat16 array with at least two axes, not "
                     f"{x_MK.dtype} {x_MK.shape}")
  if format not in FORMATS:
    raise ValueError(f"quantize has no format {format!r}; there are: {', '.join(FORMATS)}")
