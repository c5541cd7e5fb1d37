"""SwiGLU's backward pass on Hopper, whose results are quantised both ways while on the chip.

Two warpgroups share a thread block, of 128 rows of 128 hidden units. First each takes half of the
rows, writes their gradients quantised along rows, and overwrites the inputs in shared memory with
gradients and hidden units in bfloat16. Then each takes half of the columns of those, transposed by
the load to registers, and writes them quantised along columns. Two blocks fit on a multiprocessor,
so that one loads while the other computes. `fp8_kernel` explains the constructs of Pallas.

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
from pallas_kernels.mosaic_gpu.hopper import ROWS, WARPGROUPS, pad_rows
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
# No reduction here crosses warps. With the scratch memory for those, no second block would fit.
_PARAMS = dataclasses.replace(COMPILER_PARAMS, reduction_scratch_bytes=0)


@dataclasses.dataclass(frozen=True)
class BfloatQuantizer(Quantizer):
  """A quantiser for bfloat16, whose few bits make quotients cheap."""

  def values(self, x: jax.Array, scale: jax.Array, axes: Sequence[int], layout) -> jax.Array:
    """Returns the same values as `Quantizer.values`, bit for bit: see test_swiglu_backward.py."""
    if self.divides:
      return super().values(x, scale, axes, layout)
    broadcast = lambda y: plgpu.layout_cast(lax.broadcast_in_dim(y, x.shape, axes), layout)
    x, inverse = widened(x, layout, interpreted=False), 1 / scale
    if self.power_of_two:
      quotient = x * broadcast(inverse)
    else:
      residual = _fused(_inverse_residual, layout.reduce(1), scale, inverse)
      quotient = _fused(_quotient, layout, x, broadcast(inverse), broadcast(residual))
    return quotient.astype(FORMATS[self.format].dtype)


class _Refs(NamedTuple):
  """The memory and barriers that a thread block works on.

  Attributes:
    values, scales: gradients of gate and up, quantised along rows.
    values_t, scales_t: their transpose, quantised along its rows.
    hidden_t, hidden_scales_t: the transpose of the hidden units, quantised along its rows.
    dgates: parts of the gates' gradient, one for each 128 hidden units.
    tiles: shared memory for gate, up and dhidden, later for dgate, dup and the hidden units.
    values_smem: staging buffer for quantised values, which TMA stores.
    loaded: an mbarrier for each warpgroup, completed by the loads of its inputs.
    written: an mbarrier at which both warpgroups arrive when `tiles` hold results.
  """

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
  """The rows and columns that a warpgroup works on.

  Attributes:
    block_row, block_column: position of the thread block, in blocks of 128.
    wg: index of the warpgroup.
    width: F, the number of hidden units.
  """

  block_row: jax.Array
  block_column: jax.Array
  wg: jax.Array
  width: int

  @property
  def rows(self):
    """The warpgroup's 64 rows."""
    return self.step(0, ROWS)

  def step(self, first: int, count: int = STEP):
    """Returns `count` of the warpgroup's rows, from its row `first` on."""
    return pl.ds(self.block_row * BLOCK + self.wg * ROWS + first, count)

  def columns(self, half: int):
    """Returns the block's columns of gate (half 0, also those of hidden units) or up (half 1)."""
    return pl.ds(half * self.width + self.block_column * BLOCK, BLOCK)


