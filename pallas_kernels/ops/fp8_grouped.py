"""Grouped matrix products of FP8 operands with one scale per tile.

A weight gradient contracts over the rows of a group, so no tile may hold rows of two groups. For it
`align_groups` lets every group begin at a multiple of 128, with padding rows between groups.

Shape letters:  R rows sorted by group  G groups  K contracted width  N result width
                S rows including padding, with every group at a multiple of 128
                P the 128 rows of a block  b blocks of 128 rows
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import implementations
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.ops.quantize import SMALLEST_AMAX
from pallas_kernels.ops.requantize import quantize_transposed
from pallas_kernels.quantized import BLOCK, Quantized, dequantize

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.fp8_grouped"),
            "mosaic_tpu": implementations.lazy("mosaic_tpu.fp8_grouped")}
_WEIGHT_GRADIENT_KERNELS = {
    "mosaic_gpu": implementations.lazy("mosaic_gpu.fp8_weight_gradient"),
    "mosaic_tpu": implementations.lazy("mosaic_tpu.fp8_weight_gradient")}
# Blocks of 128 rows that "xla" multiplies in one batch. Each block needs a copy of its group's
# matrix, so memory limits the batch.
_AT_ONCE = 32


def fp8_grouped_matmul(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *,
    dtype: jnp.dtype = jnp.bfloat16, implementation: str | None = None) -> jax.Array:
  """Multiplies each group of consecutive rows with the transpose of that group's matrix.

  Args:
    lhs_RK: rows sorted by group, with tiles of 1x128. As no two rows share a scale, groups may
      begin at any row.
    rhs_GNK: one matrix per group, with tiles of 128x128.
    sizes_G: int32, rows per group. Groups may be empty or of different sizes; rows past the sum of
      the sizes belong to no group and give zeros.
    dtype: dtype of the result.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    [R, N] in `dtype`; sums are promoted to float32 after every 128 elements of K, as in
    `fp8_matmul`.

  Raises:
    ValueError: if shapes or tiles do not match, or the named implementation cannot run here.
  """
  if (len(lhs_RK.shape) != 2 or len(rhs_GNK.shape) != 3 or sizes_G.shape != rhs_GNK.shape[:1]
      or lhs_RK.shape[1] != rhs_GNK.shape[2]):
    raise ValueError(
        "fp8_grouped_matmul takes lhs [R, K], rhs [G, N, K] and sizes [G], not "
        f"{lhs_RK.shape}, {rhs_GNK.shape} and {sizes_G.shape}")
  if lhs_RK.tile != (1, BLOCK) or rhs_GNK.tile != (BLOCK, BLOCK):
    raise ValueError("fp8_grouped_matmul takes lhs with 1x128 scales and rhs with 128x128, not "
                     f"{lhs_RK.tile} and {rhs_GNK.tile}")
  return implementations.run("fp8_grouped_matmul", implementation, _xla, _KERNELS,
                             lhs_RK, rhs_GNK, sizes_G, dtype=dtype)


def fp8_grouped_weight_gradient(
    lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *,
    dtype: jnp.dtype = jnp.float32, implementation: str | None = None) -> jax.Array:
  """Returns lhs @ rhs.T over the rows of each group: the gradient of every group's matrix.

  Both operands are transposed, as `quantize_groups` returns them: their columns are the rows of the
  grouped product. Every group begins at a multiple of 128 columns, S is a multiple of 128, and the
  padding columns between groups and after the last one are zeros.

  Args:
    lhs_KS: the input rows of the grouped product, transposed, with tiles of 1x128.
    rhs_NS: the gradients of its output rows, transposed, with tiles of 1x128.
    sizes_G: int32, rows per group, without padding.
    dtype: dtype of the result.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    [G, K, N] in `dtype`; zeros for empty groups.

  Raises:
    ValueError: if shapes or tiles do not match, or the named implementation cannot run here.
  """
  if len(lhs_KS.shape) != 2 or len(rhs_NS.shape) != 2 or lhs_KS.shape[1] != rhs_NS.shape[1]:
    raise ValueError("fp8_grouped_weight_gradient contracts the last axes of lhs [K, S] and rhs "
                     f"[N, S], not of {lhs_KS.shape} and {rhs_NS.shape}")
  if (lhs_KS.tile, rhs_NS.tile) != ((1, BLOCK), (1, BLOCK)):
    raise ValueError("fp8_grouped_weight_gradient takes 1x128 scales, not "
                     f"{lhs_KS.tile} and {rhs_NS.tile}")
  return implementations.run(
      "fp8_grouped_weight_gradient", implementation, _xla_weight_gradient,
      _WEIGHT_GRADIENT_KERNELS, lhs_KS, rhs_NS, sizes_G, dtype=dtype)


def aligned_rows(num_rows: int, num_groups: int) -> int:
  """Returns S, aligned rows that suffice however `num_rows` rows are distributed over groups."""
  not_empty = min(num_rows, num_groups)
  return -(-(num_rows + not_empty * (BLOCK - 1)) // BLOCK) * BLOCK


def aligned_sizes(sizes_G: jax.Array) -> jax.Array:
  """Returns the rows of each group including padding, multiples of 128: [G]."""
  return -(-sizes_G // BLOCK) * BLOCK


def aligned_starts(sizes_G: jax.Array) -> jax.Array:
  """Returns the first aligned row of each group, multiples of 128: [G]."""
  rows_G = aligned_sizes(sizes_G)
  return jnp.cumsum(rows_G) - rows_G


def align_groups(x_R: jax.Array, sizes_G: jax.Array, fill_value: int = 0) -> jax.Array:
  """Moves rows so that every group begins at a multiple of 128.

  Args:
    x_R: [R, ...], rows sorted by group; rows past the sum of the sizes are dropped.
    sizes_G: int32, rows per group.
    fill_value: value of the padding rows between groups and after the last one.

  Returns:
    [S, ...], where S is `aligned_rows(R, G)`.
  """
  num_rows, num_groups = len(x_R), len(sizes_G)
  starts_G = jnp.cumsum(sizes_G) - sizes_G
  # Groups are looked up per block, as there are few blocks. Blocks past the last group are assigned
  # to it, too, but hold none of its rows, so they are filled.
  row_b = jnp.arange(0, aligned_rows(num_rows, num_groups), BLOCK)
  group_b = _groups(sizes_G, row_b)
  within_b = row_b - aligned_starts(sizes_G)[group_b]
  within_S = (within_b[:, None] + jnp.arange(BLOCK)).reshape(-1)
  per_row = lambda x_G: jnp.repeat(x_G[group_b], BLOCK)
  place_S = jnp.where(within_S < per_row(sizes_G), per_row(starts_G) + within_S, num_rows)
  return gather_rows(x_R, place_S, fill_value, implementation="xla")


def quantize_groups(
    x_RK: jax.Array | Quantized, sizes_G: jax.Array, tile: str = "1x128", *, format: str = "e4m3",
    power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX,
    implementation: str | None = None) -> Quantized:
  """Aligns groups of rows, transposes them and quantises the transpose.

  A tile of 128 columns of the result then holds rows of a single group, as
  `fp8_grouped_weight_gradient` requires.

  Args:
    x_RK: rows sorted by group, float32 or bfloat16, or quantised with tiles of one row.
    sizes_G: int32, rows per group.
    tile: the elements of the transpose that share a scale; see `quantize` for the names.
    format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    [K, S], where S is `aligned_rows(R, G)`; the padding columns between groups and after the last
    one are zeros.

  Raises:
    ValueError: if rows of x share scales, if the tile or the format is unknown, if x has another
      dtype, or if the named implementation cannot run here.
  """
  if isinstance(x_RK, Quantized) and x_RK.tile[0] != 1:
    raise ValueError("quantize_groups moves single rows, so no two of them may share a scale: use "
                     "`with_tiles` to give each row its own scales; the tiles are "
                     f"{x_RK.tile[0]}x{x_RK.tile[1]}")
  # Rows are moved first, before they are dequantised, so that they have the fewest bits.
  if isinstance(x_RK, Quantized):
    parts = (align_groups(x_R, sizes_G) for x_R in (x_RK.values_MK, x_RK.scales_mk))
    x_SK = Quantized.of(*parts, x_RK.tile)
  else:
    x_SK = align_groups(x_RK, sizes_G)
  return quantize_transposed(x_SK, tile, format=format, power_of_two=power_of_two,
                             smallest_amax=smallest_amax, implementation=implementation)


def _xla(lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *, dtype) -> jax.Array:
  lhs_SK, rhs = align_groups(dequantize(lhs_RK), sizes_G), dequantize(rhs_GNK)

  def product(block):
    lhs_PK, group = block
    return jnp.einsum("pk,nk->pn", lhs_PK, rhs[group], precision=lax.Precision.HIGHEST)

  group_b = _groups(sizes_G, jnp.arange(0, len(lhs_SK), BLOCK))
  blocks = lhs_SK.reshape(-1, BLOCK, lhs_SK.shape[1]), group_b
  out_SN = lax.map(product, blocks, batch_size=_AT_ONCE).reshape(len(lhs_SK), -1)
  places_R = aligned_places(sizes_G, lhs_RK.shape[0], len(lhs_SK))
  return gather_rows(out_SN, places_R, implementation="xla").astype(dtype)


def aligned_places(sizes_G: jax.Array, num_rows: int, rows: int) -> jax.Array:
  """Returns the row to which `align_groups` moves each row.

  Args:
    sizes_G: int32, rows per group.
    num_rows: R.
    rows: S, the number of aligned rows.

  Returns:
    [R]; S or more for rows of no group.
  """
  ends_G = jnp.cumsum(sizes_G)
  group_R = jnp.searchsorted(ends_G, jnp.arange(num_rows), side="right")
  within_R = jnp.arange(num_rows) - gather_rows(ends_G - sizes_G, group_R)
  return gather_rows(aligned_starts(sizes_G), group_R, fill_value=rows) + within_R


def _xla_weight_gradient(lhs_KS: Quantized, rhs_NS: Quantized, sizes_G: jax.Array, *, dtype):
  lhs, rhs = (dequantize(x).T.reshape(-1, BLOCK, len(x.values_MK)) for x in (lhs_KS, rhs_NS))
  at_once = min(_AT_ONCE, len(lhs))

  def chunks(blocks):
    missing = [(0, -len(blocks) % at_once)] + [(0, 0)] * (blocks.ndim - 1)
    return jnp.pad(blocks, missing).reshape(-1, at_once, *blocks.shape[1:])

  def add(sums_GKN, chunk):
    lhs_bPK, rhs_bPN, group_b = chunk
    products = jnp.einsum("bpk,bpn->bkn", lhs_bPK, rhs_bPN, precision=lax.Precision.HIGHEST)
    return sums_GKN.at[group_b].add(products), None

  zeros = lax.full_like(lhs, 0, shape=(len(sizes_G), lhs.shape[-1], rhs.shape[-1]))
  blocks = lhs, rhs, _groups(sizes_G, jnp.arange(0, lhs_KS.shape[1], BLOCK))
  return lax.scan(add, zeros, jax.tree.map(chunks, blocks))[0].astype(dtype)


def _groups(sizes_G: jax.Array, row_b: jax.Array) -> jax.Array:
  """Returns the group of each aligned row; rows past the last group count as that group's."""
  return jnp.searchsorted(aligned_starts(sizes_G), row_b, side="right") - 1
