"""How absorbed latent attention divides its work on Hopper, and what its two kernels share.

The blocks of 64 tokens of all batch rows are concatenated and divided evenly among the thread
blocks, however the rows' lengths differ. A thread block writes a part of the result for each batch
row of which it has blocks; parts are combined afterwards.

Shape letters:  B batch  S slots  T query positions  H heads  C width of an entry  N query rows of a
                tile  R tiles  P parts  G thread blocks
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu.hopper import MULTIPROCESSORS, ROWS, WARPGROUPS, as_rows

TOKENS = ROWS  # of a block
CHUNK = 64     # numbers of an entry in a row of the widest swizzle
LAYOUT = plgpu.Layout.WGMMA
LOWEST = -1e30  # below every score; minus infinity would make differences NaN
FETCH_REGISTERS, COMPUTE_REGISTERS = 40, 232
_SHARED_MEMORY = 225 << 10  # bytes that a thread block has, less some for barriers
_MOST_BLOCKS = 4  # blocks in a ring
_FEW_ROWS = 32  # query rows up to which `mla_few_rows` is the faster kernel


class Shape(NamedTuple):
  """How the work is cut; all of it follows from the operands' shapes.

  Attributes:
    many: whether `mla_many_rows` computes it, and not `mla_few_rows`.
    rows: N, query rows of a tile, a multiple of 8.
    tiles: R, tiles of the query rows of a batch row.
    chunks: chunks of 64 numbers of an entry that are loaded.
    value_chunks: chunks of values that each of the two consumers multiplies.
    together: chunks in a stage of the ring of `mla_few_rows`.
    stages: stages of that ring.
    programs: G, thread blocks among which the blocks of all batch rows are divided, for each tile.
  """

  many: bool
  rows: int
  tiles: int
  chunks: int
  value_chunks: int
  together: int
  stages: int
  programs: int

  @property
  def groups(self) -> int:
    """Stages that a block takes."""
    return self.chunks // self.together

  @property
  def scratch(self) -> int:
    """Numbers of a consumer's memory for reductions: 4 warps' pairs, for some columns at once."""
    return 256 * min(self.rows // 8, 4)

  @property
  def values(self) -> int:
    """Columns of the parts: those of values, up to a multiple of 128."""
    return WARPGROUPS * self.value_chunks * CHUNK


def shape_of(q_BTHC: jax.Array, cache: jax.Array, value_width: int, programs: int | None = None,
             many: bool | None = None) -> Shape:
  """Returns how the work on these operands is cut.

  Args:
    q_BTHC, cache, value_width: see `mla_decode.run`.
    programs: thread blocks of all tiles together; None for one for each multiprocessor of an H200.
    many: see `Shape`; None for the faster kernel.
  """
  batch, positions, heads, width = q_BTHC.shape
  value_chunks = pl.cdiv(value_width, WARPGROUPS * CHUNK)
  chunks = max(pl.cdiv(width, CHUNK), WARPGROUPS * value_chunks)
  if many is None:
    many = positions * heads > _FEW_ROWS
  # `mla_many_rows` puts its weights where a chunk without values was, and needs memory for the
  # queries and two blocks.
  many = (many and chunks > WARPGROUPS * value_chunks
          and 3 * chunks * ROWS * CHUNK * 2 < _SHARED_MEMORY)
  tiles = pl.cdiv(positions * heads, ROWS)
  rows = ROWS if many else pl.cdiv(pl.cdiv(positions * heads, tiles), 8) * 8
  together = max(each for each in (1, 2, 3) if chunks % each == 0)
  shape = Shape(many, rows, tiles, chunks, value_chunks, together, 0, 0)
  chunk_bytes = CHUNK * 2
  others = (chunks + WARPGROUPS) * rows * chunk_bytes + WARPGROUPS * shape.scratch * 4
  stages = (_SHARED_MEMORY - others) // (together * TOKENS * chunk_bytes)
  blocks = batch * pl.cdiv(cache.shape[2], TOKENS)
  return shape._replace(
      stages=min(stages, _MOST_BLOCKS * shape.groups),
      programs=max(1, min((programs or MULTIPROCESSORS) // tiles, blocks)))


class Schedule(NamedTuple):
  """Which thread block has which blocks of which batch rows.

  Part g + b is what thread block g computes of row b.

  Attributes:
    ends_B: number of blocks of the rows up to this one, and of this one.
    plan: int32 [G, 4], for each thread block its first and last row, and its first block and the
      one after its last, counted over all rows. If it has none, its last row precedes its first.
    parts_B2: the first and last part of each row.
  """

  ends_B: jax.Array
  plan: jax.Array
  parts_B2: jax.Array


def schedule(lengths_B: jax.Array, positions: int, slots: int, programs: int) -> Schedule:
  """Divides the blocks of all rows evenly among thread blocks.

  Args:
    lengths_B: int32, number of tokens in each row before the new ones.
    positions: T, the number of new ones.
    slots: S.
    programs: G.
  """
  blocks_B = pl.cdiv(jnp.minimum(lengths_B + positions, slots), TOKENS)
  ends_B = jnp.cumsum(blocks_B)
  each = pl.cdiv(ends_B[-1], programs)
  begins_G = jnp.arange(programs) * each
  stops_G = jnp.minimum(begins_G + each, ends_B[-1])
  row_of = lambda block_G: jnp.sum(ends_B <= block_G[:, None], 1)
  plan = jnp.stack([row_of(begins_G), row_of(stops_G - 1), begins_G, stops_G], 1)
  firsts = jnp.stack([ends_B - blocks_B, ends_B - 1], 1) // each
  parts_B2 = firsts + jnp.arange(len(lengths_B))[:, None]
  return Schedule(*(x.astype(jnp.int32) for x in (ends_B, plan, parts_B2)))


class Job(NamedTuple):
  """What is the same for all blocks of a launch.

  Attributes:
    shape: how the work is cut.
    positions, heads: T and H.
    scale: multiplies the scores, to base 2.
    interpreted: whether Pallas' interpreter runs the kernel, on a CPU.
  """

  shape: Shape
  positions: int
  heads: int
  scale: float
  interpreted: bool


def each_row(lengths_B: jax.Ref, ends_B: jax.Ref, plan: jax.Ref, visit: Callable) -> jax.Array:
  """Calls step = visit(row, length, first block, blocks, step) for this thread block's rows.

  Returns the last step.
  """
  program = lax.axis_index("program")
  begin, stop = plan[program, 2], plan[program, 3]

  def one(row, step):
    start = jnp.where(row > 0, ends_B[jnp.maximum(row - 1, 0)], 0)
    first = jnp.maximum(begin - start, 0)
    count = jnp.minimum(stop, ends_B[row]) - start - first
    return visit(row, lengths_B[row], first, count, step)

  return lax.fori_loop(plan[program, 0], plan[program, 1] + 1, one, jnp.int32(0))


def meet(barrier: jax.Ref) -> None:
  """Waits for the other consumer."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def load_queries(job: Job, wg, row, q_BNC: jax.Ref, q_smem: jax.Ref, q_full: jax.Ref,
                 together: jax.Ref) -> None:
  """Loads a row's queries, half of them in each consumer, once both have used the ones before.

  The producer does not do this, so that it can run ahead to the next row's entries.

  Args:
    job: see `Job`.
    wg: index of the consumer.
    row: the batch row.
    q_BNC: all queries, in global memory.
    q_smem: place for those of a tile, [chunks, N, 64].
    q_full: barrier that completes when they have landed.
    together: barrier that completes when both consumers have arrived.
  """
  shape = job.shape
  meet(together)
  half = pl.cdiv(shape.chunks, WARPGROUPS)

  @pl.loop(wg * half, jnp.minimum((wg + 1) * half, shape.chunks))
  def _(chunk):
    rows = pl.ds(lax.axis_index("tile") * shape.rows, shape.rows)
    plgpu.copy_gmem_to_smem(
        q_BNC.at[row, rows, pl.ds(chunk * CHUNK, CHUNK)],
        as_rows(q_smem, chunk, interpreted=job.interpreted), q_full)

  plgpu.barrier_wait(q_full)


