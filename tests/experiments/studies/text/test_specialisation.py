"""Specialisation of experts: mutual information, and its bias from finitely many sequences."""

import math

import numpy as np
import pytest

from experiments.studies.text import specialisation


@pytest.mark.parametrize(("loads", "nats"), [
    (np.eye(4), math.log(4)),                       # one expert for each domain
    (np.ones((3, 8)), 0.0),                         # all domains use the experts alike
    ([[1, 1, 0, 0], [0, 0, 5, 5]], math.log(2)),    # two experts for each domain, unequal totals
    ([[1, 0], [1, 1]],                              # H(3/4, 1/4) - H(1/2, 1/2) / 2
     -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - 0.5 * math.log(2)),
])
def test_mutual_information_equals_its_closed_form(loads, nats):
  np.testing.assert_allclose(specialisation.mutual_information(loads), nats, atol=1e-12)


def test_domains_have_equal_weight_whatever_their_number_of_tokens():
  loads = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
  np.testing.assert_allclose(
      specialisation.mutual_information(loads * [[1000.0], [1.0]]),
      specialisation.mutual_information(loads))


def test_perfect_specialists_have_ln_d_nats_and_shuffled_domains_almost_none():
  domain_R = np.repeat(["bible", "python"], 100)
  loads_RE = np.repeat(np.eye(2), 100, axis=0)
  found = specialisation.expert_domain_information(loads_RE, domain_R, num_shuffles=50, seed=0)
  np.testing.assert_allclose(found.raw, math.log(2))
  assert found.shuffled_mean < 0.02 and found.corrected > math.log(2) - 0.02


def test_the_shuffled_mean_is_the_bias_of_experts_that_are_independent_of_the_domain():
  rng = np.random.default_rng(3)
  loads_RE = rng.multinomial(16, np.full(8, 1 / 8), size=40)
  found = specialisation.expert_domain_information(loads_RE, np.arange(40) % 4, 200, seed=1)
  assert found.raw > 0 and found.shuffled_mean > 3 * found.shuffled_std
  assert abs(found.corrected) < 3 * found.shuffled_std


def test_shuffles_are_determined_by_the_seed():
  rng = np.random.default_rng(4)
  loads_RE = rng.integers(0, 9, (20, 4))
  first, repeated, other = (
      specialisation.expert_domain_information(loads_RE, np.arange(20) % 2, 5, seed)
      for seed in (7, 7, 8))
  assert first == repeated and first.raw == other.raw and first != other


@pytest.mark.parametrize(("call", "message"), [
    (lambda: specialisation.mutual_information([[1.0, 1.0], [0.0, 0.0]]),
     "some load in every domain"),
    (lambda: specialisation.expert_domain_information([[1.0]], ["a", "b"], 9, 0),
     "a domain for each"),
    (lambda: specialisation.expert_domain_information([[1.0]], ["a"], 1, 0), "at least 2"),
])
def test_misuse_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
