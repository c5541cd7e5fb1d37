"""What the kernels share: Hopper's sizes, its shared memory, and storing a few of a tile's rows.

Shape letters:  R rows  N columns  M, C rows and columns of a piece in shared memory
                k blocks of 128 columns, of a matrix of M rows
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

MULTIPROCESSORS = 132  # of an H100 or H200; on fewer a kernel is right, but some programs wait
WARPGROUPS = 2  # that multiply, beside one that fetches; a third would leave each few registers
ROWS = 64  # of a warpgroup's matrix instruction
# Mosaic lays swizzled blocks out in 8 rows, and copies rows wrongly, and silently so, where a
# block does not begin at a multiple of them.
ALIGNMENT = 8
SWIZZLE = 128  # bytes, the widest


def swizzle(itemsize: int, width: int = SWIZZLE) -> tuple[object, object]:
  """How rows of `width` bytes lie in shared memory, so that lanes of a column share no bank."""
  return plgpu.TilingTransform((ALIGNMENT, width // itemsize)), plgpu.SwizzleTransform(width)


def aligned(rows: int, least: int = 0) -> int:
  """As many rows or a few more: a multiple of 8, or `least`, which is one."""
  return max(-(-rows // ALIGNMENT) * ALIGNMENT, least)


def pad_rows(x_RN: jax.Array, least: int = 0) -> jax.Array:
  """Adds rows of zeros, up to as many as `aligned` says."""
  return jnp.pad(x_RN, ((0, aligned(len(x_RN), least) - len(x_RN)), (0, 0)))


def pad_blocks(x_MK: jax.Array, block: int) -> jax.Array:
  """Adds columns of zeros, up to whole blocks, of which copies cut nothing off along rows."""
  pad = [(0, 0)] * (x_MK.ndim - 1) + [(0, -x_MK.shape[-1] % block)]
  return jnp.pad(x_MK, pad) if pad[-1][1] else x_MK


def k_major(scales_Mk: jax.Array, multiple: int) -> jax.Array:
  """[k, M], with zeros for the rows of a tile that reaches past the last."""
  return jnp.pad(scales_Mk.T, ((0, 0), (0, -len(scales_Mk) % multiple)))


def store_runs(piece_MC: jax.Ref, first, count, out_RN: jax.Ref, row, columns) -> None:
  """Stores `count` rows of a piece, those from `first`, in runs of 1, 2, 4, ... rows.

  Args:
    piece_MC: in shared memory, not swizzled; 64 rows.
    first, count: of the piece's rows.
    out_RN: in global memory.
    row: where the piece's first row would go.
    columns: where its columns go.
  """
  for bit in range(ROWS.bit_length()):
    done = first + (count >> (bit + 1) << (bit + 1))  # behind the longer runs
    pl.when((count >> bit) & 1 == 1)(functools.partial(
        plgpu.copy_smem_to_gmem, piece_MC.at[pl.ds(done, 1 << bit)],
        out_RN.at[pl.ds(row + done, 1 << bit), columns], commit_group=False))
  plgpu.commit_smem_to_gmem_group()


def wgmma_overwrite(accumulator: jax.Ref, lhs_MK: jax.Ref, rhs_KN: jax.Ref) -> None:
  """Begins a product in an accumulator that was read, or is new: zeros, if interpreted."""
  _let_read()
  plgpu.wgmma(accumulator, lhs_MK, rhs_KN)
  _overwrite_accumulator()
  _issue_first()


@plgpu.inline_mgpu()
def _let_read(_) -> None:
  """Has reads of accumulators end before products that follow write there."""
  _assemble("wgmma.fence.sync.aligned;")


@plgpu.inline_mgpu()
def _overwrite_accumulator(_) -> None:
  """Has the `wgmma` just issued overwrite its accumulator, not add to it.

  Nothing is written to those registers first: with a new accumulator for every 128 of K that took
  an eighth of an FP8 product's time. `wgmma` itself has no such option.
  """
  overwrite_last(ir.InsertionPoint.current.block.operations)


@plgpu.inline_mgpu()
def _issue_first(_) -> None:
  """Has every `wgmma` so far issued before anything that follows, and costs nothing itself.

  Else ptxas moves loads and arithmetic from behind a product in among its instructions, where the
  tensor core idles until loads have come.
  """
  _assemble("bar.warp.sync 0xffffffff;")


def _assemble(instruction: str) -> None:
  llvm.inline_asm(None, [], instruction, "~{memory}", has_side_effects=True)


def overwrite_last(operations: Sequence[ir.Operation]) -> bool:
  """Makes the first instruction of the last matrix product overwrite; whether there is one."""
  first, committed = None, False
  for operation in reversed(list(operations)):
    text = _assembly(operation)
    if "wgmma.commit_group" in text or "wgmma.fence" in text:
      if committed:
        break
      committed = True
    if "wgmma.mma_async" in text:
      first = operation  # of several instructions, each for a part of K
  if first is None:
    return False
  sums = first.attributes["constraints"].value.count("=")
  adds = sums + 2  # behind sums and two operands' addresses
  zero = ir.IntegerAttr.get(first.operands[adds].type, 0)
  with ir.InsertionPoint(first), first.location:
    first.operands[adds] = llvm.ConstantOp(first.operands[adds].type, zero).result
  return True


def _assembly(operation: ir.Operation) -> str:
  attributes = operation.attributes
  return attributes["asm_string"].value if "asm_string" in attributes else ""


def owned(first, end, row) -> tuple[jax.Array, jax.Array]:
  """Of the 64 rows at `row`, the first that is in first..end, counted from it, and how many are."""
  start = jnp.clip(first - row, 0, ROWS)
  return start, jnp.clip(end - row, 0, ROWS) - start
