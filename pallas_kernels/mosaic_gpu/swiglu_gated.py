"""The backward pass of SwiGLU with gates on Hopper. It is memory-bound, so nothing is moved twice.

A thread block is one warpgroup. It owns some rows and walks along their hidden units, 128 at a
time, through a ring of pieces in shared memory: the next pieces are loaded by TMA while one is
computed, and results overwrite in shared memory what they are computed from. The sums for the
gates' gradients stay in registers. `fp8_kernel` explains the constructs of Pallas.

Shape letters:  M rows  F hidden units  S rows in registers at a time
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, implementations
from pallas_kernels.mosaic_gpu.hopper import pad_rows, swizzle
from pallas_kernels.mosaic_gpu.quantize import COMPILER_PARAMS, row_layout, steps
from pallas_kernels.mosaic_gpu.swiglu_backward import backward_in_registers, widened
from pallas_kernels.quantized import BLOCK

STEP = 16  # rows in registers at a time
_OPERANDS = 3  # gate, up and the gradient of the hidden units
_BYTES_OF_ROW = _OPERANDS * BLOCK * 2
_SHARED_MEMORY = 226 << 10  # bytes that a block has at most, less some for barriers
# No reduction here crosses warps. With the scratch memory for those, fewer blocks would fit on a
# multiprocessor.
_PARAMS = dataclasses.replace(COMPILER_PARAMS, reduction_scratch_bytes=0)


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the work is cut.

  Attributes:
    rows: rows of a thread block, a multiple of 16.
    stages: length of the ring in shared memory; a stage holds 128 hidden units, 768 bytes a row.
  """

  rows: int = 32
  stages: int = 2

  def __post_init__(self):
    if self.rows < STEP or self.rows % STEP:
      raise ValueError(f"Tiling's rows must be a multiple of {STEP}, and they are {self.rows}")
    if self.stages < 2 or self.stages * self.rows * _BYTES_OF_ROW > _SHARED_MEMORY:
      raise ValueError("Tiling needs 2 stages or more, all in 226 KiB, and they are "
                       f"{self.stages} of {self.rows} rows with {_BYTES_OF_ROW} bytes each")


