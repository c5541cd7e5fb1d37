"""Grouped matrix product: rows sorted by group, each group with its own matrix.

Shape letters:  R rows  G groups  K contracted width  N result width
"""

import jax
from jax import lax

IMPLEMENTATIONS = ("xla",)


def grouped_matmul(
    lhs_RK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array, *,
    precision: lax.PrecisionLike = None, implementation: str | None = None,
) -> jax.Array:
  """Multiplies each group of consecutive rows with that group's matrix.

  Args:
    lhs_RK: rows, those of group 0 first.
    rhs_GKN: one matrix per group.
    sizes_G: int32, rows per group; they may be empty or uneven, and rows past their sum give zero.
    precision: as for `jnp.dot`.
    implementation: "xla", or None for the best that this backend has.

  Returns:
    [R, N] in the operands' format, accumulated in float32.

  Raises:
    ValueError: on shapes that do not fit together, or an implementation that does not exist.
  """
  if lhs_RK.ndim != 2 or rhs_GKN.ndim != 3 or sizes_G.shape != rhs_GKN.shape[:1]:
    raise ValueError(
        "grouped_matmul takes lhs [R, K], rhs [G, K, N] and sizes [G], not "
        f"{lhs_RK.shape}, {rhs_GKN.shape} and {sizes_G.shape}")
  if lhs_RK.shape[1] != rhs_GKN.shape[1]:
    raise ValueError(f"grouped_matmul contracts K: lhs has {lhs_RK.shape[1]}, "
                     f"rhs {rhs_GKN.shape[1]}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"grouped_matmul has no implementation {implementation!r}; "
                     f"there are: {', '.join(IMPLEMENTATIONS)}")
  return lax.ragged_dot(lhs_RK, rhs_GKN, sizes_G, precision=precision)
