"""Expert row layout: an expert's rows are contiguous, 128-aligned, and one per assignment.

Shape letters:  N tokens  K experts per token  E experts  S rows
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels import RECIPES, fp8_experts, layout_expert_rows
from pallas_kernels.ops.gather_rows import gather_rows
from pallas_kernels.recipe import Recipe

E = 3


@settings(deadline=None)  # some examples compile, which exceeds the deadline
@given(arrays(np.int32, (140, 2), elements=st.integers(-1, E)))
def test_every_assignment_has_a_row_in_a_tile_of_its_expert(experts_NK):
  layout = layout_expert_rows(jnp.array(experts_NK), E)
  assignment_S, place_NK = np.array(layout.assignment_S), np.array(layout.place_NK)
  assigned = (experts_NK >= 0) & (experts_NK < E)
  assert (place_NK[~assigned] >= len(assignment_S)).all()
  np.testing.assert_array_equal(
      assignment_S[place_NK[assigned]], np.flatnonzero(assigned.reshape(-1)))
  taken = assignment_S < experts_NK.size
  assert taken.sum() == assigned.sum() == layout.sizes_E.sum()
  for tile in np.split(np.where(taken, assignment_S, -1), len(assignment_S) // 128):
    assert len(set(experts_NK.reshape(-1)[tile[tile >= 0]])) <= 1


def test_indices_past_the_last_row_gather_zeros():
  np.testing.assert_array_equal(gather_rows(jnp.arange(1, 4), jnp.array([2, 0, 3])), [3, 1, 0])


@pytest.mark.parametrize("recipe", [Recipe(None, None, None), RECIPES["v3"]])
def test_a_tokens_output_is_the_sum_of_its_experts_separate_outputs(recipe):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  x_ND, gates_NK = normal(20, 32), jnp.abs(normal(20, 2))
  w_gate_up, w_down = normal(E, 32, 2, 16), normal(E, 16, 32)
  experts_NK = jnp.asarray([[0, 2], [1, 0], [2, E], [-1, 1]] * 5)
  run = lambda experts, gates: fp8_experts(
      x_ND, gates, w_gate_up, w_down, layout_expert_rows(experts, E), recipe)
  both = run(experts_NK, gates_NK)
  separately = sum(run(experts_NK[:, k:k + 1], gates_NK[:, k:k + 1]) for k in range(2))
  # A row's products do not depend on the other rows; only the order of summation differs.
  np.testing.assert_allclose(both, separately, rtol=1e-5, atol=1e-5)
