"""The tilings that `--experiment=tune_kernels` measured fastest, by operation and shape.

Nothing is tuned at run time: a shape that is not in the table gets its kernel's default tiling.
"""

import functools
import importlib.resources
import json

import jax.numpy as jnp


def key(operation: str, dtype: jnp.dtype, *sizes: int) -> str:
  """Returns the table's key for an operation with a result of this dtype, on these sizes."""
  return f"{operation} {jnp.dtype(dtype).name} {' x '.join(map(str, sizes))}"


def tuned[Tiling](default: Tiling, operation: str, dtype: jnp.dtype, *sizes: int) -> Tiling:
  """Returns the tiling measured fastest for this shape, or `default` if none was measured."""
  fields = table().get(key(operation, dtype, *sizes))
  return type(default)(**fields) if fields else default


@functools.cache
def table() -> dict[str, dict[str, int]]:
  """Returns the committed table: the fields of a `Tiling`, by `key`."""
  text = importlib.resources.files(__package__).joinpath("tilings.json").read_text()
  return json.loads(text)
