"""What Hopper's kernels share: sizes of the hardware, swizzles, ragged copies, and padding.

Shape letters:  R rows  N columns  M rows of a matrix or of a piece in shared memory
                C columns of a piece  K columns of a matrix  S stages
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.hijax import TransformedRef
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# Of an H100 or H200. With fewer, persistent kernels still compute correct results, but some of
# their blocks wait until others have finished.
MULTIPROCESSORS = 132
# Consumer warpgroups of a block, which multiply; a producer warpgroup fetches for them. A third
# consumer would leave each with few registers.
WARPGROUPS = 2
ROWS = 64  # M of wgmma, Hopper's matrix instruction for a warpgroup
# Mosaic lays swizzled memory out in groups of 8 rows, and cuts global memory into the same groups
# when it copies: the matrix must have a multiple of 8 rows, and a copy that does not begin at one
# moves wrong rows, without an error. `as_rows` and `row_groups` are for copies at any row.
ALIGNMENT = 8
SWIZZLE = 128  # bytes in a row of the widest swizzle
COPY_LENGTH = 256  # most elements that a TMA copy takes along an axis


def swizzle(itemsize: int, width: int = SWIZZLE) -> tuple[object, object]:
  """Returns the transforms of shared memory that TMA and wgmma swizzle, in rows of `width` bytes.

  The tiling stores a matrix as tiles of 8 rows by `width` bytes, each contiguous, and the swizzle
  (CU_TENSOR_MAP_SWIZZLE_128B for the default width) permutes the 16-byte units of every row, so
  that threads that read one column access different banks.

  Args:
    itemsize: bytes of an element.
    width: bytes of a row: 32, 64 or 128.
  """
  return plgpu.TilingTransform((ALIGNMENT, width // itemsize)), plgpu.SwizzleTransform(width)


def aligned(rows: int, least: int = 0) -> int:
  """Returns `rows` rounded up to a multiple of 8, or `least`, also a multiple of 8, if larger."""
  return max(-(-rows // ALIGNMENT) * ALIGNMENT, least)


def pad_rows(x_RN: jax.Array, least: int = 0) -> jax.Array:
  """Appends rows of zeros, up to the number of rows that `aligned` returns."""
  return jnp.pad(x_RN, ((0, aligned(len(x_RN), least) - len(x_RN)), (0, 0)))


def pad_columns(x_MK: jax.Array, multiple: int = 16) -> jax.Array:
  """Appends columns of zeros up to a multiple of `multiple`; 16 bytes are the least that TMA takes.
  """
  pad = [(0, 0)] * (x_MK.ndim - 1) + [(0, -x_MK.shape[-1] % multiple)]
  return jnp.pad(x_MK, pad) if pad[-1][1] else x_MK


def as_rows(
    blocks: jax.Ref, *index: int | jax.Array, interpreted: bool = False) -> jax.Ref:
  """Returns a block as a copy may address it that begins at any row of a matrix of any height.

  The block is as wide as a row of its swizzle, so its groups of 8 rows follow one another, and it
  can be seen as rows without groups.

  Args:
    blocks: swizzled shared memory [..., R, C].
    *index: index of the block, one for each of the leading axes.
    interpreted: whether Pallas' interpreter runs the kernel. It has no groups, and copies any rows.
  """
  rows = as_plain_rows(blocks, *index, interpreted=interpreted)
  return rows if interpreted else _transformed(rows, blocks.transforms[0])


def as_plain_rows(
    blocks: jax.Ref, *index: int | jax.Array, interpreted: bool = False) -> jax.Ref:
  """Returns the memory of such a block as rows that are not swizzled; see `as_rows`."""
  block = (blocks if interpreted else blocks.ref).at[index]
  if interpreted:
    return block
  groups, pieces, rows, width = block.shape  # as it lies in memory
  if pieces != 1:
    raise ValueError(f"a block must be as wide as a row of its swizzle, and it is {pieces} times "
                     "as wide")
  return block.reshape(groups * rows, width)


def row_groups(
    blocks: jax.Ref, index: int | jax.Array, interpreted: bool = False) -> list[jax.Ref]:
  """Returns a block of any width as groups of 8 rows, each of which is copied by itself.

  As with `as_rows`, the copies may begin at any row of a matrix of any height.

  Args:
    blocks: swizzled shared memory [S, R, C].
    index: index of the block.
    interpreted: see `as_rows`.

  Returns:
    Refs of shape [8, C].
  """
  if interpreted:
    return [blocks.at[index, pl.ds(row, ALIGNMENT)]
            for row in range(0, blocks.shape[1], ALIGNMENT)]
  unswizzle, _ = blocks.transforms
  _, groups, _, _, width = blocks.ref.shape
  # A group lies in memory as one piece of 8 rows after another, each as wide as the swizzle's rows.
  untile = plgpu.TilingTransform((width,)).undo(None)
  return [_transformed(_transformed(blocks.ref.at[index, group], unswizzle).transpose((1, 0, 2)),
                       untile) for group in range(groups)]


def _transformed(ref: TransformedRef, transform: object) -> TransformedRef:
  return TransformedRef(ref.ref, (*ref.transforms, transform))


def store_runs(piece_MC: jax.Ref, count, out_RN: jax.Ref, row, columns) -> None:
  """Stores the first `count` rows of a piece, in runs of 1, 2, 4, ... rows.

  A copy's shape is fixed when the kernel is compiled, and `count` is known only when it runs. So
  there is a copy for each power of two, and the bits of `count` say which of them are issued.

  Args:
    piece_MC: 64 rows in shared memory. They are not swizzled, so that a run may begin at any row.
    count: the number of rows to store.
    out_RN: the destination in global memory.
    row: row of `out_RN` that the first row goes to.
    columns: slice of the columns of `out_RN` that the piece's columns go to.
  """
  for bit in range(ROWS.bit_length()):
    done = count >> (bit + 1) << (bit + 1)  # the longer runs come first
    pl.when((count >> bit) & 1 == 1)(functools.partial(
        plgpu.copy_smem_to_gmem, piece_MC.at[pl.ds(done, 1 << bit)],
        out_RN.at[pl.ds(row + done, 1 << bit), columns], commit_group=False))
  plgpu.commit_smem_to_gmem_group()


def wgmma_overwrite(accumulator: jax.Ref, lhs_MK: jax.Ref, rhs_KN: jax.Ref) -> None:
  """Starts accumulator = lhs @ rhs, asynchronously; the accumulator may be new, or was read before.

  The interpreter adds the product to the accumulator, so there it must be new, that is zero.
  """
  _fence_registers()
  plgpu.wgmma(accumulator, lhs_MK, rhs_KN)
  _overwrite_accumulator()
  _keep_issue_order()


@plgpu.inline_mgpu()
def _fence_registers(_) -> None:
  """Orders this warpgroup's reads of accumulators before the writes of the wgmmas that follow."""
  _assemble("wgmma.fence.sync.aligned;")


