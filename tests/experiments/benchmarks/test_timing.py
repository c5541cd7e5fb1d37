"""Timing: counterbalanced order, medians with intervals, and contenders that fail."""

import math
import sys

import numpy as np
import pytest
from scipy import stats

from experiments.benchmarks import timing


def test_a_speedup_is_the_median_over_rounds_with_its_interval():
  ours = [1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0]
  assert timing.speedup(ours, [2 * took for took in ours]) == (2, 2, 2)
  assert timing.speedup(ours, [3.0, 2.0, 8.0, 2.0, 2.0, 2.0, 90.0]) == (2, 1, 90)


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (10, 2, 9), (20, 6, 15), (25, 8, 18)])
def test_the_interval_of_a_median_equals_that_of_the_sign_test(n, low, high):
  values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
  assert timing.median_interval(values) == ((n + 1) / 2, low, high)
  # The p-value of a median beyond the order statistic `end`.
  outside = lambda end: stats.binomtest(end, n, 0.5).pvalue
  assert outside(low - 1) <= 0.05 < outside(low)


def test_five_values_do_not_bound_the_median_at_95_percent():
  assert timing.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3, -math.inf, math.inf)


def test_contenders_alternate_in_counterbalanced_order():
  calls = []
  timed = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
  assert timing.alternate(timed, 3)["b"] == [2.0, 5.0, 8.0]
  assert "".join(calls) == "abccbaabc"


class Peer:
  """A contender that counts the calls of `quit`."""

  name, quits = "peer", 0

  def quit(self) -> None:
    self.quits += 1


def test_an_unavailable_contender_is_excluded_with_the_reason_and_the_others_continue():
  first, second, excluded, ran = Peer(), Peer(), {}, []
  contenders = [first, second]

  def action(contender):
    if contender is first:
      raise timing.Unavailable("no GPU")
    ran.append(contender)

  timing.attempt(contenders, action, excluded)
  assert contenders == ran == [second] and excluded == {"peer": "no GPU"}
  assert (first.quits, second.quits) == (1, 0)


def test_other_errors_of_a_contender_are_raised():
  with pytest.raises(ValueError, match="a fault"):
    timing.attempt([Peer()], lambda _: (_ for _ in ()).throw(ValueError("a fault")), {})


ECHO = """
import json, sys
for line in sys.stdin:
  if line.strip() == "stop": break
  if line.strip() != "sleep": print(json.dumps({"got": line.strip()}), flush=True)
"""


def test_a_peer_process_answers_line_by_line_and_is_unavailable_if_too_slow_or_stopped():
  peer = timing.PeerProcess([sys.executable, "-c", ECHO], timeout=20)
  assert [peer.ask(word) for word in ("a", "b")] == [{"got": "a"}, {"got": "b"}]
  with pytest.raises(timing.Unavailable, match="did not answer within"):
    peer.answer(timeout=0.01)
  with pytest.raises(timing.Unavailable, match="the peer stopped"):
    peer.ask("stop")
  peer.quit()


def test_a_peer_whose_packages_are_missing_is_an_error_that_names_them():
  timing.require_packages(None, ("json", "numpy"), "bench.python")
  with pytest.raises(ValueError, match="needs no_such and nor_this, which this interpreter"):
    timing.require_packages(None, ("no_such", "json", "nor_this"), "bench.python")
  for python in ("/nowhere/python", "false"):
    with pytest.raises(ValueError, match=f"bench.python={python} is not a Python interpreter"):
      timing.require_packages(python, ("json",), "bench.python")
