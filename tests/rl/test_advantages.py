"""Advantages within groups and along tokens: hand-computed values and properties.

Shape letters:  S sequences  T tokens
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import are_equal, gae, group_advantages, process_advantages
from rl.rewards import combine

BASELINES = ("mean_std", "mean", "leave_one_out")
each_baseline = pytest.mark.parametrize("baseline", BASELINES)
# For up to four prompts, the rewards of two to six outputs; None stands for an unjudged output.
groups = st.lists(
    st.lists(st.one_of(st.none(), st.floats(-10, 10, width=16)), min_size=2, max_size=6),
    min_size=1, max_size=4)


def flat(groups):
  return ([reward for group in groups for reward in group],
          np.repeat(np.arange(len(groups)), [len(group) for group in groups]))


@pytest.mark.parametrize(("baseline", "expected"), [
    ("mean_std", [-1, -1, 1, 1]), ("mean", [-0.5, -0.5, 0.5, 0.5]),
    ("leave_one_out", [-2 / 3, -2 / 3, 2 / 3, 2 / 3])])
def test_baselines_have_hand_computed_values(baseline, expected):
  values = group_advantages([0, 0, 1, 1], ["a"] * 4, baseline=baseline).values
  np.testing.assert_allclose(values, expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(groups)
def test_advantages_sum_to_zero_in_each_group(groups):
  rewards, ids = flat(groups)
  for baseline in BASELINES:
    values = group_advantages(rewards, ids, baseline=baseline).values
    # Rounding of up to six float32 values, each at most 6/5 x 20.
    np.testing.assert_allclose(np.bincount(ids, values), 0, atol=6 * 24 * 2**-24)


@settings(max_examples=60, deadline=None)
@given(groups, st.randoms(use_true_random=False))
def test_advantages_do_not_depend_on_the_order_of_rows(groups, random):
  rewards, ids = flat(groups)
  order = list(range(len(rewards)))
  random.shuffle(order)
  for baseline in BASELINES:
    straight = group_advantages(rewards, ids, baseline=baseline)
    shuffled = group_advantages([rewards[i] for i in order], ids[order], baseline=baseline)
    np.testing.assert_allclose(shuffled.values, straight.values[order], rtol=1e-6, atol=1e-6)
    assert shuffled[1:] == straight[1:]


@settings(max_examples=60, deadline=None)
@given(groups)
def test_groups_do_not_affect_each_other(groups):
  rewards, ids = flat(groups)
  values = group_advantages(rewards, ids).values
  alone = [group_advantages(group, [0] * len(group)).values for group in groups]
  np.testing.assert_allclose(values, np.concatenate(alone), rtol=1e-6, atol=1e-6)


@each_baseline
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 10, 64])
def test_identical_rewards_give_exactly_zero(baseline, dtype, size):
  result = group_advantages(np.full(size, 0.1, dtype), np.zeros(size, int), baseline=baseline)
  assert not result.values.any() and result.equal == 1


def test_rewards_that_differ_by_rounding_only_give_exactly_zero():
  assert 0.1 + 0.2 != 0.3
  result = group_advantages([0.1 + 0.2, 0.3, 0.3], [0] * 3)
  assert not result.values.any() and result.equal == 1


@pytest.mark.parametrize(("rewards", "equal"), [
    ([0.1 + 0.2 - 0.3, 0, 0], True), ([0.3 - 0.2 - 0.1, 0], True), ([100000, 100000.05], False),
    ([-100000, -100000.05], False), ([-1.0, -1.0 - 1e-15], True), ([0, 1e-9], False),
    ([1e15, 1e15 + 100], True), ([1.0, None, 1.0 + 1e-15], True), ([None, None], True),
    ([], True), ([2.0], True)])
def test_the_tolerance_of_equal_rewards_is_that_of_float64(rewards, equal):
  assert are_equal(rewards) is equal
  if len(rewards) > 1 and None not in rewards:
    result = group_advantages(rewards, [0] * len(rewards))
    assert result.equal == equal and result.values.any() != equal


def test_the_scale_of_rewards_decides_what_their_rounding_is():
  assert are_equal([1e-10, 0], scales=[1e6, 0]) and not are_equal([1e-10, 0], scales=[1e-10, 0])
  assert are_equal([1e-30, 0], scales=[1e-10, 0]) and not are_equal([1e-20, 2e-20], [1e-20, 2e-20])
  result = group_advantages([1e-20, 2e-20, 1e-10, 0], [0, 0, 1, 1], scales_S=[1e-20, 2e-20, 1e6, 0])
  np.testing.assert_allclose(result.values, [-1, 1, 0, 0], rtol=1e-6)
  assert result.equal == 1


def test_sums_of_weighted_rewards_that_differ_by_rounding_give_no_advantage():
  values = {"a": [1, 0, 0], "b": [1, 0, 0], "c": [-1, 0, 0]}
  for factor in (1, 1e-9, 1e9):
    weights = {"a": 0.1 * factor, "b": 0.2 * factor, "c": 0.3 * factor}
    scored = combine({name: lambda *_, value=value, **columns: value
                      for name, value in values.items()}, weights)(["?"] * 3, [""] * 3)
    assert scored.rewards[0] != 0 or factor > 1
    result = group_advantages(scored.rewards, [0] * 3, scales_S=scored.scales)
    assert not result.values.any() and result.equal == 1
    assert are_equal(scored.rewards, scored.scales)


@pytest.mark.parametrize("reward", [1e39, -1e308, 10**400, np.inf])
def test_rewards_too_large_for_float32_are_refused_by_row(reward):
  with pytest.raises(ValueError, match=r"the reward of row 1 is .*not finite or exceeds 1e"):
    group_advantages([0, reward], [0, 0])


def test_normalised_advantages_have_a_mean_square_of_one_however_close_the_rewards():
  values = group_advantages([1.0, 1.001, 1.0, 1.002], [0] * 4).values
  np.testing.assert_allclose(np.mean(values**2), 1, rtol=1e-6)


@each_baseline
def test_unjudged_rows_are_excluded_from_their_group(baseline):
  without = group_advantages([0, 1, 5, 1, 2], [0, 0, 0, 1, 1], baseline=baseline).values
  rewards, ids = [0, None, 1, 5, 1, 2, 7], [0, 0, 0, 0, 1, 1, 1]
  valid = [True, True, True, True, True, True, False]
  result = group_advantages(rewards, ids, baseline=baseline, valid_S=valid)
  np.testing.assert_array_equal(result.values, np.insert(without, [1, 5], 0))
  assert (result.excluded, result.lone, result.equal) == (2, 0, 0)


@each_baseline
def test_the_only_judged_row_of_a_group_has_no_advantage_and_is_counted(baseline):
  result = group_advantages([3, None, None, None, 0, 1], [0, 0, 1, 1, 2, 2], baseline=baseline)
  assert not result.values[:4].any() and result.values[4:].all()
  assert (result.excluded, result.lone, result.equal) == (3, 1, 0)


@pytest.mark.parametrize(("arguments", "message"), [
    (([1.0, 0.0, 1.0], [0, 0, 1]), "num_generations"),
    (([1.0, np.nan], [0, 0]), "not finite"),
    (([1.0, 2.0], [0, 0, 0]), "2 rewards with 3 group ids")])
@each_baseline
def test_rewards_that_cannot_be_compared_are_refused(arguments, message, baseline):
  with pytest.raises(ValueError, match=message):
    group_advantages(*arguments, baseline=baseline)


def test_unknown_baselines_are_refused():
  with pytest.raises(ValueError, match="baseline='median'"):
    group_advantages([0, 1], [0, 0], baseline="median")


def test_process_supervision_has_hand_computed_values():
  # The rewards of all steps of the group have mean 1 and population standard deviation 1.
  result = process_advantages([[0, 2], [2, 0]], [[1, 3], [0, 1]], ["q", "q"], 5)
  np.testing.assert_allclose(
      result.values, [[0, 0, 1, 1, 0], [0, -1, 0, 0, 0]], rtol=1e-6, atol=1e-6)


def test_one_step_at_the_last_token_equals_outcome_supervision():
  rewards, ids = [0.0, 1.0, 5.0, 2.0, 2.5], [0, 0, 1, 1, 1]
  values = process_advantages([[r] for r in rewards], [[2]] * 5, ids, 3).values
  outcome = group_advantages(rewards, ids).values
  np.testing.assert_allclose(values, np.repeat(outcome[:, None], 3, 1), rtol=1e-6)


def test_equal_step_rewards_give_exactly_zero():
  result = process_advantages([[0.1] * 7, [0.1]], [list(range(7)), [3]], [0, 0], 8)
  assert not result.values.any() and result.equal == 1


def test_unjudged_steps_and_outputs_without_steps_are_excluded():
  result = process_advantages([[0, None, 2], []], [[0, 1, 2], []], [0, 0], 3)
  np.testing.assert_allclose(result.values, [[0, 1, 1], [0, 0, 0]], atol=1e-6)
  assert result.excluded == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (([[1]], [[0]], [0], 1), "num_generations"), (([[1], [1]], [[0], [3]], [0, 0], 3), "0..2"),
    (([[1], [1, 2]], [[0], [1]], [0, 0], 3), "disagree")])
def test_inconsistent_steps_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    process_advantages(*arguments)


REWARDS, VALUES = [0.0, 1.0, 2.0], [0.5, 1.0, 4.0]
# One-step TD errors with gamma 0.5: 0 + 0.5 - 0.5, 1 + 2 - 1, 2 + 0 - 4.
ERRORS = np.array([0.0, 2.0, -2.0])


@pytest.mark.parametrize(("lam", "expected"), [
    (0.0, ERRORS),
    (0.95, [0.475 * (2 - 0.475 * 2), 2 - 0.475 * 2, -2]),
    (1.0, [0.5 * 1 + 0.25 * 2 - 0.5, 1 + 0.5 * 2 - 1, 2 - 4])])
def test_gae_has_hand_computed_values(lam, expected):
  advantages, returns = gae(
      np.float32([REWARDS]), np.float32([VALUES]), np.ones((1, 3)), 0.5, lam)
  np.testing.assert_allclose(advantages[0], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(returns[0], np.array(expected) + VALUES, rtol=1e-6)


def test_gae_returns_without_discount_and_with_lambda_1_are_the_rewards_to_go():
  rewards, values = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
  _, returns = gae(rewards, values, np.ones((4, 6)), 1.0, 1.0)
  np.testing.assert_allclose(returns, np.cumsum(rewards[:, ::-1], 1)[:, ::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [[0, 1, 2], [2, 3, 4], [0, 2, 4]])
@pytest.mark.parametrize("garbage", [0.0, 9.0, np.nan])
def test_gae_skips_masked_positions_before_between_and_after_the_tokens(columns, garbage):
  rewards, values = np.full((2, 1, 5), garbage, np.float32)
  mask = np.zeros((1, 5), bool)
  rewards[0, columns], values[0, columns], mask[0, columns] = REWARDS, VALUES, True
  expected = gae(np.float32([REWARDS]), np.float32([VALUES]), np.ones((1, 3)), 0.9, 0.95)
  for got, narrow in zip(gae(rewards, values, mask, 0.9, 0.95), expected, strict=True):
    np.testing.assert_allclose(got[:, columns], narrow, rtol=1e-6)
    assert not np.asarray(got)[~mask].any()