def masked(job: Job, scores: jax.Array, length, visible, at, rows_axis: int) -> jax.Array:
  """Returns the scores of a block, minus infinity where a position does not see a token.

  Args:
    job: see `Job`.
    scores: in registers.
    length: number of tokens in the batch row before the new ones.
    visible: number of slots that any position sees.
    at: slot of the block's first token.
    rows_axis: axis of query rows; the other one is that of tokens.
  """
  iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=LAYOUT)
  end = length + 1
  if job.positions > 1:
    row = iota(rows_axis) + lax.axis_index("tile") * job.shape.rows
    end += lax.div(row, jnp.int32(job.heads))
  return jnp.where(iota(1 - rows_axis) + at < jnp.minimum(end, visible), scores, -jnp.inf)


def accumulated(job: Job, add: Callable, values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """Returns what add(accumulators) makes of accumulators that begin with these values."""
  if not job.interpreted:
    return tuple(pl.run_state(add)(tuple(map(plgpu.ACC.init, values))))
  # The interpreter has no accumulators with initial values.
  more = lambda *sums: (add(sums), tuple(each[...] for each in sums))[1]
  products = pl.run_scoped(more, *[plgpu.ACC(each.shape, jnp.float32) for each in values])
  return tuple(each + product for each, product in zip(values, products, strict=True))


def zero_values(chunk: jax.Ref, tokens) -> None:
  """Zeroes a chunk of a block from token `tokens` on: weights of zero do not remove NaN."""
  token = plgpu.broadcasted_iota(jnp.int32, (TOKENS, CHUNK), 0, layout=LAYOUT)
  values = plgpu.load(chunk, layout=LAYOUT)
  chunk[...] = jnp.where(token < tokens, values, jnp.zeros_like(values))


def filled(value: float, shape: tuple[int, ...], layout) -> jax.Array:
  """Returns float32 registers with the same number everywhere."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def unknown_zero(job: Job) -> jax.Array | int:
  """Returns a zero which the compiler does not know, so that it does not compute addresses early.

  Otherwise it computes all wgmmas' descriptors before the loop over blocks, and as there are more
  than registers, it keeps them in local memory.
  """
  if job.interpreted:
    return 0

  @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
  def zero(_):
    i32 = ir.IntegerType.get_signless(32)
    value = llvm.inline_asm(i32, [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
    return FragmentedArray.splat(value, (), is_signed=True)

  return zero()


def params() -> plgpu.CompilerParams:
  return plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0)
