"""SwiGLU whose hidden units are multiplied by a gate for each row, and its backward pass.

Shape letters:  M rows  F hidden units
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.ops.quantize import swiglu

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.swiglu_gated")}


class SwigluGatedBackward(NamedTuple):
  """What a backward pass needs of swiglu(gate and up) * gates.

  Attributes:
    dgate_up: gradient of gate and up, in dhidden's format: [M, 2 F].
    hidden_MF: the output, computed again, in that format, too.
    dgates_M: gradient of the gates, float32.
  """

  dgate_up: jax.Array
  hidden_MF: jax.Array
  dgates_M: jax.Array


def swiglu_gated(gate_up: jax.Array, gates_M: jax.Array) -> jax.Array:
  """swiglu(gate and up) * gates.

  Args:
    gate_up: [M, 2 F], gate first.
    gates_M: what each row is multiplied by.

  Returns:
    [M, F], float32.
  """
  split = gate_up.astype(jnp.float32).reshape(len(gate_up), 2, -1)
  return swiglu(split) * gates_M[:, None]


def swiglu_gated_backward(
    gate_up: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array, *,
    implementation: str | None = None) -> SwigluGatedBackward:
  """Gradients of `swiglu_gated`, and its output again, in one pass over memory.

  All is computed in float32 and rounded once. V3 computes SwiGLU's output again in its backward
  pass (arXiv:2412.19437, section 3.3.3).

  Args:
    gate_up, gates_M: as there.
    dhidden_MF: gradient of its output.
    implementation: see `pallas_kernels`.

  Raises:
    ValueError: on shapes that do not fit, or an implementation that cannot do it here.
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
