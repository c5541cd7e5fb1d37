"""Rates, votes and intervals, compared with brute force over all subsets and resamples.

Shape letters:  P problems  N samples
"""

import itertools

import numpy as np
import pytest

from rl.pass_rates import interval, majority_vote, pass_at_1, pass_at_k

CORRECT_PN = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0],
                       [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(k):
  brute = [np.mean([any(subset) for subset in itertools.combinations(row, k)])
           for row in CORRECT_PN]
  np.testing.assert_allclose(pass_at_k(CORRECT_PN, k), brute, rtol=1e-12, atol=1e-15)


def test_pass_at_k_does_not_overflow_where_binomials_would():
  correct = np.arange(10_000)[None] < 1
  np.testing.assert_allclose(pass_at_k(correct, 5_000), 0.5, rtol=1e-12)


def test_pass_at_1_is_the_mean_over_samples():
  np.testing.assert_allclose(pass_at_1(CORRECT_PN), CORRECT_PN.mean(1), atol=1e-15)


def test_unjudged_samples_are_excluded():
  judged = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
  correct = np.array([[1, 0, 1, 0], [1, 1, 1, 1]], bool)
  np.testing.assert_allclose(pass_at_1(correct, judged), [1 / 3, np.nan])
  np.testing.assert_allclose(pass_at_k(correct, 2, judged), [2 / 3, np.nan])
  votes = majority_vote([["b", "a", "b", "c"], ["b"] * 4], correct, judged)
  np.testing.assert_allclose(votes, [1 / 3, np.nan])


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_lie_between_1_and_the_number_of_judged_samples(k):
  judged = np.array([[1, 1, 1, 1], [1, 0, 1, 1]])
  with pytest.raises(ValueError, match=r"k=. must lie in 1\.\.3"):
    pass_at_k(np.ones((2, 4)), k, judged)


@pytest.mark.parametrize(("answers", "gold", "expected"), [
    ("aab", "a", 1), ("aab", "b", 0), ("aabb", "b", 0.5), ("abc", "c", 1 / 3), ("abc", "d", 0),
    ([None, None, "b"], "b", 1), ([None, None, None], "b", 0), ([None, "a", "b"], "b", 0.5)])
def test_majority_votes_have_hand_computed_values(answers, gold, expected):
  correct = [[answer == gold for answer in answers]]
  np.testing.assert_allclose(majority_vote([list(answers)], correct), [expected], rtol=1e-12)


def test_a_tie_counts_as_much_as_a_random_choice_among_the_winners():
  rng = np.random.default_rng(0)
  for _ in range(50):
    answers = rng.choice(["a", "b", "c"], 6).tolist()
    winners = [x for x in "abc" if answers.count(x) == max(map(answers.count, answers))]
    got = majority_vote([answers], [[x == "a" for x in answers]])
    np.testing.assert_allclose(got, [winners.count("a") / len(winners)], rtol=1e-12)


def test_equal_answers_with_different_verdicts_are_refused():
  with pytest.raises(ValueError, match="problem 1: the answer 'x' is both"):
    majority_vote([["x", "y"], ["x", "x"]], [[1, 0], [1, 0]])


@pytest.mark.parametrize("answers", [[["x"]], [["x", "y", "z"]], []])
def test_answers_that_do_not_match_the_verdicts_are_refused(answers):
  with pytest.raises(ValueError, match="for each of"):
    majority_vote(answers, [[1, 0]])


def test_the_interval_is_that_of_all_possible_resamples():
  # The 27 resamples of three problems are equally likely; the bounds are quantiles of their means.
  rates = [0.0, 0.25, 1.0]
  means = np.mean(list(itertools.product(rates, repeat=3)), axis=1)
  got = interval(rates, confidence=0.8)
  assert got.estimate == np.mean(rates)
  np.testing.assert_allclose(
      [got.low, got.high], np.quantile(means, [0.1, 0.9], method="inverted_cdf"), rtol=1e-12)


def test_the_interval_is_reproducible_from_its_seed():
  rates = np.random.default_rng(1).random(20)
  assert interval(rates, seed=3) == interval(rates, seed=3) != interval(rates, seed=4)


def test_intervals_have_their_nominal_coverage():
  rng = np.random.default_rng(2)
  found = [interval(rng.random(60), confidence=0.9, resamples=400) for _ in range(200)]
  covered = np.mean([each.low <= 0.5 <= each.high for each in found])
  assert abs(covered - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 200)


def test_the_interval_excludes_problems_without_a_rate():
  assert interval([0.0, np.nan, 1.0, 1.0]) == interval([0.0, 1.0, 1.0])
  assert interval([1.0, 1.0, 1.0]) == (1, 1, 1)


@pytest.mark.parametrize("rates", [[], [0.5], [0.5, np.nan]])
def test_an_interval_needs_at_least_two_problems(rates):
  with pytest.raises(ValueError, match="at least 2"):
    interval(rates)


def test_problems_with_the_same_question_count_once_in_the_intervals_width():
  rates, names = np.array([0.1, 0.4, 0.9, 0.2]), ["a", "b", "c", "d"]
  assert interval(np.repeat(rates, 5), list(np.repeat(names, 5))) == pytest.approx(
      interval(rates))
  twice = interval([0.1, 0.1, 0.4, 0.9, 0.2], ["a", *names])
  assert twice.estimate == pytest.approx(np.mean([0.1, *rates]))
  with pytest.raises(ValueError, match="1 different problem"):
    interval([0.0, 1.0], ["a", "a"])