def run(
    gate_up_M2F: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array, *,
    tiling: Tiling | None = None, interpret: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns gradients and hidden units; see `pallas_kernels.swiglu_gated_backward`.

  Args:
    gate_up_M2F: bfloat16 [M, 2 F], gate first.
    gates_M: float32, the factor of each row.
    dhidden_MF: bfloat16, gradient of the hidden units.
    tiling: how the work is cut; None means the default.
    interpret: `plgpu.InterpretGPUParams`, to run in the interpreter, on a CPU.

  Returns:
    The gradient of gate and up, the hidden units, and the gradient of the gates.
  """
  tiling = tiling or Tiling()
  num_rows, width = dhidden_MF.shape
  grid = pl.cdiv(num_rows, tiling.rows)
  gates = jnp.pad(gates_M, (0, grid * tiling.rows - num_rows))
  gate_up, dhidden = pad_rows(gate_up_M2F), pad_rows(dhidden_MF)

  def kernel(gate_up, gates, dhidden, dgate_up, hidden, dgates, ring, loaded):
    rows = pl.ds(lax.axis_index("block") * tiling.rows, tiling.rows)
    _walk(width // BLOCK, rows, (gate_up, gates, dhidden), (dgate_up, hidden, dgates), ring, loaded,
          interpreted=interpret is not None)

  dgate_up, hidden, dgates = plgpu.kernel(
      kernel,
      out_type=(jax.ShapeDtypeStruct(gate_up.shape, jnp.bfloat16),
                jax.ShapeDtypeStruct(dhidden.shape, jnp.bfloat16),
                jax.ShapeDtypeStruct(gates.shape, jnp.float32)),
      grid=(grid,), grid_names=("block",),
      scratch_types=(
          plgpu.SMEM((tiling.stages, _OPERANDS, tiling.rows, BLOCK), jnp.bfloat16,
                     transforms=swizzle(2)),
          plgpu.Barrier(num_arrivals=_OPERANDS, num_barriers=tiling.stages)),
      compiler_params=_PARAMS, interpret=interpret, kernel_name="swiglu_gated_backward",
  )(gate_up, gates, dhidden)
  return dgate_up[:num_rows], hidden[:num_rows], dgates[:num_rows]


def _walk(num_pieces: int, rows, inputs, results, ring, loaded, *, interpreted: bool) -> None:
  """Computes a thread block's rows, one piece of 128 hidden units after another."""
  gate_up, gates, dhidden = inputs
  dgate_up, hidden, dgates = results
  num_stages, _, num_rows, _ = ring.shape
  ahead = num_stages - 1

  layout = row_layout(ring.dtype)
  parts = [piece for _, piece in steps(num_rows, STEP)]
  rows_of_part = lambda ref, part: ref.at[pl.ds(rows.start + part.start, STEP)]
  gates_S = [plgpu.load(rows_of_part(gates, part), layout=layout.reduce(1), optimized=False)
             for part in parts]

  def load(piece):
    slot = lax.rem(piece, num_stages)
    for k, place in enumerate(_places(gate_up, dhidden, rows, piece)):
      plgpu.copy_gmem_to_smem(place, ring.at[slot, k], loaded.at[slot])

  def compute(piece, sums):
    # The next load goes to the stage of the piece before this one, whose results TMA must have read
    # first. By the time that this piece has been loaded, it has.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pl.when(piece + ahead < num_pieces)(lambda: load(piece + ahead))
    slot = lax.rem(piece, num_stages)
    plgpu.barrier_wait(loaded.at[slot])
    sums = [sum_S + _compute(ring.at[slot, :, part], gate_S, layout, interpreted)
            for part, gate_S, sum_S in zip(parts, gates_S, sums, strict=True)]
    plgpu.commit_smem()
    for k, place in enumerate(_places(dgate_up, hidden, rows, piece)):
      plgpu.copy_smem_to_gmem(ring.at[slot, k], place, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    return sums

  for piece in range(min(ahead, num_pieces)):
    load(piece)
  zeros = [plgpu.layout_cast(jnp.zeros(STEP, jnp.float32), layout.reduce(1)) for _ in parts]
  for part, sum_S in zip(parts, lax.fori_loop(0, num_pieces, compute, zeros), strict=True):
    compat.store(rows_of_part(dgates, part), sum_S)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _places(gate_up, hidden, rows, piece) -> tuple[Any, Any, Any]:
  """Returns a piece of gate, of up and of hidden units in global memory, or of their gradients."""
  columns = pl.ds(piece * BLOCK, BLOCK)
  up_columns = pl.ds(hidden.shape[1] + piece * BLOCK, BLOCK)
  return gate_up.at[rows, columns], gate_up.at[rows, up_columns], hidden.at[rows, columns]


def _compute(smem, gate_S: jax.Array, layout, interpreted: bool) -> jax.Array:
  """Overwrites some rows of inputs with their results, in shared memory.

  Returns:
    The rows' sums for the gates' gradient.
  """
  numbers = (widened(plgpu.load(smem.at[k], layout=layout), layout, interpreted)
             for k in range(_OPERANDS))
  *results, sum_S = backward_in_registers(*numbers, gate_S, layout, interpreted)
  for k, x_SF in enumerate(results):
    smem[k] = x_SF
  return sum_S


def unsupported_reason(
    gate_up_M2F: jax.Array, gates_M: jax.Array, dhidden_MF: jax.Array) -> str | None:
  """Returns why `run` cannot take these arguments, or None if it can."""
  del gates_M
  for name, x in (("gate and up", gate_up_M2F), ("dhidden", dhidden_MF)):
    if x.dtype != jnp.bfloat16:
      return f"needs bfloat16, and {name} have {x.dtype}"
  if dhidden_MF.size == 0 or dhidden_MF.shape[1] % BLOCK:
    return ("needs at least one row and F to be a multiple of 128, and the shape is "
            f"{dhidden_MF.shape}")
  return None


KERNEL = implementations.Kernel(run, unsupported_reason)
