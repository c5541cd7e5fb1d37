"""Advantages: by comparison within a prompt's group of outputs (GRPO, RLOO), or by GAE (PPO).

Groups are told by their prompt's id, never by a row's position, so rows may be shuffled, dropped or
spread unevenly; but a group must be complete: these functions run on the host, on all of a rollout.

Shape letters:  S sequences  T tokens  N rows to normalise: sequences, or their steps
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from model.checks import require

Baseline = Literal["mean_std", "mean", "leave_one_out"]

# Rewards of a group that differ by less, relative to the highest, differ by rounding: 0.1 + 0.2 and
# 0.3, say, which divided by their standard deviation would become +-1. This is above float32's.
_ROUNDING = 1e-6


class Advantages(NamedTuple):
  """Advantages, and what of the rollout gives no signal.

  Attributes:
    values: float32, [S] or for process supervision [S, T].
    excluded: rows (steps) whose reward could not be judged.
    lone: groups in which a single row was judged, whose advantage is 0.
    equal: groups of several whose rewards are all equal, whose advantages are 0.
  """

  values: np.ndarray
  excluded: int
  lone: int
  equal: int


def group_advantages(
    rewards_S: ArrayLike | Sequence[float | None], group_ids_S: ArrayLike, *,
    baseline: Baseline = "mean_std", valid_S: ArrayLike | None = None) -> Advantages:
  """Outcome supervision: each output's reward against those of its group.

  "mean_std" is (r - mean) / std (R1 eq. 3), exactly 0 where all rewards are equal, with the
  population's std: a group's advantages have a mean square of 1 whatever its size. The paper shows
  nothing added to std, and nothing is. "mean" is r - mean (Dr. GRPO). "leave_one_out" is r - the
  mean of the others (RLOO), G / (G - 1) times "mean".

  Args:
    rewards_S: one per output; None where it could not be judged.
    group_ids_S: the prompt of each output, of any type that sorts; all of a prompt's outputs must
      be there.
    baseline: what a reward is compared with.
    valid_S: bool; where false, as where a reward is None, the row leaves its group: its advantage
      is 0 and it counts in no mean or std.

  Raises:
    ValueError: a prompt with one output only, a reward that is not finite, lengths that differ, or
      an unknown baseline.
  """
  groups_S = _groups(group_ids_S)
  rewards_S, valid_S = _judged(rewards_S, valid_S)
  require(groups_S.shape == rewards_S.shape,
          f"{rewards_S.size} rewards with {groups_S.size} group ids: give each reward its prompt's")
  return _normalise(rewards_S, groups_S, valid_S, baseline)


def process_advantages(
    step_rewards: Sequence[Sequence[float | None]], step_ends: Sequence[Sequence[int]],
    group_ids_S: ArrayLike, num_tokens: int, *, baseline: Baseline = "mean_std") -> Advantages:
  """Process supervision: each token has the sum of the rewards of steps that end at it or later.

  Rewards are normalised over all steps of all outputs of the group first (DeepSeekMath section
  4.1.3).

  Args:
    step_rewards: of S outputs, a reward for each of its steps; None as in `group_advantages`.
    step_ends: the index of each step's last token, in 0..num_tokens - 1.
    group_ids_S: the prompt of each output.
    num_tokens: T.
    baseline: as in `group_advantages`, over steps.

  Returns:
    Values of shape [S, T], 0 after an output's last step; counts are of steps and groups.

  Raises:
    ValueError: as `group_advantages`, or steps that do not match their ends.
  """
  groups_S = _groups(group_ids_S)
  counts_S = np.array([len(rewards) for rewards in step_rewards], int)
  require(list(counts_S) == [len(ends) for ends in step_ends] and counts_S.size == groups_S.size,
          "step_rewards, step_ends and group_ids_S disagree: give each output a list of rewards, a "
          "list of as many ends, and its prompt's id")
  rows_N = np.repeat(np.arange(groups_S.size), counts_S)
  ends_N = np.array([end for ends in step_ends for end in ends], int)
  require(bool(((ends_N >= 0) & (ends_N < num_tokens)).all()),
          f"step_ends must lie in 0..{num_tokens - 1}, the tokens that there are")
  rewards_N, valid_N = _judged([reward for rewards in step_rewards for reward in rewards], None)
  steps = _normalise(rewards_N, groups_S[rows_N], valid_N, baseline)
  values_ST = np.zeros((groups_S.size, num_tokens), np.float32)
  np.add.at(values_ST, (rows_N, ends_N), steps.values)
  return steps._replace(values=np.cumsum(values_ST[:, ::-1], axis=1)[:, ::-1])


def gae(rewards_ST: jax.Array, values_ST: jax.Array, mask_ST: jax.Array,
        gamma: float | jax.Array, lam: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (Schulman et al. 2016, eq. 16), for PPO with a value head.

  The value after an output's last token is 0: an output that was cut off should be masked.

  Args:
    rewards_ST: by token; an output's own reward is at its last.
    values_ST: the value of the state that each token is chosen in; taken as constant.
    mask_ST: true at tokens that were chosen; others, wherever they are, are passed over.
    gamma: discount per token.
    lam: 0 trusts the values (one-step errors), 1 the rewards (Monte Carlo).

  Returns:
    Advantages, and the returns (advantage + value) that values are fitted to; [S, T], 0 outside
    the mask.
  """
  mask_ST = jnp.asarray(mask_ST) != 0
  rewards_ST, values_ST = jax.lax.stop_gradient(
      (jnp.where(mask_ST, rewards_ST, 0), jnp.where(mask_ST, values_ST, 0)))

  def step(later, token):
    later_advantage_S, later_value_S = later
    reward_S, value_S, mask_S = token
    error_S = reward_S + gamma * later_value_S - value_S
    advantage_S = jnp.where(mask_S, error_S + gamma * lam * later_advantage_S, later_advantage_S)
    return (advantage_S, jnp.where(mask_S, value_S, later_value_S)), advantage_S

  end_S = jnp.zeros_like(values_ST[:, 0])
  _, advantage_TS = jax.lax.scan(
      step, (end_S, end_S), (rewards_ST.T, values_ST.T, mask_ST.T), reverse=True)
  advantage_ST = jnp.where(mask_ST, advantage_TS.T, 0)
  return advantage_ST, advantage_ST + values_ST


