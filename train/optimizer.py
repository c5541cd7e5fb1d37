"""AdamW with bfloat16 moments and float32 master weights, and V3's schedules."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import model
from train.config import OptimizerConfig, RunConfig

# V3 section 4.2, in shares of its 14.8 T tokens: constant to 10 T, a cosine over 4.3 T to a tenth,
# 333 B there, and the last 167 B at 7.3e-6 of a peak of 2.2e-4.
_V3_CONSTANT, _V3_DECAYED, _V3_LAST = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
_V3_FINAL = 7.3 / 220


class Moments(NamedTuple):
  """Running means of the gradient and of its square, shaped like the parameters."""

  mu: dict
  nu: dict


def init_moments(params: dict, cfg: OptimizerConfig) -> Moments:
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, cfg.moments), params)
  return Moments(zeros(), zeros())


def decay_mask(cfg: model.ModelConfig) -> dict:
  """Which parameters decay: matrices, so neither norms nor biases. Stacking layers adds no axis."""
  def decays(path, axes):
    # A bias of several heads has two axes and is none the less a bias.
    is_bias = path[-1].key.startswith("b_")
    return not is_bias and sum(axis != "layers" for axis in axes) >= 2

  return jax.tree_util.tree_map_with_path(
      decays, model.logical_axes(cfg)["params"],
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def adamw(
    grads: dict, moments: Moments, params: dict, count: jax.Array, learning_rate: jax.Array,
    decays: dict, cfg: OptimizerConfig) -> tuple[dict, Moments]:
  """One step of AdamW (arXiv:1711.05101); arithmetic in float32, moments kept in their format.

  Args:
    grads: already clipped.
    moments: see Moments.
    params: float32 masters.
    count: updates before this one.
    learning_rate: also scales the decay.
    decays: a bool for every parameter.
    cfg: see OptimizerConfig.

  Returns:
    The parameters and moments after the step.
  """
  steps = count.astype(jnp.float32) + 1
  mu_scale, nu_scale = 1 / (1 - cfg.beta1**steps), 1 / (1 - cfg.beta2**steps)

  def one(g, mu, nu, p, decay):
    g = g.astype(jnp.float32)
    mu = cfg.beta1 * mu.astype(jnp.float32) + (1 - cfg.beta1) * g
    nu = cfg.beta2 * nu.astype(jnp.float32) + (1 - cfg.beta2) * g * g
    update = mu * mu_scale / (jnp.sqrt(nu * nu_scale) + cfg.eps)
    if decay:
      update += cfg.weight_decay * p
    return p - learning_rate * update, mu.astype(cfg.moments), nu.astype(cfg.moments)

  stepped = jax.tree.map(one, grads, moments.mu, moments.nu, params, decays)
  params, mu, nu = jax.tree.transpose(jax.tree.structure(grads), None, stepped)
  return params, Moments(mu, nu)


def learning_rate(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate of every step from 0; the first is one warm-up step above zero."""
  peak, warmup = cfg.learning_rate, max(1, round(cfg.warmup_fraction * steps))
  ramp = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  if cfg.schedule == "constant":
    after, bounds = [optax.constant_schedule(peak)], [warmup]
  elif cfg.schedule == "cosine":
    decay = max(1, steps - 1 - warmup)
    after, bounds = [optax.cosine_decay_schedule(peak, decay, cfg.final_ratio)], [warmup]
  else:
    bounds = [warmup] + [round(share * steps) for share in (_V3_CONSTANT, _V3_DECAYED, _V3_LAST)]
    after = [optax.constant_schedule(peak),
             optax.cosine_decay_schedule(peak, max(1, bounds[2] - bounds[1]), 0.1),
             optax.constant_schedule(0.1 * peak), optax.constant_schedule(_V3_FINAL * peak)]
  return optax.join_schedules([ramp, *after], bounds)


class Schedule:
  """Values of step `i` of a run, as numbers: they enter the step as data and recompile nothing."""

  def __init__(self, cfg: RunConfig):
    self.cfg = cfg

  @functools.cached_property
  def _learning_rates(self) -> np.ndarray:
    # In one call: schedules are jax functions, and slow one number at a time.
    steps = self.cfg.train.steps
    return np.asarray(jax.vmap(learning_rate(self.cfg.optimizer, steps))(jnp.arange(steps)))

  def __getitem__(self, step: int) -> dict:
    train, balance = self.cfg.train, self.cfg.balance
    early = step < train.mtp_fraction * train.steps
    biased = step < balance.bias_fraction * train.steps
    return {
        "learning_rate": np.float32(self._learning_rates[step]),
        "bias_rate": np.float32(balance.bias_rate if biased else 0.0),
        "weights": {
            "lm": np.float32(1),
            "mtp": np.float32(train.mtp_weight if early else train.mtp_late_weight),
            "sequence_balance": np.float32(balance.sequence_weight),
            "batch_balance": np.float32(balance.batch_weight),
            "expert_balance": np.float32(balance.expert_weight)}}

  def num_micro_batches(self, step: int) -> int:
    """How many micro-batches step `step` has: fewer than all while the batch ramps up."""
    train = self.cfg.train
    ramp, full = train.batch_ramp_fraction * train.steps, train.num_micro_batches
    if step >= ramp:
      return full
    share = train.batch_ramp_start + (1 - train.batch_ramp_start) * step / ramp
    return max(1, round(share * full))
