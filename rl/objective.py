"""Policy-gradient losses as data: GRPO and its relatives are `ObjectiveSpec`s of one function.

A loss is returned as a sum and its denominator. Both are additive over micro-batches, so that the
gradient is the same however the sequences are split, ordered or padded.

Shape letters:  S sequences  T tokens
"""

import dataclasses
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from model.checks import require

Sum = tuple[jax.Array, jax.Array]
_static = lambda **kwargs: flax.struct.field(pytree_node=False, **kwargs)

# The largest exponent given to exp, in nats. A larger log ratio only says that the sample was next
# to impossible; clamping it, with zero gradient, keeps exp from overflowing into the gradient.
_MAX_EXPONENT = 20.0


@flax.struct.dataclass
class ObjectiveSpec:
  """The objective to maximise.

  Its floats are pytree leaves, so that specs that differ only in them share one executable.

  Attributes:
    ratio: the unit that has one policy ratio r = pi_theta / pi_old. "token": each token
      (DeepSeekMath eq. 3). "sequence": the whole output, as the product over its tokens (R1 eq. 1).
      "sequence_mean": the whole output, as the geometric mean over its tokens (GSPO eq. 7). The
      latter two give an output a single value, which counts once for each of its tokens.
    surrogate: the term that is maximised. "clip": min(r A, clip(r) A) (PPO eq. 7). "cispo":
      stop_gradient(clip(r)) A log pi (MiniMax-M1 eq. 4). "none": A log pi, which ignores pi_old
      (REINFORCE).
    aggregation: how tokens are averaged. "sequence_mean": over each output's tokens, then over
      outputs. "token_mean": over all tokens (DAPO eq. 8). "constant_length": each output's sum over
      tokens / `max_length`, then the mean over outputs (Dr. GRPO); with a `max_length` of 1, the
      mean over outputs of plain sums.
    max_length: divisor of the aggregation "constant_length", in tokens; unused otherwise.
    kl_in: where beta x KL(policy, reference) enters: "loss", "reward" or "none".
    kl: the estimator, with d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d
      (DeepSeekMath eq. 4). For samples of pi itself, the expected gradient of k2 in the loss and of
      k1 in the reward is that of KL(pi || pi_ref), of k3 in the loss that of KL(pi_ref || pi), and
      of k1 in the loss 0. Estimated token by token in the loss, these are KLs of the next token at
      the sampled prefixes: they have no gradient through the probability of reaching a prefix.
    kl_level: the unit of a KL in the loss. "token": each token's, averaged like the surrogate, in
      nats per token. "token_sum": the sum over an output's tokens, which by the chain rule
      estimates the KL of whole outputs, in nats per output. "sequence": the estimator applied to
      d summed over the output, in nats per output.
    dual_clip: bound the loss of tokens with a negative advantage A by `dual_clip_ratio` x |A| (Ye
      et al. 2020).
    importance: weight each token's surrogate by min(pi_old / pi_sampler, `importance_cap`), for a
      sampler whose log-probabilities differ numerically from the trainer's for the same policy.
    epsilon: r is clipped below at 1 - epsilon; an epsilon of 1 or more has no lower clip.
    epsilon_high: r is clipped above at 1 + epsilon_high; None for the value of `epsilon`.
    beta: weight of the KL; 0 or more.
    dual_clip_ratio: the bound of `dual_clip`, above 1.
    importance_cap: the largest weight of `importance`, above 0.
  """

  ratio: Literal["token", "sequence", "sequence_mean"] = _static(default="token")
  surrogate: Literal["clip", "cispo", "none"] = _static(default="clip")
  aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = _static(
      default="sequence_mean")
  max_length: int | None = _static(default=None)
  kl_in: Literal["none", "loss", "reward"] = _static(default="none")
  kl: Literal["k1", "k2", "k3"] = _static(default="k3")
  kl_level: Literal["token", "token_sum", "sequence"] = _static(default="token")
  dual_clip: bool = _static(default=False)
  importance: bool = _static(default=False)
  epsilon: float | jax.Array = 0.2
  epsilon_high: float | jax.Array | None = None
  beta: float | jax.Array = 0.0
  dual_clip_ratio: float | jax.Array = 3.0
  importance_cap: float | jax.Array = 2.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, choices = getattr(self, field.name), get_args(field.type)
      if choices and isinstance(choices[0], str):
        require(value in choices, f"ObjectiveSpec.{field.name}={value!r} must be one of {choices}")
    require(self.max_length is None or self.max_length > 0,
            f"ObjectiveSpec.max_length={self.max_length} must be positive")
    require(self.kl_level == "token" or (self.kl_in, self.aggregation) == ("loss", "sequence_mean"),
            f"ObjectiveSpec.kl_level={self.kl_level!r} is for a KL in the loss that is averaged "
            "over outputs: set kl_in='loss' and aggregation='sequence_mean', or kl_level='token'")
    require(not self.dual_clip or self.surrogate == "clip",
            f"ObjectiveSpec.dual_clip needs surrogate='clip', not {self.surrogate!r}")
    bounds = {"epsilon": 0, "epsilon_high": 0, "beta": 0, "dual_clip_ratio": 1, "importance_cap": 0}
    for name, low in bounds.items():
      value = getattr(self, name)
      if isinstance(value, (int, float)):  # not a tracer, nor an array of values to vmap over
        strict = name in ("dual_clip_ratio", "importance_cap")
        require(value > low or (value == low and not strict),
                f"ObjectiveSpec.{name}={value} must be {'above' if strict else 'at least'} {low}")


