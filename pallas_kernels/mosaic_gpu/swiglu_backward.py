"""SwiGLU's backward pass on Hopper, quantised both ways while it is on the chip.

Two warpgroups share a block of 128 rows of 128 hidden units. First each takes half of the rows,
writes gradients along them, and leaves gradients and hidden units where their inputs lay. Then each
takes half of the columns of those, which the copy to registers transposes. Blocks are small enough
for two on a multiprocessor, one of which loads while the other computes.

Shape letters:  M rows  F hidden units  S rows of a step  K columns of a warpgroup
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu.hopper import ROWS, WARPGROUPS, pad_rows
from pallas_kernels.mosaic_gpu.quantize import (
    COMPILER_PARAMS,
    Quantizer,
    refuse_any,
    row_layout,
    steps,
    store_in_column,
    swizzled,
    this_block,
)
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized

STEP = 16  # rows in registers at a time
# No reduction here is across warps; with memory for those no second block would fit.
_PARAMS = dataclasses.replace(COMPILER_PARAMS, reduction_scratch_bytes=0)


@dataclasses.dataclass(frozen=True)
class BfloatQuantizer(Quantizer):
  """A quantiser of rows of bfloat16 numbers, whose few bits make quotients cheap."""

  def values(self, x: jax.Array, scale: jax.Array, axes: Sequence[int], layout) -> jax.Array:
    """As `Quantizer.values`, to the bit: see test_swiglu_backward.py."""
    if self.divides:
      return super().values(x, scale, axes, layout)
    along = lambda y: plgpu.layout_cast(lax.broadcast_in_dim(y, x.shape, axes), layout)
    x, inverse = widened(x, layout, self.divides), 1 / scale
    quotient = x * along(inverse)
    if not self.power_of_two:
      rest = _fused(_rest_of_inverse, layout.reduce(1), scale, inverse)
      quotient = _fused(_quotient, layout, x, along(inverse), along(rest))
    return quotient.astype(FORMATS[self.format].dtype)


def run(
    gate_up_M2F: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
    power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float,
    interpret: Any = None) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """See `pallas_kernels.swiglu_backward_quantize`, and `quantize.run` for interpret."""
  (rows, width), small = dhidden_MF.shape, FORMATS[format].dtype
  grid = (pl.cdiv(rows, BLOCK), width // BLOCK)
  padded, interpreted = grid[0] * BLOCK, interpret is not None
  of_hidden, of_gradient = (
      BfloatQuantizer(format, power_of_two, smallest, interpreted)
      for smallest in (smallest_amax, smallest_gradient_amax))

  def kernel(gate_up, gates, dhidden, values, scales, values_t, scales_t, hidden_t,
             hidden_scales_t, dgates, gate_smem, up_smem, dhidden_smem, values_smem, loaded,
             written):
    (i, j), wg = this_block(grid), lax.axis_index("wg")
    half = pl.ds(wg * ROWS, ROWS)
    rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
    columns = [pl.ds(k * width + j * BLOCK, BLOCK) for k in range(2)]
    for source, smem in (
        (gate_up.at[rows, columns[0]], gate_smem), (gate_up.at[rows, columns[1]], up_smem),
        (dhidden.at[rows, columns[0]], dhidden_smem)):
      plgpu.copy_gmem_to_smem(source, smem.at[half], loaded.at[wg])
    layout, firsts = row_layout(dhidden.dtype), [first for first, _ in steps(ROWS, STEP)]
    gates = [plgpu.load(gates.at[pl.ds(i * BLOCK + wg * ROWS + first, STEP)],
                        layout=layout.reduce(1), optimized=False) for first in firsts]
    plgpu.barrier_wait(loaded.at[wg])

    for first, gate_S in zip(firsts, gates, strict=True):
      piece = pl.ds(wg * ROWS + first, STEP)
      rows = pl.ds(i * BLOCK + wg * ROWS + first, STEP)
      *gradients, hidden_SF, dgates_S = _backward(
          *(widened(plgpu.load(smem.at[piece], layout=layout), layout, interpreted)
            for smem in (gate_smem, up_smem, dhidden_smem)), gate_S, layout)
      store_in_column(dgates.at[rows, pl.ds(j, 1)], dgates_S, layout)
      dhidden_smem[piece] = hidden_SF
      for k, (x_SF, smem) in enumerate(zip(gradients, (gate_smem, up_smem), strict=True)):
        x_SF = lax.optimization_barrier(x_SF)
        smem[piece] = x_SF
        scale_S = of_gradient.scale(jnp.abs(x_SF).max(1))
        compat.store(values.at[rows, columns[k]], of_gradient.values(x_SF, scale_S, (0,), layout))
        store_in_column(scales.at[rows, pl.ds(k * grid[1] + j, 1)], scale_S, layout)
    plgpu.barrier_arrive(written)
    plgpu.barrier_wait(written)

    columns = [pl.ds(k * width + j * BLOCK + wg * ROWS, ROWS) for k in range(2)]
    for quantizer, smem, out, out_scales, place in (
        (of_gradient, gate_smem, values_t, scales_t, columns[0]),
        (of_gradient, up_smem, values_t, scales_t, columns[1]),
        (of_hidden, dhidden_smem, hidden_t, hidden_scales_t, columns[0])):
      x_KM = plgpu.load(smem.at[:, half].T, layout=plgpu.Layout.WGMMA)
      scale_K = quantizer.scale(jnp.abs(x_KM).max(1))
      compat.store(out_scales.at[i, place], scale_K)
      values_KM = quantizer.values(x_KM, scale_K, (0,), plgpu.Layout.WGMMA)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      values_smem[half] = values_KM
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(values_smem.at[half], out.at[place, pl.ds(i * BLOCK, BLOCK)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  array = jax.ShapeDtypeStruct
  tile = swizzled(BLOCK, dhidden_MF.dtype)
  values, scales, values_t, scales_t, hidden_t, hidden_scales_t, dgates = plgpu.kernel(
      kernel,
      out_type=(
          array((padded, 2 * width), small), array((padded, 2 * grid[1]), jnp.float32),
          array((2 * width, padded), small), array((grid[0], 2 * width), jnp.float32),
          array((width, padded), small), array((grid[0], width), jnp.float32),
          array((padded, grid[1]), jnp.float32)),
      grid=(math.prod(grid),), grid_names=("block",), num_threads=WARPGROUPS, thread_name="wg",
      scratch_types=(
          tile, tile, tile, swizzled(BLOCK, small),
          plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
          plgpu.Barrier(num_arrivals=WARPGROUPS)),
      compiler_params=_PARAMS, interpret=interpret, kernel_name="swiglu_backward",
  )(pad_rows(gate_up_M2F.reshape(rows, 2 * width)),
    jnp.pad(gates_M.astype(jnp.float32), (0, padded - rows)), pad_rows(dhidden_MF))
  transposed = lambda values, scales: Quantized(values[:, :rows], scales.T, (1, BLOCK))
  return (Quantized(values[:rows], scales[:rows], (1, BLOCK)), transposed(values_t, scales_t),
          transposed(hidden_t, hidden_scales_t), dgates[:rows].sum(1))


def _backward(gate_SF, up_SF, dhidden_SF, gate_S, layout):
  """Gradients and hidden units of some rows, in their format, and sums for the gates' gradients."""
  scale_SF = plgpu.layout_cast(lax.broadcast_in_dim(gate_S, gate_SF.shape, (0,)), layout)
  # 1 / (1 + exp(-gate)), to a few units in the last place and without a division.
  sigmoid_SF = lax.square(lax.rsqrt(1 + jnp.exp(-gate_SF)))
  silu_SF = gate_SF * sigmoid_SF
  hidden_SF = silu_SF * up_SF
  dswiglu_SF = dhidden_SF * scale_SF
  dgate_SF = dswiglu_SF * up_SF * (sigmoid_SF + silu_SF * (1 - sigmoid_SF))
  rounded = (x.astype(jnp.bfloat16) for x in (dgate_SF, dswiglu_SF * silu_SF, hidden_SF * scale_SF))
  return *rounded, (dhidden_SF * hidden_SF).sum(1)


