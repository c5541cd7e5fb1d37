"""Absorbed latent attention over a cache on Hopper, for decoding.

`mla_schedule` says how the work is divided. One of two kernels computes parts of the result,
`mla_few_rows` or `mla_many_rows`, and a third combines them. `fp8_kernel` explains the constructs
of Pallas.

Shape letters:  L layers  B batch  S slots  T query positions  H heads  C width of an entry
                V width of the values  N query rows of a tile  R tiles  P parts
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu import mla_few_rows, mla_many_rows
from pallas_kernels.mosaic_gpu.hopper import WARPGROUPS
from pallas_kernels.mosaic_gpu.mla_few_rows import TRANSPOSED
from pallas_kernels.mosaic_gpu.mla_schedule import (
    CHUNK,
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    LOWEST,
    Job,
    Schedule,
    Shape,
    each_row,
    filled,
    params,
    schedule,
    shape_of,
)


def run(
    q_BTHC: jax.Array, cache: jax.Array, layer: jax.Array, lengths_B: jax.Array, *,
    value_width: int, scale: float, programs: int | None = None, many: bool | None = None,
    interpret: Any = None) -> tuple[jax.Array, jax.Array]:
  """Returns weighted sums of values and log-sum-exps; see `pallas_kernels.mla_decode`.

  Args:
    q_BTHC: bfloat16.
    cache: bfloat16 [L, B, S, C].
    layer: int32 scalar.
    lengths_B: int32.
    value_width: V.
    scale: multiplies the scores.
    programs, many: see `mla_schedule.shape_of`.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, on a CPU.
  """
  batch, positions, heads, width = q_BTHC.shape
  shape = shape_of(q_BTHC, cache, value_width, programs, many)
  plan = schedule(lengths_B, positions, cache.shape[2], shape.programs)
  q_BNC = q_BTHC.reshape(batch, positions * heads, width)
  padding = shape.tiles * shape.rows - positions * heads
  q_BNC = jnp.pad(q_BNC, ((0, 0), (0, padding), (0, 0))) if padding else q_BNC
  parts = _attend(shape, positions, heads, scale * math.log2(math.e), plan, q_BNC, cache,
                  layer.reshape(1), lengths_B, interpret)
  out_BRNV, lse_BRN = _combine(shape, value_width, plan.parts_B2, *parts, q_BTHC.dtype, interpret)
  out_BNV = out_BRNV.reshape(batch, -1, out_BRNV.shape[-1])[:, :positions * heads, :value_width]
  lse_BN = lse_BRN.reshape(batch, -1)[:, :positions * heads]
  return (out_BNV.reshape(batch, positions, heads, value_width),
          lse_BN.reshape(batch, positions, heads))


def _attend(
    shape: Shape, positions: int, heads: int, scale: float, plan: Schedule, q_BNC, cache, layer_1,
    lengths_B, interpret) -> list[jax.Array]:
  """Returns the parts of the result, [R, P, N, V] and [R, P, N]."""
  job = Job(shape, positions, heads, scale, interpret is not None)
  form = mla_many_rows if shape.many else mla_few_rows
  most_parts = shape.programs + len(lengths_B) - 1

  def kernel(layer_1, lengths_B, ends_B, plan, *refs):
    refs, wg = form.Refs(*refs), lax.axis_index("wg")
    visits = functools.partial(each_row, lengths_B, ends_B, plan)

    @pl.when(wg == WARPGROUPS)
    def _():
      plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
      form.fetch(refs, job, layer_1[0], visits)

    def consume(consumer):
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      form.compute(refs, job, consumer, visits)

    # With a branch for each consumer, the addresses of its half are known while compiling.
    if shape.many:
      for consumer in range(WARPGROUPS):
        pl.when(wg == consumer)(functools.partial(consume, consumer))
    else:  # which is no slower
      pl.when(wg < WARPGROUPS)(functools.partial(consume, wg))

  return plgpu.kernel(
      kernel, kernel_name="mla_decode",
      out_type=(
          jax.ShapeDtypeStruct((shape.tiles, most_parts, shape.rows, shape.values), jnp.float32),
          jax.ShapeDtypeStruct((shape.tiles, most_parts, shape.rows), jnp.float32)),
      grid=(shape.programs, shape.tiles), grid_names=("program", "tile"),
      num_threads=WARPGROUPS + 1, thread_name="wg", scratch_types=form.scratch_types(shape),
      compiler_params=params(), interpret=interpret,
  )(layer_1, lengths_B, plan.ends_B, plan.plan, q_BNC, cache)


def _combine(shape: Shape, value_width, parts_B2, parts, lse_parts, dtype, interpret):
  """Returns the results of all rows, [B, R, N, V] and [B, R, N], from their parts."""
  batch, columns = len(parts_B2), pl.cdiv(value_width, CHUNK)
  per_row = TRANSPOSED.reduce(0)

  def kernel(parts_B2, parts, lse_parts, out, lse):
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    at = pl.ds(lax.axis_index("column") * CHUNK, CHUNK)

    def add(part, carry):
      largest_N, sum_N, total_VN = carry
      lse_N = plgpu.load(lse_parts.at[tile, part], layout=per_row, optimized=False)
      new_N = jnp.maximum(largest_N, lse_N)
      shrink_N, weight_N = jnp.exp2(largest_N - new_N), jnp.exp2(lse_N - new_N)
      values_VN = plgpu.load(parts.at[tile, part, :, at].T, layout=TRANSPOSED, optimized=False)
      wide = lambda x_N: lax.broadcast_in_dim(x_N, values_VN.shape, [1])
      return (new_N, sum_N * shrink_N + weight_N,
              total_VN * wide(shrink_N) + values_VN * wide(weight_N))

    largest_N, sum_N, total_VN = lax.fori_loop(
        parts_B2[row, 0], parts_B2[row, 1] + 1, add,
        (filled(LOWEST, (shape.rows,), per_row), filled(0, (shape.rows,), per_row),
         filled(0, (CHUNK, shape.rows), TRANSPOSED)))
    total_VN /= lax.broadcast_in_dim(sum_N, total_VN.shape, [1])
    compat.store(out.at[row, tile, :, at].T, total_VN.astype(dtype))

    @pl.when(lax.axis_index("column") == 0)
    def _():
      compat.store(lse.at[row, tile], (largest_N + jnp.log2(sum_N)) * math.log(2))

  return plgpu.kernel(
      kernel, kernel_name="mla_decode_combine",
      out_type=(jax.ShapeDtypeStruct((batch, shape.tiles, shape.rows, columns * CHUNK), dtype),
                jax.ShapeDtypeStruct((batch, shape.tiles, shape.rows), jnp.float32)),
      grid=(batch, shape.tiles, columns), grid_names=("row", "tile", "column"),
      compiler_params=params(), interpret=interpret)(parts_B2, parts, lse_parts)


def unsupported_reason(
    q_BTHC: jax.Array, cache: jax.Array, layer: jax.Array, lengths_B: jax.Array, *,
    value_width: int, scale: float) -> str | None:
  """Returns why `run` cannot take these operands, or None if it can."""
  del layer, lengths_B, scale
  if q_BTHC.dtype != jnp.bfloat16 or cache.dtype != jnp.bfloat16:
    return f"needs bfloat16, not queries in {q_BTHC.dtype} and a cache in {cache.dtype}"
  if not q_BTHC.size or not cache.size:
    return f"needs queries and a cache, and their shapes are {q_BTHC.shape} and {cache.shape}"
  if cache.shape[3] % 16:
    return f"needs the width of an entry to be a multiple of 16, and it is {cache.shape[3]}"
  shape = shape_of(q_BTHC, cache, value_width)
  if not shape.many and shape.stages < shape.groups:
    return f"has too little shared memory for entries {cache.shape[3]} wide"
  return None


KERNEL = implementations.Kernel(run, unsupported_reason)
