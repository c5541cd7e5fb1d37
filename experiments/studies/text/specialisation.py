"""Specialisation of experts in domains, as mutual information that is corrected for chance.

Shape letters:  R sequences  D domains  E experts
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class DomainInformation(NamedTuple):
  """Mutual information of expert and domain, in nats.

  Attributes:
    raw: the measured value.
    shuffled_mean: mean of the values that shuffled domains give, which is the value by chance.
    shuffled_std: sample standard deviation of these values.
  """

  raw: float
  shuffled_mean: float
  shuffled_std: float

  @property
  def corrected(self) -> float:
    """The measured value minus its bias, which is due to the finite number of sequences."""
    return self.raw - self.shuffled_mean


def mutual_information(loads_DE: ArrayLike) -> float:
  """Returns the mutual information of expert and domain in nats, for equally likely domains.

  Args:
    loads_DE: tokens of each domain that each expert received.

  Returns:
    0 if the experts' relative loads are the same in all domains; ln D if no two domains use the
    same expert.
  """
  loads_DE = np.asarray(loads_DE, float)
  if loads_DE.ndim != 2 or (loads_DE < 0).any() or not (loads_DE.sum(1) > 0).all():
    raise ValueError(f"loads of shape {loads_DE.shape} must be [domains, experts], not negative, "
                     "with some load in every domain")
  given_domain_DE = loads_DE / loads_DE.sum(1, keepdims=True)
  return float(special.rel_entr(given_domain_DE, given_domain_DE.mean(0)).sum(1).mean())


def expert_domain_information(
    loads_RE: ArrayLike, domain_R: ArrayLike, num_shuffles: int, seed: int) -> DomainInformation:
  """Returns the mutual information of expert and domain, and its value by chance.

  Args:
    loads_RE: tokens of each sequence that each expert received.
    domain_R: domain of each sequence, as a name or a number.
    num_shuffles: number of times that the domains are shuffled between the sequences, at least 2.
    seed: seed of the shuffles.

  Raises:
    ValueError: if the shapes do not match, a load is negative, a domain has no load, or
      `num_shuffles` is below 2.
  """
  loads_RE = np.asarray(loads_RE, float)
  domains, index_R = np.unique(np.asarray(domain_R), return_inverse=True)
  if loads_RE.ndim != 2 or index_R.shape != loads_RE.shape[:1]:
    raise ValueError(f"loads of shape {loads_RE.shape} and {index_R.size} domains: expected "
                     "[sequences, experts] and a domain for each sequence")
  if num_shuffles < 2:
    raise ValueError(f"num_shuffles={num_shuffles} must be at least 2, to give a standard "
                     "deviation")
  member_RD = np.eye(len(domains))[index_R]
  rng = np.random.default_rng(seed)
  shuffled = [mutual_information(rng.permutation(member_RD).T @ loads_RE)
              for _ in range(num_shuffles)]
  return DomainInformation(mutual_information(member_RD.T @ loads_RE), float(np.mean(shuffled)),
                           float(np.std(shuffled, ddof=1)))