SPECS: dict[str, ObjectiveSpec] = {
    # DeepSeekMath eq. 3-4, section 4.2; the paper gives no epsilon.
    "grpo": ObjectiveSpec(kl_in="loss", beta=0.04),
    # R1 eq. 1-2, epsilon and beta as in its section on training details. Both the ratio and D_KL
    # are of whole outputs, pi(o|q). Taken literally (kl_level="sequence"), k3's gradient 1 - e^-d
    # is 1 for nearly every long output and, like k1's, averages to zero. The sum of the tokens' k3
    # estimates the same KL and has an effect. Their mean would not match a ratio whose gradient is
    # a sum over tokens: relative to it, the KL would vanish as outputs grow longer.
    "grpo_r1": ObjectiveSpec(
        ratio="sequence", kl_in="loss", kl_level="token_sum", beta=0.001, epsilon=10.0),
    # Liu et al. 2025, section 3.2. Set max_length to the sampler's limit on completion length.
    "dr_grpo": ObjectiveSpec(aggregation="constant_length", max_length=1024),
    # Yu et al. 2025, eq. 8 and section 4.1.
    "dapo": ObjectiveSpec(aggregation="token_mean", epsilon_high=0.28),
    # Zheng et al. 2025, eq. 5-7 and section 5.1.
    "gspo": ObjectiveSpec(ratio="sequence_mean", epsilon=3e-4, epsilon_high=4e-4),
    # MiniMax-M1 eq. 4-5: no lower clip. The paper gives no epsilon_high; the upper bound of 5 is
    # ScaleRL's.
    "cispo": ObjectiveSpec(
        surrogate="cispo", aggregation="token_mean", epsilon=1.0, epsilon_high=4.0),
    # Ahmadian et al. 2024: an output is one action, with the leave-one-out baseline. Here the
    # baseline is taken over the task's rewards alone, and the KL is subtracted afterwards.
    "rloo": ObjectiveSpec(
        ratio="sequence", surrogate="none", kl_in="reward", kl="k1", beta=0.03),
    # Williams 1992: the sum over tokens of A log pi.
    "reinforce": ObjectiveSpec(surrogate="none", aggregation="constant_length", max_length=1),
    # DeepSeekMath eq. 1-2, with InstructGPT's beta (its appendix C.4).
    "ppo": ObjectiveSpec(kl_in="reward", kl="k1", beta=0.02),
}


def denominator(mask_ST: jax.Array, spec: ObjectiveSpec) -> jax.Array:
  """Returns the divisor of the summed loss: outputs, tokens, or outputs x `max_length`.

  Args:
    mask_ST: mask of the learned tokens, [..., S, T], where leading axes may be micro-batches. Rows
      without a token do not count as outputs.
    spec: the objective, whose `aggregation` decides what is counted.

  Returns:
    A float32 scalar. It is 0 for an empty mask: divide by the maximum of it and 1, over the whole
    batch.

  Raises:
    ValueError: for the aggregation "constant_length" without a `max_length`.
  """
  token_mask_ST = jnp.asarray(mask_ST) != 0
  if spec.aggregation == "token_mean":
    return token_mask_ST.sum(dtype=jnp.float32)
  sequences = token_mask_ST.any(-1).sum(dtype=jnp.float32)
  if spec.aggregation == "sequence_mean":
    return sequences
  require(spec.max_length is not None, "aggregation='constant_length' needs the limit on "
          "the completion length, in tokens: set it by spec.replace(max_length=...)")
  return sequences * spec.max_length


