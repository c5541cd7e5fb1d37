"""Absorbed latent attention for many query rows on Hopper, which is bound by arithmetic.

A tile has 64 query rows. Its queries and two blocks of 64 tokens fill the shared memory. Of each
pair of blocks, either of two consumer warpgroups computes the scores of one. They agree on the
largest score of each row, exchange their weights, and each sums one half of the values' columns of
both blocks. A block's halves are released and loaded separately: the first half that a consumer is
done with is the first it needs of the next pair.

Weights lie where the rotated keys of their block have been, which only its scores need.

Shape letters:  B batch  C width of an entry  V width of the values  N query rows of a tile, 64
                R tiles  P parts  K tokens of a block
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.mosaic_gpu import mla_schedule as shared
from pallas_kernels.mosaic_gpu.hopper import ROWS, WARPGROUPS, as_rows, swizzle
from pallas_kernels.mosaic_gpu.mla_schedule import CHUNK, LAYOUT, TOKENS, Job

_PER_ROW = LAYOUT.reduce(1)  # of an array with one number for each query row
_HALVES = 2  # of the values' columns, one for each consumer
_PAIR = 2    # blocks that are in shared memory at a time, one for each consumer


class Refs(NamedTuple):
  """Memory and barriers of a thread block.

  Attributes:
    q_BNC, cache: operands in global memory.
    parts, lse_parts: float32 results in global memory, [R, P, N, V] and [R, P, N]; the latter are
      logarithms to base 2.
    blocks: both blocks in chunks, [2 * chunks, K, 64]: first those of values, the rest is rotated.
    q_smem: the tile of queries, [chunks, N, 64].
    largest: a number of each consumer for each row.
    full, empty: barriers of each block's halves, two for a block.
    rest_full, rest_empty: barriers of each block's other chunks.
    q_full: completes when queries have landed.
    together: completes when both consumers have arrived.
  """

  q_BNC: jax.Ref
  cache: jax.Ref
  parts: jax.Ref
  lse_parts: jax.Ref
  blocks: jax.Ref
  q_smem: jax.Ref
  largest: jax.Ref
  full: jax.Ref
  empty: jax.Ref
  rest_full: jax.Ref
  rest_empty: jax.Ref
  q_full: jax.Ref
  together: jax.Ref


def scratch_types(shape: shared.Shape) -> tuple:
  """Returns the types of the memory and barriers in `Refs`, after those of the arrays."""
  memory = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzle(2))
  return (
      memory((_PAIR * shape.chunks, TOKENS, CHUNK)),
      memory((shape.chunks, ROWS, CHUNK)),
      plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=shape.value_chunks, num_barriers=_PAIR * _HALVES),
      plgpu.Barrier(num_barriers=_PAIR * _HALVES),
      plgpu.Barrier(num_arrivals=_rest(shape), num_barriers=_PAIR),
      plgpu.Barrier(num_barriers=_PAIR),
      plgpu.Barrier(num_arrivals=shape.chunks),
      plgpu.Barrier(num_arrivals=WARPGROUPS))


def _rest(shape: shared.Shape) -> int:
  """Returns how many chunks of an entry hold no values."""
  return shape.chunks - _HALVES * shape.value_chunks


def fetch(refs: Refs, job: Job, layer, each_row) -> None:
  """The producer: loads the entries of all blocks."""
  shape = job.shape

  def visit(row, length, first, count, step):
    del length

    def load(pair, block, chunk, full):
      # A row with an odd number of blocks has its last one twice; the second is masked.
      token = (first + jnp.minimum(_PAIR * pair + block, count - 1)) * TOKENS
      # TMA fills what lies past the last slot or past an entry's end with zeros.
      plgpu.copy_gmem_to_smem(
          refs.cache.at[layer, row, pl.ds(token, TOKENS), pl.ds(chunk * CHUNK, CHUNK)],
          as_rows(refs.blocks, block * shape.chunks + chunk, interpreted=job.interpreted), full)

    def one(pair, _):
      used = step + pair > 0
      # Halves in the order in which they are released.
      for block, half in ((0, 0), (1, 1), (0, 1), (1, 0)):
        index = _HALVES * block + half
        pl.when(used)(functools.partial(plgpu.barrier_wait, refs.empty.at[index]))
        for chunk in range(half * shape.value_chunks, (half + 1) * shape.value_chunks):
          load(pair, block, chunk, refs.full.at[index])
      for block in range(_PAIR):
        pl.when(used)(functools.partial(plgpu.barrier_wait, refs.rest_empty.at[block]))
        pl.loop(_HALVES * shape.value_chunks, shape.chunks)(
            lambda chunk, block=block: load(pair, block, chunk, refs.rest_full.at[block]))

    pairs = pl.cdiv(count, _PAIR)
    lax.fori_loop(0, pairs, one, None)
    return step + pairs

  @pl.when(each_row(visit) > 0)
  def _():  # the releases that are left
    for index in range(_PAIR * _HALVES):
      plgpu.barrier_wait(refs.empty.at[index])
    for block in range(_PAIR):
      plgpu.barrier_wait(refs.rest_empty.at[block])


def compute(refs: Refs, job: Job, wg: int, each_row) -> None:
  """A consumer: computes the parts of all rows of this thread block."""
  shape = job.shape

  def visit(row, length, first, count, step):
    shared.load_queries(job, wg, row, refs.q_BNC, refs.q_smem, refs.q_full, refs.together)
    visible = jnp.minimum(length + job.positions, refs.cache.shape[2])  # to any position
    # Blocks that all positions see whole need no mask.
    whole = lax.div(jnp.minimum(length + 1, visible), TOKENS) - first
    whole = lax.div(jnp.clip(whole, 0, count), _PAIR)

    def pair(masked, i, carry):
      if not masked:
        return _pair(refs, job, wg, None, None, carry)
      mine = _PAIR * i + wg
      at = (first + jnp.minimum(mine, count - 1)) * TOKENS
      last = jnp.where(mine < count, visible, 0)
      mask = functools.partial(shared.masked, job, length=length, visible=last, at=at, rows_axis=0)
      return _pair(refs, job, wg, mask, functools.partial(_clean, refs, job, wg, visible - at),
                   carry)

    carry = (shared.filled(shared.LOWEST, (ROWS,), _PER_ROW), shared.filled(0, (ROWS,), _PER_ROW),
             tuple(shared.filled(0, (ROWS, CHUNK), LAYOUT) for _ in range(shape.value_chunks)))
    pairs = pl.cdiv(count, _PAIR)
    carry = lax.fori_loop(0, whole, functools.partial(pair, False), carry)
    carry = lax.fori_loop(whole, pairs, functools.partial(pair, True), carry)
    _store(refs, job, wg, lax.axis_index("program") + row, carry)
    return step + pairs

  each_row(visit)


def _pair(refs: Refs, job: Job, wg, mask, clean, carry):
  """Adds two blocks to the maximum, the sum of this consumer's weights, and the sums of values."""
  shape, other = job.shape, 1 - wg
  largest_N, sum_N, values = carry
  rotated = _HALVES * shape.value_chunks
  zero = shared.unknown_zero(job)
  place = lambda block, chunk: refs.blocks.at[block * shape.chunks + chunk + zero]

  def score(product):
    multiply = lambda chunk: plgpu.wgmma(product, refs.q_smem.at[chunk + zero], place(wg, chunk).T)
    for half in (wg, other):
      plgpu.barrier_wait(refs.full.at[_HALVES * wg + half])
      for index in range(shape.value_chunks):
        multiply(half * shape.value_chunks + index)
    plgpu.barrier_wait(refs.rest_full.at[wg])
    for chunk in range(rotated, shape.chunks):
      multiply(chunk)
    return product[...]

  scores_NK = pl.run_scoped(score, plgpu.ACC((ROWS, TOKENS), jnp.float32)) * job.scale
  if mask is not None:
    scores_NK = mask(scores_NK)
    clean(place)
  before_N = largest_N
  mine_N = jnp.maximum(before_N, scores_NK.max(1))
  compat.store(refs.largest.at[wg], mine_N)
  shared.meet(refs.together)
  largest_N = jnp.maximum(mine_N, _load_rows(refs, other))
  shrink_N = jnp.exp2(before_N - largest_N)
  weights_NK = jnp.exp2(scores_NK - lax.broadcast_in_dim(largest_N, scores_NK.shape, [0]))
  sum_N = sum_N * shrink_N + weights_NK.sum(1)
  weights_NK = weights_NK.astype(jnp.bfloat16)
  compat.store(place(wg, rotated), weights_NK)
  plgpu.commit_smem()
  values = [each * lax.broadcast_in_dim(shrink_N, each.shape, [0]) for each in values]

  def add(sums):
    def multiply(block, weights_NK):
      for index, product in enumerate(sums):
        weights = place(block, rotated) if job.interpreted else weights_NK
        plgpu.wgmma(product, weights, place(block, wg * shape.value_chunks + index))

    multiply(wg, weights_NK)
    shared.meet(refs.together)
    plgpu.barrier_wait(refs.full.at[_HALVES * other + wg])
    multiply(other, None if job.interpreted else plgpu.load(place(other, rotated), layout=LAYOUT))
    plgpu.wgmma_wait(shape.value_chunks)  # the products of the first block are complete
    plgpu.barrier_arrive(refs.empty.at[_HALVES * wg + wg])

  values = shared.accumulated(job, add, values)
  plgpu.barrier_arrive(refs.empty.at[_HALVES * other + wg])
  plgpu.barrier_arrive(refs.rest_empty.at[other])
  return largest_N, sum_N, values


