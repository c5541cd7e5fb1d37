"""FP8 matrix product on Hopper, built from `fp8_kernel`.

A result of many tiles is dealt to multiprocessors tile by tile. Tiles of a last round that leaves
many multiprocessors idle, or all tiles if they are few, are summed in parts by several
multiprocessors each; few tiles by equally many each, if that leaves few idle. For few rows the
transpose of the result is computed.

Shape letters:  M, N rows of the operands  K contracted width  P parts of a tile
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import fp8_kernel, schedule
from pallas_kernels.mosaic_gpu.fp8_kernel import Refs, Tile
from pallas_kernels.mosaic_gpu.fp8_tiling import (
    MOST_PARTS,
    Tiling,
    dense_tiling,
    first_of_last_round,
    num_programs,
    unsupported_columns,
    unsupported_formats,
)
from pallas_kernels.mosaic_gpu.hopper import pad_columns
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.quantized import BLOCK, Quantized


def run(
    lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """Returns lhs @ rhs.T; see `pallas_kernels.fp8_matmul`.

  Args:
    lhs_MK: float8_e4m3fn values with 1x128 scales.
    rhs_NK: float8_e4m3fn values with 128x128 or 1x128 scales.
    dtype: dtype of the result, bfloat16 or float32.
    tiling: how the product is cut; None takes that of `fp8_tiling.dense_tiling`, or the exception
      that the table of tilings has for this shape.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, without a GPU.

  Returns:
    [M, N].
  """
  vectors = rhs_NK.tile == (1, BLOCK)
  operation = f"fp8_matmul {'1x128' if vectors else '128x128'}"
  shape = lhs_MK.shape[0], *rhs_NK.shape
  tiling = tiling or tuned(dense_tiling(dtype, vectors, *shape), operation, dtype, *shape)
  if tiling.swapped:
    return _product(rhs_NK, lhs_MK, dtype, tiling, interpret).T
  return _product(lhs_MK, rhs_NK, dtype, tiling, interpret)


class _Cut(NamedTuple):
  """Which tiles of a result are computed whole, and which are summed in parts.

  Attributes:
    whole: grid of the tiles that are computed whole, along M and N.
    first: row and column of tiles from which on they are shared, or (0, 0) if all are.
    rest: grid of the shared tiles.
    blocks: blocks of 128 of K.
    programs, sharing: number of programs, and of those among which `rest` is shared.
  """

  whole: tuple[int, int]
  first: tuple[int, int]
  rest: tuple[int, int]
  blocks: int
  programs: int
  sharing: int

  @classmethod
  def of(cls, m: int, n: int, k: int, tiling: Tiling) -> "_Cut":
    grid = (pl.cdiv(m, tiling.block_m * tiling.cluster_m),
            pl.cdiv(n, tiling.block_n * tiling.cluster))
    blocks = pl.cdiv(k, BLOCK)
    programs = num_programs(tiling, math.prod(grid) * (blocks if tiling.shared else 1))
    first = (0, 0) if tiling.shared else (grid[0], 0)
    if tiling.share_last:
      first = first_of_last_round(grid, programs)
    whole = tuple(start or size for start, size in zip(first, grid, strict=True))
    rest = tuple(size - start for start, size in zip(first, grid, strict=True))
    most = math.prod(rest) * (blocks if tiling.shared else min(blocks, MOST_PARTS))
    sharing = min(programs, most)
    if tiling.shared:
      programs = sharing = schedule.sharers(math.prod(rest), blocks, sharing)
    return cls(whole, first, rest, blocks, programs, sharing)

  @property
  def most_parts(self) -> int:
    """The largest number of parts of a shared tile; 0 if none is shared."""
    tiles = math.prod(self.rest)
    return schedule.most_parts(tiles, self.blocks, self.sharing) if tiles else 0


def _product(lhs_MK, rhs_NK, dtype, tiling: Tiling, interpret) -> jax.Array:
  """Returns lhs @ rhs.T, of which one operand at least has 1x128 scales: [M, N]."""
  (m, k), n = lhs_MK.shape, rhs_NK.shape[0]
  cut = _Cut.of(m, n, k, tiling)
  vectors = tuple(x.tile == (1, BLOCK) for x in (lhs_MK, rhs_NK))
  operands = (pad_columns(lhs_MK.values_MK), pad_columns(rhs_NK.values_MK), lhs_MK.scales,
              rhs_NK.scales)
  call = functools.partial(
      fp8_kernel.launch, "fp8_matmul", functools.partial(_compute, cut, m, tiling), operands,
      tiling=tiling, programs=cut.programs, interpret=interpret, vectors=vectors)
  if tiling.shared:
    columns = -(-n // 4) * 4  # for rows of a multiple of 16 bytes
    parts_PMN = call(out=jax.ShapeDtypeStruct((cut.most_parts, m, columns), jnp.float32))
    # Without the added columns first, so that XLA sums and transposes in one kernel; it would move
    # a slice of the sum behind the transposition, and copy.
    return parts_PMN[..., :n].sum(0).astype(dtype)
  out = jax.ShapeDtypeStruct((m, n), dtype)
  if not cut.most_parts:
    return call(out=out)
  # With the barrier, as XLA would take the kernel for one that could write to the slice, and fail.
  out_MN, parts_PMN = lax.optimization_barrier(call(out=out, parts=jax.ShapeDtypeStruct(
      (cut.most_parts, cut.rest[0] * tiling.block_m, cut.rest[1] * tiling.block_n), jnp.float32)))
  row, column = cut.first[0] * tiling.block_m, cut.first[1] * tiling.block_n
  # Added one by one, so that XLA adds, converts and updates the result in place in one kernel.
  rest_MN = sum(parts_PMN[part, :m - row, :n - column] for part in range(cut.most_parts))
  return lax.dynamic_update_slice(out_MN, rest_MN.astype(dtype), (row, column))


def _compute(cut: _Cut, m: int, tiling: Tiling, refs: Refs) -> None:
  """The kernel: computes the whole tiles, and then the parts of the others."""
  def locate(mi, ni, first_k, num_k, store_sums):
    row, column = fp8_kernel.first_row(mi, tiling), fp8_kernel.first_column(ni, tiling)
    end = m if m % (tiling.block_m * tiling.cluster_m) else None
    return Tile(row, column, end, first_k, num_k, None, refs.rhs_NK, refs.rhs_scales,
                functools.partial(store_sums, row, column))

  def store_tile(row, column, sums):
    fp8_kernel.store(refs, refs.out, row, column, tiling, sums)

  def store_part(part, row, column, sums):
    if tiling.shared:
      fp8_kernel.store(refs, refs.out.at[part], row, column, tiling, sums)
      return
    for wave, chunks in enumerate(sums):
      for i, chunk in enumerate(chunks):
        rows, columns = chunk.shape
        refs.parts[part, pl.ds(row - cut.first[0] * tiling.block_m + tiling.row(wave), rows),
                   pl.ds(column - cut.first[1] * tiling.block_n + i * columns, columns)] = chunk

  def each_tile(visit, carry):
    # L2 rasterisation: along M within a band of `swizzle` columns of tiles, back along the next
    # band, so that the tiles in flight on all multiprocessors share rows of both operands.
    place = lambda index: plgpu.planar_snake(index, cut.whole, 1, tiling.swizzle)
    return schedule.deal(math.prod(cut.whole), cut.programs, lambda index, carry: visit(
        locate(*place(index), 0, cut.blocks, store_tile), carry), carry)

  def each_part(visit, carry):
    # A tile has fewer parts than another one may have: its last part stores zeros for the others.
    def store(part, row, column, sums):
      store_part(part.index, row, column, sums)
      last = part.first + part.count == cut.blocks
      pl.loop(part.index + 1, jnp.where(last, cut.most_parts, 0))(lambda index: store_part(
          index, row, column, fp8_kernel.no_sums(refs, tiling)))

    def visit_part(part, carry):
      ni, mi = divmod(part.tile, cut.rest[0])
      return visit(locate(cut.first[0] + mi, cut.first[1] + ni, part.first, part.count,
                          functools.partial(store, part)), carry)

    return schedule.share(math.prod(cut.rest), cut.blocks, cut.sharing, visit_part, carry)

  def each(visit, carry):
    carry = each_tile(visit, carry) if any(cut.first) else carry
    return each_part(visit, carry) if cut.most_parts else carry

  fp8_kernel.multiply_tiles(refs, each, tiling)


def unsupported_reason(lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype) -> str | None:
  """Returns why `run` cannot multiply these operands, or None if it can."""
  if 0 in lhs_MK.shape:
    return f"needs an lhs that is not empty, and its shape is {lhs_MK.shape}"
  return (unsupported_formats(lhs_MK, rhs_NK, dtype)
          or unsupported_columns(rhs_NK.shape[0], dtype))


KERNEL = implementations.Kernel(run, unsupported_reason)
