"""Quantisation on Hopper. It is memory-bound, so every element is read once and written once.

A thread block is one warpgroup and quantises one piece of the matrix, 128 columns wide. TMA loads
the piece into shared memory and stores the quantised values from there, and clips both at the last
row. Several blocks share a multiprocessor, so that some load while others compute. `fp8_kernel`
explains the constructs of Pallas that are used here.

Shape letters:  M rows  K columns  R rows of 128 columns  S rows in registers at a time
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
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu.hopper import pad_rows, swizzle
from pallas_kernels.quantized import BLOCK, FORMATS, Quantized, cast_to

# With a smaller maximum the residual in `divide` could be subnormal, and would be rounded.
LEAST_AMAX = 1e-20
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Pallas need not put barriers around accesses to shared memory: no thread reads what another
    # one wrote without a `commit_smem`, which is a barrier, in between.
    unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the work is cut.

  Attributes:
    rows: rows of 128 columns that a thread block quantises; always 128 if scales span 128 rows.
    step: rows that are in registers at a time, a multiple of 16 that divides `rows` and 128.
  """

  rows: int = 64
  step: int = 32

  def __post_init__(self):
    if self.step % 16 or self.rows % self.step or BLOCK % self.step:
      raise ValueError("Tiling's step must be a multiple of 16 that divides 128 and rows, and is "
                       f"{self.step} of {self.rows} rows")


