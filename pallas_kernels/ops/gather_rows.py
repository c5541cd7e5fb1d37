"""Taking rows: sending tokens to their experts moves as many bytes as a product reads.

Shape letters:  M rows
"""

import jax

from pallas_kernels import implementations

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.gather_rows")}


def gather_rows(
    x_M: jax.Array, index: jax.Array, fill_value: int = 0, *,
    implementation: str | None = None) -> jax.Array:
  """x[index].

  Args:
    x_M: [M, ...].
    index: int32, of any shape, not negative.
    fill_value: of what is behind the last row.
    implementation: see `pallas_kernels`.

  Returns:
    [*index.shape, ...].

  Raises:
    ValueError: if the implementation named cannot do it here.
  """
  return implementations.run("gather_rows", implementation, _xla, _KERNELS, x_M, index,
                             fill_value=fill_value)


def _xla(x_M: jax.Array, index: jax.Array, *, fill_value: int) -> jax.Array:
  return x_M.at[index].get(mode="fill", fill_value=fill_value)
