"""FP8 matrix product on Hopper, and the kernel that all FP8 products there are made of.

A kernel stays on its multiprocessor and goes from tile to tile of the result. One warpgroup fetches
operands into a ring in shared memory, running ahead into the next tile; two others multiply, 64
rows each. A tensor core keeps 14 bits of a sum, so every 128 of K begins a new accumulator, which
is scaled and added to a float32 sum: the promotion (arXiv:2412.19437, section 3.3.2). While one
warpgroup promotes, the tensor core has the other's products, or with a depth of 2 its own.

Shape letters:  M, N rows of the operands  K contracted width  k blocks of 128 of K  n blocks of N
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu.hopper import (
  MULTIPROCESSORS,
  ROWS,
  WARPGROUPS,
  k_major,
  pad_blocks,
  pad_rows,
  swizzle,
  wgmma_overwrite,
)
from pallas_kernels.mosaic_gpu.tilings import tuned
from pallas_kernels.quantized import BLOCK, Quantized

_GRAIN = 16  # bytes, or rows laid out in eights; what copies count in
_IN_TURN = 4  # products after which none is in flight, as ptxas wants none where a loop goes back
FETCH_REGISTERS, MULTIPLY_REGISTERS = 24, 240  # a thread's; 65536 in all, handed out in eights


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a product is cut into tiles.

  A thread's registers hold sums for the tile's 64 rows or twice that, and `depth` products beside
  them: columns times the number of those is at most 384. A tile of 128x128 asks L2 for 64 bytes a
  cycle, more than it gives, and twice the rows or a cluster of two for 48, both for 32.

  Attributes:
    block_m: rows of a tile, 128 or 256.
    block_n: columns of a tile, a multiple of 32, up to 192.
    depth: products that a warpgroup has in flight, 1 or 2.
    stages: blocks of K in shared memory.
    swizzle: columns of tiles that are finished before the next ones begin, so that tiles that run
      at the same time share operands in L2.
    cluster: multiprocessors side by side along N that fetch lhs once for all, 1, 2 or 4.
  """

  block_m: int = 128
  block_n: int = 128
  depth: int = 2
  stages: int = 5
  swizzle: int = 8
  cluster: int = 1

  def __post_init__(self):
    if (self.block_m not in (128, 256) or self.block_n % 32 or self.block_n < 32
        or self.depth not in (1, 2) or self.cluster not in (1, 2, 4)
        or self.stages <= self.depth or self.swizzle < 1):
      raise ValueError(f"no kernel is cut as {self}; see Tiling for the ranges")
    if (self.waves + self.depth) * self.block_n > 384:
      raise ValueError(f"{self} leaves too few registers; narrow block_n, or set depth to 1")

  @property
  def waves(self) -> int:
    """Matrix instructions that a warpgroup needs for its rows."""
    return self.block_m // (WARPGROUPS * ROWS)

  def row(self, wave: int) -> jax.Array:
    """Of the tile, where this warpgroup's wave begins."""
    return (lax.axis_index("wg") * self.waves + wave) * ROWS


Sums = tuple[tuple[jax.Array, ...], ...]  # of a tile, for each wave in chunks of columns


class Tile(NamedTuple):
  """A tile of the result: its operands and where it goes.

  Attributes:
    lhs_row, rhs_row: the first.
    first_k, num_k: blocks of K.
    rhs_NK, rhs_scales: of the tile's group; scales are [k, N], one for every row, or [n, k], one
      for every 128.
    store: takes the tile's sums.
  """

  lhs_row: jax.Array
  rhs_row: jax.Array
  first_k: jax.Array | int
  num_k: jax.Array | int
  rhs_NK: jax.Ref
  rhs_scales: jax.Ref
  store: Callable[[Sums], None]