@plgpu.inline_mgpu()
def _overwrite_accumulator(_) -> None:
  """Makes the `plgpu.wgmma` just issued overwrite its accumulator instead of adding to it.

  The alternative, writing zeros to the registers first, took an eighth of an FP8 product's time, as
  every 128 of K starts from zero. PTX has this option (scale-d), but `plgpu.wgmma` does not.
  """
  overwrite_last(ir.InsertionPoint.current.block.operations)


@plgpu.inline_mgpu()
def _keep_issue_order(_) -> None:
  """Keeps ptxas from moving later code ahead of the wgmmas issued so far; it costs nothing itself.

  Otherwise ptxas moves loads and arithmetic that follow a product in between its instructions, and
  the tensor cores idle there until the loads have finished.
  """
  _assemble("bar.warp.sync 0xffffffff;")


def _assemble(instruction: str) -> None:
  llvm.inline_asm(None, [], instruction, "~{memory}", has_side_effects=True)


def overwrite_last(operations: Sequence[ir.Operation]) -> bool:
  """Makes the first wgmma of the last matrix product overwrite its accumulator.

  Args:
    operations: the operations emitted so far, in order.

  Returns:
    Whether there is a matrix product among them.
  """
  first, committed = None, False
  for operation in reversed(list(operations)):
    text = _assembly(operation)
    if "wgmma.commit_group" in text or "wgmma.fence" in text:
      if committed:
        break
      committed = True
    if "wgmma.mma_async" in text:
      first = operation  # in the end the earliest of the product's wgmmas, each for a part of K
  if first is None:
    return False
  sums = first.attributes["constraints"].value.count("=")
  adds = sums + 2  # index of scale-d, which follows the sums and the descriptors of lhs and rhs
  zero = ir.IntegerAttr.get(first.operands[adds].type, 0)
  with ir.InsertionPoint(first), first.location:
    first.operands[adds] = llvm.ConstantOp(first.operands[adds].type, zero).result
  return True


def _assembly(operation: ir.Operation) -> str:
  attributes = operation.attributes
  return attributes["asm_string"].value if "asm_string" in attributes else ""


def owned(end, row) -> jax.Array:
  """Returns how many of the 64 rows from `row` on are before `end`."""
  return jnp.clip(end - row, 0, ROWS)
