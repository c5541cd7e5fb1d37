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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu.hopper import ROWS, WARPGROUPS, k_major, pad_rows
from pallas_kernels.mosaic_gpu.quantize import (
  COMPILER_PARAMS,
  Quantizer,
  row_layout,
  sigmoid,
  steps,
  store_in_column,
  swizzled,
  this_block,
  unsupported_any,
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
    x, inverse = widened(x, layout, interpreted=False), 1 / scale
    if self.power_of_two:
      quotient = x * along(inverse)
    else:
      rest = _fused(_rest_of_inverse, layout.reduce(1), scale, inverse)
      quotient = _fused(_quotient, layout, x, along(inverse), along(rest))
    return quotient.astype(FORMATS[self.format].dtype)


class _Refs(NamedTuple):
  """Results, as `_results` says, and shared memory: inputs or what comes of them in `tiles`."""

  values: Any
  scales: Any
  values_t: Any
  scales_t: Any
  hidden_t: Any
  hidden_scales_t: Any
  dgates: Any
  tiles: Sequence[Any]
  values_smem: Any
  loaded: Any
  written: Any


class _Place(NamedTuple):
  """Where a warpgroup works.

  Attributes:
    block_row, block_column: in blocks of 128.
    wg: which warpgroup it is.
    width: F.
  """

  block_row: jax.Array
  block_column: jax.Array
  wg: jax.Array
  width: int

  @property
  def rows(self):
    return self.step(0, ROWS)

  def step(self, first: int, count: int = STEP):
    return pl.ds(self.block_row * BLOCK + self.wg * ROWS + first, count)

  def columns(self, half: int):
    """Of gate or up; those of gate are the hidden units' too."""
    return pl.ds(half * self.width + self.block_column * BLOCK, BLOCK)


def run(
    gate_up: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
    power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float,
    interpret: Any = None) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """See `pallas_kernels.swiglu_backward_quantize`, and `quantize.run` for interpret."""
  (rows, width), small = dhidden_MF.shape, FORMATS[format].dtype
  grid, interpreted = (pl.cdiv(rows, BLOCK), width // BLOCK), interpret is not None
  below = grid[0] * BLOCK - rows
  of_hidden, of_gradient = (
      BfloatQuantizer(format, power_of_two, smallest, interpreted)
      for smallest in (smallest_amax, smallest_gradient_amax))
  if isinstance(gate_up, Quantized):
    inputs = jnp.pad(gate_up.values_MK, ((0, below), (0, 0))), k_major(gate_up.scales_mk, BLOCK)
  else:
    inputs = pad_rows(gate_up),

  def kernel(gates, dhidden, *refs):
    gate_up, results = refs[:len(inputs)], refs[len(inputs):]
    refs = _Refs(*results[:7], results[7:10], *results[10:])
    place = _Place(*this_block(grid), lax.axis_index("wg"), width)
    fetch, load = _inputs(gate_up, dhidden, gates, refs, place, interpreted)
    _along_rows(of_gradient, fetch, load, refs, place)
    plgpu.barrier_arrive(refs.written)
    plgpu.barrier_wait(refs.written)
    _along_columns(of_gradient, of_hidden, refs, place)

  tile = swizzled(BLOCK, dhidden_MF.dtype)
  values, scales, values_t, scales_t, hidden_t, hidden_scales_t, dgates = plgpu.kernel(
      kernel, out_type=_results(grid, small),
      grid=(math.prod(grid),), grid_names=("block",), num_threads=WARPGROUPS, thread_name="wg",
      scratch_types=(
          tile, tile, tile, swizzled(BLOCK, small),
          plgpu.Barrier(num_arrivals=3 if len(inputs) == 1 else 1, num_barriers=WARPGROUPS),
          plgpu.Barrier(num_arrivals=WARPGROUPS)),
      compiler_params=_PARAMS, interpret=interpret, kernel_name="swiglu_backward",
  )(jnp.pad(gates_M.astype(jnp.float32), (0, below)), pad_rows(dhidden_MF), *inputs)
  transposed = lambda values, scales: Quantized(values[:, :rows], scales.T, (1, BLOCK))
  return (Quantized(values[:rows], scales[:rows], (1, BLOCK)), transposed(values_t, scales_t),
          transposed(hidden_t, hidden_scales_t), dgates[:rows].sum(1))


def _results(grid: tuple[int, int], small: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Values and scales of gradients, of their transpose, of hidden units'; the gates' gradients."""
  rows, columns = (count * BLOCK for count in grid)
  shapes = (((rows, 2 * columns), small), ((rows, 2 * grid[1]), jnp.float32),
            ((2 * columns, rows), small), ((grid[0], 2 * columns), jnp.float32),
            ((columns, rows), small), ((grid[0], columns), jnp.float32),
            ((rows, grid[1]), jnp.float32))
  return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def _inputs(
    gate_up, dhidden, gates, refs: _Refs, place: _Place, interpreted: bool
) -> tuple[Callable, Callable]:
  """Copies a warpgroup's rows to shared memory, which has no room for what is quantised.

  Returns:
    What fetches the rest of a step, given the first of its rows, to registers, ahead of time; and
    what gives gate, up, dhidden and gates of a step in float32.
  """
  layout = _rows_layout()
  copies = [(dhidden, place.columns(0), refs.tiles[2])]
  if len(gate_up) == 1:
    copies += [(gate_up[0], place.columns(k), refs.tiles[k]) for k in range(2)]
  for source, columns, tile in copies:
    plgpu.copy_gmem_to_smem(source.at[place.rows, columns], tile.at[_half(place.wg)],
                            refs.loaded.at[place.wg])
  vector = lambda ref: plgpu.load(ref, layout=layout.reduce(1), optimized=False)
  fetched = {}

  def fetch(first: int) -> None:
    """Gates and quantised inputs of a step, before they are needed."""
    if first == ROWS:
      return
    fetched[first] = vector(gates.at[place.step(first)])
    if len(gate_up) == 2:
      values, scales = gate_up
      for k, block in enumerate((0, place.width // BLOCK)):
        x_SF = values.at[place.step(first), place.columns(k)]
        fetched[k, first] = (
            plgpu.load(x_SF, layout=layout, optimized=False),
            vector(scales.at[block + place.block_column, place.step(first)]))

  def numbers(k: int, first: int) -> jax.Array:
    if (k, first) in fetched:
      x_SF, scale_S = fetched[k, first]
      x_SF = x_SF.astype(jnp.float16).astype(jnp.float32)  # exact, and the way there is
      return x_SF * plgpu.layout_cast(lax.broadcast_in_dim(scale_S, x_SF.shape, (0,)), layout)
    x_SF = plgpu.load(refs.tiles[k].at[_piece(place.wg, first)], layout=layout)
    return widened(x_SF, layout, interpreted)

  def load(first: int) -> tuple[jax.Array, ...]:
    return *(numbers(k, first) for k in range(3)), fetched[first]

  fetch(0)
  plgpu.barrier_wait(refs.loaded.at[place.wg])
  return fetch, load


def _along_rows(
    quantizer: Quantizer, fetch: Callable, load: Callable, refs: _Refs, place: _Place) -> None:
  """Writes gradients along rows, and in bfloat16 those and hidden units where inputs lay."""
  layout = _rows_layout()
  for first, _ in steps(ROWS, STEP):
    piece, rows = _piece(place.wg, first), place.step(first)
    *gradients, hidden_SF, dgates_S = backward_in_registers(*load(first), layout, quantizer.divides)
    refs.tiles[2][piece] = hidden_SF
    store_in_column(refs.dgates.at[rows, pl.ds(place.block_column, 1)], dgates_S, layout)
    for k, x_SF in enumerate(gradients):
      refs.tiles[k][piece] = x_SF
      if k:
        fetch(first + STEP)  # now that few registers are in use
      scale_S = quantizer.scale(jnp.abs(x_SF).max(1))
      compat.store(refs.values.at[rows, place.columns(k)],
                   quantizer.values(x_SF, scale_S, (0,), layout))
      column = pl.ds(k * place.width // BLOCK + place.block_column, 1)
      store_in_column(refs.scales.at[rows, column], scale_S, layout)


def _along_columns(
    of_gradient: Quantizer, of_hidden: Quantizer, refs: _Refs, place: _Place) -> None:
  """Writes gradients and hidden units transposed, half of the columns."""
  half, layout = _half(place.wg), plgpu.Layout.WGMMA
  gradients, hidden = (refs.values_t, refs.scales_t), (refs.hidden_t, refs.hidden_scales_t)
  for k, (quantizer, (values, scales)) in enumerate((
      (of_gradient, gradients), (of_gradient, gradients), (of_hidden, hidden))):
    columns = pl.ds(
        k % 2 * place.width + place.block_column * BLOCK + place.wg * ROWS, ROWS)
    x_KM = plgpu.load(refs.tiles[k].at[:, half].T, layout=layout)
    scale_K = quantizer.scale(jnp.abs(x_KM).max(1))
    compat.store(scales.at[place.block_row, columns], scale_K)
    values_KM = quantizer.values(x_KM, scale_K, (0,), layout)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for what was there before
    refs.values_smem[half] = values_KM
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        refs.values_smem.at[half], values.at[columns, pl.ds(place.block_row * BLOCK, BLOCK)])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows_layout():
  return row_layout(jnp.dtype(jnp.bfloat16))


def _half(wg: jax.Array):
  """A warpgroup's rows, or columns, of a block."""
  return pl.ds(wg * ROWS, ROWS)


def _piece(wg: jax.Array, first: int):
  """The rows of a step, of a block's."""
  return pl.ds(wg * ROWS + first, STEP)


def backward_in_registers(
    gate_SF: jax.Array, up_SF: jax.Array, dhidden_SF: jax.Array, gate_S: jax.Array, layout,
    interpreted: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients and hidden units of some rows, in their format, and sums for the gates' gradients."""
  scale_SF = plgpu.layout_cast(lax.broadcast_in_dim(gate_S, gate_SF.shape, (0,)), layout)
  sigmoid_SF = sigmoid(gate_SF)
  silu_SF = gate_SF * sigmoid_SF
  hidden_SF = silu_SF * up_SF
  dswiglu_SF = dhidden_SF * scale_SF
  dgate_SF = dswiglu_SF * up_SF * (sigmoid_SF + silu_SF * (1 - sigmoid_SF))
  gradients = (rounded(x, layout, interpreted) for x in (dgate_SF, dswiglu_SF * silu_SF))
  return (*gradients, (hidden_SF * scale_SF).astype(jnp.bfloat16), (dhidden_SF * hidden_SF).sum(1))


def rounded(x: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Float32 in bfloat16, two numbers an instruction.

  The compiler rounds each on its own where it is widened again later. An optimization barrier in
  between, as of jax 0.11.2 and 0.12, exchanges numbers of registers of more than four bytes.
  """
  if interpreted:
    return x.astype(jnp.bfloat16)
  return _fused(_bfloat16_of_float32, layout, x, dtype=jnp.bfloat16)


def widened(x: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Bfloat16 in float32, by one instruction a number, where the compiler takes one and a half."""
  if interpreted:
    return x.astype(jnp.float32)
  return _fused(_float32_of_bfloat16, layout, x)


def _fused(operation: Callable, layout, *operands: jax.Array, dtype=jnp.float32) -> jax.Array:
  """An operation on vectors of registers, of bfloat16 or float32."""
  @plgpu.inline_mgpu(
      arg_types=(layout,) * len(operands),
      return_type=plgpu.ShapeDtypeStruct(operands[0].shape, dtype, layout=layout))
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


def _bfloat16_of_float32(x: ir.Value) -> ir.Value:
  length, i32 = ir.VectorType(x.type).shape[0], ir.IntegerType.get_signless(32)
  at = lambda index: arith.constant(i32, index)
  pairs = llvm.mlir_undef(ir.VectorType.get((length // 2,), i32))
  for pair in range(length // 2):
    low, high = (llvm.extractelement(x, at(2 * pair + i)) for i in range(2))
    both = llvm.inline_asm(i32, [low, high], "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
    pairs = llvm.insertelement(pairs, both, at(pair))
  return vector.bitcast(ir.VectorType.get((length,), ir.BF16Type.get()), pairs)


def _rest_of_inverse(by: ir.Value, inverse: ir.Value) -> ir.Value:
  """What `inverse` lacks of 1 / by."""
  one = arith.constant(by.type, ir.DenseElementsAttr.get_splat(
      by.type, ir.FloatAttr.get(ir.F32Type.get(), 1.0)))
  return arith.mulf(llvm.intr_fma(arith.negf(by), inverse, one), inverse)


def _quotient(x: ir.Value, inverse: ir.Value, rest: ir.Value) -> ir.Value:
  return llvm.intr_fma(x, inverse, arith.mulf(x, rest))


def unsupported_reason(
    gate_up: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
    power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float) -> str | None:
  """Why `run` cannot take this, or None if it can."""
  del gates_M
  if isinstance(gate_up, Quantized):
    if gate_up.tile != (1, BLOCK):
      return "needs tiles of 1x128, and gate and up have {}x{}".format(*gate_up.tile)
  elif gate_up.dtype != jnp.bfloat16:
    return f"needs bfloat16, and gate and up are {gate_up.dtype}"
  if dhidden_MF.dtype != jnp.bfloat16:
    return f"needs bfloat16, and dhidden is {dhidden_MF.dtype}"
  return unsupported_any(dhidden_MF, format=format, power_of_two=power_of_two,
                    smallest_amax=min(smallest_amax, smallest_gradient_amax))


KERNEL = implementations.Kernel(run, unsupported_reason)
