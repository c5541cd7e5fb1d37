"""Grouped matrix products: rows sorted by group, each group with its own matrix.

Shape letters:  R rows  G groups  K contracted width  N result width
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import implementations

_CONTRACT_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[])


def grouped_matmul(
    lhs_RK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array, *, transpose_rhs: bool = False,
    precision: lax.PrecisionLike = None, implementation: str | None = None) -> jax.Array:
  """Multiplies each group of consecutive rows with that group's matrix.

  Args:
    lhs_RK: rows sorted by group, those of group 0 first.
    rhs_GKN: one matrix per group; [G, N, K] if `transpose_rhs`.
    sizes_G: int32, rows per group. Groups may be empty or of different sizes; rows past the sum of
      the sizes belong to no group and give zeros.
    transpose_rhs: whether to multiply with the transpose of every matrix.
    precision: as for `jnp.dot`.
    implementation: which implementation to run, for the product and its gradients; see
      `pallas_kernels`.

  Returns:
    [R, N] in the operands' dtype, accumulated in float32.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  if lhs_RK.ndim != 2 or rhs_GKN.ndim != 3 or sizes_G.shape != rhs_GKN.shape[:1]:
    form = "[G, N, K]" if transpose_rhs else "[G, K, N]"
    raise ValueError(
        f"grouped_matmul takes lhs [R, K], rhs {form} and sizes [G], not "
        f"{lhs_RK.shape}, {rhs_GKN.shape} and {sizes_G.shape}")
  contracted = rhs_GKN.shape[2 if transpose_rhs else 1]
  if lhs_RK.shape[1] != contracted:
    raise ValueError(f"grouped_matmul contracts K: lhs has {lhs_RK.shape[1]}, rhs {contracted}, "
                     "and they must be equal")
  return implementations.run("grouped_matmul", implementation, _xla, _KERNELS, lhs_RK, rhs_GKN,
                             sizes_G, transpose_rhs=transpose_rhs, precision=precision)


def grouped_weight_gradient(
    lhs_RK: jax.Array, rhs_RN: jax.Array, sizes_G: jax.Array, *, dtype: jnp.dtype | None = None,
    implementation: str | None = None) -> jax.Array:
  """Returns lhs.T @ rhs over the rows of each group: the gradient of every group's matrix.

  Args:
    lhs_RK: the input rows of the grouped product, sorted by group.
    rhs_RN: the gradients of its output rows, sorted in the same way.
    sizes_G: int32, rows per group; rows past the sum of the sizes are ignored.
    dtype: dtype of the result; None is lhs's dtype.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    [G, K, N], accumulated in float32; zeros for empty groups.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  if (lhs_RK.ndim != 2 or rhs_RN.ndim != 2 or len(lhs_RK) != len(rhs_RN) or sizes_G.ndim != 1):
    raise ValueError(
        "grouped_weight_gradient takes lhs [R, K], rhs [R, N] and sizes [G], not "
        f"{lhs_RK.shape}, {rhs_RN.shape} and {sizes_G.shape}")
  return implementations.run(
      "grouped_weight_gradient", implementation, _xla_weight_gradient, _WEIGHT_GRADIENT_KERNELS,
      lhs_RK, rhs_RN, sizes_G, dtype=dtype)


def _xla(lhs_RK, rhs_GKN, sizes_G, *, transpose_rhs, precision):
  return lax.ragged_dot(
      lhs_RK, rhs_GKN.mT if transpose_rhs else rhs_GKN, sizes_G, precision=precision)


def _xla_weight_gradient(lhs_RK, rhs_RN, sizes_G, *, dtype):
  return lax.ragged_dot_general(
      lhs_RK, rhs_RN, sizes_G, _CONTRACT_ROWS, precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32).astype(dtype or lhs_RK.dtype)


def differentiable(product: Callable, gradient: Callable) -> Callable:
  """Makes a kernel's grouped product differentiable, with gradients computed by kernels, too.

  The gradient of lhs is the product itself with `transpose_rhs` inverted; that of rhs is
  `gradient`.

  Args:
    product: takes lhs, rhs, sizes, the keyword `transpose_rhs` and further options.
    gradient: takes the operands of `grouped_weight_gradient` and the same further options, which
      must be hashable.

  Returns:
    A function with the arguments of `product` and the keyword `precision`, which has no effect:
    kernels multiply bfloat16, whose products are exact in float32, and accumulate in float32.
  """
  @functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
  def multiply(lhs_RK, rhs_GKN, sizes_G, transpose_rhs, options):
    return product(lhs_RK, rhs_GKN, sizes_G, transpose_rhs=transpose_rhs, **dict(options))

  def forward(*operands):
    return multiply(*operands), operands[:3]

  def backward(transpose_rhs, options, kept, dout_RN):
    lhs_RK, rhs_GKN, sizes_G = kept
    dlhs_RK = multiply(dout_RN, rhs_GKN, sizes_G, not transpose_rhs, options)
    operands = (dout_RN, lhs_RK) if transpose_rhs else (lhs_RK, dout_RN)
    return dlhs_RK, gradient(*operands, sizes_G, **dict(options)), None

  multiply.defvjp(forward, backward)
  return lambda lhs_RK, rhs_GKN, sizes_G, *, transpose_rhs, precision=None, **options: multiply(
      lhs_RK, rhs_GKN, sizes_G, transpose_rhs, tuple(options.items()))


_PRODUCTS = implementations.lazy("mosaic_gpu.grouped_matmul")
_GRADIENTS = implementations.lazy("mosaic_gpu.grouped_weight_gradient")
_KERNELS = {
    "mosaic_gpu": implementations.Kernel(
        differentiable(_PRODUCTS.run, _GRADIENTS.run), _PRODUCTS.unsupported_reason),
    "mosaic_tpu": implementations.lazy("mosaic_tpu.grouped_matmul")}
_WEIGHT_GRADIENT_KERNELS = {
    "mosaic_gpu": _GRADIENTS,
    "mosaic_tpu": implementations.lazy("mosaic_tpu.grouped_matmul", "WEIGHT_GRADIENT_KERNEL")}
