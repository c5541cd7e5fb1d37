"""Which row each token's assignment to an expert has among those of the same expert.

Shape letters:  N tokens  K experts per token  R = N * K assignments  E experts
                S rows with every expert at a multiple of 128
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ops.fp8_grouped import align_groups, aligned_places, aligned_rows


class Dispatch(NamedTuple):
  """Rows of one expert side by side, beginning at a multiple of 128, between them nobody's.

  A tile of 128 rows is one expert's then, whether it shares a scale or is multiplied at once.

  Attributes:
    assignment_S: the assignment n * K + k that a row is of; R for nobody's.
    place_NK: the row of an assignment; S or more for one without an expert.
    sizes_E: int32, rows per expert.
  """

  assignment_S: jax.Array
  place_NK: jax.Array
  sizes_E: jax.Array


def sort_by_expert(experts_NK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
  """Assignments n * K + k in order of their expert, and how many each expert has.

  Those without an expert come last.
  """
  experts_R = experts_NK.reshape(-1)
  experts_R = jnp.where((experts_R < 0) | (experts_R >= num_experts), num_experts, experts_R)
  sizes_E = jnp.zeros(num_experts, jnp.int32).at[experts_R].add(1, mode="drop")
  return jnp.argsort(experts_R, stable=True).astype(jnp.int32), sizes_E


def dispatch(experts_NK: jax.Array, num_experts: int) -> Dispatch:
  """Where assignments go; an expert outside 0..E-1 means none."""
  order_R, sizes_E = sort_by_expert(experts_NK, num_experts)
  num_rows = len(order_R)
  place_R = aligned_places(sizes_E, num_rows, aligned_rows(num_rows, num_experts))
  return Dispatch(
      align_groups(order_R, sizes_E, fill_value=num_rows),
      jnp.zeros_like(order_R).at[order_R].set(place_R, unique_indices=True).reshape(
          experts_NK.shape),
      sizes_E)