def policy_loss(
    logp: jax.Array, logp_old: jax.Array, logp_ref: jax.Array | None, advantage: jax.Array,
    mask: jax.Array, spec: ObjectiveSpec, *, logp_sampler: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Sum]]:
  """The loss to minimise, differentiable with respect to `logp` only.

  Log-probabilities are [S, T], in nats, of the sampled tokens, and all at the temperature at which
  they were sampled. Values outside the mask have no effect, not even NaN or infinity.

  Args:
    logp: log-probabilities under the policy that is trained.
    logp_old: log-probabilities under the policy that sampled, as the trainer computes them.
    logp_ref: log-probabilities under the reference. None if the objective has no KL, in which case
      the metric "kl" is not reported.
    advantage: [S], or [S, T] with ratio="token". With kl_in="reward" it is lowered by beta x the
      KL of pi_old to the reference, summed from the token to the end, or over the whole output
      where an output has a single ratio. A trainer that has put this KL into its rewards itself,
      for `advantages.gae`, sets beta to 0.
    mask: [S, T], True or non-zero at tokens to learn from; rows without any do not count.
    spec: the objective, one of `SPECS` or derived from one by `replace`.
    logp_sampler: log-probabilities as the sampler computed them; used if `spec.importance`.

  Returns:
    The loss's sum and its denominator (see `denominator`), both additive over micro-batches, and
    metrics {name: (sum, count)}: add up sums and counts over micro-batches, then divide. "kl" (k3
    from the policy to the reference) and "approx_kl" (k3 from pi_old to pi) are in nats per token
    whatever the objective's own KL is. "policy_loss" and "kl_loss" (multiplied by beta) have the
    loss's denominator. "ratio/mean", "ratio/mean_square", which reveals single large ratios, and
    "clip_ratio/*", the fractions of ratios whose gradient is clipped or bounded, are averages over
    tokens or outputs, depending on `spec.ratio`.

  Raises:
    ValueError: for shapes that disagree, or if log-probabilities that the spec needs are missing.
  """
  _check(logp, logp_old, logp_ref, advantage, mask, spec, logp_sampler)
  mask_ST = jnp.asarray(mask) != 0
  # Inputs are masked, rather than results multiplied by the mask: 0 x nan is nan, in gradients too.
  masked = lambda x: jnp.where(mask_ST, x, 0)
  fixed = lambda x: jax.lax.stop_gradient(masked(x))
  logp_ST, old_ST = masked(logp), fixed(logp_old)
  tokens_ST = mask_ST.astype(logp_ST.dtype)
  per_output_ST = tokens_ST / jnp.maximum(tokens_ST.sum(-1, keepdims=True), 1)
  weights_ST = per_output_ST if spec.aggregation == "sequence_mean" else tokens_ST
  count = denominator(mask_ST, spec)
  mean = lambda x_ST, over_ST: jax.lax.stop_gradient(((x_ST * over_ST).sum(), over_ST.sum()))

  advantage_ST = fixed(advantage if advantage.ndim == 2 else advantage[:, None])
  if spec.kl_in == "reward":
    advantage_ST -= spec.beta * masked(_kl_to_go(old_ST - fixed(logp_ref), spec))
  gain_ST, statistics = _surrogate(
      _of_unit(logp_ST, tokens_ST, spec), _of_unit(old_ST, tokens_ST, spec), advantage_ST, spec)
  metrics = {name: mean(value, tokens_ST if spec.ratio == "token" else per_output_ST)
             for name, value in statistics.items()}
  metrics["approx_kl"] = mean(_kl(old_ST - logp_ST, "k3"), tokens_ST)
  if spec.importance:
    weight_ST = jnp.minimum(_exp(old_ST - fixed(logp_sampler)), spec.importance_cap)
    gain_ST = gain_ST * weight_ST
    metrics["importance/mean"] = mean(weight_ST, tokens_ST)
  loss = -(gain_ST * weights_ST).sum()
  metrics["policy_loss"] = jax.lax.stop_gradient((loss, count))
  if logp_ref is not None:
    log_ratio_ST = logp_ST - fixed(logp_ref)
    metrics["kl"] = mean(_kl(log_ratio_ST, "k3"), tokens_ST)
    if spec.kl_in == "loss":
      kl_loss = spec.beta * (_kl_in_loss(log_ratio_ST, spec) * weights_ST).sum()
      metrics["kl_loss"] = jax.lax.stop_gradient((kl_loss, count))
      loss += kl_loss
  return loss, count, metrics


