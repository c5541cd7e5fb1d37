"""Grouped bfloat16 matrix product on Hopper: one persistent kernel for groups of any size.

A producer warpgroup loads blocks by TMA into a ring in shared memory, and runs ahead of the tile
that is being multiplied. Two consumer warpgroups multiply half of a tile's rows each. A group may
end anywhere: 64 rows that belong to the tile are stored whole, and fewer in runs of 1, 2, 4, ...
rows, so that no other group's rows are written. `fp8_kernel` explains the constructs of Pallas that
this kernel shares with it.

Shape letters:  R rows  G groups  K contracted width  N result width  T tiles  F fields of a tile
                W consumer warpgroups  S stages  P pieces in flight
                M, C rows and columns of a piece, the unit in which results are stored
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.implementations import Kernel
from pallas_kernels.mosaic_gpu import schedule
from pallas_kernels.mosaic_gpu.hopper import (
    MULTIPROCESSORS,
    ROWS,
    SWIZZLE,
    WARPGROUPS,
    as_plain_rows,
    as_rows,
    owned,
    store_runs,
    swizzle,
)
from pallas_kernels.mosaic_gpu.tilings import tuned

BLOCK_K = SWIZZLE // 2  # bfloat16 elements in a row of the widest swizzle
WIDTHS = 128  # K and N must be multiples of it, as either may be the rows of a weight gradient
SHARED = 226 * 1024  # bytes of shared memory of a block, less some for barriers


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the product is cut.

  Attributes:
    rows: rows of a tile of the result, a multiple of 128.
    columns: columns of a tile of the result, a multiple of 64, at most 256.
    stages: length of the ring in shared memory; a stage has 64 of the contracted axis.
    swizzle: order in which tiles are computed (L2 rasterisation): bands of this many columns of
      tiles are finished one after another, so that tiles that run at the same time share operands
      in L2.
  """

  rows: int = 128
  columns: int = 256
  stages: int = 4
  swizzle: int = 8

  def __post_init__(self):
    if self.rows % (WARPGROUPS * ROWS) or self.columns % BLOCK_K or self.columns > 256:
      raise ValueError(f"a tile's rows must be a multiple of 128 and its columns of 64, at most "
                       f"256, and they are {self.rows} and {self.columns}")
    if min(self.rows, self.columns, self.swizzle) < 1 or self.stages < 2:
      raise ValueError(f"{self} must have positive sizes and at least 2 stages")

  @property
  def pieces(self) -> int:
    """How many pieces each warpgroup can stage in shared memory at a time, at most 4."""
    ring = self.stages * (self.rows + self.columns) * SWIZZLE
    return max(1, min(4, (SHARED - ring) // (ROWS * SWIZZLE) // WARPGROUPS))


class Ring(NamedTuple):
  """A ring of blocks of both operands in shared memory, and its mbarriers.

  Blocks are counted through all of a program's tiles: `before` is the number of blocks in the tiles
  before this one. So the producer need not stop between tiles, and runs ahead of the consumers.

  Attributes:
    lhs_S, rhs_S: a block of each operand for each stage.
    full_S: completed by the TMA loads of a stage.
    free_S: completed when all consumer warpgroups have released a stage.
    interpreted: whether Pallas' interpreter runs the kernel, on a CPU.
  """

  lhs_S: jax.Ref
  rhs_S: jax.Ref
  full_S: jax.Ref
  free_S: jax.Ref
  interpreted: bool

  def slot(self, block):
    """Returns the stage of a block."""
    return lax.rem(block, self.lhs_S.shape[0])

  def fetch(self, blocks, before, copies) -> None:
    """Loads the blocks of a tile; copies(index, slot) returns sources and destinations."""
    def block(index, _):
      slot, stages = self.slot(before + index), self.lhs_S.shape[0]
      # Each stage is free before its first use.
      pl.when(before + index >= stages)(lambda: plgpu.barrier_wait(self.free_S.at[slot]))
      for source, place in copies(index, slot):
        plgpu.copy_gmem_to_smem(source, place, self.full_S.at[slot])
    lax.fori_loop(0, blocks, block, None)

  def multiply(self, blocks, before, shape: tuple[int, int], operands):
    """Sums the products of a tile's blocks in wgmma accumulators.

    Args:
      blocks: number of blocks of the tile.
      before: number of blocks in the tiles before it.
      shape: rows and columns of the result.
      operands: takes a block's index and stage, and returns refs of lhs and rhs.

    Returns:
      float32 registers.
    """
    def block(acc, index):
      slot = self.slot(before + index)
      plgpu.barrier_wait(self.full_S.at[slot])
      plgpu.wgmma(acc, *operands(index, slot))
      plgpu.wgmma_wait(1)
      # This product is in flight, and the one before it is done, so its stage may be refilled.
      pl.when(index > 0)(lambda: self._release(before + index - 1))

    def accumulate(acc):
      lax.fori_loop(0, blocks, lambda index, _: block(acc, index), None)
      return acc[...]

    result = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
    pl.when(blocks > 0)(lambda: self._release(before + blocks - 1))
    return result

  def skip(self, blocks, before) -> None:
    """Releases the blocks of a tile unread, as the producer waits for both consumers."""
    def block(index, _):
      plgpu.barrier_wait(self.full_S.at[self.slot(before + index)])
      self._release(before + index)
    lax.fori_loop(0, blocks, block, None)

  def _release(self, block) -> None:
    plgpu.barrier_arrive(self.free_S.at[self.slot(block)])

  def work(self, each_tile, fetch, multiply) -> None:
    """Runs each_tile(fetch) in the producer warpgroup, and each_tile(multiply) in the others.

    `each_tile` returns the number of blocks of all tiles.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == WARPGROUPS)
    def _():
      # setmaxnreg: 128 * (40 + 2 * 232) = 64512 registers, of the multiprocessor's 65536.
      plgpu.set_max_registers(40, action="decrease")
      # `fetch` waits for a stage's release before it refills it, so the last releases are left.
      used = jnp.minimum(each_tile(fetch), self.lhs_S.shape[0])
      lax.fori_loop(0, used, lambda slot, _: plgpu.barrier_wait(self.free_S.at[slot]), None)

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(232, action="increase")
      each_tile(multiply)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def ring_types(tiling: Tiling, lhs_block: tuple[int, int], rhs_block: tuple[int, int],
               copies: int = 2) -> list:
  """Returns the scratch types of a `Ring` of bfloat16, in the order of its attributes.

  Args:
    tiling: how the product is cut.
    lhs_block, rhs_block: shapes of an operand's block.
    copies: number of copies that fill a stage.
  """
  blocks = [plgpu.SMEM((tiling.stages, *block), jnp.bfloat16, transforms=swizzle(2))
            for block in (lhs_block, rhs_block)]
  return [*blocks, plgpu.Barrier(num_arrivals=copies, num_barriers=tiling.stages),
          plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiling.stages)]


def piece_type(dtype: jnp.dtype, pieces: int) -> object:
  """Returns the scratch type of `pieces` swizzled staging buffers for each consumer warpgroup."""
  shape = WARPGROUPS, pieces, ROWS, SWIZZLE // dtype.itemsize
  return plgpu.SMEM(shape, dtype, transforms=swizzle(dtype.itemsize))


def launch(
    name: str, kernel: Callable, operands: tuple[jax.Array, ...], out: jax.ShapeDtypeStruct,
    programs: int, scratch: list, interpret: object) -> jax.Array:
  """Launches a kernel of three warpgroups per block.

  Args:
    name: name of the kernel, for profiles.
    kernel: takes the refs of operands, result and scratch, and whether it is interpreted.
    operands: arrays in global memory.
    out: shape and dtype of the result.
    programs: number of thread blocks.
    scratch: scratch types.
    interpret: see `run`.
  """
  return plgpu.kernel(
      functools.partial(kernel, interpreted=interpret is not None), out_type=out,
      grid=(programs,), grid_names=("sm",), num_threads=WARPGROUPS + 1, thread_name="wg",
      kernel_name=name, scratch_types=scratch, interpret=interpret,
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane))(*operands)


def unsupported_reason(
    lhs_RK: jax.Array, rhs: jax.Array, sizes_G: jax.Array, *, transpose_rhs: bool = False,
    precision: lax.PrecisionLike = None) -> str | None:
  """Returns why this kernel, or those of its gradients, cannot multiply these; see `Kernel`."""
  del precision  # products of bfloat16 are exact in float32, in which they are summed
  return why_not(lhs_RK, rhs, sizes_G, lhs_RK.shape[1], rhs.shape[1 if transpose_rhs else 2])


def why_not(lhs: jax.Array, rhs: jax.Array, sizes_G: jax.Array, *widths: int) -> str | None:
  """Returns why the kernels of a product or of its gradients cannot take these, or None.

  Args:
    lhs, rhs: operands.
    sizes_G: rows per group.
    *widths: K and N.
  """
  if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
    return f"needs bfloat16, not {lhs.dtype} and {rhs.dtype}"
  if not len(lhs) or not len(sizes_G):
    return f"needs rows and groups, not {len(lhs)} and {len(sizes_G)}"
  for name, width in zip("KN", widths, strict=True):
    if not width or width % WIDTHS:
      return f"needs {name} to be a multiple of {WIDTHS}, and it is {width}"
  return None


def product_tiling(columns: int) -> Tiling:
  """Returns the tiling for a product of N columns, fitted to 28 shapes drawn at random.

  Tiles of 256 columns and of 192 are about equally fast for each column, and narrower ones slower.
  What a tile has past the last column is wasted.
  """
  known = {Tiling(128, 256): 1.0, Tiling(128, 192): 1.02, Tiling(128, 128, 6): 0.97}
  return max(known, key=lambda tiling: known[tiling] / pl.cdiv(columns, tiling.columns)
             / tiling.columns)


def run(
    lhs_RK: jax.Array, rhs: jax.Array, sizes_G: jax.Array, *, transpose_rhs: bool = False,
    precision: lax.PrecisionLike = None, dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None, programs: int | None = None,
    interpret: object = None) -> jax.Array:
  """Multiplies each group of rows by that group's matrix; see `pallas_kernels.grouped_matmul`.

  Args:
    lhs_RK: bfloat16, the rows of group 0 first.
    rhs: bfloat16 [G, K, N], or [G, N, K] if `transpose_rhs`.
    sizes_G: int32, rows per group.
    transpose_rhs: whether to multiply by the transpose of every matrix.
    precision: ignored; products are exact and summed in float32.
    dtype: dtype of the result, bfloat16 or float32; None means bfloat16.
    tiling: how the product is cut; None takes `product_tiling`, or the exception that the table of
      tilings has for this shape.
    programs: number of thread blocks among which tiles are divided; None means one for each
      multiprocessor of an H200.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, without a GPU.

  Returns:
    [R, N].
  """
  del precision
  columns = rhs.shape[1 if transpose_rhs else 2]
  dtype = jnp.dtype(dtype or jnp.bfloat16)
  operation = "grouped_matmul" + (" transposed" if transpose_rhs else "")
  tiling = tiling or tuned(product_tiling(columns), operation, dtype, len(sizes_G),
                           lhs_RK.shape[1], columns)
  return _call(schedule.row_tiles(sizes_G, len(lhs_RK), tiling.rows), lhs_RK, rhs,
               jax.ShapeDtypeStruct((len(lhs_RK), columns), dtype), transpose_rhs, tiling,
               programs or MULTIPROCESSORS, interpret)


KERNEL = Kernel(run, unsupported_reason)


def _call(tiles: schedule.Tiles, lhs_RK, rhs, out, transpose_rhs: bool, tiling: Tiling, programs,
          interpret):
  rhs_block = (tiling.columns, BLOCK_K) if transpose_rhs else (BLOCK_K, tiling.columns)
  kernel = functools.partial(
      _kernel, transpose_rhs=transpose_rhs, tiling=tiling, programs=programs)
  return launch(
      "grouped_matmul", kernel, (*tiles, lhs_RK, rhs), out, programs, [
          *ring_types(tiling, (tiling.rows, BLOCK_K), rhs_block),
          piece_type(out.dtype, tiling.pieces)], interpret)


def _kernel(
    fields_TF, count_1, lhs_RK, rhs, out_RN, lhs_S, rhs_S, full_S, free_S, staged_WPMC, *,
    transpose_rhs: bool, tiling: Tiling, programs: int, interpreted: bool):
  ring = Ring(lhs_S, rhs_S, full_S, free_S, interpreted)
  num_columns = pl.cdiv(out_RN.shape[1], tiling.columns)
  num_blocks = lhs_RK.shape[1] // BLOCK_K
  wg = lax.axis_index("wg")

  def each_tile(visit):
    """Calls visit(tile, first column, number of blocks, blocks before) for this program's tiles.

    Returns the number of blocks of all of them. Tiles of rows in no group have none.
    """
    def turn(index, before):
      row, column = plgpu.planar_snake(index, (count_1[0], num_columns), 1, tiling.swizzle)
      tile = schedule.read(fields_TF, row)
      blocks = jnp.where(tile.group < rhs.shape[0], num_blocks, 0).astype(jnp.int32)
      visit(tile, column * tiling.columns, blocks, before)
      return before + blocks

    rotate = schedule.resonates(programs, min(num_columns, tiling.swizzle))
    return schedule.deal(count_1[0] * num_columns, programs, turn, jnp.int32(0), rotate)

  def fetch(tile, column, blocks, before):
    def copies(index, slot):
      k, n = pl.ds(index * BLOCK_K, BLOCK_K), pl.ds(column, tiling.columns)
      yield (lhs_RK.at[pl.ds(tile.start, tiling.rows), k],
             as_rows(lhs_S, slot, interpreted=interpreted))
      yield rhs.at[(tile.group, n, k) if transpose_rhs else (tile.group, k, n)], rhs_S.at[slot]
    ring.fetch(blocks, before, copies)

  def multiply(tile, column, blocks, before):
    rows = tiling.rows // WARPGROUPS
    start = tile.start + wg * rows

    def operands(_, slot):
      rhs_block = rhs_S.at[slot].T if transpose_rhs else rhs_S.at[slot]
      return lhs_S.at[slot, pl.ds(wg * rows, rows)], rhs_block

    def product():
      result = ring.multiply(blocks, before, (rows, tiling.columns), operands)
      store(result, start, column, tile.end, out_RN, staged_WPMC, interpreted)

    # A warpgroup without a row that the tile owns skips the product, and leaves the tensor cores to
    # the other one.
    pl.when(start < tile.end)(product)
    pl.when(start >= tile.end)(lambda: ring.skip(blocks, before))

  ring.work(each_tile, fetch, multiply)


def store(value_MN, start, column, end, out_RN, staged_WPMC, interpreted: bool) -> None:
  """Stores those rows of a warpgroup's part of a tile that are before `end`.

  Args:
    value_MN: the warpgroup's part of the tile, float32 in registers.
    start, column: row and column of `out_RN` that its first row and column go to.
    end: the last row that the tile owns plus one.
    out_RN: the result in global memory.
    staged_WPMC: staging buffers for pieces.
    interpreted: see `Ring`.
  """
  wg = lax.axis_index("wg")

  def copy_owned(value_MC, row, columns):
    piece = as_plain_rows(staged_WPMC, wg, 0, interpreted=interpreted)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    compat.store(piece, value_MC)
    plgpu.commit_smem()
    store_runs(piece, owned(end, row), out_RN, row, columns)

  owns_all = start + value_MN.shape[0] <= end
  pl.when(owns_all)(
      lambda: store_whole(value_MN, start, column, out_RN, staged_WPMC, interpreted))
  pl.when(~owns_all)(
      lambda: _pieces(value_MN, start, column, out_RN, staged_WPMC.shape[3], copy_owned))


def store_whole(
    value_MN, start, column, out_RN, staged_WPMC, interpreted: bool) -> None:
  """Stores all rows of a warpgroup's part of a tile; the arguments are those of `store`."""
  wg, (_, pieces, _, width) = lax.axis_index("wg"), staged_WPMC.shape

  def copy(value_MC, row, columns):
    place = next(places)
    # At most P - 1 copies remain in flight, so the buffer that is written next has been read.
    plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
    staged_WPMC[wg, place] = value_MC
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        as_rows(staged_WPMC, wg, place, interpreted=interpreted),
        out_RN.at[pl.ds(row, ROWS), columns])

  # The previous tile's copies have had the time of this tile's product to finish reading.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  places = itertools.cycle(range(pieces))
  _pieces(value_MN, start, column, out_RN, width, copy)


def _pieces(value_MN, start, column, out_RN, width: int, copy) -> None:
  """Calls copy(piece, its first row, its columns) for all pieces of 64 rows by `width` columns."""
  value_MN = value_MN.astype(out_RN.dtype)
  def piece(row, at):
    copy(value_MN[row:row + ROWS, at:at + width], start + row, pl.ds(column + at, width))

  for row in range(0, value_MN.shape[0], ROWS):
    for at in range(0, value_MN.shape[1], width):
      # The last tile may reach past the last column. The copy of a single row is not clipped there.
      pl.when(column + at < out_RN.shape[1])(functools.partial(piece, row, at))
