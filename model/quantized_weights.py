"""Quantises the weights of linear layers once per step, not in every pass over a micro-batch.

Shape letters:  K input width  N output width
"""

import math
from typing import Any

import jax

from model.config import ModelConfig
from model.variables import logical_axes
from pallas_kernels import WeightOperands, quantize_weight

_STACKED = ("layers", "expert")  # logical axes that stack matrices
# Leading axes of a weight that its product sums: heads and their width of w_o, else one axis.
_SUMMED = {"w_o": 2}


def quantize_weights(cfg: ModelConfig, params: Any) -> dict:
  """Quantises the weights of a model's linear layers to FP8.

  Gradients are still computed for the parameters. Scales belong to blocks of whole matrices,
  however these are sharded, and a device that gathers a weight receives eight bits per value.

  Args:
    cfg: the architecture, with its numerics.
    params: the tree of parameters, as in `model.init(...)["params"]`; parts of the model that are
      not run, such as MTP modules, may be absent.

  Returns:
    `{"quantized": tree}`, to be passed to the model along with these parameters, where the tree has
    a `pallas_kernels.WeightOperands` for every weight, and None for other parameters. An empty dict
    if the numerics have no FP8 recipe.
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

  axes = logical_axes(cfg)["params"]
  present = {name: axes[name] for name in params}
  return {"quantized": jax.tree_util.tree_map_with_path(one, params, present)}