class Refs(NamedTuple):
  """What a kernel works on; in shared memory the first axis is stages.

  Of rhs' scales only those of rows go through shared memory: others are read one at a time.
  """

  lhs_MK: jax.Ref
  rhs_NK: jax.Ref
  lhs_scales_kM: jax.Ref
  rhs_scales: jax.Ref
  out: jax.Ref
  lhs_smem: jax.Ref
  rhs_smem: jax.Ref
  lhs_scale_smem: jax.Ref
  rhs_scale_smem: jax.Ref | None
  out_smem: jax.Ref
  full: jax.Ref
  empty: jax.Ref
  interpreted: bool


def run(
    lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype,
    tiling: Tiling | None = None, interpret: object = None) -> jax.Array:
  """See `pallas_kernels.fp8_matmul`.

  Args:
    lhs_MK, rhs_NK, dtype: as there.
    tiling: None for the one measured best, or `default_tiling`.
    interpret: `plgpu.InterpretGPUParams`, to run without a GPU.

  Returns:
    [M, N].
  """
  vectors = rhs_NK.tile == (1, BLOCK)
  operation = f"fp8_matmul {'1x128' if vectors else '128x128'}"
  default = default_tiling(dtype, vectors, (lhs_MK.shape[0], rhs_NK.shape[0]))
  tiling = tiling or tuned(default, operation, dtype, lhs_MK.shape[0], *rhs_NK.shape)
  values_MK = pad_blocks(pad_rows(lhs_MK.values_MK), BLOCK)
  (m, k), n = values_MK.shape, rhs_NK.shape[0]
  columns = tiling.block_n * tiling.cluster
  grid = (pl.cdiv(m, tiling.block_m), pl.cdiv(n, columns))

  def body(refs: Refs):
    def locate(index):
      mi, ni = plgpu.planar_snake(index, grid, 1, tiling.swizzle)
      row, column = mi * tiling.block_m, first_column(ni, tiling)
      return Tile(row, column, 0, k // BLOCK, refs.rhs_NK, refs.rhs_scales,
                  functools.partial(store, refs, refs.out, row, column, tiling))

    multiply_tiles(refs, math.prod(grid), locate, tiling)

  operands = (values_MK, pad_blocks(rhs_NK.values_MK, BLOCK),
              k_major(lhs_MK.scales_mk, tiling.block_m),
              k_major(rhs_NK.scales_mk, columns) if vectors else rhs_NK.scales_mk)
  return launch("fp8_matmul", body, operands, jax.ShapeDtypeStruct((m, n), dtype), tiling,
                math.prod(grid), interpret, vectors=vectors)[:lhs_MK.shape[0]]


def unsupported_reason(lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype) -> str | None:
  """Why `run` cannot multiply these, or None."""
  if reason := unsupported_size("N", rhs_NK.shape[0]):
    return reason
  if 0 in lhs_MK.shape:
    return f"needs numbers to multiply, and lhs is {lhs_MK.shape}"
  return unsupported_formats(lhs_MK, rhs_NK, dtype)


def unsupported_size(name: str, size: int) -> str | None:
  """Why rows of rhs, or columns of a result, cannot be copied in whole tiles, or None."""
  if size == 0 or size % _GRAIN:
    return f"needs {name} to be a multiple of {_GRAIN}, and it is {size}"
  return None


def unsupported_formats(lhs: Quantized, rhs: Quantized, dtype: jnp.dtype) -> str | None:
  """Why operands or a result of these formats cannot be had, or None."""
  formats = lhs.values_MK.dtype, rhs.values_MK.dtype
  if formats != (jnp.float8_e4m3fn, jnp.float8_e4m3fn):
    return f"needs both operands in float8_e4m3fn, and they are {formats[0]} and {formats[1]}"
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"gives bfloat16 or float32, not {jnp.dtype(dtype)}"
  return None


