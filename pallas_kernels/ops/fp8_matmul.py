"""Matrix products of FP8 operands with a scale for each tile.

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
  """lhs @ rhs.T, of what they stand for, summed in float32 (arXiv:2412.19437, section 3.3.2).

  A tensor core keeps 14 bits of a sum of FP8 products, so every 128 of K its sum is scaled and
  added in float32: the promotion. "xla" multiplies what the operands stand for in float32.

  Args:
    lhs_MK: scales of 1x128: activations or gradients.
    rhs_NK: scales of 128x128, weights, or 1x128, for weight gradients.
    dtype: of the result.
    implementation: see `pallas_kernels`.

  Returns:
    [M, N].

  Raises:
    ValueError: on shapes or tiles that do not fit, or an implementation that cannot do it here.
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
