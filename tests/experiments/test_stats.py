"""Statistics, compared with closed forms and with scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from experiments import stats
from experiments.stats import Claim


def result(low: float, high: float, n: int = 4) -> stats.Paired:
  """Returns a paired difference whose interval is [low, high]."""
  return stats.Paired(n, (low + high) / 2, 1.0, 0.5, low, high, 1, n, 1.0)


def test_the_interval_equals_that_of_scipys_paired_t_test():
  rng = np.random.default_rng(0)
  treatment, baseline = rng.normal(1.0, 1.0, 6), rng.normal(0.5, 1.0, 6)
  expected = reference.ttest_rel(treatment, baseline)
  for confidence in (0.8, 0.95):
    ours = stats.paired(treatment, baseline, confidence)
    interval = expected.confidence_interval(confidence)
    np.testing.assert_allclose((ours.low, ours.high), (interval.low, interval.high), rtol=1e-12)
  np.testing.assert_allclose(ours.mean / ours.stderr, expected.statistic, rtol=1e-12)


def test_statistics_of_three_pairs_equal_hand_computed_values():
  ours = stats.paired([2.0, 3.0, 7.0], [1.0, 1.0, 4.0])
  assert (ours.n, ours.mean, ours.std, ours.same_sign) == (3, 2.0, 1.0, 3)
  np.testing.assert_allclose(ours.stderr, 3**-0.5)
  np.testing.assert_allclose(ours.high - ours.mean, 4.302653 / 3**0.5, rtol=1e-6)
  np.testing.assert_allclose(ours.detectable, (4.302653 + 1.060660) / 3**0.5, rtol=1e-6)


def test_a_90_percent_interval_covers_the_true_mean_in_90_percent_of_samples():
  rng = np.random.default_rng(1)
  samples = rng.normal(0.3, 2.0, (2000, 4))
  covered = [r.low < 0.3 < r.high for r in (stats.paired(s, 0, 0.9) for s in samples)]
  assert abs(np.mean(covered) - 0.9) < 0.025


@pytest.mark.parametrize("n", [3, 8])
def test_the_detectable_effect_is_detected_with_a_power_of_about_80_percent(n):
  rng = np.random.default_rng(2)
  noise = rng.normal(0.0, 1.0, (4000, n))
  needed = reference.t.ppf(0.975, n - 1) + reference.t.ppf(0.8, n - 1)
  effect = needed / n**0.5  # what `detectable` is for a standard deviation of 1
  assert stats.paired(noise[0], 0).detectable == pytest.approx(effect * noise[0].std(ddof=1))
  found = np.mean([stats.paired(row + effect, 0).low > 0 for row in noise])
  assert 0.72 < found < 0.9


def test_same_sign_counts_pairs_with_the_expected_sign_or_else_that_of_the_mean():
  assert stats.paired([1.0, 2.0, -9.0, 0.0], 0, sign=1).same_sign == 2
  assert stats.paired([1.0, 2.0, -9.0, 0.0], 0, sign=-1).same_sign == 1
  unnamed = stats.paired([1.0, 2.0, -9.0, 0.0], 0)
  assert (unnamed.sign, unnamed.same_sign) == (-1, 1)


def test_one_pair_has_an_infinite_interval():
  ours = stats.paired([3.0], [1.0])
  assert (ours.n, ours.mean, ours.low, ours.high) == (1, 2.0, -math.inf, math.inf)
  assert ours.detectable == math.inf and math.isnan(ours.std)


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.11, 0.2, "reproduced"), (0.05, 0.2, "unresolved"), (-0.2, 0.2, "unresolved"),
    (-0.05, -0.01, "unresolved"), (-0.2, -0.11, "contradicted")])
def test_a_sign_claim_needs_the_whole_interval_beyond_the_margin(low, high, verdict):
  opposite = {"reproduced": "contradicted", "contradicted": "reproduced"}.get(verdict, verdict)
  assert stats.judge(result(low, high), Claim("sign", 1, margin=0.1)) == verdict
  assert stats.judge(result(low, high), Claim("sign", -1, margin=0.1)) == opposite
  assert stats.judge(result(-high, -low), Claim("sign", -1, margin=0.1)) == verdict


def test_a_sign_claim_without_a_margin_is_decided_at_zero():
  assert stats.judge(result(-0.2, -1e-9), Claim("sign", -1)) == "reproduced"
  assert stats.judge(result(-0.2, 1e-9), Claim("sign", -1)) == "unresolved"
  assert stats.judge(result(1e-9, 0.2), Claim("sign", -1)) == "contradicted"


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (-0.1, 0.1, "reproduced"), (0.02, 0.05, "reproduced"), (-0.1, 0.11, "unresolved"),
    (0.05, 0.2, "unresolved"), (0.11, 0.2, "contradicted"), (-0.2, -0.11, "contradicted")])
def test_an_equivalence_claim_needs_the_whole_interval_within_the_margin(low, high, verdict):
  assert stats.judge(result(low, high), Claim("equivalent", margin=0.1)) == verdict


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.5, 0.9, "reproduced"), (0.9, 1.1, "unresolved"), (1.1, 1.2, "contradicted")])
def test_a_threshold_claim_needs_the_whole_interval_beyond_the_threshold(low, high, verdict):
  assert stats.judge(result(low, high), Claim("threshold", -1, threshold=1.0)) == verdict


@pytest.mark.parametrize("claim", [
    Claim("sign"), Claim("equivalent", margin=5.0), Claim("threshold", threshold=0.0)])
def test_a_single_seed_leaves_every_claim_unresolved(claim):
  assert stats.judge(stats.paired([1.0], 0), claim) == "unresolved"


@pytest.mark.parametrize(("value", "verdict"), [
    (1.5, "reproduced"), (1.0, "unresolved"), (0.5, "contradicted")])
def test_a_threshold_claim_with_single_run_is_decided_by_one_run(value, verdict):
  claim = Claim("threshold", 1, threshold=1.0, single_run=True)
  assert stats.judge(stats.paired([value], 0), claim) == verdict


def test_several_runs_are_judged_by_their_interval_even_with_single_run():
  claim = Claim("threshold", 1, threshold=1.0, single_run=True)
  assert stats.judge(result(0.9, 1.5), claim) == "unresolved"


@pytest.mark.parametrize(("call", "message"), [
    (lambda: stats.paired([], []), "expected one value for each seed"),
    (lambda: stats.paired([1.0, 2.0], [1.0]), "pair them, seed by seed"),
    (lambda: stats.paired([1.0, math.nan], [1.0, 1.0]), "leave failed runs out"),
    (lambda: stats.paired([1.0, 2.0], 0, confidence=95), "between 0 and 1"),
    (lambda: Claim("smaller"), "must be one of"),
    (lambda: Claim("sign", 0), "must be -1 or 1"),
    (lambda: Claim("sign", margin=-1.0), "at least 0"),
    (lambda: Claim("equivalent"), "fix a positive margin"),
    (lambda: Claim("threshold"), "Claim.threshold=None"),
    (lambda: Claim("sign", threshold=1.0), "for no other"),
    (lambda: Claim("threshold", threshold=1.0, margin=0.1), "move `threshold`"),
    (lambda: Claim("sign", single_run=True), "one pair says nothing"),
    (lambda: stats.noise([1.0]), "at least two runs"),
    (lambda: stats.problem_variance([[1.0, 2.0]]), "at least two seeds and two problems"),
])
def test_misuse_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_noise_is_the_sample_standard_deviation():
  np.testing.assert_allclose(stats.noise([1.0, 2.0, 3.0, 4.0]), (5 / 3) ** 0.5)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("claim", "effect"), [
    (stats.Claim("sign", sign=1, margin=0.2), 1.5), (stats.Claim("sign", sign=-1), -0.8),
    (stats.Claim("equivalent", margin=1.5), 0.2),
    (stats.Claim("threshold", sign=-1, threshold=4.0), 3.0)])
def test_the_power_is_how_often_simulated_studies_reproduce_the_claim(claim, effect, n):
  rng = np.random.default_rng(3)
  found = stats.power(claim, 1.0, n, effect)
  samples = rng.normal(effect, 1.0, (4000, n))
  verdicts = [stats.judge(stats.paired(row, 0), claim) for row in samples]
  assert found.probability == pytest.approx(np.mean(np.array(verdicts) == "reproduced"), abs=0.03)
  assert stats.power(claim, 1.0, found.seeds, effect).probability >= 0.8
  assert stats.power(claim, 1.0, found.seeds - 1, effect).probability < 0.8


def test_the_power_assumes_the_papers_effect_or_none_and_is_unknown_without_either_or_noise():
  sign = stats.Claim("sign", paper=0.5)
  assert stats.power(sign, 1.0, 4).effect == 0.5
  assert stats.power(stats.Claim("equivalent", margin=1.0, paper=0.7), 1.0, 4).effect == 0
  assert stats.power(stats.Claim("sign"), 1.0, 4) is None
  assert stats.power(sign, 0.0, 4) is None and stats.power(sign, math.nan, 1) is None
  assert stats.power(stats.Claim("sign", paper=1e-6), 1.0, 4).seeds is None


def test_no_more_than_5_percent_of_studies_without_an_effect_reach_a_false_verdict():
  rng = np.random.default_rng(4)
  claim = stats.Claim("sign", sign=1)
  for n in (3, 5, 10):
    verdicts = [stats.judge(stats.paired(row, 0), claim) for row in rng.normal(0, 1.0, (4000, n))]
    assert np.mean(np.array(verdicts) != "unresolved") < 0.06


@pytest.mark.parametrize("claim", [
    Claim("sign", sign=-1), Claim("sign", margin=0.3), Claim("equivalent", margin=1.5),
    Claim("threshold", sign=-1, threshold=0.2)])
def test_p_values_fall_below_5_percent_exactly_where_the_verdict_is_given(claim):
  rng = np.random.default_rng(0)
  for mean in np.linspace(-3, 3, 41):
    found = stats.paired(rng.normal(mean, 1, 5), 0.0)
    evidence = stats.evidence(found, claim)
    assert (evidence.supports < 0.05) == (stats.judge(found, claim) == "reproduced")
    assert (evidence.opposes < 0.05) == (stats.judge(found, claim) == "contradicted")


def test_a_single_seed_and_equal_pairs_are_no_evidence():
  assert stats.evidence(stats.paired([1.0], 0.0), Claim("sign")) is None
  assert stats.evidence(stats.paired([1.0, 1.0], 0.0), Claim("sign")) is None


def test_holm_equals_hand_computed_values():
  assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert stats.holm([0.6, 0.7]) == [1.0, 1.0] and stats.holm([]) == []


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_the_true_difference_95_percent_of_the_time(n):
  rng = np.random.default_rng(n)
  studies = (stats.paired(rng.normal(0.3, 1, n), rng.normal(0, 1, n)) for _ in range(4000))
  covered = np.mean([found.low < 0.3 < found.high for found in studies])
  assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_the_variance_between_problems_equals_a_hand_computed_value():
  # Means of the problems 2, 4 and 9, of the seeds 4 and 6; residuals +-1, 0 and +-1.
  values = [[0.0, 3.0, 9.0], [4.0, 5.0, 9.0]]
  between, interaction = 2 * 13.0, (1 + 0 + 1) * 2 / 2
  assert stats.problem_variance(values) == pytest.approx((between - interaction) / 6)
  assert stats.problem_variance([[1.0, 0.0], [0.0, 1.0]]) == 0  # interaction alone


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_of_seeds_that_share_their_problems_cover_the_difference_on_all_problems(n):
  rng, problems, crossed, alone = np.random.default_rng(n), 50, [], []
  for _ in range(3000):
    values = (0.3 + rng.normal(0, 0.1, (n, 1)) + rng.normal(0, 0.7, (1, problems))
              + rng.normal(0, 0.5, (n, problems)))
    for found, by_problem in ((crossed, values), (alone, None)):
      pair = stats.paired(values.mean(1), 0, by_problem=by_problem)
      found.append(pair.low < 0.3 < pair.high)
  assert np.mean(crossed) > 0.94
  assert np.mean(alone) < 0.9 or n == 3  # with few seeds, t is so large that it covers both


@pytest.mark.parametrize("n", [3, 8])
def test_at_most_5_percent_of_studies_without_effects_give_a_verdict_on_any_claim(n):
  """Six arms that equal the baseline, which all of them share: uncorrected, a fifth would."""
  rng, claim, wrong, uncorrected = np.random.default_rng(n), Claim("sign"), 0, 0
  for _ in range(2000):
    baseline_n, arms = rng.normal(0, 1, n), rng.normal(0, 1, (6, n))
    p_values = [min(stats.evidence(stats.paired(arm_n, baseline_n), claim)) for arm_n in arms]
    wrong += min(stats.holm(p_values)) < 0.05
    uncorrected += min(p_values) < 0.05
  assert wrong / 2000 < 0.05 + 0.015 < uncorrected / 2000  # three standard errors


def test_the_power_of_one_of_several_claims_is_that_of_simulated_studies():
  rng, claim, n, found = np.random.default_rng(0), Claim("sign", paper=1.2), 6, 0
  for _ in range(2000):
    effects = (1.2, 0, 0, 0)  # of the claims, only the first is true
    pairs = [stats.paired(rng.normal(effect, 1, n), 0.0) for effect in effects]
    found += stats.holm([min(stats.evidence(pair, claim)) for pair in pairs])[0] < 0.05
  assert found / 2000 == pytest.approx(stats.power(claim, 1.0, n, family=4).probability, abs=0.05)
