"""Weights cast to the compute format once, rather than in every product."""

import flax.linen as nn
import jax

from model.config import ModelConfig


def cast_weights(cfg: ModelConfig, variables: dict) -> dict:
  """Returns a model's variables with weights in the compute format.

  A pass casts every weight to that format before it is multiplied, so this changes no result. But a
  pass over few tokens takes about as long as reading the weights, and reads half as many bytes of
  weights that are cast already. The parameters of routers and norms are read in float32 and stay
  as they are, and so does everything with an FP8 recipe, which quantises weights from their own
  format.

  Args:
    cfg: the architecture.
    variables: its variables, as `Transformer.init` returns them or without Flax's boxes. Weights in
      that format are returned as they are.
  """
  variables = nn.unbox(variables)
  if cfg.numerics.recipe is not None:
    return variables
  dtype = cfg.numerics.compute_dtype

  def one(path, x):
    name = path[-1].key
    is_weight = name.startswith("w_") or name in ("embedding", "head")
    return x.astype(dtype) if is_weight and x.dtype != dtype else x

  return variables | {"params": jax.tree_util.tree_map_with_path(one, variables["params"])}