def _load_rows(refs: Refs, wg) -> jax.Array:
  return plgpu.load(refs.largest.at[wg], layout=_PER_ROW, optimized=False)


def _clean(refs: Refs, job: Job, wg, tokens, place) -> None:
  """Zeroes the values of this consumer's block from token `tokens` on."""
  @pl.when(tokens < TOKENS)
  def _():
    for chunk in range(_HALVES * job.shape.value_chunks):
      shared.zero_values(place(wg, chunk), tokens)
    plgpu.commit_smem()


def _store(refs: Refs, job: Job, wg, part, carry) -> None:
  """Writes a part of the result."""
  shape, tile = job.shape, lax.axis_index("tile")
  largest_N, sum_N, values = carry
  compat.store(refs.largest.at[wg], sum_N)
  shared.meet(refs.together)
  sum_N += _load_rows(refs, 1 - wg)
  inverse_N = jnp.where(sum_N > 0, 1 / sum_N, 0.0)
  for index, each in enumerate(values):
    column = (wg * shape.value_chunks + index) * CHUNK
    compat.store(refs.parts.at[tile, part, :, pl.ds(column, CHUNK)],
                 each * lax.broadcast_in_dim(inverse_N, each.shape, [0]))

  @pl.when(wg == 0)
  def _():
    compat.store(refs.lse_parts.at[tile, part], largest_N + jnp.log2(sum_N))
