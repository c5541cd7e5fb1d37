"""How an FP8 product is cut into tiles on Hopper, and which products can be cut so.

The kernel that these tilings are for is in `fp8_kernel`. A tiling is chosen by a rule, fitted to
times that were measured on an H200 for shapes drawn at random; `tilings.json` lists exceptions.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu import schedule
from pallas_kernels.mosaic_gpu.hopper import MULTIPROCESSORS, ROWS, WARPGROUPS
from pallas_kernels.quantized import BLOCK, Quantized

_COPY_BYTES = 16  # TMA needs rows of a multiple of it
_SHARED = 225 * 1024  # bytes of shared memory of a block, less some for barriers and alignment


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
    cluster, cluster_m: thread blocks in a cluster along N and along M, each 1, 2 or 4. Blocks along
      N have the same rows of lhs, and blocks along M the same rows of rhs: each is fetched once and
      multicast to them. Grouped products have clusters along N only.
    shared: whether several multiprocessors may sum parts of a tile, for results of few tiles; see
      `schedule.sharers`. The parts are added afterwards.
    share_last: whether several multiprocessors sum parts of the tiles that are left after as many
      whole rounds of tiles as there are. The parts are added afterwards, too.
    swapped: whether the transpose of the result is computed, rhs @ lhs.T, for an lhs of few rows:
      the instruction's 64 rows are then those of rhs, and its columns the few rows of lhs.
  """

  block_m: int = 128
  block_n: int = 128
  depth: int = 2
  stages: int = 5
  swizzle: int = 8
  cluster: int = 1
  cluster_m: int = 1
  shared: bool = False
  share_last: bool = False
  swapped: bool = False

  def __post_init__(self):
    if (self.block_m not in (128, 256) or self.block_n % 32 or self.block_n < 32
        or self.depth not in (1, 2) or self.cluster not in (1, 2, 4)
        or self.cluster_m not in (1, 2, 4) or self.stages <= self.depth or self.swizzle < 1):
      raise ValueError(f"the kernel does not support {self}; see Tiling for what it supports")
    if self.swapped and not self.shared:
      raise ValueError(f"{self} swaps operands, so tiles must be shared")
    if self.share_last and (self.shared or self.cluster * self.cluster_m > 1):
      raise ValueError(f"{self} shares the last round, so it must not share all tiles, nor have "
                       "clusters")
    if self.cluster * self.cluster_m > 8:
      raise ValueError(f"{self} has clusters of more than 8 blocks, the most that CUDA promises")
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


def dense_tiling(dtype: jnp.dtype, vectors: bool, m: int, n: int, k: int) -> Tiling:
  """Returns a tiling for a product of [M, K] and [N, K], by the time that each is expected to take.

  Args:
    dtype: dtype of the result.
    vectors: whether rhs has 1x128 scales, one for each row, rather than 128x128.
    m, n, k: the shape.
  """
  if m <= _FEW_ROWS:
    return _few_rows_tiling(dtype, vectors, m, n, k)
  if vectors:
    return gradient_tiling(dtype, 1, m, n)
  # The times of the other widths were exceeded where many rounds heat the chip. But large results
  # of a small K took up to 1.4 times as long with 128 columns as expected, and not with 192.
  short = k <= 1024 and n > MULTIPROCESSORS * BLOCK
  tiling = lambda width, cluster_m=1, cluster=1: Tiling(
      block_n=width, depth=1 if width > BLOCK else 2, cluster_m=cluster_m, cluster=cluster)
  expected = {tiling(width): (1.0 if width == BLOCK else 0.92 if short else 1.04)
              * _microseconds(width, (1, 1), m, n, k) for width in _MICROSECONDS}
  if m <= _CLUSTERED_ROWS:
    expected |= {tiling(width, *clusters): _microseconds(width, clusters, m, n, k)
                 for width, worthwhile in _CLUSTERS.items() for clusters in worthwhile
                 if m > BLOCK or width == BLOCK}
  if BLOCK < m <= 256:
    expected[Tiling(block_m=256, depth=1)] = _tall_microseconds(n, k)
  shared_last = {dataclasses.replace(tiling(width), share_last=True):
                 _shared_last_microseconds(width, m, n, k) for width in (BLOCK, 192)}
  if min(shared_last.values()) < 0.97 * min(expected.values()):
    expected = shared_last
  best = min(expected, key=expected.get)
  widths = () if m <= 96 else (BLOCK,) if m <= BLOCK else (BLOCK, 192)
  shared = {_fill(dataclasses.replace(tiling(width), shared=True), jnp.float32):
            _shared_microseconds(width, m, n, k) for width in widths}
  if m <= _SWAPPED_ROWS:
    shared[_swapped_tiling(m)] = (1.05 if m <= BLOCK else 1.0) * _swapped_microseconds(m, n, k)
  fastest = min(shared, key=shared.get)
  return fastest if shared[fastest] < expected[best] else _fill(best, dtype)


