"""Models and batches for training within a test: one layer each, of parts that compile quickly."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import model
from train.config import OptimizerConfig
from train.losses import Batch

MOE = dataclasses.replace(
    tiny.V3, num_layers=1, num_dense_layers=0, attention=tiny.MQA.attention, rope=tiny.MQA.rope,
    moe=dataclasses.replace(tiny.V3.moe, num_groups=1, groups_per_token=1),
    mtp=model.MTPConfig(depth=1), init_std=0.2)
DENSE = dataclasses.replace(
    tiny.MHA, num_layers=1, tie_embeddings=False, mtp=model.MTPConfig(depth=2))

# An update is lr * m / (sqrt(v) + eps): with eps far above the gradients' rounding noise, it is a
# smooth function of them, and runs that round differently can be compared.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_fraction=0, eps=1e-2, moments="float32")

LENGTH = 12
RAGGED = (12, 11, 1, 0, 3, 2, 12, 7)  # learned tokens of each row; pairs of rows: 23, 1, 5, 19


def rows(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
  """Returns random rows; of row i, the last RAGGED[i] tokens are learned.

  No row contains the vocabulary's last token.
  """
  tokens = np.random.default_rng(seed).integers(0, MOE.vocab_size - 1, (count, LENGTH + 1))
  learned = np.resize(RAGGED, count)
  return {"tokens": tokens.astype(np.int32),
          "loss_mask": np.arange(LENGTH) >= LENGTH - learned[:, None]}


def batch(values: dict[str, np.ndarray], num_micro_batches: int | None = None) -> Batch:
  """Returns rows as a Batch, with a leading axis of micro-batches if their number is given."""
  if num_micro_batches:
    values = {k: v.reshape(num_micro_batches, -1, *v.shape[1:]) for k, v in values.items()}
  return Batch(values["tokens"], values["loss_mask"], values.get("segments"))


def max_rel_diff(a, b) -> float:
  """Returns the largest difference in any array, relative to that array's largest value in b."""
  def one(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))

  return max(jax.tree.leaves(jax.tree.map(one, a, b)))


def assert_same_bits(a, b) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(
      np.asarray(x).view(np.int32), np.asarray(y).view(np.int32)), a, b)


def fp8_blocks(jaxpr, loops: int = 0) -> collections.Counter:
  """Counts the conversions to FP8 in blocks of 128x128, by the number of enclosing loops."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "convert_element_type":
      out = eqn.outvars[0].aval
      if out.dtype == jnp.float8_e4m3fn and out.shape[-3::2] == (128, 128):
        found[loops] += 1
    within = loops + (eqn.primitive.name in ("scan", "while"))
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found += fp8_blocks(inner, within)
  return found
