"""Gathering rows by index, which for dispatch moves as many bytes as a matrix product reads.

Shape letters:  M rows
"""

import jax

from pallas_kernels import implementations

_KERNELS = {"mosaic_gpu": implementations.lazy("mosaic_gpu.gather_rows")}


def gather_rows(
    x_M: jax.Array, index: jax.Array, fill_value: int = 0, *,
    implementation: str | None = None) -> jax.Array:
  """Returns x[index], with a fill value where an index is out of range.

  Args:
    x_M: [M, ...], the rows to gather from.
    index: int32, of any shape; must not be negative.
    fill_value: value of every element whose index is M or more.
    implementation: which implementation to run; see `pallas_kernels`.

  Returns:
    [*index.shape, ...], in x's dtype.

  Raises:
    ValueError: if the named implementation cannot run here.
  """
  return implementations.run("gather_rows", implementation, _xla, _KERNELS, x_M, index,
                             fill_value=fill_value)


def _xla(x_M: jax.Array, index: jax.Array, *, fill_value: int) -> jax.Array:
  return x_M.at[index].get(mode="fill", fill_value=fill_value)
