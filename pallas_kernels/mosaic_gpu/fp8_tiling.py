"""How an FP8 product is cut into tiles on Hopper, and which products can be cut so.

The kernel that these tilings are for is in `fp8_matmul`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu.hopper import MULTIPROCESSORS, ROWS, WARPGROUPS
from pallas_kernels.quantized import Quantized

_COPY_BYTES = 16  # TMA needs rows of a multiple of it


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How an FP8 product is cut into tiles.

  Registers limit a tile's size. A consumer warpgroup holds the float32 sums of its 64 or 128 rows
  and, beside them, `depth` wgmma accumulators of 64 rows. Each 64 rows of `block_n` columns take
  block_n / 2 registers of every thread, and (waves + depth) * block_n may be at most 384: 192 of
  the 240 registers that a thread has.

  L2 bandwidth asks for large tiles. At the tensor cores' full rate, a multiprocessor with a tile of
  128 x 128 asks L2 for 64 bytes a cycle, which is more than L2 gives. A tile of 256 x 128, or a
  cluster of two, asks for 48 bytes, and both together for 32.

  Attributes:
    block_m: rows of a tile, 128 or 256; each of the two consumer warpgroups has half of them.
    block_n: columns of a tile, a multiple of 32, at most 192.
    depth: products that a warpgroup has in flight, 1 or 2, each in an accumulator of its own; a
      product is 64 rows by `block_n` columns by 128 of K.
    stages: length of the ring in shared memory, in blocks of 128 of K; more than `depth`.
    swizzle: order in which tiles are computed (L2 rasterisation): bands of this many columns of
      tiles are finished one after another, so that tiles that run at the same time share operands
      in L2. With a cluster, a column is as wide as the cluster.
    cluster: thread blocks in a cluster, 1, 2 or 4. Their tiles are neighbours along N, and their
      common block of lhs is fetched once and multicast to all of them.
    shared: whether several multiprocessors may sum parts of a tile, for results of few tiles. Each
      then has the same number of blocks of 128 of K, and the parts are added afterwards.
    swapped: whether the transpose of the result is computed, rhs @ lhs.T, for an lhs of few rows:
      the instruction's 64 rows are then those of rhs, and its columns the few rows of lhs.
  """

  block_m: int = 128
  block_n: int = 128
  depth: int = 2
  stages: int = 5
  swizzle: int = 8
  cluster: int = 1
  shared: bool = False
  swapped: bool = False

  def __post_init__(self):
    if (self.block_m not in (128, 256) or self.block_n % 32 or self.block_n < 32
        or self.depth not in (1, 2) or self.cluster not in (1, 2, 4)
        or self.stages <= self.depth or self.swizzle < 1):
      raise ValueError(f"the kernel does not support {self}; see Tiling for what it supports")
    if self.swapped and not self.shared:
      raise ValueError(f"{self} swaps operands, so tiles must be shared")
    if self.shared and self.cluster > 1:
      raise ValueError(f"{self} divides tiles among multiprocessors, so it can have no clusters")
    if (self.waves + self.depth) * self.block_n > 384:
      raise ValueError(f"{self} leaves too few registers: (block_m / 128 + depth) * block_n must "
                       "be at most 384; narrow block_n, or set depth to 1")

  @property
  def waves(self) -> int:
    """Products of 64 rows, the height of a wgmma, that cover a warpgroup's rows: 1 or 2."""
    return self.block_m // (WARPGROUPS * ROWS)

  def row(self, wave: int) -> jax.Array:
    """Returns the first row, within the tile, of this warpgroup's wave."""
    return (lax.axis_index("wg") * self.waves + wave) * ROWS


def unsupported_columns(size: int, dtype: jnp.dtype) -> str | None:
  """Returns why a result with this many columns N cannot be stored, or None if it can."""
  multiple = _COPY_BYTES // jnp.dtype(dtype).itemsize
  if size == 0 or size % multiple:
    return (f"needs N of a {jnp.dtype(dtype).name} result to be a multiple of {multiple}, and it "
            f"is {size}")
  return None


def unsupported_formats(lhs: Quantized, rhs: Quantized, dtype: jnp.dtype) -> str | None:
  """Returns why the kernel does not support the operands' or the result's dtype, or None."""
  formats = lhs.values_MK.dtype, rhs.values_MK.dtype
  if formats != (jnp.float8_e4m3fn, jnp.float8_e4m3fn):
    return f"needs both operands in float8_e4m3fn, and they are {formats[0]} and {formats[1]}"
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"returns bfloat16 or float32, not {jnp.dtype(dtype)}"
  return None


def default_tiling(
    dtype: jnp.dtype, vectors: bool, shape: tuple[int, int] | None = None) -> Tiling:
  """Returns the tiling for shapes that were not tuned: the most stages that fit in shared memory.

  Those are 5 for tiles of 128 rows, or 4 with a float32 result, which takes twice the room, and 3
  for tiles of 256 rows with either result. None of these tilings spills registers.

  With 1x128 scales on both operands, a tile of 256 rows reads rhs's scales half as often as two
  tiles of 128 rows, and takes 1.8 times as long as one. Where tiles of 256 rows would leave too
  many multiprocessors idle in the last round, tiles of 128 rows are taken.

  Args:
    dtype: dtype of the result.
    vectors: whether rhs has 1x128 scales, one for each row, rather than 128x128.
    shape: shape of the result if its tiles are all that the kernel computes; None otherwise.
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
