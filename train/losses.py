"""The language model's training loss as named terms, each a sum with its own denominator.

Denominators are computed from the whole batch before the first micro-batch is processed, so that
gradients do not depend on how the batch is split into micro-batches.

Shape letters:  B sequences  T tokens
"""

import flax.struct
import jax
import jax.numpy as jnp

from model import Transformer, balance

Sums = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
  """Training sequences; arrays may have further leading axes (micro-batches, seeds).

  Attributes:
    tokens: int32 [B, T + 1]; the model reads the first T and predicts the last T.
    loss_mask: bool [B, T]; whether the prediction of token t + 1 is trained on.
    segments: int32 [B, T], number of the document of each prediction (0 is padding) if documents
      must not attend to each other, else None.
  """

  tokens: jax.Array
  loss_mask: jax.Array
  segments: jax.Array | None = None


@flax.struct.dataclass
class AuxOutputs:
  """What a micro-batch yields besides its loss; summed over micro-batches.

  Attributes:
    loads: int32 [..., E] for each key of `Output.router`: tokens that each expert received.
    means: metrics that are means, as pairs of a sum and a count.
  """

  loads: dict[str, jax.Array]
  means: dict[str, tuple[jax.Array, jax.Array]] = flax.struct.field(default_factory=dict)


class LanguageModelLoss:
  """The losses of next-token and multi-token prediction (V3 eq. 24-25), and of load balance."""

  def __init__(self, model: Transformer):
    self.model = model

  def denominators(self, batch: Batch) -> Sums:
    """Returns the denominator of each term, from the whole batch with all its micro-batches."""
    tokens = jnp.maximum(batch.loss_mask.sum(), 1).astype(jnp.float32)
    sequences = jnp.maximum(_counts(batch).sum(), 1).astype(jnp.float32)
    depth = self.model.cfg.mtp.depth if self.model.cfg.mtp else 1
    one = jnp.float32(1)
    return {"lm": tokens, "mtp": depth * tokens, "sequence_balance": sequences,
            "batch_balance": one, "expert_balance": one}

  def sums(self, variables: dict, batch: Batch) -> tuple[Sums, AuxOutputs]:
    """Returns the terms of one micro-batch, and its AuxOutputs.

    "lm" and "mtp" are in nats, summed over tokens and (for "mtp") over depths; "sequence_balance"
    is summed over sequences and MoE layers; "batch_balance" and "expert_balance" over MoE layers.
    """
    model = self.model
    inputs_BT = batch.tokens[:, :-1]
    output = model.apply(variables, inputs_BT, segment_ids_BT=batch.segments, logits=False)

    def nll(hidden_BTD, ahead, mask_BT):
      targets_BT = jnp.roll(batch.tokens, -ahead, axis=1)[:, :-1]
      weights_BT = mask_BT.astype(jnp.float32)
      return -model.apply(variables, hidden_BTD, targets_BT, weights_BT, method="logprob_sum")

    sums = {"lm": nll(output.hidden_BTD, 1, batch.loss_mask)}
    if output.mtp_hidden:
      sums["mtp"] = sum(
          nll(hidden, 1 + k, mtp_mask(batch, k)) for k, hidden in enumerate(output.mtp_hidden, 1))
    if output.router:
      chosen = model.cfg.moe.experts_per_token
      total = lambda loss, weight=1: sum(
          (loss(stats, chosen) * weight).sum() for stats in output.router.values())
      sums |= {"sequence_balance": total(balance.sequence_balance_loss, _counts(batch)),
               "batch_balance": total(balance.batch_balance_loss),
               "expert_balance": total(balance.expert_balance_loss)}
    return sums, AuxOutputs({name: stats.load_BE.sum(-2) for name, stats in output.router.items()})


def _counts(batch: Batch) -> jax.Array:
  """Returns bool [..., B]: which rows are sequences rather than padding of the batch."""
  return (batch.loss_mask if batch.segments is None else batch.segments).any(-1)


def mtp_mask(batch: Batch, depth: int) -> jax.Array:
  """Returns bool [B, T]: where MTP module `depth` has a token to read and one to predict.

  Both must be in the sequence and in the same document, and the second must be trained on. V3's eq.
  24 nevertheless divides by all T positions, not by the number of such positions.
  """
  num_tokens = batch.loss_mask.shape[1]
  inside_T = jnp.arange(num_tokens) < num_tokens - depth
  mask_BT = jnp.roll(batch.loss_mask, -depth, axis=1) & inside_T
  if batch.segments is not None:
    mask_BT &= jnp.roll(batch.segments, -depth, axis=1) == batch.segments
  return mask_BT
