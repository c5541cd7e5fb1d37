"""Advantages, relative to the other outputs of a prompt (GRPO, RLOO) or by GAE (PPO).

A group is all outputs of one prompt. It is identified by the prompt's id, never by row positions,
so rows may be shuffled or dropped and groups may differ in size. A group must be complete, however:
the group functions run on the host, on a whole rollout.

Shape letters:  S sequences  T tokens  N rows to normalise: sequences, or their steps
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from model.checks import require

Baseline = Literal["mean_std", "mean", "leave_one_out"]

# Rewards whose range is at most this fraction of their scale differ only by rounding, like
# 0.1 + 0.2 and 0.3: divided by their standard deviation they would become +-1. Sums of float64
# terms are rounded by 1e-16 of the terms.
_ROUNDING = 1e-12
# Advantages are float32, and multiplied by ratios of up to e^20.
LARGEST_REWARD = 1e20


class Advantages(NamedTuple):
  """Advantages, and counts of the rows and groups that give no learning signal.

  Attributes:
    values: float32 advantages, [S], or [S, T] for process supervision.
    excluded: number of outputs (of steps, for process supervision) left out of their group: their
      reward is None, or `valid_S` is false.
    lone: number of groups with a single judged row; its advantage is 0.
    equal: number of groups with several judged rows whose rewards are all equal; their advantages
      are 0.
  """

  values: np.ndarray
  excluded: int
  lone: int
  equal: int


def are_equal(rewards: Sequence[float | None], scales: Sequence[float] | None = None) -> bool:
  """Whether all rewards of a group are equal up to rounding, so that they give no signal.

  Args:
    rewards: rewards of a group; None, for an output that could not be judged, is left out.
    scales: for each reward, the sum of the absolute values of the terms that it is the sum of,
      which bounds its rounding. None if it is unknown: terms of at least 1 are assumed.
  """
  known = [(reward, scale) for reward, scale in zip(
      rewards, rewards if scales is None else scales, strict=True) if reward is not None]
  if not known:
    return True
  values, sizes = zip(*known, strict=True)
  scale = max(sizes) if scales is not None else max(1.0, *(abs(value) for value in values))
  return max(values) - min(values) <= _ROUNDING * scale


def group_advantages(
    rewards_S: ArrayLike | Sequence[float | None], group_ids_S: ArrayLike, *,
    baseline: Baseline = "mean_std", valid_S: ArrayLike | None = None,
    scales_S: ArrayLike | None = None) -> Advantages:
  """Outcome supervision: compares each output's reward with those of its group.

  "mean_std" is (r - mean) / std (R1 eq. 3). std is the population's, so that a group's advantages
  have a mean square of 1 whatever its size; as in the paper, no epsilon is added to it. "mean" is
  r - mean (Dr. GRPO). "leave_one_out" is r - the mean of the other rewards (RLOO), which is
  G / (G - 1) times "mean" in a group of G. All of them are exactly 0 where the rewards of a group
  are equal up to rounding, see `are_equal`.

  Args:
    rewards_S: one reward per output; None where the output could not be judged.
    group_ids_S: the id of each output's prompt, of any sortable type; all outputs of a prompt must
      be present.
    baseline: what a reward is compared with: "mean_std", "mean" or "leave_one_out".
    valid_S: bool. A row where it is false, or whose reward is None, leaves its group: its advantage
      is 0, and it enters neither the mean nor the std. None if all rows are valid.
    scales_S: for each reward, the sum of the absolute values of its terms, see `are_equal`.

  Returns:
    Values of shape [S], and counts of outputs and groups.

  Raises:
    ValueError: for a prompt with only one output, a reward that is not finite or exceeds 1e20,
      lengths that differ, or an unknown baseline.
  """
  groups_S = _groups(group_ids_S)
  rewards_S, valid_S = _judged(rewards_S, valid_S)
  require(groups_S.shape == rewards_S.shape,
          f"{rewards_S.size} rewards with {groups_S.size} group ids: give one id for each reward")
  return _normalise(rewards_S, groups_S, valid_S, baseline, scales_S)


def process_advantages(
    step_rewards: Sequence[Sequence[float | None]], step_ends: Sequence[Sequence[int]],
    group_ids_S: ArrayLike, num_tokens: int, *, baseline: Baseline = "mean_std") -> Advantages:
  """Process supervision: a token's advantage sums the rewards of the steps that end at or after it.

  Rewards are first normalised over all steps of all outputs of a group (DeepSeekMath section
  4.1.3).

  Args:
    step_rewards: for each of the S outputs, one reward per step; None for a step that could not be
      judged.
    step_ends: for each of the S outputs, the index of each step's last token, in
      0..num_tokens - 1.
    group_ids_S: the id of each output's prompt, as in `group_advantages`.
    num_tokens: T, the length of the rows that are returned.
    baseline: as in `group_advantages`, taken over steps instead of outputs.

  Returns:
    Values of shape [S, T], 0 after an output's last step, and counts of steps and groups.

  Raises:
    ValueError: for what `group_advantages` refuses, for steps that do not match their ends, or for
      ends outside the tokens.
  """
  groups_S = _groups(group_ids_S)
  counts_S = np.array([len(rewards) for rewards in step_rewards], int)
  require(list(counts_S) == [len(ends) for ends in step_ends] and counts_S.size == groups_S.size,
          "step_rewards, step_ends and group_ids_S disagree: give for each output a list of "
          "rewards, an equally long list of ends, and its prompt's id")
  rows_N = np.repeat(np.arange(groups_S.size), counts_S)
  ends_N = np.array([end for ends in step_ends for end in ends], int)
  require(bool(((ends_N >= 0) & (ends_N < num_tokens)).all()),
          f"step_ends must be token indices, in 0..{num_tokens - 1}")
  rewards_N, valid_N = _judged([reward for rewards in step_rewards for reward in rewards], None)
  steps = _normalise(rewards_N, groups_S[rows_N], valid_N, baseline)
  values_ST = np.zeros((groups_S.size, num_tokens), np.float32)
  np.add.at(values_ST, (rows_N, ends_N), steps.values)
  return steps._replace(values=np.cumsum(values_ST[:, ::-1], axis=1)[:, ::-1])


def gae(rewards_ST: jax.Array, values_ST: jax.Array, mask_ST: jax.Array,
        gamma: float | jax.Array, lam: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (Schulman et al. 2016, eq. 16), for PPO with a value model.

  The value after an output's last token is taken to be 0, which is wrong for a truncated output:
  mask such outputs.

  Args:
    rewards_ST: reward of each token; an output's own reward is at its last token.
    values_ST: value of the state in which each token is chosen; no gradient flows through it.
    mask_ST: True, or non-zero, at tokens that the policy chose; all others are skipped, wherever
      they are in the row.
    gamma: discount per token, in 0..1.
    lam: lambda, in 0..1; at 0 the advantages are one-step TD errors, at 1 Monte Carlo returns less
      the value.

  Returns:
    Advantages, and the returns (advantage + value) to which the values are fitted; both [S, T] and
    0 outside the mask.
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
  """Returns each output's group as an integer from 0; raises if a group has only one output."""
  ids, groups_S, sizes = np.unique(group_ids_S, return_inverse=True, return_counts=True)
  alone = ids[sizes == 1]
  require(not alone.size, f"{alone.size} prompts have only one output, such as "
          f"{alone[:1].tolist()}: an output is compared with the others of its prompt, so sample "
          "at least 2 per prompt (num_generations)")
  return groups_S


