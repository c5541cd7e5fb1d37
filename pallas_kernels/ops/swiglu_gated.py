"""SwiGLU with hidden units multiplied by the router's gate of their row, and its backward pass.

"Gate and up" are SwiGLU's two inputs; "gates" are the router's values, one per row.

Shape letters:  M rows  F hidden units
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.ops.quantize import swiglu

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.swiglu_gated")}


class SwigluGatedBackward(NamedTuple):
  """Results of the backward pass of swiglu(gate, up) * gates.

  Attributes:
    dgate_up: gradient of gate and up, [M, 2 F], in dhidden's dtype.
    hidden_MF: the recomputed output of the forward pass, in dhidden's dtype.
    dgates_M: gradient of the gates, float32.
  """

  dgate_up: jax.Array
  hidden_MF: jax.Array
  dgates_M: jax.Array


def swiglu_gated(gate_up: jax.Array, gates_M: jax.Array) -> jax.Array:
  """Returns swiglu(gate, up) * gates, computed in float32.

  Args:
    gate_up: [M, 2 F], SwiGLU's gate columns followed by its up columns.
    gates_M: the router's gate of each row.

  Returns:
    [M, F], float32.
  """
  split = gate_up.astype(jnp.float32).reshape(len(gate_up), 2, -1)
  return swiglu(split) * gates_M[:, None]


def swiglu_gated_backward(
    gate_up: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array, *,
    implementation: str | None = None) -> SwigluGatedBackward:
  """Computes the gradients of `swiglu_gated` and recomputes its output, in one pass over memory.

  Everything is computed in float32 and rounded once. V3, too, recomputes SwiGLU's output in the
  backward pass (arXiv:2412.19437, section 3.3.3).

  Args:
    gate_up: [M, 2 F], SwiGLU's gate columns followed by its up columns.
    gates_M: the router's gate of each row.
    dhidden_MF: gradient of the output of `swiglu_gated`.
    implementation: which implementation to run; see `pallas_kernels`.

  Raises:
    ValueError: if the shapes do not match, or the named implementation cannot run here.
  """
  rows, width = dhidden_MF.shape[0], dhidden_MF.shape[-1]
  if (dhidden_MF.shape != (rows, width) or gates_M.shape != (rows,)
      or gate_up.shape != (rows, 2 * width)):
    raise ValueError(
        "swiglu_gated_backward takes gate and up [M, 2 F], gates [M] and dhidden [M, F], not "
        f"{gate_up.shape}, {gates_M.shape} and {dhidden_MF.shape}")
  return SwigluGatedBackward(*implementations.run(
      "swiglu_gated_backward", implementation, _xla, _KERNELS, gate_up,
      gates_M.astype(jnp.float32), dhidden_MF))


def _xla(gate_up, gates_M, dhidden_MF):
  hidden_MF, vjp = jax.vjp(swiglu_gated, gate_up.astype(jnp.float32), gates_M)
  dgate_up, dgates_M = vjp(dhidden_MF.astype(jnp.float32))
  return dgate_up.astype(dhidden_MF.dtype), hidden_MF.astype(dhidden_MF.dtype), dgates_M
