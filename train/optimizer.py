"""AdamW with bfloat16 moments and float32 master weights, and V3's schedules."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import model
from model.checks import require
from train.config import OptimizerConfig, RunConfig

# V3 section 4.2, as fractions of its 14.8 T tokens: constant until 10 T, a cosine to a tenth over
# 4.3 T, constant for 333 B, and 7.3e-6 for the last 167 B, where the peak is 2.2e-4.
_V3_CONSTANT, _V3_DECAYED, _V3_LAST = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
_V3_FINAL = 7.3 / 220


class Moments(NamedTuple):
  """AdamW's moments: running means of the gradient (mu) and of its square (nu).

  Attributes:
    mu: first moments, a tree with the parameters' structure and shapes.
    nu: second moments, a tree with the parameters' structure and shapes.
  """

  mu: dict
  nu: dict


def init_moments(params: dict, cfg: OptimizerConfig) -> Moments:
  """Returns the moments before the first step: zeros in the format `cfg.moments`."""
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, cfg.moments), params)
  if any(len(p.sharding.device_set) > 1 for p in jax.tree.leaves(params)
         if not isinstance(p, jax.core.Tracer)):
    return Moments(zeros(), zeros())
  # One program for all arrays, instead of one for every shape.
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, cfg.moments), params)
  return jax.jit(lambda: Moments(zeros(), zeros()))()


def decay_mask(cfg: model.ModelConfig) -> dict:
  """Returns a bool for every parameter: whether weight decay applies to it.

  It applies to matrices, but not to norms and biases. The axis along which layers are stacked does
  not count: stacked vectors are not matrices.
  """
  def decays(path, axes):
    # The bias of several heads has two axes, but is not a matrix.
    is_bias = path[-1].key.startswith("b_")
    return not is_bias and sum(axis != "layers" for axis in axes) >= 2

  return jax.tree_util.tree_map_with_path(
      decays, model.logical_axes(cfg)["params"],
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def adamw(
    grads: dict, moments: Moments, params: dict, count: jax.Array, learning_rate: jax.Array,
    decays: dict, cfg: OptimizerConfig) -> tuple[dict, Moments]:
  """Takes one step of AdamW (arXiv:1711.05101).

  All arithmetic is in float32; the moments are stored in the format `cfg.moments`.

  Args:
    grads: gradients, already scaled down to `cfg.max_grad_norm`.
    moments: the moments before the step.
    params: float32 master weights.
    count: number of updates before this one, an integer scalar.
    learning_rate: learning rate of this step, a scalar; it also multiplies the weight decay.
    decays: a bool for every parameter, whether weight decay applies (`decay_mask`).
    cfg: beta1, beta2, eps, weight decay and the format of the moments.

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
  """Returns the learning rate as a function of the step, which counts from 0.

  Step 0 is already one increment of the warm-up above zero.

  Args:
    cfg: the kind of schedule, its peak and its fractions.
    steps: number of optimizer steps of the run.

  Raises:
    ValueError: if the decay is longer than the run.
  """
  require(cfg.decay_steps <= steps, f"optimizer.decay_steps={cfg.decay_steps} must be at most the "
          f"{steps} optimizer steps of the run")
  peak = cfg.learning_rate
  warmup = cfg.warmup_steps or max(1, round(cfg.warmup_fraction * steps))
  ramp = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  if cfg.schedule == "constant":
    after, bounds = [optax.constant_schedule(peak)], [warmup]
  elif cfg.schedule == "wsd":
    decay = cfg.decay_steps
    after = [optax.constant_schedule(peak),
             optax.linear_schedule(peak, cfg.final_ratio * peak, max(1, decay - 1))]
    bounds = [warmup, max(warmup, steps - decay)]
  elif cfg.schedule == "cosine":
    decay = max(1, steps - 1 - warmup)
    after, bounds = [optax.cosine_decay_schedule(peak, decay, cfg.final_ratio)], [warmup]
  else:
    bounds = [warmup] + [
        round(fraction * steps) for fraction in (_V3_CONSTANT, _V3_DECAYED, _V3_LAST)]
    after = [optax.constant_schedule(peak),
             optax.cosine_decay_schedule(peak, max(1, bounds[2] - bounds[1]), 0.1),
             optax.constant_schedule(0.1 * peak), optax.constant_schedule(_V3_FINAL * peak)]
  return optax.join_schedules([ramp, *after], bounds)


class Schedule:
  """The hyper-parameters that change during a run; `schedule[i]` are those of step i, from 0.

  They are numbers that enter the compiled step as data, so that a change does not recompile it.
  """

  def __init__(self, cfg: RunConfig):
    self.cfg = cfg

  @functools.cached_property
  def _learning_rates(self) -> np.ndarray:
    # All steps in one call: schedules are JAX functions, which are slow for one step at a time.
    steps = self.cfg.train.steps
    rates = jax.jit(jax.vmap(learning_rate(self.cfg.optimizer, steps)))
    return np.asarray(rates(np.arange(steps)))

  def __getitem__(self, step: int) -> dict:
    """Returns "learning_rate", "bias_rate" (gamma) and the "weights" of the loss terms."""
    train, balance = self.cfg.train, self.cfg.balance
    early = step < train.mtp_fraction * train.steps
    biased = step < balance.bias_fraction * train.steps
    return {
        "learning_rate": np.float32(self._learning_rates[step]),
        "bias_rate": np.float32(balance.gamma(train.steps, not self.cfg.init) if biased else 0.0),
        "weights": {
            "lm": np.float32(1),
            "mtp": np.float32(train.mtp_weight if early else train.mtp_late_weight),
            "sequence_balance": np.float32(balance.sequence_weight),
            "batch_balance": np.float32(balance.batch_weight),
            "expert_balance": np.float32(balance.expert_weight)}}

  def num_micro_batches(self, step: int) -> int:
    """Returns the number of micro-batches of a step: fewer than all while the batch ramps up."""
    train = self.cfg.train
    ramp, full = train.batch_ramp_fraction * train.steps, train.num_micro_batches
    if step >= ramp:
      return full
    fraction = train.batch_ramp_start + (1 - train.batch_ramp_start) * step / ramp
    return max(1, round(fraction * full))


def schedule_changes(before: RunConfig, after: RunConfig, done: int) -> list[str]:
  """Returns how the hyper-parameters of the steps that a run has taken differ in another config.

  Fractions in schedules are fractions of all steps, so they differ if the number of steps does. An
  extended run is the same as one that was longer from the beginning if nothing differs.

  Args:
    before: the config of the run.
    after: the config with which it is extended.
    done: number of steps that have been taken.
  """
  old, new, lines = Schedule(before), Schedule(after), {}
  for step in np.unique(np.linspace(0, done - 1, min(done, 500)).astype(int)).tolist():
    for name, (was, now) in {
        **{key: (old[step][key], new[step][key]) for key in ("learning_rate", "bias_rate")},
        **{f"weight of {key}": (old[step]["weights"][key], new[step]["weights"][key])
           for key in old[step]["weights"]},
        "micro-batches": (old.num_micro_batches(step), new.num_micro_batches(step))}.items():
      if not np.isclose(was, now, rtol=1e-6, atol=0):
        lines[name] = f"{name} of step {step + 1}: {was:.4g} as trained, {now:.4g} in a run of " \
                      f"{after.train.steps} steps"
  return list(lines.values())