def run(
    gate_up: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
    power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float,
    interpret: Any = None) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """Returns quantised gradients and hidden units; see `pallas_kernels.swiglu_backward_quantize`.

  Args:
    gate_up: [M, 2 F], gate first: bfloat16, or quantised with 1x128 scales.
    gates_M: the factor of each row.
    dhidden_MF: bfloat16, gradient of the hidden units.
    format, power_of_two, smallest_amax, smallest_gradient_amax: see
      `pallas_kernels.swiglu_backward_quantize`.
    interpret: see `quantize.run`.

  Returns:
    The gradient of gate and up, its transpose, the transpose of the hidden units, and the gradient
    of the gates.
  """
  (rows, width), small = dhidden_MF.shape, FORMATS[format].dtype
  grid, interpreted = (pl.cdiv(rows, BLOCK), width // BLOCK), interpret is not None
  padding = grid[0] * BLOCK - rows
  hidden_quantizer, gradient_quantizer = (
      BfloatQuantizer(format, power_of_two, smallest, interpreted)
      for smallest in (smallest_amax, smallest_gradient_amax))
  if isinstance(gate_up, Quantized):
    inputs = jnp.pad(gate_up.values_MK, ((0, padding), (0, 0))), gate_up.scales
  else:
    inputs = pad_rows(gate_up),

  def kernel(gates, dhidden, *refs):
    gate_up, results = refs[:len(inputs)], refs[len(inputs):]
    refs = _Refs(*results[:7], results[7:10], *results[10:])
    place = _Place(*this_block(grid), lax.axis_index("wg"), width)
    fetch, load = _inputs(gate_up, dhidden, gates, refs, place, interpreted)
    _along_rows(gradient_quantizer, fetch, load, refs, place)
    # A column has rows of both warpgroups, so both must have written theirs.
    plgpu.barrier_arrive(refs.written)
    plgpu.barrier_wait(refs.written)
    _along_columns(gradient_quantizer, hidden_quantizer, refs, place)

  tile = swizzled(BLOCK, dhidden_MF.dtype)
  values, scales, values_t, scales_t, hidden_t, hidden_scales_t, dgates = plgpu.kernel(
      kernel, out_type=_results(grid, small),
      grid=(math.prod(grid),), grid_names=("block",), num_threads=WARPGROUPS, thread_name="wg",
      scratch_types=(
          tile, tile, tile, swizzled(BLOCK, small),
          plgpu.Barrier(num_arrivals=3 if len(inputs) == 1 else 1, num_barriers=WARPGROUPS),
          plgpu.Barrier(num_arrivals=WARPGROUPS)),
      compiler_params=_PARAMS, interpret=interpret, kernel_name="swiglu_backward",
  )(jnp.pad(gates_M.astype(jnp.float32), (0, padding)), pad_rows(dhidden_MF), *inputs)
  transposed = lambda values, scales: Quantized(values[:, :rows], scales, (1, BLOCK))
  return (Quantized(values[:rows], scales, (1, BLOCK)), transposed(values_t, scales_t),
          transposed(hidden_t, hidden_scales_t), dgates[:rows].sum(1))


def _results(grid: tuple[int, int], small: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the types of the results, in the order of the first attributes of `_Refs`."""
  rows, columns = (count * BLOCK for count in grid)
  shapes = (((rows, 2 * columns), small), ((2 * grid[1], rows), jnp.float32),
            ((2 * columns, rows), small), ((grid[0], 2 * columns), jnp.float32),
            ((columns, rows), small), ((grid[0], columns), jnp.float32),
            ((rows, grid[1]), jnp.float32))
  return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def _inputs(
    gate_up, dhidden, gates, refs: _Refs, place: _Place, interpreted: bool
) -> tuple[Callable, Callable]:
  """Starts the loads of a warpgroup's rows to shared memory.

  Shared memory has no room for quantised inputs, so these are loaded to registers, step by step.

  Returns:
    Two functions of a step's first row: `fetch` loads the gates and quantised inputs of the step to
    registers, ahead of time; `load` returns gate, up, dhidden and gates of the step in float32.
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
    """Loads gates and quantised inputs of a step, before they are needed."""
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
      x_SF = x_SF.astype(jnp.float16).astype(jnp.float32)  # exact; FP8 converts by way of float16
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
  """Writes gradients quantised along rows, and overwrites the inputs in shared memory.

  There gradients and hidden units are kept in bfloat16, for `_along_columns`.
  """
  layout = _rows_layout()
  for first, _ in steps(ROWS, STEP):
    piece, rows = _piece(place.wg, first), place.step(first)
    *gradients, hidden_SF, dgates_S = backward_in_registers(*load(first), layout, quantizer.divides)
    refs.tiles[2][piece] = hidden_SF
    store_in_column(refs.dgates.at[rows, pl.ds(place.block_column, 1)], dgates_S, layout)
    for k, x_SF in enumerate(gradients):
      refs.tiles[k][piece] = x_SF
      if k:
        fetch(first + STEP)  # here, where few registers are in use
      scale_S = quantizer.scale(jnp.abs(x_SF).max(1))
      compat.store(refs.values.at[rows, place.columns(k)],
                   quantizer.values(x_SF, scale_S, (0,), layout))
      compat.store(refs.scales.at[k * place.width // BLOCK + place.block_column, rows], scale_S)


def _along_columns(
    gradient_quantizer: Quantizer, hidden_quantizer: Quantizer, refs: _Refs,
    place: _Place) -> None:
  """Writes this warpgroup's half of the columns, transposed and quantised along columns."""
  half, layout = _half(place.wg), plgpu.Layout.WGMMA
  gradients, hidden = (refs.values_t, refs.scales_t), (refs.hidden_t, refs.hidden_scales_t)
  for k, (quantizer, (values, scales)) in enumerate((
      (gradient_quantizer, gradients), (gradient_quantizer, gradients),
      (hidden_quantizer, hidden))):
    columns = pl.ds(
        k % 2 * place.width + place.block_column * BLOCK + place.wg * ROWS, ROWS)
    x_KM = plgpu.load(refs.tiles[k].at[:, half].T, layout=layout)
    scale_K = quantizer.scale(jnp.abs(x_KM).max(1))
    compat.store(scales.at[place.block_row, columns], scale_K)
    values_KM = quantizer.values(x_KM, scale_K, (0,), layout)
    # The copy before this one must have read `values_smem`.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.values_smem[half] = values_KM
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        refs.values_smem.at[half], values.at[columns, pl.ds(place.block_row * BLOCK, BLOCK)])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows_layout():
  """Returns the register layout of a step's rows."""
  return row_layout(jnp.dtype(jnp.bfloat16))


def _half(wg: jax.Array):
  """Returns a warpgroup's 64 rows, or columns, of a block."""
  return pl.ds(wg * ROWS, ROWS)


def _piece(wg: jax.Array, first: int):
  """Returns the rows of a warpgroup's step, counted from the block's first row."""
  return pl.ds(wg * ROWS + first, STEP)


def backward_in_registers(
    gate_SF: jax.Array, up_SF: jax.Array, dhidden_SF: jax.Array, gate_S: jax.Array, layout,
    interpreted: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes the backward pass for some rows.

  Args:
    gate_SF, up_SF, dhidden_SF: inputs and the gradient of the hidden units, float32.
    gate_S: the factor of each row.
    layout: register layout of the matrices.
    interpreted: whether Pallas' interpreter runs this.

  Returns:
    Gradients of gate and of up and the hidden units, in bfloat16, and each row's sum for the gates'
    gradient.
  """
  scale_SF = plgpu.layout_cast(lax.broadcast_in_dim(gate_S, gate_SF.shape, (0,)), layout)
  sigmoid_SF = sigmoid(gate_SF)
  silu_SF = gate_SF * sigmoid_SF
  hidden_SF = silu_SF * up_SF
  dswiglu_SF = dhidden_SF * scale_SF
  dgate_SF = dswiglu_SF * up_SF * (sigmoid_SF + silu_SF * (1 - sigmoid_SF))
  gradients = (rounded(x, layout, interpreted) for x in (dgate_SF, dswiglu_SF * silu_SF))
  return (*gradients, (hidden_SF * scale_SF).astype(jnp.bfloat16), (dhidden_SF * hidden_SF).sum(1))


def rounded(x: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Rounds float32 to bfloat16, two numbers with one instruction.

  The compiler rounds each number separately where it is widened again later. An optimization
  barrier in between would prevent that, but in jax 0.11.2 and 0.12 it swaps numbers in registers
  of more than four bytes.
  """
  if interpreted:
    return x.astype(jnp.bfloat16)
  return _fused(_bfloat16_of_float32, layout, x, dtype=jnp.bfloat16)


def widened(x: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Widens bfloat16 to float32 by one instruction a number; the compiler takes one and a half."""
  if interpreted:
    return x.astype(jnp.float32)
  return _fused(_float32_of_bfloat16, layout, x)


def _fused(operation: Callable, layout, *operands: jax.Array, dtype=jnp.float32) -> jax.Array:
  """Applies an operation on MLIR vectors to arrays in registers, vector by vector.

  Args:
    operation: takes and returns MLIR values.
    layout: register layout of the operands and of the result.
    *operands: bfloat16 or float32.
    dtype: dtype of the result.
  """
  @plgpu.inline_mgpu(
      arg_types=(layout,) * len(operands),
      return_type=plgpu.ShapeDtypeStruct(operands[0].shape, dtype, layout=layout))
  def fused(_, first: FragmentedArray, *others: FragmentedArray):
    return first._pointwise(operation, *others)

  return fused(*operands)


def _float32_of_bfloat16(x: ir.Value) -> ir.Value:
  """Widens pairs of bfloat16: a shift and a mask put each in the upper half of 32 bits."""
  length, i32 = ir.VectorType(x.type).shape[0], ir.IntegerType.get_signless(32)
  pairs = ir.VectorType.get((length // 2,), i32)
  constant = lambda value: arith.constant(
      pairs, ir.DenseElementsAttr.get_splat(pairs, ir.IntegerAttr.get(i32, value)))
  x = vector.bitcast(pairs, x)
  both = vector.interleave(arith.shli(x, constant(16)), arith.andi(x, constant(-1 << 16)))
  return vector.bitcast(ir.VectorType.get((length,), ir.F32Type.get()), both)


def _bfloat16_of_float32(x: ir.Value) -> ir.Value:
  """Rounds pairs of float32 with PTX's cvt for two."""
  length, i32 = ir.VectorType(x.type).shape[0], ir.IntegerType.get_signless(32)
  at = lambda index: arith.constant(i32, index)
  pairs = llvm.mlir_undef(ir.VectorType.get((length // 2,), i32))
  for pair in range(length // 2):
    low, high = (llvm.extractelement(x, at(2 * pair + i)) for i in range(2))
    both = llvm.inline_asm(i32, [low, high], "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
    pairs = llvm.insertelement(pairs, both, at(pair))
  return vector.bitcast(ir.VectorType.get((length,), ir.BF16Type.get()), pairs)


def _inverse_residual(by: ir.Value, inverse: ir.Value) -> ir.Value:
  """Returns 1 / by - inverse, to first order: the rounding error of the inverse."""
  one = arith.constant(by.type, ir.DenseElementsAttr.get_splat(
      by.type, ir.FloatAttr.get(ir.F32Type.get(), 1.0)))
  return arith.mulf(llvm.intr_fma(arith.negf(by), inverse, one), inverse)


def _quotient(x: ir.Value, inverse: ir.Value, residual: ir.Value) -> ir.Value:
  """Returns x / by, from the rounded inverse of `by` and that inverse's residual."""
  return llvm.intr_fma(x, inverse, arith.mulf(x, residual))


def unsupported_reason(
    gate_up: jax.Array | Quantized, gates_M: jax.Array, dhidden_MF: jax.Array, *, format: str,
    power_of_two: bool, smallest_amax: float, smallest_gradient_amax: float) -> str | None:
  """Returns why `run` cannot take these arguments, or None if it can."""
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
