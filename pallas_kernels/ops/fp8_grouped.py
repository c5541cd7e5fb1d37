"""Grouped matrix products of FP8 operands with a scale for each tile.

A weight gradient contracts over a group's rows, so tiles must not straddle groups: for it every
group begins at a multiple of 128, as `align_groups` puts them.

Shape letters:  R rows, those of group 0 first  G groups  K contracted width  N result width
                S rows with every group at a multiple of 128  P 128 of them  b blocks of them
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
# Blocks of 128 rows, each with its own matrix, that "xla" multiplies together; memory bounds it.
_AT_ONCE = 32


def fp8_grouped_matmul(
    lhs_RK: Quantized, rhs_GNK: Quantized, sizes_G: jax.Array, *,
    dtype: jnp.dtype = jnp.bfloat16, implementation: str | None = None) -> jax.Array:
  """Multiplies each group of consecutive rows with that group's matrix, transposed.

  Args:
    lhs_RK: scales of 1x128, which are of one row, so groups may begin anywhere.
    rhs_GNK: scales of 128x128, for each group its own.
    sizes_G: int32, rows per group; they may be empty or uneven, and rows past their sum give zero.
    dtype: of the result.
    implementation: see `pallas_kernels`.

  Returns:
    [R, N]; sums are promoted to float32 every 128 of K, as in `fp8_matmul`.

  Raises:
    ValueError: on shapes or tiles that do not fit, or an implementation that cannot do it here.
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
  """Each group's lhs @ rhs.T over that group's rows: the gradient of every group's matrix.

  Args:
    lhs_KS, rhs_NS: scales of 1x128; every group's columns begin at a multiple of 128, S is one too,
      and between groups and after the last are zeros.
    sizes_G: int32, rows per group.
    dtype: of the result.
    implementation: see `pallas_kernels`.

  Returns:
    [G, K, N]; zeros for empty groups.

  Raises:
    ValueError: on shapes or tiles that do not fit, or an implementation that cannot do it here.
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
  """Rows that are enough for `align_groups`, however its rows fall into groups."""
  not_empty = min(num_rows, num_groups)
  return -(-(num_rows + not_empty * (BLOCK - 1)) // BLOCK) * BLOCK


def aligned_sizes(sizes_G: jax.Array) -> jax.Array:
  """Rows from the first of each group to where the next may begin, multiples of 128: [G]."""
  return -(-sizes_G // BLOCK) * BLOCK


def aligned_starts(sizes_G: jax.Array) -> jax.Array:
  """The first row of each group, at multiples of 128: [G]."""
  rows_G = aligned_sizes(sizes_G)
  return jnp.cumsum(rows_G) - rows_G


def align_groups(x_R: jax.Array, sizes_G: jax.Array, fill_value: int = 0) -> jax.Array:
  """Rows with every group at a multiple of 128: [R, ...] to [S, ...].

  Args:
    x_R: rows, those of group 0 first; those past the sum of the sizes are left out.
    sizes_G: int32, rows per group.
    fill_value: of rows between groups and after the last.

  Returns:
    S is `aligned_rows`.
  """
  num_rows, num_groups = len(x_R), len(sizes_G)
  starts_G = jnp.cumsum(sizes_G) - sizes_G
  # Found for blocks, of which there are few; a block behind the last group has none of its rows.
  row_b = jnp.arange(0, aligned_rows(num_rows, num_groups), BLOCK)
  group_b = _groups(sizes_G, row_b)
  within_b = row_b - aligned_starts(sizes_G)[group_b]
  within_S = (within_b[:, None] + jnp.arange(BLOCK)).reshape(-1)
  of = lambda of_G: jnp.repeat(of_G[group_b], BLOCK)
  place_S = jnp.where(within_S < of(sizes_G), of(starts_G) + within_S, num_rows)
  return gather_rows(x_R, place_S, fill_value, implementation="xla")


def quantize_groups(
    x_RK: jax.Array | Quantized, sizes_G: jax.Array, tile: str = "1x128", *, format: str = "e4m3",
    power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX,
    implementation: str | None = None) -> Quantized:
  """Transposes rows and quantises them; scales of 128 columns are of rows of one group: [K, S].

  Args:
    x_RK: rows as `align_groups` takes them, or quantised with scales of one row each.
    sizes_G: int32, rows per group.
    tile, format, power_of_two, smallest_amax, implementation: see `quantize`.

  Returns:
    S is `aligned_rows`; between groups and after the last are zeros.

  Raises:
    ValueError: on what it does not know, or an implementation that cannot do it here.
  """
  if isinstance(x_RK, Quantized) and x_RK.tile[0] != 1:
    raise ValueError("quantize_groups moves rows, and these share scales: give each its own by "
                     f"`with_tiles`; they have {x_RK.tile[0]}x{x_RK.tile[1]}")
  # Before all else, as rows are moved in the fewest bits so.
  x_SK = jax.tree.map(lambda x_R: align_groups(x_R, sizes_G), x_RK)
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
  """Where `align_groups` puts each row; behind the end for rows of no group."""
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
  """The group of each row where groups begin at multiples of 128; the last's goes on behind it."""
  return jnp.searchsorted(aligned_starts(sizes_G), row_b, side="right") - 1
