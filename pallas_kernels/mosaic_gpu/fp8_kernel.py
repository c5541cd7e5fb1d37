"""The kernel that every FP8 product on Hopper is built from.

A tensor core keeps about 14 bits of a sum of FP8 products. So every 128 of K goes to an accumulator
that starts from zero, and its result is multiplied by the scales and added to a float32 sum in
registers: the promotion (arXiv:2412.19437, section 3.3.2).

The kernel is persistent and warp-specialised: one block of three warpgroups per multiprocessor
computes tile after tile of the result. The producer warpgroup loads both operands by TMA into a
ring of stages in shared memory, and runs ahead into the next tile. Two consumer warpgroups multiply
half of the tile's rows each. Two mbarriers per stage connect them: `full` completes when the TMA
loads of a stage have landed, and `empty` when both consumers have released it. While one consumer
promotes, the tensor cores work on a product of the other or, with a depth of 2, on its next one.

Reading Pallas as CUDA: the code of a kernel is that of one warpgroup, which Pallas calls a thread.
An array is spread over the registers of its 128 CUDA threads. A ref is a pointer with a shape, to
global or shared memory, and `ref.at[...]` is address arithmetic that loads nothing. Python's own
loops and branches run while the kernel is traced, so they unroll; `lax.fori_loop`, `pl.loop` and
`pl.when` become loops and branches of the kernel.

Shape letters:  M, N rows of the operands  K contracted width  k blocks of 128 of K
                n blocks of 128 of N
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.fp8_tiling import Tiling
from pallas_kernels.mosaic_gpu.hopper import (
    COPY_LENGTH,
    ROWS,
    WARPGROUPS,
    as_rows,
    swizzle,
    wgmma_overwrite,
)
from pallas_kernels.quantized import BLOCK

# Products in one iteration of the loop over K with a depth of 2. ptxas wants no wgmma in flight
# where a loop jumps back, so each iteration ends by draining the pipeline: once for four products.
_PRODUCTS_PER_ITERATION = 4
# Registers per thread after setmaxnreg, which counts in eights. One producer and two consumer
# warpgroups use 128 * (24 + 2 * 240) = 64512 of the 65536 that a multiprocessor has.
FETCH_REGISTERS, MULTIPLY_REGISTERS = 24, 240
CLUSTER = ("cluster_m", "cluster_n")  # names of a cluster's axes, along M and N

# The float32 sums of a warpgroup's part of a tile: for each wave of 64 rows a tuple of chunks of
# columns, such that all columns of a chunk have the same 128x128 scale.
Sums = tuple[tuple[jax.Array, ...], ...]


class Tile(NamedTuple):
  """A tile of the result: its operands, and how to store it.

  Attributes:
    lhs_row, rhs_row: first row of each operand; those of rhs are the tile's columns.
    end: row of lhs at which the result, or the tile's group, ends; None if the tile is whole.
    first_k, num_k: first block of 128 of K to sum over, and the number of blocks.
    live: whether there is anything to sum, or None if there always is; otherwise sums are zeros.
    rhs_NK, rhs_scales: rhs and its scales, those of the tile's group in a grouped product; scales
      are [k, N] if each row has its own (1x128), or [n, k] if each 128 rows share one (128x128).
    store: takes the sums of this warpgroup's part of the tile, and writes them to the result.
  """

  lhs_row: jax.Array
  rhs_row: jax.Array
  end: jax.Array | int | None
  first_k: jax.Array | int
  num_k: jax.Array | int
  live: jax.Array | None
  rhs_NK: jax.Ref
  rhs_scales: jax.Ref
  store: Callable[[Sums], None]


class Refs(NamedTuple):
  """The memory and barriers that a kernel works on.

  Attributes:
    lhs_MK, rhs_NK, lhs_scales, rhs_scales, out: operands and result in global memory. Scales are
      [k, rows] if each row has its own (1x128), or [rows / 128, k] if 128 rows share one (128x128).
    parts: further result of the kernel in global memory, or None.
    lhs_smem, rhs_smem, lhs_scale_smem, rhs_scale_smem: the ring in shared memory; the first axis is
      the stage. There is none for 128x128 scales: a tile needs one or two of those for 128 of K,
      and a TMA copy moves no less than 16 bytes, so they are read from global memory.
    out_smem: staging buffer for the result: for each consumer warpgroup the pieces of a wave of 64
      rows, as wide as a row of their swizzle.
    full, empty: one mbarrier for each stage; see `_shared`.
    interpreted: whether Pallas' interpreter runs the kernel, on a CPU.
  """

  lhs_MK: jax.Ref
  rhs_NK: jax.Ref
  lhs_scales: jax.Ref
  rhs_scales: jax.Ref
  out: jax.Ref
  parts: jax.Ref | None
  lhs_smem: jax.Ref
  rhs_smem: jax.Ref
  lhs_scale_smem: jax.Ref | None
  rhs_scale_smem: jax.Ref | None
  out_smem: jax.Ref
  full: jax.Ref
  empty: jax.Ref
  interpreted: bool


def first_column(ni: jax.Array, tiling: Tiling) -> jax.Array:
  """Returns the first column of this block's tile.

  Args:
    ni: index of the group of tiles, side by side along N, that the cluster computes at a time.
    tiling: how the result is cut.
  """
  return (ni * tiling.cluster + lax.axis_index(CLUSTER[1])) * tiling.block_n


def first_row(mi: jax.Array, tiling: Tiling) -> jax.Array:
  """Returns the first row of this block's tile.

  Args:
    mi: index of the group of tiles, below one another along M, that the cluster computes at a time.
    tiling: how the result is cut.
  """
  return (mi * tiling.cluster_m + lax.axis_index(CLUSTER[0])) * tiling.block_m


def launch(
    name: str, body: Callable[..., None], operands: tuple[jax.Array, ...], *,
    out: jax.ShapeDtypeStruct, tiling: Tiling, programs: int, interpret: object,
    vectors: tuple[bool, bool], any_row: bool = False,
    before: tuple[jax.Array, ...] = (), parts: jax.ShapeDtypeStruct | None = None) -> jax.Array:
  """Launches a kernel as persistent blocks, at most one for each multiprocessor.

  Args:
    name: name of the kernel, for profiles.
    body: the kernel; it takes the refs of `before`, and a `Refs`.
    operands: lhs, rhs and their scales; see `Refs`.
    out: shape and dtype of the result.
    tiling: how the result is cut.
    programs: number of clusters; see `fp8_tiling.num_programs`.
    interpret: see `run`.
    vectors: whether lhs and rhs have a scale for each row.
    any_row: whether tiles begin at any row of lhs, rather than at multiples of 4.
    before: further arrays that the kernel reads, passed ahead of `operands`.
    parts: shape and dtype of a further result, which is returned after the first.
  """
  def kernel(*refs, **shared):
    more, own = refs[:len(before)], refs[len(before):]
    body(*more, Refs(*own[:5], *own[5:] or (None,), **shared, interpreted=interpret is not None))

  # A launch of grid * cluster blocks of 3 * 128 CUDA threads. The grid counts clusters, so
  # lax.axis_index("sm") is the same in all blocks of a cluster, and CLUSTER names a block's place
  # there. `num_threads` counts warpgroups, and axis_index("wg") tells them apart.
  # With lane semantics Pallas lowers a wgmma to inline PTX at once, which `wgmma_overwrite` edits.
  # With the default, warpgroup semantics, there would be no PTX yet: a later pass emits it.
  return plgpu.kernel(
      kernel, out_type=(out, parts) if parts else out, grid=(programs,), grid_names=("sm",),
      cluster=(tiling.cluster_m, tiling.cluster), cluster_names=CLUSTER, num_threads=WARPGROUPS + 1,
      thread_name="wg", scratch_types=_shared(out.dtype, tiling, vectors, any_row),
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
      interpret=interpret, kernel_name=name)(*before, *operands)


def _shared(dtype, tiling, vectors, any_row) -> dict[str, object]:
  """Returns the shared memory and the mbarriers of a block, by their names in `Refs`."""
  stages, block_n = tiling.stages, tiling.block_n
  # Bytes of the widest swizzle of which a row of the tile is a multiple.
  row = min(128, math.gcd(block_n, 128) * dtype.itemsize)
  width = row // dtype.itemsize
  # Barriers are mbarriers, one for each stage; `num_arrivals` counts warpgroups, not threads. Both
  # consumers arrive at `empty`. With a cluster they arrive at that of every block in it: its TMA
  # multicasts write to the stages of all blocks, so the consumers of all must have released them.
  axes = tuple(CLUSTER[i] for i, size in enumerate((tiling.cluster_m, tiling.cluster)) if size > 1)
  barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=axes) if axes else plgpu.Barrier
  # Shared memory. A stage has 128 of K, which in FP8 are one row of the 128-byte swizzle, and lies
  # there as TMA writes it and wgmma reads it.
  ring = functools.partial(plgpu.SMEM, dtype=jnp.float8_e4m3fn, transforms=swizzle(1))
  # Copies of scales must begin at a multiple of 16 bytes, so they may begin up to 3 rows early.
  # They move multiples of 128 bytes.
  row_scales = tiling.block_m + (32 if any_row else 0)
  copies = 2 + vectors[0] * pl.cdiv(row_scales, COPY_LENGTH) + vectors[1]
  return {
      "lhs_smem": ring((stages, tiling.block_m, BLOCK)),
      "rhs_smem": ring((stages, block_n, BLOCK)),
      "lhs_scale_smem": plgpu.SMEM((stages, row_scales), jnp.float32) if vectors[0] else None,
      "rhs_scale_smem": plgpu.SMEM((stages, block_n), jnp.float32) if vectors[1] else None,
      "out_smem": plgpu.SMEM((WARPGROUPS, block_n // width, ROWS, width), dtype,
                             transforms=swizzle(dtype.itemsize, row)),
      # Each TMA load into a stage counts as one arrival, and announces the bytes that must land.
      "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      "empty": barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
  }


def multiply_tiles(
    refs: Refs, each_tile: Callable[..., jax.Array], tiling: Tiling) -> None:
  """Computes all tiles: the body of a kernel, with a role for each warpgroup.

  Args:
    refs: memory and barriers.
    each_tile: each_tile(visit, carry) calls carry = visit(tile, carry) for each `Tile` of this
      block, and returns the last carry.
    tiling: how the result is cut.
  """
  wg = lax.axis_index("wg")

  @pl.when(wg == WARPGROUPS)
  def _():
    # setmaxnreg: the producer, which only issues copies, gives registers up to the consumers.
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
    _fetch_tiles(refs, each_tile, tiling)

  @pl.when(wg < WARPGROUPS)
  def _():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    own_rows = pl.ds(wg * (tiling.block_m // WARPGROUPS), tiling.block_m // WARPGROUPS)
    own_refs = refs._replace(lhs_smem=refs.lhs_smem.at[:, own_rows])

    # The carry is the ring's next stage, as the producer does not stop between tiles.
    def visit(tile, slot):
      def multiply():
        tile.store(_multiply_tile(own_refs, tile, slot, tiling))

      if tile.end is None:
        multiply()
        return lax.rem(slot + tile.num_k, tiling.stages)
      # A warpgroup without a row to store leaves the tensor cores to the other one.
      has_rows = tile.lhs_row + tiling.row(0) < tile.end
      if tile.live is None:
        pl.when(has_rows)(multiply)
        pl.when(~has_rows)(lambda: _skip_tile(refs, tile, slot, tiling))
        return lax.rem(slot + tile.num_k, tiling.stages)
      # ptxas makes code half as fast of a loop over blocks whose number it does not know.
      pl.when(has_rows & tile.live)(multiply)
      pl.when(has_rows & ~tile.live)(lambda: tile.store(no_sums(own_refs, tiling)))
      pl.when(~has_rows & tile.live)(lambda: _skip_tile(refs, tile, slot, tiling))
      return jnp.where(tile.live, lax.rem(slot + tile.num_k, tiling.stages), slot)

    each_tile(visit, jnp.int32(0))

    # TMA stores read shared memory, which is gone when the block exits.
    plgpu.wait_smem_to_gmem(0)


def _fetch_tiles(refs, each_tile, tiling) -> None:
  """The producer: fills stages for the same tiles, in the same order, as consumers empty them."""
  # A wait takes no phase. Pallas keeps each barrier's parity bit in a local variable and flips it
  # on every wait, so a warpgroup that waits for a barrier must wait for every one of its phases.
  def await_empty(step):
    plgpu.barrier_wait(refs.empty.at[lax.rem(step, tiling.stages)])

  def visit(tile, step):
    def fetch(i, step):
      # Stages are empty at first, and no consumer has arrived at their barriers.
      pl.when(step >= tiling.stages)(lambda: await_empty(step))
      _fetch(refs, tile, tile.first_k + i, lax.rem(step, tiling.stages), tiling)
      return step + 1

    num_k = tile.num_k if tile.live is None else jnp.where(tile.live, tile.num_k, 0)
    return lax.fori_loop(0, num_k, fetch, step)

  steps = each_tile(visit, jnp.int32(0))
  # A block must not exit while another block of its cluster may still multicast into its shared
  # memory, or arrive at its barriers: so wait until the last fills of all stages are released.
  pl.loop(jnp.maximum(steps - tiling.stages, 0), steps)(await_empty)


def _fetch(refs, tile, ki, slot, tiling) -> None:
  """Starts the TMA loads of one block of K into a stage."""
  def copy(source, smem, **options):
    # One thread issues cp.async.bulk.tensor; what lies past the operand's end is filled with zeros.
    # Before that the warpgroup arrives at the barrier and announces the bytes (arrive.expect_tx).
    plgpu.copy_gmem_to_smem(source, smem, refs.full.at[slot], **options)

  rows, columns = pl.ds(tile.lhs_row, tiling.block_m), pl.ds(tile.rhs_row, tiling.block_n)
  block = pl.ds(ki * BLOCK, BLOCK)
  # Multicast: every block of the cluster loads an equal part of lhs's rows into the shared memory
  # of all, and waits at its own barrier for all of them.
  stage = functools.partial(as_rows, interpreted=refs.interpreted)
  copy(refs.lhs_MK.at[rows, block], stage(refs.lhs_smem, slot),
       collective_axes=CLUSTER[1] if tiling.cluster > 1 else None)
  copy(tile.rhs_NK.at[columns, block], stage(refs.rhs_smem, slot),
       collective_axes=CLUSTER[0] if tiling.cluster_m > 1 else None)
  length = refs.lhs_scale_smem.shape[1] if refs.lhs_scale_smem is not None else 0
  for at in range(0, length, COPY_LENGTH):
    part = min(COPY_LENGTH, length - at)
    copy(refs.lhs_scales.at[ki, pl.ds(_first_scale(refs, tile, tiling) + at, part)],
         refs.lhs_scale_smem.at[slot, pl.ds(at, part)])
  if refs.rhs_scale_smem is not None:
    copy(tile.rhs_scales.at[ki, columns], refs.rhs_scale_smem.at[slot])


def _first_scale(refs, tile, tiling) -> jax.Array:
  """Returns the row of the first of lhs's scales that are fetched for a tile."""
  return tile.lhs_row & -4 if refs.lhs_scale_smem.shape[1] > tiling.block_m else tile.lhs_row


