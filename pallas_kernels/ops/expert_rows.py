"""The layout in which experts receive their tokens: rows sorted by expert, aligned to tiles.

Shape letters:  N tokens  K experts per token  R = N * K assignments  E experts
                S rows with every expert at a multiple of 128
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ops.fp8_grouped import align_groups, aligned_places, aligned_rows


class ExpertRows(NamedTuple):
  """Rows sorted by expert, each expert's from a multiple of 128 on, with padding rows between them.

  A tile of 128 rows then belongs to one expert, so that it can share a scale and be multiplied at
  once.

  Attributes:
    assignment_S: the assignment n * K + k that a row holds; R for padding rows.
    place_NK: the row of an assignment; S or more for one without an expert.
    sizes_E: int32, rows per expert, padding not counted.
  """

  assignment_S: jax.Array
  place_NK: jax.Array
  sizes_E: jax.Array


def sort_by_expert(experts_NK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
  """Assignments n * K + k sorted by expert, those without one last, and each expert's count."""
  experts_R = experts_NK.reshape(-1)
  experts_R = jnp.where((experts_R < 0) | (experts_R >= num_experts), num_experts, experts_R)
  sizes_E = jnp.zeros(num_experts, jnp.int32).at[experts_R].add(1, mode="drop")
  return jnp.argsort(experts_R, stable=True).astype(jnp.int32), sizes_E


def layout_expert_rows(experts_NK: jax.Array, num_experts: int) -> ExpertRows:
  """The layout for a routing; an expert outside 0..E-1 means none."""
  order_R, sizes_E = sort_by_expert(experts_NK, num_experts)
  num_rows = len(order_R)
  place_R = aligned_places(sizes_E, num_rows, aligned_rows(num_rows, num_experts))
  return ExpertRows(
      align_groups(order_R, sizes_E, fill_value=num_rows),
      jnp.zeros_like(order_R).at[order_R].set(place_R, unique_indices=True).reshape(
          experts_NK.shape),
      sizes_E)
