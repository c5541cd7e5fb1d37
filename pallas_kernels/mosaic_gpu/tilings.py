"""The tilings that were measured fastest, by operation and shape.

They come from `--experiment=tune_kernels`.

Nothing is tuned when it runs: a shape that is not in the table gets its kernel's default.
"""

import functools
import importlib.resources
import json

import jax.numpy as jnp


def key(operation: str, dtype: jnp.dtype, *sizes: int) -> str:
  """The table's name for an operation that gives `dtype`, on arrays of these sizes."""
  return f"{operation} {jnp.dtype(dtype).name} {' x '.join(map(str, sizes))}"


def tuned[Tiling](default: Tiling, operation: str, dtype: jnp.dtype, *sizes: int) -> Tiling:
  """The tiling measured best, or `default` if this was never measured."""
  fields = table().get(key(operation, dtype, *sizes))
  return type(default)(**fields) if fields else default


@functools.cache
def table() -> dict[str, dict[str, int]]:
  text = importlib.resources.files(__package__).joinpath("tilings.json").read_text()
  return json.loads(text)
