"""How far experts specialise in domains: mutual information, corrected for chance.

Shape letters:  R sequences  D domains  E experts
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class DomainInformation(NamedTuple):
  """Nats of mutual information between expert and domain: measured, and by chance alone."""

  raw: float
  shuffled_mean: float
  shuffled_std: float

  @property
  def corrected(self) -> float:
    """Less the bias that finitely many sequences cause."""
    return self.raw - self.shuffled_mean


def mutual_information(loads_DE: ArrayLike) -> float:
  """Nats that the domain tells about the expert, if every domain is as likely as the others.

  Args:
    loads_DE: [D, E], tokens of each domain that each expert received.

  Returns:
    0 if all domains use the experts alike; ln D if no two share an expert.
  """
  loads_DE = np.asarray(loads_DE, float)
  if loads_DE.ndim != 2 or (loads_DE < 0).any() or not (loads_DE.sum(1) > 0).all():
    raise ValueError(f"loads of shape {loads_DE.shape} must be [domains, experts], not negative, "
                     "with some load in every domain")
  given_domain_DE = loads_DE / loads_DE.sum(1, keepdims=True)
  return float(special.rel_entr(given_domain_DE, given_domain_DE.mean(0)).sum(1).mean())


def expert_domain_information(
    loads_RE: ArrayLike, domain_R: ArrayLike, num_shuffles: int, seed: int) -> DomainInformation:
  """How far experts specialise in domains, beside what the same sequences give by chance.

  Args:
    loads_RE: [R, E], tokens of each sequence that each expert received.
    domain_R: [R], each sequence's domain: names or numbers.
    num_shuffles: how often domains are dealt anew among the sequences; at least 2.
    seed: of the shuffles.
  """
  loads_RE = np.asarray(loads_RE, float)
  domains, index_R = np.unique(np.asarray(domain_R), return_inverse=True)
  if loads_RE.ndim != 2 or index_R.shape != loads_RE.shape[:1]:
    raise ValueError(f"loads of shape {loads_RE.shape} and {index_R.size} domains: expected "
                     "[sequences, experts] and a domain for each sequence")
  if num_shuffles < 2:
    raise ValueError(f"num_shuffles={num_shuffles} must be at least 2, to have a spread")
  member_RD = np.eye(len(domains))[index_R]
  rng = np.random.default_rng(seed)
  shuffled = [mutual_information(rng.permutation(member_RD).T @ loads_RE)
              for _ in range(num_shuffles)]
  return DomainInformation(mutual_information(member_RD.T @ loads_RE), float(np.mean(shuffled)),
                           float(np.std(shuffled, ddof=1)))
