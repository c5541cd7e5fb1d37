"""The second half of experts: SwiGLU with gates and the grouped down projection, as one operation.

Hidden units are not kept for the backward pass. The down projection's weight gradient needs them
again, and the pass over gate and up that SwiGLU's gradients take gives them as well: so one
operation has the gradients of both.

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
  """Each row's swiglu(gate and up) * gate, multiplied with its group's matrix.

  Its arguments are all that is kept for the backward pass: neither hidden units nor a cast weight.

  Args:
    gate_up: [R, 2 F], gate first, rows of group 0 first.
    gates_R: what each row's hidden units are multiplied by.
    w_down_GFN: one matrix per group, as stored; multiplied in the format of gate and up.
    sizes_G: int32, rows per group; rows past their sum give zero.
    precision: as for `jnp.dot`.
    implementation: see `pallas_kernels`; of products and the backward pass.

  Returns:
    [R, N] in the format of gate and up, and so are all gradients but the gates', which is float32,
    until the weight's is cast to the format that weights are stored in: whoever reads it may as
    well read the fewer bits.

  Raises:
    ValueError: on shapes that do not fit, or an implementation that cannot do it here.
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