def _few_rows_tiling(dtype: jnp.dtype, vectors: bool, m: int, n: int, k: int) -> Tiling:
  """Returns `dense_tiling` for products of few rows, most of whose time goes into reading rhs."""
  expected = {_swapped_tiling(m): _swapped_microseconds(m, n, k)}
  if not vectors:
    for width in _DIRECT_MICROSECONDS:
      tiling = Tiling(block_n=width, cluster=2 if width == BLOCK else 1)
      expected[_fill(tiling, dtype)] = _direct_microseconds(width, n, k)
  return min(expected, key=expected.get)


def _swapped_tiling(m: int) -> Tiling:
  """Returns the tiling of a product with swapped operands, for at most 160 rows."""
  # Tiles of 128 columns and a depth of 2 were slow: 15 blocks of K took 23 us, where 13 took 14
  # with 160 columns and a depth of 1.
  width = next(width for width in (32, 64, 96, 160) if m <= width)
  return _fill(Tiling(block_n=width, depth=2 if width < BLOCK else 1, shared=True, swapped=True),
               jnp.float32)


def grouped_tiling(dtype: jnp.dtype, n: int) -> Tiling:
  """Returns a tiling for a grouped product with N columns, for groups of any number of rows."""
  # 192 columns take a little longer than their share.
  narrow, wide = -(-n // BLOCK) * BLOCK, -(-n // 192) * 192
  if 1.04 * wide < narrow:
    return _fill(Tiling(block_n=192, depth=1), dtype)
  return _fill(Tiling(), dtype)


def gradient_tiling(dtype: jnp.dtype, groups: int, k: int, n: int) -> Tiling:
  """Returns a tiling for the gradients of `groups` matrices of [K, N]; operands have 1x128 scales.

  A tile of 256 rows reads rhs's scales half as often as two tiles of 128 rows, and takes 1.85 times
  as long as one. Where tiles of 256 rows would leave too many multiprocessors idle in the last
  round, or exceed the result by too much, tiles of 128 rows are taken.
  """
  rounds = lambda rows: pl.cdiv(groups * pl.cdiv(k, rows) * pl.cdiv(n, BLOCK), MULTIPROCESSORS)
  short = rounds(128) < 1.85 * rounds(256)
  return _fill(Tiling(block_m=128 if short else 256, depth=1), dtype)


_FEW_ROWS, _SWAPPED_ROWS = 64, 160
MOST_PARTS = 6  # of a tile of the last round; each is written and read again
# By the columns of a tile of 128 rows: microseconds before the first round of tiles on all
# multiprocessors, for each round, and for each block of 128 of K in a round. Fitted to 60 shapes of
# 65 to 16384 rows.
_MICROSECONDS = {32: (2.3, 0.1, 0.257), 64: (2.5, 0.1, 0.325), 96: (3.5, 0.3, 0.38),
                 128: (3.0, 0.45, 0.42), 192: (2.5, 0.55, 0.63)}
# For at most 128 rows, whose products take as long as it takes to read rhs: microseconds of a block
# of K for each tile of the round, if that is more than the tile's own time. By the columns of a
# tile; and with 128 columns by the thread blocks of a cluster. Fitted to 24 shapes.
_READING_MICROSECONDS = {32: 0.0028, 64: 0.0033, 96: 0.0035, 128: 0.0055, 192: 0.0071}
_CLUSTERS_READING_MICROSECONDS = {1: 0.0055, 2: 0.0048, 4: 0.0047}
# For at most 64 rows, by the columns of a tile: microseconds before the first round, and for each
# block of 128 of K in a round. The latter is a tile's own time, the second number, or if more the
# third number and, for each tile of the round, the fourth. Fitted to 27 shapes, and 78 before.
_DIRECT_MICROSECONDS = {32: (2.6, 0.195, 0.0, 0.0043), 64: (2.3, 0.19, 0.09, 0.0047),
                        128: (3.45, 0.295, 0.0, 0.0058)}
# With swapped operands, by the most rows: microseconds where all tiles have equally many parts, and
# otherwise; and those of a block of K, which are no less than what it takes to read rhs. Fitted to
# 25 shapes with equally many parts, and 97 others.
_SWAPPED_MICROSECONDS = {32: (3.5, 4.3, 0.4), 64: (4.0, 5.2, 0.4), 96: (5.3, 8.0, 0.4),
                         160: (5.3, 9.5, 0.78)}
_READING_BY_ALL = 0.584  # microseconds in which all multiprocessors read 128 x 128 of rhs each
# With shared tiles of 128 rows, by their columns: microseconds, and those of a block of K, where
# all tiles have equally many parts; and the same otherwise. Fitted to 31 and 24 shapes.
_SHARED_MICROSECONDS = {128: ((5.9, 0.44), (9.5, 0.42)), 192: ((5.9, 0.63), (10.5, 0.63))}
# By the columns of a tile: clusters of thread blocks along M and N that are worth their cost.
_CLUSTERS = {128: ((1, 2), (1, 4), (2, 2)), 192: ((1, 2), (2, 2))}
# With more rows clusters gain little, and one product of 1216 rows took a quarter longer.
_CLUSTERED_ROWS = 1024


def clusters_at_once(size: int) -> int:
  """Returns how many clusters of `size` thread blocks run on an H200 at a time.

  The blocks of a cluster run in one group of multiprocessors, of which there are 16 or 18, so
  clusters of four leave some idle: 30 were seen to run, and not 32.
  """
  return MULTIPROCESSORS // size if size <= 2 else 120 // size


def num_programs(tiling: Tiling, most_tiles: int) -> int:
  """Returns the number of clusters: as many as run at a time, but no more than there are tiles.

  Args:
    tiling: how the result is cut.
    most_tiles: upper bound on the number of tiles, or of groups of tiles that a cluster computes at
      a time.
  """
  size = tiling.cluster_m * tiling.cluster
  return min(MULTIPROCESSORS // size, clusters_at_once(size), most_tiles)


def first_of_last_round(grid: tuple[int, int], programs: int) -> tuple[int, int]:
  """Returns the place of the first tile of those that fill no whole round.

  They are whole rows or whole columns of tiles, so that they are one block of the result.

  Args:
    grid: number of tiles along M and N.
    programs: tiles of a round.
  """
  m, n = grid
  tiles = m * n // programs * programs
  rows, columns = tiles // n, tiles // m
  return (rows, 0) if rows * n > columns * m else (0, columns)


def _microseconds(width: int, clusters: tuple[int, int], m: int, n: int, k: int) -> float:
  """Returns the expected time with tiles of 128 rows and `width` columns, in these clusters."""
  start, per_round, per_block = _MICROSECONDS[width]
  grid = pl.cdiv(m, 128), pl.cdiv(n, width)
  tiles, size = math.prod(grid), math.prod(clusters)
  groups = math.prod(map(pl.cdiv, grid, clusters))
  at_once = clusters_at_once(size)
  rounds = pl.cdiv(groups, at_once)
  if width <= 64 and tiles <= MULTIPROCESSORS // 2:
    per_block *= 0.87  # the idle half leaves them memory and L2
  if grid[0] == 1:
    return (start + 0.5 * (size > 1) + rounds * per_round + pl.cdiv(k, BLOCK) * sum(
        max(per_block * (1.03 if size > 1 else 1.0), _reading_microseconds(width, size, count))
        for count in (min(at_once, groups - done) for done in range(0, groups, at_once))))
  slower = {1: 1.0, 2: 1.03, 4: 1.08}[size]
  if size == 2 and rounds > 1:
    slower = 0.98
  elif size == 2 and width == BLOCK and tiles >= 100 and k >= 4096:
    slower = 0.97
  if width > BLOCK and size > 1:  # each of which fetches more for the same rows
    slower *= 0.95
  slower *= _drift(m, tiles, size, most=60 if width in (96, BLOCK) else 100)
  return start + rounds * (per_round + slower * per_block * pl.cdiv(k, BLOCK))


def _reading_microseconds(width: int, cluster: int, clusters: int = 0) -> float:
  """Returns the time in which so many clusters, or all multiprocessors, read a block of K each."""
  each = (_CLUSTERS_READING_MICROSECONDS[cluster] if width == BLOCK
          else _READING_MICROSECONDS[width])
  return each * cluster * (clusters or MULTIPROCESSORS)


def _tall_microseconds(n: int, k: int) -> float:
  """Returns the expected time of a product of one row of tiles of 256 x 128."""
  return 3.5 + 0.85 * pl.cdiv(k, BLOCK) * pl.cdiv(pl.cdiv(n, 128), MULTIPROCESSORS)


def _drift(m: int, tiles: int, cluster: int, most: int = 100) -> float:
  """Returns how much longer tiles take where some have rows for one of two warpgroups only.

  Those take less time than the others. Multiprocessors then drift apart, and fetch weights from
  memory again; clusters keep them together. Up to `most` tiles showed nothing of it.
  """
  tiles_m = pl.cdiv(m, 128)
  if tiles_m == 1 or not 0 < m % 128 <= ROWS or tiles <= most:
    return 1.0
  return 1 + {1: 2.0, 2: 0.7, 4: 0.1}[cluster] / tiles_m**2


def _swapped_microseconds(m: int, n: int, k: int) -> float:
  """Returns the expected time of a swapped product, including the sum of the parts of its tiles.

  It has one tile of the transpose for each 128 columns: m is at most 160.
  """
  even_start, start, own = next(
      fitted for rows, fitted in _SWAPPED_MICROSECONDS.items() if m <= rows)
  most, parts, programs, even = _shares(pl.cdiv(n, 128), k)
  per_block = max(own, _READING_BY_ALL * programs / MULTIPROCESSORS)
  per_part = 0.12 if even and 8 < m <= _FEW_ROWS else 0.0  # of the sum and its transposition
  return ((even_start if even else start) + per_block * most
          + parts * (per_part + 0.2e-6 * m * n * 4))


def _shares(tiles: int, k: int) -> tuple[int, int, int, bool]:
  """Returns what programs have to do where all tiles are shared.

  Returns:
    The blocks of K that a program sums, and the parts of a tile: the most that any has. The number
    of programs, and whether all tiles have equally many parts.
  """
  blocks = pl.cdiv(k, BLOCK)
  programs = schedule.sharers(tiles, blocks, min(MULTIPROCESSORS, tiles * blocks))
  most = pl.cdiv(tiles * blocks, programs)
  if programs % tiles:
    return most, pl.cdiv(blocks, most) + 1, programs, False
  return pl.cdiv(blocks, programs // tiles), programs // tiles, programs, True


def _direct_microseconds(width: int, n: int, k: int) -> float:
  """Returns the expected time of a product of one row of tiles that are not shared."""
  start, own, before, per_tile = _DIRECT_MICROSECONDS[width]
  rounds, left = divmod(pl.cdiv(n, width), MULTIPROCESSORS)
  round_of = lambda tiles: max(own, before + per_tile * tiles) if tiles else 0
  return start + pl.cdiv(k, BLOCK) * (rounds * round_of(MULTIPROCESSORS) + round_of(left))


def _shared_microseconds(width: int, m: int, n: int, k: int) -> float:
  """Returns the expected time with shared tiles of 128 rows, including the sum of their parts.

  It is 3 % more than the fit where all tiles have equally many parts, and 10 % otherwise, as far as
  the fit may err: other tilings are taken unless these gain more.
  """
  tiles = pl.cdiv(m, 128) * pl.cdiv(n, width)
  most, parts, programs, even = _shares(tiles, k)
  start, per_block = _SHARED_MICROSECONDS[width][0 if even else 1]
  if m <= BLOCK:
    per_block = max(per_block, _READING_BY_ALL * programs / MULTIPROCESSORS)
  if even:
    return 1.03 * (start + per_block * most + parts * m * n * 4 / 5e6)
  rate = 2e6 if width == BLOCK else 5e6  # bytes of the parts, a microsecond
  return 1.1 * (start + per_block * _drift(m, tiles, 1) * most + parts * m * n * 4 / rate)


def _shared_last_microseconds(width: int, m: int, n: int, k: int) -> float:
  """Returns the expected time with a shared last round of tiles of 128 rows and `width` columns.

  It includes the sum of the last tiles' parts. Fitted to 30 shapes.
  """
  start, per_round, per_block = _MICROSECONDS[width]
  if m <= BLOCK:
    per_block = max(per_block, _reading_microseconds(width, 1))
  grid = pl.cdiv(m, 128), pl.cdiv(n, width)
  first = first_of_last_round(grid, MULTIPROCESSORS)
  rest = math.prod(size - start for size, start in zip(grid, first, strict=True))
  rounds = pl.cdiv(math.prod(grid) - rest, MULTIPROCESSORS)
  if not rest or not 1 <= rounds <= 8:  # after many rounds multiprocessors have drifted apart
    return math.inf
  blocks = pl.cdiv(k, BLOCK)
  most = pl.cdiv(rest * blocks, min(MULTIPROCESSORS, rest * MOST_PARTS))
  parts = pl.cdiv(blocks, most) + 1
  time = (start + 5 + rounds * (per_round + per_block * blocks) + per_block * most
          + parts * rest * 128 * width * 4 / 2.5e6)
  return time if width == BLOCK else 0.98 * time


def _fill(tiling: Tiling, dtype: jnp.dtype) -> Tiling:
  """Returns the tiling with as many stages as fit in shared memory, at most 8."""
  out = WARPGROUPS * ROWS * tiling.block_n * jnp.dtype(dtype).itemsize
  stage = (tiling.block_m + tiling.block_n) * (BLOCK + 4)
  return dataclasses.replace(tiling, stages=min(8, (_SHARED - out) // stage))