def _skip_tile(refs, tile, slot, tiling) -> None:
  """Releases a tile's stages unread, as the producer waits for both consumers."""
  def skip(i, _):
    stage = lax.rem(slot + i, tiling.stages)
    plgpu.barrier_wait(refs.full.at[stage])
    plgpu.barrier_arrive(refs.empty.at[stage])

  lax.fori_loop(0, tile.num_k, skip, None)


def _multiply_tile(refs, tile, slot, tiling) -> Sums:
  """Sums this warpgroup's part of a tile over K, from the stage `slot` on."""
  # Blocks of K in one iteration. With a depth of 1 every product is drained before the next anyway.
  span = 1 if tiling.depth == 1 else _PRODUCTS_PER_ITERATION // tiling.waves

  def add_blocks(num, first_k):
    def add(i, carry):
      slot, sums = carry
      slots = [slot]
      for _ in range(num):
        slots.append(jnp.where(slots[-1] == tiling.stages - 1, 0, slots[-1] + 1))
      return slots[num], _add_products(
          refs, tile, first_k + i * num, slots[:num], sums, tiling)
    return add

  carry = lax.fori_loop(0, tile.num_k // span, add_blocks(span, tile.first_k),
                        (slot, no_sums(refs, tiling)))
  if span > 1 and not (isinstance(tile.num_k, int) and tile.num_k % span == 0):
    left = tile.num_k % span
    carry = lax.fori_loop(0, left, add_blocks(1, tile.first_k + tile.num_k - left), carry)
  return carry[1]