def default_tiling(
    dtype: jnp.dtype, vectors: bool, shape: tuple[int, int] | None = None) -> Tiling:
  """The most stages that fit, without spilled registers.

  Those are 5 for tiles of 128 rows, or 4 where results in float32 take twice the room, and 3 for
  tiles of 256 rows whatever the result.

  With scales of rows on both sides, tiles of 256 rows read them half as often, and take 1.8 times
  as long as tiles of 128. Too few of them leave multiprocessors idle in the end.

  Args:
    dtype: of the result.
    vectors: whether rhs has a scale for every row.
    shape: of the result, where it is all that there is to compute.
  """
  stages = 5 if jnp.dtype(dtype).itemsize == 2 else 4
  if not vectors:
    return Tiling(stages=stages)
  tall, short = Tiling(block_m=256, depth=1, stages=3), Tiling(depth=1, stages=stages)
  if not shape:
    return tall
  rounds = lambda tiling: pl.cdiv(
      pl.cdiv(shape[0], tiling.block_m) * pl.cdiv(shape[1], tiling.block_n), MULTIPROCESSORS)
  return short if rounds(short) < 1.8 * rounds(tall) else tall


def first_column(ni: jax.Array, tiling: Tiling) -> jax.Array:
  """Of this multiprocessor's tile among those that its cluster has side by side."""
  return (ni * tiling.cluster + lax.axis_index("cluster")) * tiling.block_n