def _surrogate(logp, old, advantage_ST, spec):
  """Returns the surrogate of each token, to be maximised, and statistics of the ratios."""
  if spec.surrogate == "none":
    return advantage_ST * logp, {}
  ratio = _exp(logp - old)
  low = 1 - spec.epsilon
  high = 1 + (spec.epsilon if spec.epsilon_high is None else spec.epsilon_high)
  clipped = jnp.clip(ratio, low, high)
  below, above = ratio < low, ratio > high
  if spec.surrogate == "cispo":
    gain_ST = jax.lax.stop_gradient(clipped) * advantage_ST * logp
  else:
    gain_ST = jnp.minimum(ratio * advantage_ST, clipped * advantage_ST)
    below, above = below & (advantage_ST < 0), above & (advantage_ST > 0)
  statistics = {"ratio/mean": ratio, "ratio/mean_square": ratio**2, "clip_ratio/low": below,
                "clip_ratio/high": above, "clip_ratio/region": below | above}
  if spec.dual_clip:
    bound_ST = spec.dual_clip_ratio * advantage_ST
    statistics["clip_ratio/dual"] = (advantage_ST < 0) & (gain_ST < bound_ST)
    gain_ST = jnp.where(advantage_ST < 0, jnp.maximum(gain_ST, bound_ST), gain_ST)
  return gain_ST, statistics


def _of_unit(logp_ST, tokens_ST, spec):
  """Log-probabilities of the units that have one ratio: tokens [S, T] or whole outputs [S, 1]."""
  if spec.ratio == "token":
    return logp_ST
  total_S1 = logp_ST.sum(-1, keepdims=True)
  if spec.ratio == "sequence":
    return total_S1
  return total_S1 / jnp.maximum(tokens_ST.sum(-1, keepdims=True), 1)


def _kl(log_ratio, estimator):
  """Estimates KL(p || q) by k1, k2 or k3 of log p - log q at samples of p (Schulman 2020)."""
  if estimator == "k1":
    return log_ratio
  if estimator == "k2":
    return log_ratio**2 / 2
  exponent = jnp.minimum(-log_ratio, _MAX_EXPONENT)
  return jnp.expm1(exponent) - exponent


def _kl_in_loss(log_ratio_ST, spec):
  if spec.kl_level == "sequence":
    return _kl(log_ratio_ST.sum(-1, keepdims=True), spec.kl)
  kl_ST = _kl(log_ratio_ST, spec.kl)
  return kl_ST.sum(-1, keepdims=True) if spec.kl_level == "token_sum" else kl_ST


def _kl_to_go(log_ratio_ST, spec):
  """The KL from each token to the end, as a token cannot change earlier ones; or the output's."""
  kl_ST = _kl(log_ratio_ST, spec.kl)
  if spec.ratio == "token":
    return jax.lax.cumsum(kl_ST, axis=1, reverse=True)
  return kl_ST.sum(-1, keepdims=True)


def _exp(log_ratio):
  return jnp.exp(jnp.minimum(log_ratio, _MAX_EXPONENT))


def _check(logp, logp_old, logp_ref, advantage, mask, spec, logp_sampler):
  require(spec.kl_in == "none" or logp_ref is not None,
          f"logp_ref is None, but the objective has a KL in the {spec.kl_in}: give the "
          "reference's log-probabilities, or set kl_in='none'")
  require(not spec.importance or logp_sampler is not None,
          "logp_sampler is None: give the sampler's log-probabilities, or set importance=False")
  require(jnp.ndim(logp) == 2,
          f"logp has shape {jnp.shape(logp)}, expected [sequences, tokens]")
  arrays = {"logp_old": logp_old, "logp_ref": logp_ref, "mask": mask,
            "logp_sampler": logp_sampler}
  for name, array in arrays.items():
    shape = logp.shape if array is None else array.shape
    require(shape == logp.shape,
            f"{name} has shape {shape}, expected the shape of logp, {logp.shape}")
  shapes = [logp.shape[:1]] + ([logp.shape] if spec.ratio == "token" else [])
  require(advantage.shape in shapes,
          f"advantage has shape {advantage.shape}, expected one of {shapes}: with ratio="
          f"{spec.ratio!r}, one value for each sequence" + (" or token" if len(shapes) > 1 else ""))
