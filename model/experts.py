"""Routed experts on one device: four exact implementations with one signature.

Every function takes `(weights, x_ND, gates_NK, experts_NK, numerics)` and returns y_ND, each
token's sum over its K experts, weighted by its gates. An expert index outside 0..E-1 means no
expert, and adds nothing. No token is ever dropped. The gates multiply the hidden units instead of
the outputs, which is equivalent because the down projection is linear, and cheaper because hidden
units are narrower. With an FP8 recipe only `grouped_experts` can be used.

Shape letters:  N tokens  K experts per token  R = N * K assignments of a token to an expert
                E experts  C slots per expert  D model width  F expert width
                P rows of an overflow block
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.layers import gated, recomputed
from model.numerics import Numerics
from pallas_kernels import (
    fp8_experts,
    gather_rows,
    grouped_matmul,
    implementations,
    layout_expert_rows,
    moe_down_proj,
)
from pallas_kernels.ops.expert_rows import sort_by_expert
from pallas_kernels.targets import target

# Slots per expert as a multiple of the mean load, and rows of an overflow block. Both were chosen
# by measurement: see experiments/results/bench/bench_moe.
CAPACITY_FACTOR = 1.125
BLOCK = 256
_FEW_ON_GPU = 16  # assignments
_PART = 128  # products that a thread of a GPU adds up


class ExpertWeights(NamedTuple):
  """The weights of all experts' SwiGLUs; the gate and up projections are one array."""

  w_gate_up: jax.Array  # [E, D, 2, F], the gate projection first
  w_down: jax.Array     # [E, F, D]

  @property
  def num_experts(self) -> int:
    """E, the number of experts."""
    return self.w_down.shape[0]


def dense_experts(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics) -> jax.Array:
  """Computes every expert for every token: the oracle, which does E / K times the work.

  Raises:
    ValueError: if the numerics have an FP8 recipe.
  """
  _reject_recipe("dense", numerics)
  chosen_NKE = jax.nn.one_hot(experts_NK, weights.num_experts, dtype=gates_NK.dtype)
  gates_NE = jnp.einsum("nk,nke->ne", gates_NK, chosen_NKE, precision=lax.Precision.HIGHEST)
  hidden_NEF = gated(numerics.einsum("nd,edgf->negf", x_ND, weights.w_gate_up))
  hidden_NEF *= gates_NE[..., None].astype(hidden_NEF.dtype)
  return numerics.einsum("nef,efd->nd", hidden_NEF, weights.w_down)


# Grouped: rows sorted by expert, and grouped matrix products.


@jax.custom_vjp
def _gather_rows(x_ND, token_R, place_NK):
  """Returns x_ND[token_R], where the copies of token n are the rows place_NK[n].

  Knowing `place_NK`, the backward pass is a gather too, instead of a scatter.
  """
  return gather_rows(x_ND, token_R)


def _gather_rows_forward(x_ND, token_R, place_NK):
  return _gather_rows(x_ND, token_R, place_NK), place_NK


def _gather_rows_backward(place_NK, dy_RD):
  return dy_RD[place_NK].sum(1, dtype=jnp.float32).astype(dy_RD.dtype), None, None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def _sum_rows(y_RD, token_R, place_NK):
  """The transpose of `_gather_rows`: for every token n, the sum of the rows place_NK[n]."""
  return y_RD[place_NK].sum(1, dtype=jnp.float32).astype(y_RD.dtype)


_sum_rows.defvjp(
    lambda y_RD, token_R, place_NK: (_sum_rows(y_RD, token_R, place_NK), token_R),
    lambda token_R, dy_ND: (gather_rows(dy_ND, token_R), None, None))


def grouped_experts(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics) -> jax.Array:
  """Sorts assignments by expert, then computes two grouped matrix products.

  With an FP8 recipe, `pallas_kernels.fp8_experts` does all of it.
  """
  cast = lambda x: x.astype(numerics.compute_dtype)
  if numerics.recipe:
    return fp8_experts(cast(x_ND), gates_NK, weights.w_gate_up, weights.w_down,
                       layout_expert_rows(experts_NK, weights.num_experts), numerics.recipe)

  order_R, sizes_E = sort_by_expert(experts_NK, weights.num_experts)
  token_R = order_R // experts_NK.shape[1]
  place_NK = _inverse(order_R).reshape(experts_NK.shape)

  rows_RD = _gather_rows(cast(x_ND), token_R, place_NK)
  gates_R = _gather_rows(gates_NK.reshape(-1), order_R, place_NK.reshape(-1, 1))
  # Recomputed, so that the weights are kept for the backward pass as they are stored, and not as a
  # copy in the compute format.
  @recomputed
  def up(rows_RD, weights):
    return grouped_matmul(rows_RD, cast(weights).reshape(len(sizes_E), rows_RD.shape[1], -1),
                          sizes_E, precision=numerics.precision)

  gate_up = checkpoint_name(up(rows_RD, weights.w_gate_up), "ffn_gate_up")
  y_RD = moe_down_proj(gate_up, gates_R, weights.w_down, sizes_E, precision=numerics.precision)
  return _sum_rows(y_RD, token_R, place_NK)


