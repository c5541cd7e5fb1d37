"""The second half of the experts: gated SwiGLU and the grouped down projection as one operation.

The hidden units between the two are not kept for the backward pass. The weight gradient of the down
projection needs them again, and the kernel that computes SwiGLU's gradients recomputes them in the
same pass over gate and up. Both gradients are therefore part of one operation.

Shape letters:  R rows  G groups  F hidden units  N result width
"""

import functools
from typing import NamedTuple

import jax
from jax import lax

from pallas_kernels.ops.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.ops.swiglu_gated import swiglu_gated, swiglu_gated_backward


class _Static(NamedTuple):
  precision: lax.PrecisionLike
  implementation: str | None


def moe_down_proj(
    gate_up: jax.Array, gates_R: jax.Array, w_down_GFN: jax.Array, sizes_G: jax.Array, *,
    precision: lax.PrecisionLike = None, implementation: str | None = None) -> jax.Array:
  """Multiplies each row's swiglu(gate, up) * gate value with the matrix of its group.

  Only the arguments are kept for the backward pass: neither the hidden units nor the cast weights.

  Args:
    gate_up: [R, 2 F], SwiGLU's gate columns followed by its up columns, rows sorted by group.
    gates_R: the router's gate value of each row, by which its hidden units are multiplied.
    w_down_GFN: master weights, one matrix per group; cast to gate_up's dtype for the products.
    sizes_G: int32, rows per group; rows past the sum of the sizes give zeros.
    precision: as for `jnp.dot`.
    implementation: which implementation of the products and of SwiGLU's backward pass to run; see
      `pallas_kernels`.

  Returns:
    [R, N] in gate_up's dtype. Gradients are computed in gate_up's dtype, except for that of the
    gates, which is float32, and are returned in the dtypes of their arguments. The weight's
    gradient is cast to the master's dtype last, so that its consumer can read the fewer bits.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  num_rows, (num_groups, width, _) = len(gate_up), w_down_GFN.shape
  if (gate_up.shape != (num_rows, 2 * width) or gates_R.shape != (num_rows,)
      or sizes_G.shape != (num_groups,)):
    raise ValueError(
        "moe_down_proj takes gate and up [R, 2 F], gates [R], weights [G, F, N] and sizes [G], not "
        f"{gate_up.shape}, {gates_R.shape}, {w_down_GFN.shape} and {sizes_G.shape}")
  return _moe_down_proj(_Static(precision, implementation), gate_up, gates_R, w_down_GFN, sizes_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe_down_proj(static: _Static, gate_up, gates_R, w_down_GFN, sizes_G):
  hidden_RF = swiglu_gated(gate_up, gates_R).astype(gate_up.dtype)
  return grouped_matmul(
      hidden_RF, w_down_GFN.astype(gate_up.dtype), sizes_G, **static._asdict())


def _forward(static: _Static, *operands):
  return _moe_down_proj(static, *operands), operands


def _backward(static: _Static, operands, dy_RN):
  gate_up, gates_R, w_down_GFN, sizes_G = operands
  dhidden_RF = grouped_matmul(dy_RN, w_down_GFN.astype(gate_up.dtype), sizes_G, transpose_rhs=True,
                              **static._asdict())
  dgate_up, hidden_RF, dgates_R = swiglu_gated_backward(
      gate_up, gates_R, dhidden_RF, implementation=static.implementation)
  dw_down_GFN = grouped_weight_gradient(
      hidden_RF, dy_RN, sizes_G, implementation=static.implementation)
  return dgate_up, dgates_R.astype(gates_R.dtype), dw_down_GFN.astype(w_down_GFN.dtype), None


_moe_down_proj.defvjp(_forward, _backward)
