"""Specialisation of experts: mutual information, and what chance alone gives."""

import math

import numpy as np
import pytest

from experiments.studies import specialisation


@pytest.mark.parametrize(("loads", "nats"), [
    (np.eye(4), math.log(4)),                       # an expert for each domain
    (np.ones((3, 8)), 0.0),                         # no domain is told from another
    ([[1, 1, 0, 0], [0, 0, 5, 5]], math.log(2)),    # two experts each, unequal totals
    ([[1, 0], [1, 1]],                              # H(3/4, 1/4) - H(1/2, 1/2) / 2
     -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - 0.5 * math.log(2)),
])
def test_mutual_information_in_closed_form(loads, nats):
  np.testing.assert_allclose(specialisation.mutual_information(loads), nats, atol=1e-12)


def test_domains_weigh_alike_however_much_of_each_there_is():
  loads = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
  np.testing.assert_allclose(
      specialisation.mutual_information(loads * [[1000.0], [1.0]]),
      specialisation.mutual_information(loads))


def test_perfect_specialists_carry_ln_d_and_shuffling_takes_it_away():
  domain_R = np.repeat(["bible", "python"], 100)
  loads_RE = np.repeat(np.eye(2), 100, axis=0)
  found = specialisation.expert_domain_information(loads_RE, domain_R, num_shuffles=50, seed=0)
  np.testing.assert_allclose(found.raw, math.log(2))
  assert found.shuffled_mean < 0.02 and found.corrected > math.log(2) - 0.02


def test_shuffles_measure_the_bias_of_experts_that_know_no_domain():
  rng = np.random.default_rng(3)
  loads_RE = rng.multinomial(16, np.full(8, 1 / 8), size=40)
  found = specialisation.expert_domain_information(loads_RE, np.arange(40) % 4, 200, seed=1)
  assert found.raw > 0 and found.shuffled_mean > 3 * found.shuffled_std
  assert abs(found.corrected) < 3 * found.shuffled_std


def test_the_same_seed_shuffles_alike():
  rng = np.random.default_rng(4)
  loads_RE = rng.integers(0, 9, (20, 4))
  first, again, other = (
      specialisation.expert_domain_information(loads_RE, np.arange(20) % 2, 5, seed)
      for seed in (7, 7, 8))
  assert first == again and first.raw == other.raw and first != other


@pytest.mark.parametrize(("call", "message"), [
    (lambda: specialisation.mutual_information([[1.0, 1.0], [0.0, 0.0]]),
     "some load in every domain"),
    (lambda: specialisation.expert_domain_information([[1.0]], ["a", "b"], 9, 0),
     "a domain for each"),
    (lambda: specialisation.expert_domain_information([[1.0]], ["a"], 1, 0), "at least 2"),
])
def test_misuse_is_an_error(call, message):
  with pytest.raises(ValueError, match=message):
    call()
