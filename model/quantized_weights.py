"""Every linear layer's weight quantised ahead: once a step, not once a pass over a micro-batch.

Shape letters:  K input width  N output width
"""

import math
from typing import Any

import jax

from model.config import ModelConfig
from model.variables import logical_axes
from pallas_kernels import WeightOperands, quantize_weight

_STACKED = ("layers", "expert")  # axes with a matrix for each index
_SUMMED = {"w_o": 2}  # axes that a product sums, heads and their width; of others, one


def quantize_weights(cfg: ModelConfig, params: Any) -> dict:
  """`{"quantized": tree}`, to pass among variables beside these parameters; {} without a recipe.

  Gradients are still those of the parameters. Scales are of blocks of whole matrices, however they
  are spread over devices, and a device that gathers a weight gathers eight bits a number.

  Args:
    cfg: of the model.
    params: its parameters.
  """
  recipe = cfg.numerics.recipe
  if recipe is None:
    return {}

  def one(path, w, axes) -> WeightOperands | None:
    name = path[-1].key
    if not name.startswith("w_"):
      return None
    stacked = sum(axis in _STACKED for axis in axes)
    width = math.prod(w.shape[stacked:stacked + _SUMMED.get(name, 1)])
    return quantize_weight(w.reshape(*w.shape[:stacked], width, -1), recipe)

  return {"quantized": jax.tree_util.tree_map_with_path(one, params, logical_axes(cfg)["params"])}