def _groups(group_ids_S):
  """Each output's group as 0, 1, ...; refuses groups that were sampled with one output."""
  ids, groups_S, sizes = np.unique(group_ids_S, return_inverse=True, return_counts=True)
  alone = ids[sizes == 1]
  require(not alone.size, f"{alone.size} prompts have one output, such as {alone[:1].tolist()}: an "
          "output is compared with others of its prompt, so sample at least 2 (num_generations)")
  return groups_S


def _judged(rewards, valid):
  """Rewards in float64, 0 where not judged, and which are."""
  judged_N = np.array([reward is not None for reward in rewards], bool)
  if valid is not None:
    require(np.shape(valid) == judged_N.shape,
            f"valid_S has shape {np.shape(valid)}, expected {judged_N.shape}, that of the rewards")
    judged_N &= np.asarray(valid, bool)
  rewards_N = np.where(judged_N, np.asarray(rewards, float), 0)
  require(bool(np.isfinite(rewards_N).all()),
          "a reward is not finite: return None for an output that cannot be judged")
  return rewards_N, judged_N


def _normalise(rewards_N, groups_N, valid_N, baseline) -> Advantages:
  require(baseline in get_args(Baseline),
          f"baseline={baseline!r} must be one of {get_args(Baseline)}")
  num_groups = groups_N.max(initial=-1) + 1
  total = lambda x_N: np.bincount(groups_N, np.where(valid_N, x_N, 0), num_groups)
  count = total(np.ones_like(rewards_N))
  centred_N = rewards_N - (total(rewards_N) / np.maximum(count, 1))[groups_N]
  variance = total(centred_N**2) / np.maximum(count, 1)

  lowest, highest = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
  np.minimum.at(lowest, groups_N[valid_N], rewards_N[valid_N])
  np.maximum.at(highest, groups_N[valid_N], rewards_N[valid_N])
  several = count > 1
  differ = np.zeros(num_groups, bool)
  differ[several] = (highest - lowest)[several] > _ROUNDING * abs(highest[several])

  scale = {"mean_std": 1 / np.sqrt(np.where(differ, variance, 1)), "mean": np.ones(num_groups),
           "leave_one_out": count / np.maximum(count - 1, 1)}[baseline]
  values_N = np.where(valid_N & differ[groups_N], centred_N * scale[groups_N], 0)
  return Advantages(
      values_N.astype(np.float32), excluded=int((~valid_N).sum()), lone=int((count == 1).sum()),
      equal=int((several & ~differ).sum()))
