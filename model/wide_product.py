"""Products of activations with a narrow matrix, such as a router's, accurate to float32.

Shape letters:  B batch  T tokens  D model width  E columns of the matrix  n = E times its parts
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.implementations import varying_as


def wide_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
  """Computes x w as accurately as a product of float32 operands: float32, [B, T, E].

  If x is in bfloat16, an accelerator reads it in this format. The narrow float32 operands, w here
  and the result's gradient in the backward pass, are split into bfloat16 parts instead, whose sum
  they are: three to compute the result and the gradient of w, both accurate to float32, and two to
  compute that of x, which is rounded to bfloat16. CPUs, and all for other formats of x, convert x
  to float32.

  Args:
    x_BTD: activations, float32 or narrower.
    w_DE: a matrix with few columns, in any format; it is cast to float32.
  """
  w_DE = w_DE.astype(jnp.float32)
  if x_BTD.dtype != jnp.bfloat16:
    return _whole_product(x_BTD, w_DE)
  # The gradients of a custom_vjp vary over devices as its operands do.
  return _bf16_product(*varying_as((x_BTD, w_DE), (x_BTD, w_DE)))


def _whole_product(x_BTD, w_DE):
  return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), w_DE, precision=lax.Precision.HIGHEST)


def _whole_gradients(x_BTD, w_DE, dy_BTE):
  return jax.vjp(_whole_product, x_BTD, w_DE)[1](dy_BTE)


def split_bf16(x: jax.Array, num_parts: int) -> list[jax.Array]:
  """Splits float32 numbers into bfloat16 numbers, largest first, whose sum they are.

  Three parts are exact, two leave a relative error of at most 2^-17. Numbers that round to infinity
  in bfloat16 have parts that are not finite; of numbers below 2^-103 the third part may underflow.
  """
  parts = []
  for _ in range(num_parts):
    # Not by casting to bfloat16 and back, which XLA may leave out, so that the rest would be zero.
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    x -= part
  return parts


def split_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
  """Computes `wide_product` of bfloat16 and float32 from parts of w."""
  return _sum_of_parts(_f32_einsum("btd,dn->btn", x_BTD, jnp.concatenate(split_bf16(w_DE, 3), -1)))


def split_gradients(
    x_BTD: jax.Array, w_DE: jax.Array, dy_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the gradients of `split_product`: of x in bfloat16, and of w in float32."""
  dy_parts, (w_high, w_mid) = split_bf16(dy_BTE, 3), split_bf16(w_DE, 2)
  dw_DE = _sum_of_parts(_f32_einsum("btd,btn->dn", x_BTD, jnp.concatenate(dy_parts, -1)))
  dy_high, dy_mid, _ = dy_parts
  # The products of large with large, large with small and small with large parts in one sum.
  dx_BTD = jnp.einsum("btn,dn->btd", jnp.concatenate([dy_high, dy_high, dy_mid], -1),
                      jnp.concatenate([w_high, w_mid, w_high], -1))
  return dx_BTD, dw_DE


def _f32_einsum(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _sum_of_parts(x):
  high, mid, low = jnp.split(x, 3, axis=-1)
  return high + (mid + low)


@jax.custom_vjp
def _bf16_product(x_BTD, w_DE):
  return lax.platform_dependent(x_BTD, w_DE, cpu=_whole_product, default=split_product)


def _bf16_product_forward(x_BTD, w_DE):
  return _bf16_product(x_BTD, w_DE), (x_BTD, w_DE)


def _bf16_product_backward(operands, dy_BTE):
  return lax.platform_dependent(
      *operands, dy_BTE, cpu=_whole_gradients, default=split_gradients)


_bf16_product.defvjp(_bf16_product_forward, _bf16_product_backward)
