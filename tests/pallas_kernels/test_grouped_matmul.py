"""The grouped product equals one product per group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul


@pytest.mark.parametrize("sizes", [[3, 4, 5], [0, 12, 0], [12, 0, 0], [1, 0, 2], [0, 0, 0]])
def test_each_group_meets_its_own_matrix_and_rows_past_the_sum_give_zero(sizes):
  lhs_RK = jax.random.normal(jax.random.key(0), (12, 5))
  rhs_GKN = jax.random.normal(jax.random.key(1), (3, 5, 7))
  ours = grouped_matmul(lhs_RK, rhs_GKN, jnp.array(sizes, jnp.int32), precision="highest")
  want, first = np.zeros((12, 7), np.float32), 0
  for group, size in enumerate(sizes):
    want[first:first + size] = np.asarray(lhs_RK)[first:first + size] @ np.asarray(rhs_GKN)[group]
    first += size
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shapes", "message"), [
    (((4, 5), (2, 6, 7), (2,)), "contracts K: lhs has 5, rhs 6"),
    (((4, 5), (2, 5, 7), (3,)), "sizes \\[G\\]"),
    (((4, 5, 1), (2, 5, 7), (2,)), "lhs \\[R, K\\]"),
])
def test_shapes_that_do_not_fit_are_refused(shapes, message):
  lhs, rhs, sizes = (jnp.zeros(shape, jnp.int32) for shape in shapes)
  with pytest.raises(ValueError, match=message):
    grouped_matmul(lhs, rhs, sizes)


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="no implementation 'magic'; there are: xla"):
    grouped_matmul(jnp.zeros((4, 5)), jnp.zeros((2, 5, 7)), jnp.zeros(2, jnp.int32),
                   implementation="magic")