def no_sums(refs, tiling) -> Sums:
  """Returns the sums of no products: zeros."""
  # Tiles begin at multiples of block_n, so as many columns as divide both it and 128 have one
  # 128x128 scale. 1x128 scales differ for each column anyway.
  width = math.gcd(tiling.block_n, BLOCK) if refs.rhs_scale_smem is None else tiling.block_n
  # Layout.WGMMA spreads an array over the threads' registers as wgmma does its result.
  zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
  return ((zeros,) * (tiling.block_n // width),) * tiling.waves


def _add_products(refs, tile, ki, slots, sums, tiling) -> Sums:
  """Adds the products of consecutive blocks of K, from `ki` on, which are in stages `slots`."""
  jobs = [(i, wave) for i in range(len(slots)) for wave in range(tiling.waves)]
  # The interpreter ignores inline_mgpu, by which `wgmma_overwrite` has a product overwrite its
  # accumulator. There a product adds to it, so each gets a new accumulator, which holds zeros.
  at_once = tiling.depth if refs.interpreted else len(jobs)
  # The D registers of a wgmma, block_n / 2 of each thread. run_scoped allocates them while the
  # function given to it runs.
  accumulator = plgpu.ACC((ROWS, tiling.block_n), jnp.float32)
  for first in range(0, len(jobs), at_once):
    group = jobs[first:first + at_once]
    sums = pl.run_scoped(functools.partial(_pipeline, refs, tile, ki, slots, sums, tiling, group),
                         *[accumulator] * min(tiling.depth, len(group)))
  return sums


def _pipeline(refs, tile, ki, slots, sums, tiling, jobs, *accumulators) -> Sums:
  """Multiplies and promotes, with as many products in flight as there are accumulators.

  Two accumulators take turns: while the product in one is promoted, the tensor cores write to the
  other. `jobs` are the products, pairs of an index into `slots` and a wave.
  """
  sums, row_scales, rhs_scales = list(sums), {}, {}

  def begin(job):
    i, wave = jobs[job]
    # Loaded before the wait, so that global memory's latency passes while operands arrive.
    if refs.rhs_scale_smem is None and i not in rhs_scales:
      rhs_scales[i] = _block_scales(tile, ki + i, tiling)
    if refs.lhs_scale_smem is None:
      row_scales[job] = _block_scale(refs.lhs_scales, tile.lhs_row + tiling.row(wave), ki + i)
    if wave == 0:  # once for all waves: they read the same stage
      plgpu.barrier_wait(refs.full.at[slots[i]])
    # Scales are loaded before the product is issued. A load that follows a wgmma may be served so
    # late that the producer has refilled the stage, although the load precedes the arrival at
    # `empty`: with narrow tiles that gave wrong scales, and results that changed from run to run.
    if i not in rhs_scales:
      rhs_scales[i] = [_load(refs.rhs_scale_smem.at[slots[i]], 0)]
    if refs.lhs_scale_smem is not None:
      row = tile.lhs_row - _first_scale(refs, tile, tiling) + tiling.row(wave)
      row_scales[job] = _load(refs.lhs_scale_smem.at[slots[i], pl.ds(row, ROWS)], 1)
    # Asynchronous: four wgmma.m64nNk32, the first of which overwrites the accumulator, and a
    # commit_group. `.T` moves nothing: rhs is [N, K], the K-major order that FP8 wgmma requires.
    wgmma_overwrite(accumulators[job % len(accumulators)],
                    refs.lhs_smem.at[slots[i], pl.ds(wave * ROWS, ROWS)],
                    refs.rhs_smem.at[slots[i]].T)

  for job in range(len(accumulators)):
    begin(job)
  for job, (i, wave) in enumerate(jobs):
    if refs.interpreted:
      # The race detector requires this between a read and the copy that overwrites it. On hardware
      # the loads above are complete when the wgmmas issued after them are.
      plgpu.commit_smem()
    # wgmma.wait_group: products finish in order, and those begun after this one may go on.
    in_flight = min(len(accumulators), len(jobs) - job) - 1
    product = plgpu.wgmma_accumulator_load(accumulators[job % len(accumulators)], wait_n=in_flight)
    if wave == tiling.waves - 1:
      # The stage is not needed any more: operands are multiplied, and scales are in registers.
      plgpu.barrier_arrive(refs.empty.at[slots[i]])
    sums[wave] = _promote(sums[wave], product, row_scales[job], rhs_scales[i])
    if job + len(accumulators) < len(jobs):
      begin(job + len(accumulators))
  return tuple(sums)


def _load(scales, axis) -> jax.Array:
  """Loads scales from shared memory, to each thread those of its elements of a wgmma's result.

  A scale is common to all elements along `axis`: 1 for scales of rows, 0 for scales of columns.
  `optimized=False` accepts that Pallas has no vectorised load for these layouts.
  """
  return plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _block_scales(tile, ki, tiling) -> list[jax.Array]:
  """Loads rhs's 128x128 scales for a block of K: one scalar for each chunk of columns."""
  return [_block_scale(tile.rhs_scales, tile.rhs_row + column, ki)
          for column in range(0, tiling.block_n, math.gcd(tiling.block_n, BLOCK))]


def _block_scale(scales, row, ki) -> jax.Array:
  """Loads the 128x128 scale of a row, which may be past the last one, and a block of K."""
  return scales[jnp.minimum(lax.div(row, BLOCK), scales.shape[0] - 1), ki]


def _promote(sums, product, row_scales, rhs_scales) -> tuple[jax.Array, ...]:
  """Adds a scaled product to the sums in full float32 precision, chunk by chunk of columns.

  `row_scales` is a vector with a scale for each row, or a scalar; so is a chunk's scale in
  `rhs_scales`, with one for each column.
  """
  shape = sums[0].shape

  def scale(rhs_scale):
    if rhs_scale.ndim == 0 or row_scales.ndim == 0:
      return lax.broadcast_in_dim(row_scales * rhs_scale, shape, [int(row_scales.ndim == 0)])
    return (lax.broadcast_in_dim(row_scales, shape, [0])
            * lax.broadcast_in_dim(rhs_scale, shape, [1]))

  return tuple(
      total + lax.slice(product, (0, i * shape[1]), (ROWS, (i + 1) * shape[1])) * scale(rhs_scale)
      for i, (total, rhs_scale) in enumerate(zip(sums, rhs_scales, strict=True)))


def store(
    refs: Refs, out_MN: jax.Ref, row: jax.Array, column: jax.Array, tiling: Tiling,
    sums: Sums) -> None:
  """Writes this warpgroup's part of the tile at `row` and `column`, without waiting for the copies.

  TMA leaves out what reaches past the end of the result.
  """
  for wave, chunks in enumerate(sums):
    store_wave(refs, out_MN, row + tiling.row(wave), column, chunks)


def store_wave(
    refs: Refs, out_MN: jax.Ref, row: jax.Array, column: jax.Array,
    chunks: tuple[jax.Array, ...]) -> None:
  """Writes a wave's 64 rows of sums to the result, at `row` and `column`, through shared memory."""
  wg, width = lax.axis_index("wg"), refs.out_smem.shape[3]
  # The TMA store before this one must have finished reading the staging buffer (wait_group.read).
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for piece, value in enumerate(pieces(refs, chunks)):
    refs.out_smem[wg, piece] = value
  # fence.proxy.async by every thread, then a barrier of the warpgroup: TMA sees the stores above.
  plgpu.commit_smem()
  for piece in range(refs.out_smem.shape[1]):
    plgpu.copy_smem_to_gmem(
        as_rows(refs.out_smem, wg, piece, interpreted=refs.interpreted),
        out_MN.at[pl.ds(row, ROWS), pl.ds(column + piece * width, width)], commit_group=False)
  plgpu.commit_smem_to_gmem_group()


def pieces(refs: Refs, chunks: tuple[jax.Array, ...]) -> list[jax.Array]:
  """Returns a wave's sums as the staging buffer holds them: in its dtype and in its pieces."""
  (_, num_pieces, _, width), chunk = refs.out_smem.shape, chunks[0].shape[1]
  found = []
  for piece in range(num_pieces):
    index, at = divmod(piece * width, chunk)
    found.append(lax.slice(chunks[index], (0, at), (ROWS, at + width)).astype(refs.out_smem.dtype))
  return found