def _inverse(order_R: jax.Array) -> jax.Array:
  ranks_R = jnp.arange(order_R.shape[0], dtype=jnp.int32)
  return jnp.zeros_like(order_R).at[order_R].set(ranks_R, unique_indices=True)


# Few: the weights of the chosen experts, for so few assignments that most experts have none.


def few_experts(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics) -> jax.Array:
  """Multiplies each assignment by its expert's weights, which are read once for each assignment.

  The other implementations read the weights of all experts, or sort assignments first, which takes
  longer than multiplying a few. On CPUs assignments are computed one after another, elsewhere all
  at once.

  Raises:
    ValueError: if the numerics have an FP8 recipe.
  """
  _reject_recipe("few", numerics)
  num_experts, chosen = weights.num_experts, experts_NK.shape[1]
  valid_NK = (experts_NK >= 0) & (experts_NK < num_experts)
  gates_R = jnp.where(valid_NK, gates_NK, 0).reshape(-1)
  expert_R = jnp.where(valid_NK, experts_NK, 0).reshape(-1)
  rows_RD = jnp.repeat(x_ND.astype(numerics.compute_dtype), chosen, axis=0)
  on_cpu = target().platform == "cpu"
  alone = (lambda x: x) if on_cpu else lax.optimization_barrier

  def product(equation, row, w, expert):
    of_expert = lax.dynamic_index_in_dim(w, expert, keepdims=False)
    if on_cpu:
      return numerics.einsum(equation, row, of_expert)
    # On a GPU, XLA makes this a sum of float32 products, and fuses it with the choice of weights if
    # nothing is computed on the way. Parts of the sum are added up by different threads.
    parts = len(row) // _PART if len(row) % _PART == 0 else 1
    wide = (x.astype(numerics.compute_dtype).astype(jnp.float32).reshape(
        parts, len(row) // parts, *x.shape[1:]) for x in (row, of_expert))
    sums = jnp.einsum("pd,pd...->p...", *wide, precision=lax.Precision.HIGHEST)
    return alone(sums).sum(0).astype(row.dtype)

  def up_and_down(row_D, gate, expert):
    hidden_F = gated(product("d,dgf->gf", row_D, weights.w_gate_up, expert))
    hidden_F = alone(hidden_F * gate.astype(hidden_F.dtype))
    return alone(product("f,fd->d", hidden_F, weights.w_down, expert))

  assignments = rows_RD, gates_R, expert_R
  y_RD = (lax.map(lambda each: up_and_down(*each), assignments) if on_cpu
          else jax.vmap(up_and_down)(*assignments))
  return y_RD.reshape(*experts_NK.shape, -1).sum(1, dtype=jnp.float32).astype(y_RD.dtype)


# Slots: C rows for every expert in one batched product, and a loop over what overflows them.


class _Slots(NamedTuple):
  """Which assignment is in which slot; `order_R` also has those that overflow their expert's slots.

  Attributes:
    order_R: int32, the assignments n * K + k, sorted by expert.
    starts_E: int32, the index in `order_R` of each expert's first assignment.
    sizes_E: int32, each expert's number of assignments, overflow included.
    assignment_EC: int32, the assignment in each slot; undefined for slots that are not taken.
    taken_EC: whether there is an assignment in each slot.
    slot_NK: int32, the slot e * C + c of each assignment; undefined for those without a slot.
    within_capacity_NK: whether each assignment has a slot.
  """

  order_R: jax.Array
  starts_E: jax.Array
  sizes_E: jax.Array
  assignment_EC: jax.Array
  taken_EC: jax.Array
  slot_NK: jax.Array
  within_capacity_NK: jax.Array


def _assign_slots(experts_NK: jax.Array, num_experts: int, capacity: int) -> _Slots:
  order_R, sizes_E = sort_by_expert(experts_NK, num_experts)
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  slot_C = jnp.arange(capacity, dtype=jnp.int32)
  place_EC = jnp.minimum(starts_E[:, None] + slot_C, order_R.shape[0] - 1)
  none_NK = (experts_NK < 0) | (experts_NK >= num_experts)
  expert_NK = jnp.where(none_NK, 0, experts_NK)
  rank_NK = _inverse(order_R).reshape(experts_NK.shape) - starts_E[expert_NK]
  return _Slots(
      order_R, starts_E, sizes_E,
      assignment_EC=order_R[place_EC], taken_EC=slot_C < sizes_E[:, None],
      slot_NK=expert_NK * capacity + jnp.minimum(rank_NK, capacity - 1),
      within_capacity_NK=(rank_NK < capacity) & ~none_NK)


def slot_experts(
    weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array,
    numerics: Numerics, *, capacity_factor: float = CAPACITY_FACTOR,
    block: int = BLOCK) -> jax.Array:
  """Computes C slots per expert in one batched product, then the overflow in blocks of rows.

  Balanced routing costs `capacity_factor` times the useful work, and no iteration of the loop over
  blocks. Any other routing is computed as exactly, and is slower in proportion to its overflow.

  Args:
    weights, x_ND, gates_NK, experts_NK, numerics: as in all functions of this module.
    capacity_factor: slots per expert as a multiple of the mean load, N * K / E.
    block: rows of an overflow block, which holds assignments of one expert.

  Raises:
    ValueError: if the numerics have an FP8 recipe.
  """
  _reject_recipe("slots", numerics)
  num_experts, d_ff, d_model = weights.w_down.shape
  assignments = experts_NK.size
  capacity = -(-int(capacity_factor * assignments) // num_experts)
  capacity = max(1, min(x_ND.shape[0], -(-capacity // 8) * 8))
  cast = lambda x: x.astype(numerics.compute_dtype)
  slots = _assign_slots(experts_NK, num_experts, capacity)
  return _slot_ffn(
      (numerics, block), cast(x_ND), gates_NK,
      cast(weights.w_gate_up).reshape(num_experts, d_model, 2 * d_ff), cast(weights.w_down), slots)


@recomputed
def _hidden(gate_up: jax.Array, gates: jax.Array) -> jax.Array:
  """Returns hidden units times their row's gate: [..., 2 F] and [...] to [..., F]."""
  split = gate_up.reshape(*gate_up.shape[:-1], 2, -1)
  return gated(split) * gates[..., None].astype(gate_up.dtype)


def _from_slots(rows_ED: jax.Array, slots: _Slots) -> jax.Array:
  """Sums every token's rows that are within capacity: [E, C, D] to [N, D], in float32."""
  flat = rows_ED.reshape(-1, rows_ED.shape[-1])[slots.slot_NK]
  return jnp.where(slots.within_capacity_NK[..., None], flat, 0).sum(1, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slot_ffn(static, x_ND, gates_NK, w_gate_up, w_down, slots):
  return _slot_ffn_forward(static, x_ND, gates_NK, w_gate_up, w_down, slots)[0]


def _slot_ffn_forward(static, x_ND, gates_NK, w_gate_up, w_down, slots):
  numerics, block = static
  token_EC = slots.assignment_EC // gates_NK.shape[1]
  gates_EC = jnp.where(slots.taken_EC, gates_NK.reshape(-1)[slots.assignment_EC], 0)
  gate_up = checkpoint_name(
      numerics.einsum("ecd,edf->ecf", x_ND[token_EC], w_gate_up), "ffn_gate_up")
  rows = numerics.einsum("ecf,efd->ecd", _hidden(gate_up, gates_EC), w_down)
  y_ND = _from_slots(rows, slots)

  capacity = slots.taken_EC.shape[1]
  blocks_E, ends_E = _overflow_blocks(slots, capacity, block)

  def add_block(index, y_ND):
    expert, assignment_P, real_P = _overflow_block(
        index, blocks_E, ends_E, slots, capacity, block)
    token_P = assignment_P // gates_NK.shape[1]
    gates_P = jnp.where(real_P, gates_NK.reshape(-1)[assignment_P], 0)
    rows = _ffn(numerics, x_ND[token_P], gates_P, w_gate_up[expert], w_down[expert])
    return y_ND.at[token_P].add(rows.astype(jnp.float32))

  y_ND = lax.fori_loop(0, ends_E[-1], add_block, y_ND).astype(x_ND.dtype)
  return y_ND, (x_ND, gates_NK, w_gate_up, w_down, slots, gate_up)


def _ffn(numerics, x_PD, gates_P, w_gate_up, w_down):
  gate_up = numerics.einsum("pd,df->pf", x_PD, w_gate_up)
  return numerics.einsum("pf,fd->pd", _hidden(gate_up, gates_P), w_down)


def _overflow_blocks(slots: _Slots, capacity: int, block: int) -> tuple[jax.Array, jax.Array]:
  """Returns the number of blocks of each expert's overflow, and its cumulative sum over experts."""
  blocks_E = -(-jnp.maximum(slots.sizes_E - capacity, 0) // block)
  return blocks_E, jnp.cumsum(blocks_E)


def _overflow_block(index, blocks_E, ends_E, slots, capacity, block):
  """Returns the expert and assignments of an overflow block, and which of its rows are real.

  The other rows are padding, after the expert's last assignment.
  """
  expert = jnp.searchsorted(ends_E, index, side="right").astype(jnp.int32)
  nth = index - (ends_E[expert] - blocks_E[expert])
  rank_P = capacity + nth * block + jnp.arange(block, dtype=jnp.int32)
  place_P = jnp.minimum(slots.starts_E[expert] + rank_P, slots.order_R.shape[0] - 1)
  return expert, slots.order_R[place_P], rank_P < slots.sizes_E[expert]


def _slot_ffn_backward(static, residuals, dy_ND):
  numerics, block = static
  x_ND, gates_NK, w_gate_up, w_down, slots, gate_up = residuals
  einsum, num_chosen = numerics.einsum, gates_NK.shape[1]
  token_EC = slots.assignment_EC // num_chosen
  gates_EC = jnp.where(slots.taken_EC, gates_NK.reshape(-1)[slots.assignment_EC], 0)

  # The gate of an empty slot is zero, and hence so are its hidden units and their gradients: they
  # need no mask.
  dy_ECD = dy_ND[token_EC]
  hidden, hidden_vjp = jax.vjp(_hidden, gate_up, gates_EC)
  dw_down = einsum("ecf,ecd->efd", hidden, dy_ECD)
  dgate_up, dgates_EC = hidden_vjp(einsum("ecd,efd->ecf", dy_ECD, w_down))
  dw_gate_up = einsum("ecd,ecf->edf", x_ND[token_EC], dgate_up)
  dx_ND = _from_slots(einsum("ecf,edf->ecd", dgate_up, w_gate_up), slots)
  dgates_NK = jnp.where(slots.within_capacity_NK, dgates_EC.reshape(-1)[slots.slot_NK], 0)

  capacity = slots.taken_EC.shape[1]
  blocks_E, ends_E = _overflow_blocks(slots, capacity, block)

  def add_block(index, totals):
    dx_ND, dgates_R, dw_gate_up, dw_down = totals
    expert, assignment_P, real_P = _overflow_block(
        index, blocks_E, ends_E, slots, capacity, block)
    token_P = assignment_P // num_chosen
    gates_P = jnp.where(real_P, gates_NK.reshape(-1)[assignment_P], 0)
    _, vjp = jax.vjp(functools.partial(_ffn, numerics), x_ND[token_P], gates_P,
                     w_gate_up[expert], w_down[expert])
    dx_P, dgates_P, dw_gate_up_1, dw_down_1 = vjp(dy_ND[token_P])
    return (dx_ND.at[token_P].add(dx_P.astype(jnp.float32)),
            dgates_R.at[assignment_P].add(jnp.where(real_P, dgates_P, 0)),
            dw_gate_up.at[expert].add(dw_gate_up_1), dw_down.at[expert].add(dw_down_1))

  dx_ND, dgates_R, dw_gate_up, dw_down = lax.fori_loop(
      0, ends_E[-1], add_block, (dx_ND, dgates_NK.reshape(-1), dw_gate_up, dw_down))
  return (dx_ND.astype(x_ND.dtype), dgates_R.reshape(gates_NK.shape), dw_gate_up, dw_down, None)


_slot_ffn.defvjp(_slot_ffn_forward, _slot_ffn_backward)


def fastest_experts(cfg: ModelConfig, num_tokens: int) -> str:
  """Returns the key of EXPERTS that is fastest on this process's first device.

  That is "grouped" with an FP8 recipe; otherwise "few" for tokens that choose no more experts than
  there are or, on GPUs, than `_FEW_ON_GPU`; "grouped" where grouped products have a kernel (Hopper
  GPUs, for bfloat16 and widths that are multiples of 128), else "slots".

  Args:
    cfg: the architecture.
    num_tokens: N, tokens of a pass.
  """
  if cfg.numerics.recipe:
    return "grouped"
  most = {"cpu": cfg.moe.num_experts, "gpu": _FEW_ON_GPU}.get(target().platform, 0)
  if num_tokens * cfg.moe.experts_per_token <= most:
    return "few"
  kernel = (implementations.local_backend() == "mosaic_gpu" and cfg.numerics.compute == "bfloat16"
            and cfg.d_model % 128 == 0 and cfg.moe.expert_dim % 128 == 0)
  return "grouped" if kernel else "slots"


def _reject_recipe(name: str, numerics: Numerics) -> None:
  if numerics.recipe:
    raise ValueError(f"experts={name!r} does not support FP8, which numerics.recipe asks for: use "
                     "experts='grouped', or numerics without a recipe")


EXPERTS = {"dense": dense_experts, "grouped": grouped_experts, "slots": slot_experts,
           "few": few_experts}
