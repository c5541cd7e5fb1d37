"""Evaluation: held-out loss by domain, acceptance of MTP's drafts, and the load of the experts.

Shape letters:  L MoE layers  E routed experts  R held-out sequences  B sequences  T tokens  D width
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from model import Transformer
from train.data import HeldOut
from train.losses import Batch, mtp_mask


@flax.struct.dataclass
class Counts:
  """Sums over the tokens of each sequence.

  Attributes:
    nll_B: negative log-likelihood of the predicted tokens, in nats.
    tokens_B: number of predicted tokens.
    accepted_B: number of tokens for which the first MTP module and the main model have the same
      most likely prediction.
    drafted_B: number of tokens that both of them predict.
    loads_BLE: int32, tokens that each expert of each MoE layer received; L and E are 0 without
      experts.
  """

  nll_B: jax.Array
  tokens_B: jax.Array
  accepted_B: jax.Array
  drafted_B: jax.Array
  loads_BLE: jax.Array


def count(model: Transformer, variables: dict, batch: Batch) -> Counts:
  """Returns the sums of each sequence of a batch, from a forward pass of the model.

  Args:
    model: the network.
    variables: its variables.
    batch: sequences of T + 1 tokens each, [B, T + 1].
  """
  inputs_BT, targets_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
  output = model.apply(variables, inputs_BT, segment_ids_BT=batch.segments, logits=False)
  logp_BT = model.apply(variables, output.hidden_BTD, targets_BT, method="token_logprobs")
  total = lambda x_BT: jnp.where(batch.loss_mask, x_BT, 0).sum(1)
  zeros = jnp.zeros(len(inputs_BT), jnp.int32)
  accepted, drafted = zeros, zeros
  if output.mtp_hidden:
    # MTP at i and the main model at i + 1 both predict token i + 2.
    mask_BT = mtp_mask(batch, 1)
    main_BT = jnp.roll(_likeliest(model, variables, output.hidden_BTD), -1, axis=1)
    draft_BT = _likeliest(model, variables, output.mtp_hidden[0])
    accepted, drafted = ((main_BT == draft_BT) & mask_BT).sum(1), mask_BT.sum(1)
  loads_BLE = jnp.zeros((len(inputs_BT), 0, 0), jnp.int32)
  if "moe_layers" in output.router:
    loads_BLE = output.router["moe_layers"].load_BE.swapaxes(0, 1)
  return Counts(total(-logp_BT), total(jnp.ones_like(logp_BT)), accepted, drafted, loads_BLE)


def _likeliest(model: Transformer, variables: dict, hidden_BTD: jax.Array) -> jax.Array:
  """Returns the token with the largest logit, int32 [B, T].

  Sequence by sequence, so that the logits of only one are in memory.
  """
  def one(hidden_TD):
    return model.apply(variables, hidden_TD[None], method="unembed")[0].argmax(-1)

  return jax.lax.map(one, hidden_BTD)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The results of an `Evaluator`; with several seeds, all values have a leading axis of seeds.

  Attributes:
    loss: mean loss in nats per token, by domain.
    bits_per_byte: bits per byte of text, by domain. The loss of end-of-document tokens is included,
      but they count as no bytes.
    mtp_acceptance: fraction of positions at which the first MTP module's most likely token is the
      main model's too, over all domains; None without MTP.
    loads: int64 [L, E], tokens that each expert received, by domain.
    row_loads: int32 [R, L, E], tokens that each expert received from every sequence, by domain, for
      statistics over sequences.
  """

  loss: dict[str, np.ndarray]
  bits_per_byte: dict[str, np.ndarray]
  mtp_acceptance: np.ndarray | None
  loads: dict[str, np.ndarray]
  row_loads: dict[str, np.ndarray]

  @property
  def mean_bits_per_byte(self) -> np.ndarray:
    """The unweighted mean of `bits_per_byte` over domains."""
    return np.mean(list(self.bits_per_byte.values()), axis=0)

  @property
  def mean_loss(self) -> np.ndarray:
    """The unweighted mean of `loss` over domains, in nats per token."""
    return np.mean(list(self.loss.values()), axis=0)

  @property
  def max_violation(self) -> np.ndarray | None:
    """MaxVio over all held-out tokens, averaged over layers; None without experts.

    This is MaxVio_global of arXiv:2408.15664.
    """
    load_LE = sum(np.asarray(load) for load in self.loads.values())
    if not load_LE.size:
      return None
    return (load_LE.max(-1) / load_LE.mean(-1) - 1).mean(-1)


class Evaluator:
  """Evaluates variables on the held-out sequences of every domain.

  Args:
    counts: jitted `count` of a model, a function of variables and a batch.
    heldout: the held-out sequences by domain.
    batch_size: number of sequences that are evaluated at a time.
    several: whether the variables, and hence the counts, have a leading axis of seeds.
    masked: whether documents packed into a sequence are kept from attending to each other.
  """

  def __init__(self, counts: Callable[[dict, Batch], Counts], heldout: Mapping[str, HeldOut], *,
               batch_size: int, several: bool = False, masked: bool = False):
    self._count, self._heldout, self._batch_size = counts, heldout, batch_size
    self._masked = masked
    self._axis = int(several)  # the axis of sequences in the counts

  def __call__(self, variables: dict) -> Evaluation:
    """Returns the evaluation of `variables` on all domains."""
    counts = self._count_by_domain(variables)
    axis = self._axis
    total = lambda c, name: np.asarray(getattr(c, name)).sum(axis, dtype=np.float64)
    nll = {domain: total(c, "nll_B") for domain, c in counts.items()}
    loss = {domain: nll[domain] / total(c, "tokens_B") for domain, c in counts.items()}
    bits = {domain: nll[domain] / math.log(2) / self._heldout[domain].num_bytes
            for domain in counts}
    accepted = sum(total(c, "accepted_B") for c in counts.values())
    drafted = sum(total(c, "drafted_B") for c in counts.values())
    return Evaluation(
        loss, bits, accepted / drafted if np.all(drafted) else None,
        {domain: c.loads_BLE.sum(axis, dtype=np.int64) for domain, c in counts.items()},
        {domain: c.loads_BLE for domain, c in counts.items()})

  def _count_by_domain(self, variables: dict) -> dict[str, Counts]:
    """Returns the counts of all sequences of each domain, gathered on the host.

    The domains' sequences are counted as one list, so that a single batch is padded, and a single
    shape of batches is compiled.
    """
    parts, axis = list(self._heldout.values()), self._axis
    joined = lambda name: np.concatenate([getattr(rows, name) for rows in parts])
    tokens_RL, mask_RT = joined("tokens"), joined("loss_mask")
    segments_RT = joined("segments") if self._masked else None
    batches, size = [], min(self._batch_size, len(tokens_RL))
    for start in range(0, len(tokens_RL), size):
      part = lambda x, start=start: x if x is None else _padded(x[start:start + size], size)
      batches.append(self._count(
          variables, Batch(part(tokens_RL), part(mask_RT), part(segments_RT))))
    counts = jax.tree.map(lambda *xs: np.concatenate(xs, axis), *batches)
    ends = np.cumsum([len(rows.tokens) for rows in parts]).tolist()
    cut = lambda x, start, end: x[(slice(None),) * axis + (slice(start, end),)]
    return {domain: jax.tree.map(lambda x, start=start, end=end: cut(x, start, end), counts)
            for domain, start, end in zip(self._heldout, [0, *ends], ends, strict=False)}


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  return np.pad(rows, [(0, size - len(rows)), (0, 0)])
