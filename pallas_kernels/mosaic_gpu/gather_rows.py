"""Gathering rows on Hopper: TMA moves them through shared memory, and no thread touches their data.

Shape letters:  M rows  R rows gathered  N elements of a row  P rows of a thread block
                c chunks of a row
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu.quantize import COMPILER_PARAMS

_CHUNK = 128    # elements; rows are cut, as a TMA copy takes at most 256 along an axis
_BYTES = 2**15  # shared memory of a thread block; six or seven blocks share a multiprocessor
_MOST_ROWS = 32  # rows of a thread block


def run(
    x_MN: jax.Array, index_R: jax.Array, *, fill_value: int = 0, interpret: Any = None
) -> jax.Array:
  """Returns x[index]; see `pallas_kernels.gather_rows`, and `quantize.run` for `interpret`."""
  del fill_value  # 0, or `unsupported_reason` refuses it
  (rows, width), taken = x_MN.shape, len(index_R)
  chunks = (width // _CHUNK, _CHUNK)
  at_once = max(1, min(_MOST_ROWS, _BYTES // (width * x_MN.dtype.itemsize)))
  blocks = pl.cdiv(taken, at_once)

  def kernel(x, index, out, x_smem, loaded):
    first = lax.axis_index("block") * at_once
    # One TMA load for each row, all on one mbarrier. An index past the last row is out of bounds,
    # and TMA fills its row with zeros.
    for p in range(at_once):
      plgpu.copy_gmem_to_smem(x.at[index[first + p]], x_smem.at[p], loaded)
    plgpu.barrier_wait(loaded)
    plgpu.copy_smem_to_gmem(x_smem, out.at[pl.ds(first, at_once)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((taken, *chunks), x_MN.dtype),
      grid=(blocks,), grid_names=("block",),
      scratch_types=(plgpu.SMEM((at_once, *chunks), x_MN.dtype),
                     plgpu.Barrier(num_arrivals=at_once)),
      compiler_params=COMPILER_PARAMS, interpret=interpret, kernel_name="gather_rows",
  )(x_MN.reshape(rows, *chunks), jnp.pad(index_R, (0, blocks * at_once - taken)))
  return out.reshape(taken, width)


def unsupported_reason(x_MN: jax.Array, index_R: jax.Array, *, fill_value: int = 0) -> str | None:
  """Returns why `run` cannot take these operands, or None if it can."""
  if fill_value != 0:
    return f"fills with zeros, not with {fill_value}"
  if x_MN.ndim != 2 or index_R.ndim != 1:
    return f"needs a matrix and a list, and their shapes are {x_MN.shape} and {index_R.shape}"
  if x_MN.shape[1] % _CHUNK or x_MN.shape[1] > 256 * _CHUNK:
    return ("needs N to be a multiple of 128, and at most 32768, and it is "
            f"{x_MN.shape[1]}")
  if not x_MN.size or not index_R.size:
    return f"needs at least one row of each, and their shapes are {x_MN.shape} and {index_R.shape}"
  return None


KERNEL = implementations.Kernel(run, unsupported_reason)
