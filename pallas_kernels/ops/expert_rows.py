"""The layout in which experts receive their tokens: rows sorted by expert, aligned to tiles.

Shape letters:  N tokens  K experts per token  R = N * K assignments  E experts
                S rows of the layout, in which every expert begins at a multiple of 128
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ops.fp8_grouped import align_groups, aligned_places, aligned_rows


class ExpertRows(NamedTuple):
  """Rows sorted by expert; every expert begins at a multiple of 128, after padding rows if needed.

  Every tile of 128 rows thus belongs to a single expert, so that its rows can share a scale and be
  multiplied with the same matrix. Padding rows belong to no token.

  Attributes:
    assignment_S: int32, the assignment n * K + k of each row; R for padding rows.
    place_NK: int32, the row of each assignment; S or more for assignments without an expert.
    sizes_E: int32, rows per expert, without padding rows.
  """

  assignment_S: jax.Array
  place_NK: jax.Array
  sizes_E: jax.Array


def sort_by_expert(experts_NK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
  """Sorts the assignments of tokens to experts by expert.

  Args:
    experts_NK: int, the experts of each token; one outside 0..E-1 means no expert.
    num_experts: E.

  Returns:
    The assignments n * K + k, int32 [R], stably sorted by expert with those without an expert last,
    and the number of assignments per expert, int32 [E].
  """
  experts_R = experts_NK.reshape(-1)
  experts_R = jnp.where((experts_R < 0) | (experts_R >= num_experts), num_experts, experts_R)
  sizes_E = jnp.zeros(num_experts, jnp.int32).at[experts_R].add(1, mode="drop")
  return jnp.argsort(experts_R, stable=True).astype(jnp.int32), sizes_E


def layout_expert_rows(experts_NK: jax.Array, num_experts: int) -> ExpertRows:
  """Returns the layout of rows for a routing.

  Args:
    experts_NK: int, the experts of each token; one outside 0..E-1 means no expert.
    num_experts: E.
  """
  order_R, sizes_E = sort_by_expert(experts_NK, num_experts)
  num_rows = len(order_R)
  place_R = aligned_places(sizes_E, num_rows, aligned_rows(num_rows, num_experts))
  return ExpertRows(
      align_groups(order_R, sizes_E, fill_value=num_rows),
      jnp.zeros_like(order_R).at[order_R].set(place_R, unique_indices=True).reshape(
          experts_NK.shape),
      sizes_E)
