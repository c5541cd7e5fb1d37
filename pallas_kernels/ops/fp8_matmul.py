"""Matrix products of FP8 operands with one scale per tile.

Shape letters:  M, N rows of the operands  K contracted width
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import implementations
from pallas_kernels.quantized import BLOCK, Quantized, dequantize

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.fp8_matmul"),
            "mosaic_tpu": implementations.lazy("mosaic_tpu.fp8_matmul")}


def fp8_matmul(
    lhs_MK: Quantized, rhs_NK: Quantized, *, dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None) -> jax.Array:
  """Returns lhs @ rhs.T, accumulated in float32 (arXiv:2412.19437, section 3.3.2).

  Hopper's tensor cores keep about 14 bits of a sum of FP8 products. After every 128 elements of K
  the partial sum is therefore scaled and added to a float32 accumulator (promotion). "xla"
  multiplies the dequantised operands in float32.

  Args:
    lhs_MK: activations or gradients, with tiles of 1x128.
    rhs_NK: weights with tiles of 128x128, or the other operand of a weight gradient with tiles of
      1x128.
    dtype: dtype of the result.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    [M, N] in `dtype`.

  Raises:
    ValueError: if shapes or tiles do not match, or the named implementation cannot run here.
  """
  if len(lhs_MK.shape) != 2 or len(rhs_NK.shape) != 2 or lhs_MK.shape[1] != rhs_NK.shape[1]:
    raise ValueError("fp8_matmul contracts the last axes of lhs [M, K] and rhs [N, K], not of "
                     f"{lhs_MK.shape} and {rhs_NK.shape}")
  if lhs_MK.tile != (1, BLOCK) or rhs_NK.tile not in ((BLOCK, BLOCK), (1, BLOCK)):
    raise ValueError("fp8_matmul takes lhs with 1x128 scales and rhs with 128x128 or 1x128, not "
                     f"{lhs_MK.tile} and {rhs_NK.tile}")
  return implementations.run(
      "fp8_matmul", implementation, _xla, _KERNELS, lhs_MK, rhs_NK, dtype=dtype)


def _xla(lhs_MK: Quantized, rhs_NK: Quantized, *, dtype) -> jax.Array:
  return jnp.einsum("mk,nk->mn", dequantize(lhs_MK), dequantize(rhs_NK),
                    precision=lax.Precision.HIGHEST).astype(dtype)
