"""Absorbed latent attention for few query rows on Hopper, which is memory-bound.

Blocks of 64 tokens are streamed through a ring in shared memory. Both products have tokens or value
columns as the rows of wgmma, of which there are always 64, and the query rows of a batch row, all
its heads and positions, as its columns, of which there may be as few as 8:

  scores^T [tokens, N] = entries [tokens, C] q^T [C, N]
  out^T    [V, N]      = values^T [V, tokens] weights^T [tokens, N]

A producer warpgroup loads. Two consumer warpgroups each compute all scores and weights, and one
half of the values' columns each, so they need not exchange anything.

Shape letters:  B batch  C width of an entry  V width of the values  N query rows of a tile
                R tiles  P parts  K tokens of a block
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import compat
from pallas_kernels.mosaic_gpu import mla_schedule as shared
from pallas_kernels.mosaic_gpu.hopper import WARPGROUPS, as_rows, swizzle
from pallas_kernels.mosaic_gpu.mla_schedule import CHUNK, LAYOUT, TOKENS, Job

_PER_ROW = LAYOUT.reduce(0)  # of an array with one number for each of N query rows
# As wgmma lays out its result, but a thread holds two numbers of a column side by side, not of a
# row, so that it can store them together where columns are contiguous.
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


class Refs(NamedTuple):
  """Memory and barriers of a thread block.

  Attributes:
    q_BNC, cache: operands in global memory.
    parts, lse_parts: float32 results in global memory, [R, P, N, V] and [R, P, N]; the latter are
      logarithms to base 2.
    ring: chunks of 64 tokens in shared memory, [stages * chunks of a stage, K, 64].
    q_smem: the tile of queries, [chunks, N, 64].
    weights: for each consumer its weights, [N, K].
    scratch: for each consumer the memory in which it reduces over tokens.
    full, empty: one mbarrier for each stage of the ring.
    q_full: completes when queries have landed.
    together: completes when both consumers have arrived.
  """

  q_BNC: jax.Ref
  cache: jax.Ref
  parts: jax.Ref
  lse_parts: jax.Ref
  ring: jax.Ref
  q_smem: jax.Ref
  weights: jax.Ref
  scratch: jax.Ref
  full: jax.Ref
  empty: jax.Ref
  q_full: jax.Ref
  together: jax.Ref


def scratch_types(shape: shared.Shape) -> tuple:
  """Returns the types of the memory and barriers in `Refs`, after those of the arrays."""
  memory = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzle(2))
  return (
      memory((shape.stages * shape.together, TOKENS, CHUNK)),
      memory((shape.chunks, shape.rows, CHUNK)),
      memory((WARPGROUPS, shape.rows, TOKENS)),
      plgpu.SMEM((WARPGROUPS, shape.scratch), jnp.float32),
      plgpu.Barrier(num_arrivals=shape.together, num_barriers=shape.stages),
      plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=shape.stages),
      plgpu.Barrier(num_arrivals=shape.chunks),
      plgpu.Barrier(num_arrivals=WARPGROUPS))


def fetch(refs: Refs, job: Job, layer, each_row) -> None:
  """The producer: loads the entries of all blocks."""
  shape = job.shape

  def await_empty(step):
    plgpu.barrier_wait(refs.empty.at[lax.rem(step, shape.stages)])

  def visit(row, length, first, count, step):
    del length

    def stage(i, _):
      slot = lax.rem(step + i, shape.stages)
      pl.when(step + i >= shape.stages)(lambda: await_empty(step + i))
      block, group = first + lax.div(i, shape.groups), lax.rem(i, shape.groups)
      for k in range(shape.together):
        # TMA fills what lies past the last slot or past an entry's end with zeros.
        plgpu.copy_gmem_to_smem(
            refs.cache.at[layer, row, pl.ds(block * TOKENS, TOKENS),
                          pl.ds((group * shape.together + k) * CHUNK, CHUNK)],
            as_rows(refs.ring, slot * shape.together + k, interpreted=job.interpreted),
            refs.full.at[slot])

    lax.fori_loop(0, count * shape.groups, stage, None)
    return step + count * shape.groups

  steps = each_row(visit)
  pl.loop(jnp.maximum(steps - shape.stages, 0), steps)(await_empty)  # the releases that are left


def compute(refs: Refs, job: Job, wg, each_row) -> None:
  """A consumer: computes the parts of all rows of this thread block."""
  shape = job.shape
  program, tile = lax.axis_index("program"), lax.axis_index("tile")

  def visit(row, length, first, count, step):
    shared.load_queries(job, wg, row, refs.q_BNC, refs.q_smem, refs.q_full, refs.together)
    visible = jnp.minimum(length + job.positions, refs.cache.shape[2])  # to any position
    # Blocks that all positions see whole need no mask.
    whole = jnp.clip(lax.div(length + 1, TOKENS) - first, 0, count)
    whole = jnp.minimum(whole, jnp.maximum(lax.div(visible, TOKENS) - first, 0))

    def block(masked, i, carry):
      at = (first + i) * TOKENS
      mask = functools.partial(shared.masked, job, length=length, visible=visible, at=at,
                               rows_axis=1) if masked else None
      clean = functools.partial(_clean, refs, job, wg, visible - at) if masked else None
      return _block(refs, job, wg, step + i * shape.groups, mask, clean, carry)

    matrix = lambda: shared.filled(0, (TOKENS, shape.rows), LAYOUT)
    carry = (shared.filled(shared.LOWEST, (shape.rows,), _PER_ROW), matrix(),
             tuple(matrix() for _ in range(shape.value_chunks)))
    carry = lax.fori_loop(0, whole, functools.partial(block, False), carry)
    carry = lax.fori_loop(whole, count, functools.partial(block, True), carry)
    _store(refs, job, wg, tile, program + row, carry)
    return step + count * shape.groups

  each_row(visit)


def _block(refs: Refs, job: Job, wg, step, mask, clean, carry):
  """Adds a block to the maximum, the sums of weights and the sums of values of query rows."""
  shape = job.shape
  largest_N, sums_KN, values = carry
  slot = lambda group: lax.rem(step + group, shape.stages)
  place = lambda chunk: (slot(lax.div(chunk, shape.together)) * shape.together
                         + lax.rem(chunk, shape.together))
  if clean is not None:
    for group in range(shape.groups):
      plgpu.barrier_wait(refs.full.at[slot(group)])
    clean(place)

  def score(product):
    for chunk in range(shape.chunks):
      if clean is None and chunk % shape.together == 0:
        plgpu.barrier_wait(refs.full.at[slot(chunk // shape.together)])
      plgpu.wgmma(product, refs.ring.at[place(chunk)], refs.q_smem.at[chunk].T)
    return product[...]

  scores_KN = pl.run_scoped(score, plgpu.ACC((TOKENS, shape.rows), jnp.float32)) * job.scale
  if mask is not None:
    scores_KN = mask(scores_KN)
  before_N = largest_N
  largest_N = jnp.maximum(before_N, _over_tokens(refs, job, wg, scores_KN, "max"))
  per_row = lambda x_N: lax.broadcast_in_dim(x_N, (TOKENS, shape.rows), [1])
  weights_KN = jnp.exp2(scores_KN - per_row(largest_N))
  shrink = per_row(jnp.exp2(before_N - largest_N))
  sums_KN = sums_KN * shrink + weights_KN
  compat.store(refs.weights.at[wg].T, weights_KN.astype(jnp.bfloat16))
  plgpu.commit_smem()

  def add(sums):
    for index, product in enumerate(sums):
      plgpu.wgmma(product, refs.ring.at[place(wg * shape.value_chunks + index)].T,
                  refs.weights.at[wg].T)

  values = [each * shrink for each in values]
  values = shared.accumulated(job, add, values)
  for group in range(shape.groups):
    plgpu.barrier_arrive(refs.empty.at[slot(group)])
  return largest_N, sums_KN, values


def _clean(refs: Refs, job: Job, wg, tokens, place) -> None:
  """Zeroes the values of a block from token `tokens` on, half of them in each consumer."""
  @pl.when(tokens < TOKENS)
  def _():
    for index in range(job.shape.value_chunks):
      shared.zero_values(refs.ring.at[place(wg * job.shape.value_chunks + index)], tokens)
    plgpu.commit_smem()
    shared.meet(refs.together)


def _over_tokens(refs: Refs, job: Job, wg, x_KN, operation: str):
  """Returns the maximum or the sum over a block's tokens, which are spread over the four warps.

  Pallas' own reductions do not do, as both consumers would share their memory.
  """
  if job.interpreted:
    return x_KN.max(0) if operation == "max" else x_KN.sum(0)

  @plgpu.inline_mgpu(
      arg_types=(LAYOUT, plgpu.RefType()),
      return_type=plgpu.ShapeDtypeStruct(x_KN.shape[1:], jnp.float32, layout=_PER_ROW))
  def reduced(_, x: FragmentedArray, scratch: ir.Value):
    return x.reduce(operation, 0, scratch)

  return reduced(x_KN, refs.scratch.at[wg])


def _store(refs: Refs, job: Job, wg, tile, part, carry) -> None:
  """Writes a part of the result."""
  shape = job.shape
  largest_N, sums_KN, values = carry
  sum_N = _over_tokens(refs, job, wg, sums_KN, "sum" if job.interpreted else "add")
  inverse_N = jnp.where(sum_N > 0, 1 / sum_N, 0.0)
  for index, each in enumerate(values):
    column = (wg * shape.value_chunks + index) * CHUNK
    out = refs.parts.at[tile, part, :, pl.ds(column, CHUNK)].T
    result = each * lax.broadcast_in_dim(inverse_N, each.shape, [1])
    compat.store(out, plgpu.layout_cast(result, TRANSPOSED))

  @pl.when(wg == 0)
  def _():
    compat.store(refs.lse_parts.at[tile, part], largest_N + jnp.log2(sum_N))