def run(
    x_MK: jax.Array, tile: tuple[int, int], *, format: str, power_of_two: bool,
    smallest_amax: float, tiling: Tiling | None = None, interpret: Any = None) -> Quantized:
  """Quantises a matrix; see `pallas_kernels.quantize`.

  Args:
    x_MK: [..., M, K], float32 or bfloat16, finite.
    tile: rows and columns that share a scale: 1x128, 128x1 or 128x128.
    format, power_of_two, smallest_amax: see `pallas_kernels.quantize`.
    tiling: how the work is cut; None means the default.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, on a CPU.
  """
  tiling = tiling or Tiling()
  rows, columns = math.prod(x_MK.shape[:-1]), x_MK.shape[-1]
  if tile[0] > 1:
    tiling = dataclasses.replace(tiling, rows=BLOCK)
  x = pad_rows(x_MK.reshape(rows, columns))
  # Scales of rows are stored for a multiple of 128 rows.
  grid = (pl.cdiv(rows, BLOCK) * BLOCK // tiling.rows, columns // BLOCK)
  scales_shape = {(1, BLOCK): (grid[1], grid[0] * tiling.rows), (BLOCK, 1): (grid[0], columns),
                  (BLOCK, BLOCK): grid}[tile]
  quantizer = Quantizer(format, power_of_two, smallest_amax, interpret is not None)
  dtype = FORMATS[format].dtype

  def kernel(x, values, scales, x_smem, values_smem, scales_smem, loaded):
    i, j = this_block(grid)
    place = (pl.ds(i * tiling.rows, tiling.rows), pl.ds(j * BLOCK, BLOCK))
    plgpu.copy_gmem_to_smem(x.at[place], x_smem, loaded)
    plgpu.barrier_wait(loaded)
    if tile == (1, BLOCK):
      write_scale = lambda first, scale_S: compat.store(
          scales.at[j, pl.ds(i * tiling.rows + first, tiling.step)], scale_S)
      quantizer.rows(x_smem, values_smem, tiling.step, write_scale)
    elif tile == (BLOCK, 1):
      scale_K = quantizer.columns(x_smem, values_smem, scales_smem, tiling.step)
      compat.store(scales.at[i, place[1]], scale_K)
    else:
      scales[i, j] = quantizer.block(x_smem, values_smem, tiling.step)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values.at[place])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  values, scales = plgpu.kernel(
      kernel,
      out_type=(jax.ShapeDtypeStruct(x.shape, dtype),
                jax.ShapeDtypeStruct(scales_shape, jnp.float32)),
      grid=(math.prod(grid),), grid_names=("block",),
      scratch_types=(swizzled(tiling.rows, x_MK.dtype), swizzled(tiling.rows, dtype),
                     plgpu.SMEM((BLOCK,), jnp.float32), plgpu.Barrier()),
      compiler_params=COMPILER_PARAMS, interpret=interpret, kernel_name="quantize",
  )(x)
  if tile == (1, BLOCK):
    return of_rows(values[:rows], scales, x_MK.shape)
  counts = (-(-x_MK.shape[-2] // tile[0]), x_MK.shape[-1] // tile[1])
  return Quantized(values[:rows].reshape(x_MK.shape),
                   scales.reshape(*x_MK.shape[:-2], *counts), tile)


def of_rows(values_RK: jax.Array, scales_kR: jax.Array, shape: tuple[int, ...]) -> Quantized:
  """Returns a matrix, or several below one another, as an array of this shape with 1x128 scales."""
  values, tile = values_RK.reshape(shape), (1, BLOCK)
  if values.ndim == 2:
    return Quantized(values, scales_kR, tile)
  return Quantized.of(values, scales_kR.T[:len(values_RK)].reshape(*values.shape[:-1], -1), tile)


def unsupported_reason(
    x_MK: jax.Array, tile: tuple[int, int], *, format: str, power_of_two: bool,
    smallest_amax: float) -> str | None:
  """Returns why `run` cannot take these arguments, or None if it can."""
  if tile not in ((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)):
    return f"needs tiles of 1x128, 128x1 or 128x128, and they are {tile[0]}x{tile[1]}"
  if x_MK.ndim > 2 and tile[0] > 1 and x_MK.shape[-2] % BLOCK:
    return ("needs M to be a multiple of 128 where tiles have 128 rows and there are several "
            f"matrices, and it is {x_MK.shape[-2]}")
  if FORMATS[format].dtype.itemsize > 1 and not power_of_two:
    # With other scales `divide` could round wrongly.
    return f"has {format} with powers of two for scales only"
  return unsupported_numbers(x_MK, smallest_amax)


def unsupported_any(
    x_MK: jax.Array, *, format: str, power_of_two: bool, smallest_amax: float) -> str | None:
  """Returns why kernels that support only formats of one byte cannot take this, or None."""
  del power_of_two
  if FORMATS[format].dtype.itemsize > 1:
    return f"has no {format}"
  return unsupported_numbers(x_MK, smallest_amax)


def unsupported_numbers(x_MK: jax.Array, smallest_amax: float) -> str | None:
  """Returns why none of the quantisation kernels can take this, or None."""
  if x_MK.shape[-1] % BLOCK:
    return f"needs the last axis to be a multiple of 128, and it is {x_MK.shape[-1]}"
  if x_MK.size == 0:
    return f"needs at least one row, and the shape is {x_MK.shape}"
  if smallest_amax < LEAST_AMAX:
    return f"needs smallest_amax to be at least {LEAST_AMAX}, and it is {smallest_amax}"
  return None


KERNEL = implementations.Kernel(run, unsupported_reason)


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """Quantises a piece of 128 columns from shared memory to shared memory.

  Attributes:
    format, power_of_two, smallest_amax: see `pallas_kernels.quantize`.
    divides: whether to use the ordinary division, as the interpreter must. Otherwise `divide`,
      which is inline code for the GPU.
  """

  format: str
  power_of_two: bool
  smallest_amax: float
  divides: bool

  def rows(self, x_smem, values_smem, step: int, write_scale: Callable) -> None:
    """Quantises with 1x128 scales; calls write_scale(first row, scales) for each step."""
    layout = row_layout(x_smem.dtype)
    for first, piece in steps(x_smem.shape[0], step):
      x_SK = plgpu.load(x_smem.at[piece], layout=layout)
      write_scale(first, self.row_values(x_SK, values_smem.at[piece], layout))

  def row_values(self, x_SK: jax.Array, values_smem, layout) -> jax.Array:
    """Quantises rows in registers with 1x128 scales, and returns the scales."""
    scale_S = self.scale(jnp.abs(x_SK).max(1))
    values_smem[...] = self.values(x_SK, scale_S, (0,), layout)
    return scale_S

  def columns(self, x_smem, values_smem, scales_smem, step: int) -> jax.Array:
    """Quantises with 128x1 scales, and returns the scales."""
    scale_K = self.column_scales(x_smem, scales_smem, step)
    layout = row_layout(x_smem.dtype)
    broadcast_K = plgpu.load(scales_smem, layout=layout.reduce(0), optimized=False)
    self._scaled(x_smem, values_smem, step, broadcast_K, (1,), layout)
    return scale_K

  def column_scales(self, x_smem, scales_smem, step: int) -> jax.Array:
    """Returns 128x1 scales, and stores them to shared memory, where other lanes load theirs."""
    scale_K = self.scale(self.largest(x_smem, step, column_layout(x_smem.dtype)).max(0))
    compat.store(scales_smem, scale_K)
    plgpu.commit_smem()
    return scale_K

  def block(self, x_smem, values_smem, step: int) -> jax.Array:
    """Quantises with one 128x128 scale, and returns it."""
    layout = row_layout(x_smem.dtype)
    scale = self.scale(self.largest(x_smem, step, layout).max(1).max(0))
    self._scaled(x_smem, values_smem, step, scale, (), layout)
    return scale

  def largest(self, x_smem, step: int, layout) -> jax.Array:
    """Returns the elementwise maximum of the magnitudes in all steps: [S, 128]."""
    largest_SK = None
    for _, piece in steps(x_smem.shape[0], step):
      x_SK = jnp.abs(plgpu.load(x_smem.at[piece], layout=layout))
      largest_SK = x_SK if largest_SK is None else jnp.maximum(largest_SK, x_SK)
    return largest_SK

  def scale(self, amax: jax.Array) -> jax.Array:
    """Returns scales for these maxima, bit for bit those of `scales_of` in `ops.quantize`."""
    scale = jnp.maximum(amax.astype(jnp.float32), self.smallest_amax)
    scale = scale / FORMATS[self.format].largest
    if not self.power_of_two:
      return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    bits = (bits + 0x7FFFFF) & 0x7F800000  # carries into the exponent unless the mantissa is zero
    return lax.bitcast_convert_type(bits, jnp.float32)

  def values(self, x: jax.Array, scale: jax.Array, axes: Sequence[int], layout) -> jax.Array:
    """Returns x divided by scales that lie along these axes, rounded to the format.

    No quotient is rounded to more than the format's largest value, so nothing need saturate.
    """
    broadcast = lambda y: plgpu.layout_cast(lax.broadcast_in_dim(y, x.shape, axes), layout)
    x = x.astype(jnp.float32)
    if self.power_of_two:
      quotient = x * broadcast(1 / scale)
    elif self.divides:
      quotient = x / broadcast(scale)
    else:
      quotient = divide(x, broadcast(scale), broadcast(1 / scale), layout)
    return cast_to(quotient, FORMATS[self.format])

  def _scaled(self, x_smem, values_smem, step: int, scale, axes, layout) -> None:
    """Divides a piece by its scales, step by step."""
    for _, piece in steps(x_smem.shape[0], step):
      x_SK = plgpu.load(x_smem.at[piece], layout=layout)
      values_smem[piece] = self.values(x_SK, scale, axes, layout)


def this_block(grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
  """Returns the row and column of this thread block in a grid that is launched as one axis.

  CUDA allows more than 65535 blocks along the first axis only.
  """
  block = lax.axis_index("block")
  return lax.div(block, grid[1]), lax.rem(block, grid[1])


def steps(rows: int, step: int) -> list[tuple[int, Any]]:
  """Returns the first row and the slice of every step of `step` rows."""
  return [(first, pl.ds(first, step)) for first in range(0, rows, step)]


def sigmoid(x: jax.Array) -> jax.Array:
  """Returns 1 / (1 + exp(-x)) to within a few units in the last place, without a division."""
  return lax.square(lax.rsqrt(1 + jnp.exp(-x)))


def divide(x: jax.Array, by: jax.Array, inverse: jax.Array, layout) -> jax.Array:
  """Returns x / by in three instructions, where the compiler's exact division takes about twelve.

  x * inverse is off by at most 1.5 units in the last place. A fused multiply-add computes its
  residual, and a second one corrects the quotient by that, to within 2^-22 of a unit (Markstein,
  IBM Journal of Research and Development 34, 1990). The remaining error changes no FP8 value: see
  test_quantize_gpu.py.

  Args:
    x: dividends, float32.
    by: divisors.
    inverse: 1 / by, rounded to float32.
    layout: register layout of all three.
  """
  @plgpu.inline_mgpu(
      arg_types=(layout, layout, layout),
      return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
  def corrected(_, x: FragmentedArray, by: FragmentedArray, inverse: FragmentedArray):
    return x._pointwise(_corrected_quotient, by, inverse)

  return corrected(x, by, inverse)


def _corrected_quotient(x, by, inverse):
  quotient = arith.mulf(x, inverse)
  residual = llvm.intr_fma(arith.negf(quotient), by, x)
  return llvm.intr_fma(residual, inverse, quotient)


def row_layout(dtype: jnp.dtype):
  """Returns a register layout in which a lane holds 16 bytes of a row, for reductions along rows.

  Few lanes share a row, so a reduction takes few shuffles, and none between warps. Shapes must be
  multiples of 64 columns and, for bfloat16, 16 rows.
  """
  width = 16 // dtype.itemsize
  tiles = ((2 * width, 64), (width // 2, 64), (width,))
  return plgpu.Layout.TILED(
      plgpu.Tiling(tiles), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def store_in_column(ref, row_S: jax.Array, layout) -> None:
  """Stores a vector that was reduced along the rows of `layout` to a column of memory, [S, 1]."""
  (rows, _), (rows_of_warp, _), _ = layout.to_mgpu().tiling.tiles
  column = plgpu.Layout.TILED(
      plgpu.Tiling(((rows, 1), (rows_of_warp, 1))), warp_dims=(-4,),
      lane_dims=(-2, plgpu.Replicated(32 // rows_of_warp)), vector_dim=-1)
  compat.store(ref, plgpu.layout_cast(lax.broadcast_in_dim(row_S, ref.shape, (0,)), column))


def column_layout(dtype: jnp.dtype):
  """Returns a register layout in which one warp holds a whole column, for reductions along columns.

  A lane holds 16 bytes of a row. Lanes, eight at a time, take rows that are half the height of the
  swizzle's pattern apart, so that they access different banks. Shapes must be multiples of 128
  columns and, for bfloat16, 8 rows.
  """
  width = 16 // dtype.itemsize
  tiles = ((width, 128), (width, 32), (width // 2, width))
  return plgpu.Layout.TILED(
      plgpu.Tiling(tiles), warp_dims=(-5,), lane_dims=(-2, -4, -3), vector_dim=-1)


def swizzled(rows: int, dtype: jnp.dtype):
  """Returns a type of shared memory, swizzled so that lanes of a column access different banks."""
  return plgpu.SMEM((rows, BLOCK), dtype, transforms=swizzle(dtype.itemsize))
