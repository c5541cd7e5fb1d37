"""FP8 matrix product on Hopper without promotion: sums never leave the tensor cores.

It exists to measure the error of a sum over all of K in the tensor cores' precision, and is not
meant to be fast: a block of one warpgroup computes 64 rows and 128 columns of the result, and waits
for each 128 of K to be loaded and multiplied.

Shape letters:  M, N rows of the operands  K contracted width
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.hopper import ROWS, swizzle
from pallas_kernels.quantized import BLOCK


def raw_matmul(lhs_MK: jax.Array, rhs_NK: jax.Array, *, interpret: object = None) -> jax.Array:
  """Returns lhs @ rhs.T, with all of K summed in one accumulator of the tensor cores.

  Args:
    lhs_MK: float8_e4m3fn; M must be a multiple of 64.
    rhs_NK: float8_e4m3fn; N and K must be multiples of 128.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, without a GPU.

  Returns:
    float32 [M, N].

  Raises:
    ValueError: if M, N or K is not such a multiple.
  """
  (m, k), n = lhs_MK.shape, rhs_NK.shape[0]
  if m % ROWS or n % BLOCK or k % BLOCK:
    raise ValueError(f"raw_matmul takes M in multiples of {ROWS}, N and K of {BLOCK}, not M={m}, "
                     f"N={n}, K={k}: pad the operands with zeros")
  operand = lambda rows: plgpu.SMEM((rows, BLOCK), jnp.float8_e4m3fn, transforms=swizzle(1))
  return plgpu.kernel(
      _multiply, out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
      grid=(m // ROWS, n // BLOCK), grid_names=("m", "n"),
      scratch_types={
          "lhs_smem": operand(ROWS), "rhs_smem": operand(BLOCK),
          "out_smem": plgpu.SMEM((ROWS, BLOCK), jnp.float32, transforms=swizzle(4)),
          "full": plgpu.Barrier(num_arrivals=2)},
      compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
      interpret=interpret, kernel_name="raw_matmul")(lhs_MK, rhs_NK)


def _multiply(lhs_MK, rhs_NK, out_MN, *, lhs_smem, rhs_smem, out_smem, full):
  """Computes one tile of the result."""
  rows = pl.ds(lax.axis_index("m") * ROWS, ROWS)
  columns = pl.ds(lax.axis_index("n") * BLOCK, BLOCK)

  def add_up(accumulator):
    @pl.loop(0, lhs_MK.shape[1] // BLOCK)
    def _(ki):
      block = pl.ds(ki * BLOCK, BLOCK)
      plgpu.copy_gmem_to_smem(lhs_MK.at[rows, block], lhs_smem, full)
      plgpu.copy_gmem_to_smem(rhs_NK.at[columns, block], rhs_smem, full)
      plgpu.barrier_wait(full)
      plgpu.wgmma(accumulator, lhs_smem, rhs_smem.T)
      plgpu.wgmma_wait(0)  # the next block of K overwrites this one in shared memory
    return accumulator[...]

  out_smem[...] = pl.run_scoped(add_up, plgpu.ACC((ROWS, BLOCK), jnp.float32))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_MN.at[rows, columns])
  plgpu.wait_smem_to_gmem(0)