def launch(
    name: str, body: Callable[..., None], operands: tuple[jax.Array, ...],
    out: jax.ShapeDtypeStruct, tiling: Tiling, most_tiles: int, interpret: object, *,
    vectors: bool, before: tuple[jax.Array, ...] = (), **scratch: object) -> jax.Array:
  """Runs a kernel on every multiprocessor.

  Args:
    name: of the kernel, for profiles.
    body: takes `before`, the refs, and `scratch`.
    operands: lhs, rhs and their scales; see `Refs`.
    out: shape and dtype of the result.
    tiling: of the result.
    most_tiles: of a cluster, of which there need not be more.
    interpret: see `run`.
    vectors: whether rhs has a scale for every row.
    before: more arrays.
    **scratch: more of the shared memory.
  """
  def kernel(*refs, extra, **own):
    body(*refs[:-5], Refs(*refs[-5:], **own, interpreted=interpret is not None), **extra)

  return plgpu.kernel(
      kernel, out_type=out, grid=(min(MULTIPROCESSORS // tiling.cluster, most_tiles),),
      grid_names=("sm",),
      cluster=(tiling.cluster,), cluster_names=("cluster",), num_threads=WARPGROUPS + 1,
      thread_name="wg", scratch_types=_shared(out.dtype, tiling, vectors) | {"extra": scratch},
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
      interpret=interpret, kernel_name=name)(*before, *operands)


def _shared(dtype, tiling, vectors) -> dict[str, object]:
  stages, block_n = tiling.stages, tiling.block_n
  row = min(128, math.gcd(block_n, 128) * dtype.itemsize)
  barrier = plgpu.Barrier if tiling.cluster == 1 else functools.partial(
      plgpu.ClusterBarrier, collective_axes=("cluster",))
  ring = functools.partial(plgpu.SMEM, dtype=jnp.float8_e4m3fn, transforms=swizzle(1))
  return {
      "lhs_smem": ring((stages, tiling.block_m, BLOCK)),
      "rhs_smem": ring((stages, block_n, BLOCK)),
      "lhs_scale_smem": plgpu.SMEM((stages, tiling.block_m), jnp.float32),
      "rhs_scale_smem": plgpu.SMEM((stages, block_n), jnp.float32) if vectors else None,
      "out_smem": plgpu.SMEM((WARPGROUPS, ROWS, block_n), dtype,
                             transforms=swizzle(dtype.itemsize, row)),
      "full": plgpu.Barrier(num_arrivals=4 if vectors else 3, num_barriers=stages),
      "empty": barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
  }


def multiply_tiles(
    refs: Refs, num_tiles: int | jax.Array, locate: Callable[[jax.Array], Tile],
    tiling: Tiling) -> None:
  """Divides tiles among multiprocessors and roles among warpgroups; the body of a kernel."""
  wg = lax.axis_index("wg")

  @pl.when(wg == WARPGROUPS)
  def _():
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
    _fetch_tiles(refs, num_tiles, locate, tiling)

  @pl.when(wg < WARPGROUPS)
  def _():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    own = pl.ds(wg * (tiling.block_m // WARPGROUPS), tiling.block_m // WARPGROUPS)
    mine = refs._replace(lhs_smem=refs.lhs_smem.at[:, own],
                         lhs_scale_smem=refs.lhs_scale_smem.at[:, own])

    @plgpu.nd_loop((num_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
    def _(loop, carry):
      tile = locate(loop.index[0])
      slot, sums = _multiply_tile(mine, tile, carry, tiling)
      tile.store(sums)
      return slot

    plgpu.wait_smem_to_gmem(0)


def _fetch_tiles(refs, num_tiles, locate, tiling) -> None:
  def await_empty(step):
    plgpu.barrier_wait(refs.empty.at[lax.rem(step, tiling.stages)])

  @plgpu.nd_loop((num_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  def steps(loop, carry):
    tile = locate(loop.index[0])

    def fetch(i, step):
      pl.when(step >= tiling.stages)(lambda: await_empty(step))
      _fetch(refs, tile, tile.first_k + i, lax.rem(step, tiling.stages), tiling)
      return step + 1

    return lax.fori_loop(0, tile.num_k, fetch, carry)

  # Nobody may leave while another of its cluster still writes to its memory.
  pl.loop(jnp.maximum(steps - tiling.stages, 0), steps)(await_empty)


def _fetch(refs, tile, ki, slot, tiling) -> None:
  def copy(source, smem, **options):
    plgpu.copy_gmem_to_smem(source, smem.at[slot], refs.full.at[slot], **options)

  rows, columns = pl.ds(tile.lhs_row, tiling.block_m), pl.ds(tile.rhs_row, tiling.block_n)
  block = pl.ds(ki * BLOCK, BLOCK)
  copy(refs.lhs_MK.at[rows, block], refs.lhs_smem,
       collective_axes="cluster" if tiling.cluster > 1 else None)
  copy(tile.rhs_NK.at[columns, block], refs.rhs_smem)
  copy(refs.lhs_scales_kM.at[ki, rows], refs.lhs_scale_smem)
  if refs.rhs_scale_smem is not None:
    copy(tile.rhs_scales.at[ki, columns], refs.rhs_scale_smem)


def _multiply_tile(refs, tile, slot, tiling) -> tuple[jax.Array, Sums]:
  """The slot of the next block, and the tile's sums."""
  width = math.gcd(tiling.block_n, BLOCK) if refs.rhs_scale_smem is None else tiling.block_n
  zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
  sums = ((zeros,) * (tiling.block_n // width),) * tiling.waves
  span = 1 if tiling.depth == 1 else _IN_TURN // tiling.waves

  def several(num, first_k):
    def add(i, carry):
      slot, sums = carry
      slots = [slot]
      for _ in range(num):
        slots.append(jnp.where(slots[-1] == tiling.stages - 1, 0, slots[-1] + 1))
      return slots[num], _add_products(
          refs, tile, first_k + i * num, slots[:num], sums, tiling)
    return add

  carry = lax.fori_loop(0, tile.num_k // span, several(span, tile.first_k), (slot, sums))
  if span == 1 or (isinstance(tile.num_k, int) and tile.num_k % span == 0):
    return carry
  odd = tile.num_k % span
  return lax.fori_loop(0, odd, several(1, tile.first_k + tile.num_k - odd), carry)


def _add_products(refs, tile, ki, slots, sums, tiling) -> Sums:
  """Adds the products of the next blocks of K, which are in these slots."""
  jobs = [(i, wave) for i in range(len(slots)) for wave in range(tiling.waves)]
  # The interpreter cannot overwrite an accumulator: each is for one product there.
  at_once = tiling.depth if refs.interpreted else len(jobs)
  accumulator = plgpu.ACC((ROWS, tiling.block_n), jnp.float32)
  for first in range(0, len(jobs), at_once):
    some = jobs[first:first + at_once]
    sums = pl.run_scoped(functools.partial(_pipeline, refs, tile, ki, slots, sums, tiling, some),
                         *[accumulator] * min(tiling.depth, len(some)))
  return sums


def _pipeline(refs, tile, ki, slots, sums, tiling, jobs, *accumulators) -> Sums:
  """Multiplies, with as many products in flight as there are accumulators, which take turns."""
  sums, rhs_scales = list(sums), {}

  def begin(at):
    i, wave = jobs[at]
    if refs.rhs_scale_smem is None and i not in rhs_scales:
      rhs_scales[i] = _block_scales(tile, ki + i, tiling)  # they may come while operands do
    if wave == 0:
      plgpu.barrier_wait(refs.full.at[slots[i]])
    wgmma_overwrite(accumulators[at % len(accumulators)],
                  refs.lhs_smem.at[slots[i], pl.ds(wave * ROWS, ROWS)],
                  refs.rhs_smem.at[slots[i]].T)

  for at in range(len(accumulators)):
    begin(at)
  for at, (i, wave) in enumerate(jobs):
    # From shared memory while the tensor core works, and once for all waves.
    if i not in rhs_scales:
      rhs_scales[i] = [_load(refs.rhs_scale_smem.at[slots[i]], 0)]
    row_scales = _load(refs.lhs_scale_smem.at[slots[i], pl.ds(wave * ROWS, ROWS)], 1)
    if refs.interpreted:
      # The detector of races asks for this between a read and the copy that follows. On hardware
      # the read is done by when the barrier is arrived at.
      plgpu.commit_smem()
    behind = min(len(accumulators), len(jobs) - at) - 1
    product = plgpu.wgmma_accumulator_load(accumulators[at % len(accumulators)], wait_n=behind)
    if wave == tiling.waves - 1:
      plgpu.barrier_arrive(refs.empty.at[slots[i]])
    sums[wave] = _promote(sums[wave], product, row_scales, rhs_scales[i])
    if at + len(accumulators) < len(jobs):
      begin(at + len(accumulators))
  return tuple(sums)


def _load(scales, axis) -> jax.Array:
  return plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _block_scales(tile, ki, tiling) -> list[jax.Array]:
  """One for each chunk of columns."""
  last = tile.rhs_scales.shape[0] - 1  # a tile may reach past it
  return [tile.rhs_scales[jnp.minimum(lax.div(tile.rhs_row + column, BLOCK), last), ki]
          for column in range(0, tiling.block_n, math.gcd(tiling.block_n, BLOCK))]


def _promote(sums, product, row_scales, rhs_scales) -> tuple[jax.Array, ...]:
  """Adds a product to the sums, chunk by chunk; a chunk's scale is a number or one per column."""
  shape = sums[0].shape

  def scale(of_rhs):
    if of_rhs.ndim == 0:
      return lax.broadcast_in_dim(row_scales * of_rhs, shape, [0])
    return (lax.broadcast_in_dim(row_scales, shape, [0])
            * lax.broadcast_in_dim(of_rhs, shape, [1]))

  return tuple(
      total + lax.slice(product, (0, i * shape[1]), (ROWS, (i + 1) * shape[1])) * scale(of_rhs)
      for i, (total, of_rhs) in enumerate(zip(sums, rhs_scales, strict=True)))


def store(
    refs: Refs, out_MN: jax.Ref, row: jax.Array, column: jax.Array, tiling: Tiling,
    sums: Sums) -> None:
  """Writes a tile, of which what reaches past the result is left out, without waiting for it."""
  for wave, chunks in enumerate(sums):
    store_wave(refs, out_MN, row + tiling.row(wave), column, chunks)


def store_wave(
    refs: Refs, out_MN: jax.Ref, row: jax.Array, column: jax.Array,
    chunks: tuple[jax.Array, ...]) -> None:
  """Writes a wave's sums once those before them have left shared memory."""
  staged, width = refs.out_smem.at[lax.axis_index("wg")], chunks[0].shape[1]
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for i, chunk in enumerate(chunks):
    staged[:, i * width:(i + 1) * width] = chunk.astype(staged.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staged, out_MN.at[pl.ds(row, ROWS), pl.ds(column, staged.shape[1])])


KERNEL = implementations.Kernel(run, unsupported_reason)