def widened(x: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Bfloat16 in float32, by one instruction a number, where the compiler takes one and a half."""
  if interpreted:
    return x.astype(jnp.float32)
  return _fused(_float32_of_bfloat16, layout, x)


def _fused(operation: Callable, layout, *operands: jax.Array) -> jax.Array:
  """An operation on vectors of registers, of bfloat16 or float32, with a float32 result."""
  @plgpu.inline_mgpu(
      arg_types=(layout,) * len(operands),
      return_type=plgpu.ShapeDtypeStruct(operands[0].shape, jnp.float32, layout=layout))
  def fused(_, first: FragmentedArray, *others: FragmentedArray):
    return first._pointwise(operation, *others)

  return fused(*operands)


def _float32_of_bfloat16(x: ir.Value) -> ir.Value:
  length, i32 = ir.VectorType(x.type).shape[0], ir.IntegerType.get_signless(32)
  pairs = ir.VectorType.get((length // 2,), i32)
  constant = lambda value: arith.constant(
      pairs, ir.DenseElementsAttr.get_splat(pairs, ir.IntegerAttr.get(i32, value)))
  x = vector.bitcast(pairs, x)
  both = vector.interleave(arith.shli(x, constant(16)), arith.andi(x, constant(-1 << 16)))
  return vector.bitcast(ir.VectorType.get((length,), ir.F32Type.get()), both)


def _rest_of_inverse(by: ir.Value, inverse: ir.Value) -> ir.Value:
  """What `inverse` lacks of 1 / by."""
  one = arith.constant(by.type, ir.DenseElementsAttr.get_splat(
      by.type, ir.FloatAttr.get(ir.F32Type.get(), 1.0)))
  return arith.mulf(llvm.intr_fma(arith.negf(by), inverse, one), inverse)


def _quotient(x: ir.Value, inverse: ir.Value, rest: ir.Value) -> ir.Value:
  return llvm.intr_fma(x, inverse, arith.mulf(x, rest))


def refuse(gate_up_M2F: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
           power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float) -> str | None:
  """Why `run` cannot take this, or None if it can."""
  del gates_M
  if {gate_up_M2F.dtype, dhidden_MF.dtype} != {jnp.dtype(jnp.bfloat16)}:
    return ("needs bfloat16, and gate_up and dhidden are "
            f"{gate_up_M2F.dtype} and {dhidden_MF.dtype}")
  return refuse_any(dhidden_MF, format=format, power_of_two=power_of_two,
                    smallest_amax=min(smallest_amax, smallest_gradient_amax))


KERNEL = implementations.Kernel(run, refuse)
