"""Held-out loss by domain, how often MTP's guess would be accepted, and which experts saw what.

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
  """Sums over each sequence.

  Attributes:
    nll_B: nats.
    tokens_B: tokens predicted.
    accepted_B: places where the first MTP module and the main model would predict the same token.
    drafted_B: places where it could have.
    loads_BLE: tokens that each expert of each MoE layer received; L is 0 without experts.
  """

  nll_B: jax.Array
  tokens_B: jax.Array
  accepted_B: jax.Array
  drafted_B: jax.Array
  loads_BLE: jax.Array


def count(model: Transformer, variables: dict, batch: Batch) -> Counts:
  """Runs the model over a [B, T + 1] batch."""
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
  """The token with the largest logit, [B, T], with one sequence's logits in memory at a time."""
  def one(hidden_TD):
    return model.apply(variables, hidden_TD[None], method="unembed")[0].argmax(-1)

  return jax.lax.map(one, hidden_BTD)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What `Evaluator` finds, per domain; with several seeds, values have a leading axis for them.

  Attributes:
    loss: nats per token.
    bits_per_byte: of the text, end-of-document tokens paid for but not counted as bytes.
    mtp_acceptance: share of places where MTP's guess is the main model's too; None without MTP.
    loads: int64 [L, E].
    row_loads: int32 [R, L, E] of every sequence, for statistics over sequences.
  """

  loss: dict[str, np.ndarray]
  bits_per_byte: dict[str, np.ndarray]
  mtp_acceptance: np.ndarray | None
  loads: dict[str, np.ndarray]
  row_loads: dict[str, np.ndarray]

  @property
  def mean_bits_per_byte(self) -> np.ndarray:
    """The unweighted mean over domains."""
    return np.mean(list(self.bits_per_byte.values()), axis=0)

  @property
  def mean_loss(self) -> np.ndarray:
    return np.mean(list(self.loss.values()), axis=0)

  @property
  def max_violation(self) -> np.ndarray | None:
    """MaxVio over all held-out tokens, the mean over layers (MaxVio_global, arXiv:2408.15664)."""
    load_LE = sum(np.asarray(load) for load in self.loads.values())
    if not load_LE.size:
      return None
    return (load_LE.max(-1) / load_LE.mean(-1) - 1).mean(-1)


class Evaluator:
  """Evaluates variables on the held-out sequences of every domain.

  Args:
    counts: `count` for a model, jitted: of variables and a batch.
    heldout: by domain.
    batch_size: sequences at a time.
    several: whether variables, and so counts, have a leading axis of seeds.
    masked: whether documents are kept from attending to each other.
  """

  def __init__(self, counts: Callable[[dict, Batch], Counts], heldout: Mapping[str, HeldOut], *,
               batch_size: int, several: bool = False, masked: bool = False):
    self._count, self._heldout, self._batch_size = counts, heldout, batch_size
    self._masked = masked
    self._axis = int(several)  # that of sequences

  def __call__(self, variables: dict) -> Evaluation:
    counts = {domain: self._domain(variables, rows) for domain, rows in self._heldout.items()}
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

  def _domain(self, variables: dict, rows: HeldOut) -> Counts:
    """Counts of all sequences, gathered on the host."""
    tokens_RL, mask_RT = rows.tokens, rows.loss_mask
    batches, size = [], min(self._batch_size, len(tokens_RL))
    for start in range(0, len(tokens_RL), size):
      stop = min(start + size, len(tokens_RL))
      part = lambda x, start=start, stop=stop: np.pad(
          x[start:stop], ((0, start + size - stop), (0, 0)))
      batch = Batch(part(tokens_RL), part(mask_RT), part(rows.segments) if self._masked else None)
      batches.append((self._count(variables, batch), stop - start))
    cut = lambda x, n: np.asarray(x)[(slice(None),) * self._axis + (slice(n),)]
    return jax.tree.map(lambda *xs: np.concatenate(xs, self._axis), *(
        jax.tree.map(lambda x, n=n: cut(x, n), counts) for counts, n in batches))