def _judged(rewards, valid):
  """Returns the rewards as float64, 0 where they are left out, and a mask of those that count."""
  judged_N = np.array([reward is not None for reward in rewards], bool)
  if valid is not None:
    require(np.shape(valid) == judged_N.shape,
            f"valid_S has shape {np.shape(valid)}, expected the rewards' shape {judged_N.shape}")
    judged_N &= np.asarray(valid, bool)
  for row in np.flatnonzero(judged_N):
    require(is_usable(rewards[row]), f"the reward of row {row} is {shown(rewards[row])}, which is "
            f"not finite or exceeds {LARGEST_REWARD:g}: give None for an output that cannot be "
            "judged, and smaller rewards otherwise")
  rewards_N = np.array([float(reward) if judged else 0.0
                        for reward, judged in zip(rewards, judged_N, strict=True)])
  return rewards_N, judged_N


def is_usable(reward: float) -> bool:
  """Whether a reward is finite and at most `LARGEST_REWARD`, as an integer of any size may not be.

  Raises:
    TypeError: for a reward that is not a number.
  """
  return -LARGEST_REWARD <= reward <= LARGEST_REWARD


def shown(reward: Any) -> str:
  """Returns a reward as error messages show it; Python refuses to print integers of any length."""
  if isinstance(reward, int) and abs(reward) >= 10**30:
    return f"an integer of {reward.bit_length()} bits"
  return repr(reward)


def _normalise(rewards_N, groups_N, valid_N, baseline, scales_N=None) -> Advantages:
  require(baseline in get_args(Baseline),
          f"baseline={baseline!r} must be one of {get_args(Baseline)}")
  num_groups = groups_N.max(initial=-1) + 1
  total = lambda x_N: np.bincount(groups_N, np.where(valid_N, x_N, 0), num_groups)
  count = total(np.ones_like(rewards_N))
  centred_N = rewards_N - (total(rewards_N) / np.maximum(count, 1))[groups_N]
  variance = total(centred_N**2) / np.maximum(count, 1)

  several, differ = count > 1, np.zeros(num_groups, bool)
  order_N = np.argsort(groups_N, kind="stable")
  for rows in np.split(order_N, np.cumsum(np.bincount(groups_N, minlength=num_groups))[:-1]):
    rows = rows[valid_N[rows]]
    if rows.size > 1:
      differ[groups_N[rows[0]]] = not are_equal(
          rewards_N[rows], None if scales_N is None else np.asarray(scales_N, float)[rows])

  scale = {"mean_std": 1 / np.sqrt(np.where(differ, variance, 1)), "mean": np.ones(num_groups),
           "leave_one_out": count / np.maximum(count - 1, 1)}[baseline]
  values_N = np.where(valid_N & differ[groups_N], centred_N * scale[groups_N], 0)
  return Advantages(
      values_N.astype(np.float32), excluded=int((~valid_N).sum()), lone=int((count == 1).sum()),
      equal=int((several & ~differ).sum()))
