"""bench_kernels: its arithmetic, its shapes, and a whole small run."""

import importlib
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import bench_kernels, kernel_cases
from experiments.options import Options
from pallas_kernels import dequantize, quantize


def test_ratio_is_the_median_over_rounds_with_its_interval():
  ours = [1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0]
  assert bench_kernels.ratio(ours, [2 * took for took in ours]) == (2, 2, 2)
  assert bench_kernels.ratio(ours, [3.0, 2.0, 8.0, 2.0, 2.0, 2.0, 90.0]) == (2, 1, 90)


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (10, 2, 9), (20, 6, 15), (25, 8, 18)])
def test_a_medians_interval_is_that_of_the_sign_test(n, low, high):
  values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
  assert bench_kernels.median_interval(values) == ((n + 1) / 2, low, high)
  outside = lambda end: stats.binomtest(end, n, 0.5).pvalue  # of a median beyond that value
  assert outside(low - 1) <= 0.05 < outside(low)


def test_five_values_tell_nothing_of_their_median_at_95_percent():
  assert bench_kernels.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (3, -math.inf, math.inf)


def test_sides_take_turns_there_and_back():
  calls = []
  timed = {side: lambda side=side: calls.append(side) or float(len(calls)) for side in "abc"}
  assert bench_kernels.in_turns(timed, 3)["b"] == [2.0, 5.0, 8.0]
  assert "".join(calls) == "abccbaabc"


@pytest.mark.parametrize("skew", ["even", "skewed"])
@pytest.mark.parametrize(("rows", "groups"), [(300, 4), (65536, 64), (10, 32)])
def test_groups_share_all_rows(rows, groups, skew):
  sizes = np.asarray(kernel_cases.group_sizes(rows, groups, skew))
  assert sizes.sum() == rows and sizes.min() >= 0 and len(sizes) == groups
  if skew == "even":
    assert sizes.max() - sizes.min() <= 1
  else:
    assert sizes[0] > 1.5 * rows / groups


def test_a_small_run_times_every_side_and_says_which_peers_are_absent(tmp_path, capsys):
  options = Options("bench_kernels", scale="smoke", out=tmp_path,
                    settings=("rounds=4", "seconds=0", "only=fp8_matmul"))
  bench_kernels.main(options)
  result = json.loads((tmp_path / "results.json").read_text())
  rows = {row["side"]: row for row in result["rows"]}
  assert rows["ours"]["rate"] == pytest.approx(2 * 128 * 256 * 384 / rows["ours"]["seconds"] / 1e12)
  assert rows["ours"]["error"] < 2**-8  # the result is rounded to bfloat16
  assert len(rows["XLA bf16"]["ours_over_it"]) == 3
  assert "absent" in rows["torch _scaled_mm"]
  assert "fp8_matmul" in capsys.readouterr().out


def test_an_order_that_favours_what_runs_first_moves_no_ratio_and_widens_no_interval():
  calls = itertools.count()
  slowing = lambda seconds: lambda: seconds * 1.1 ** next(calls)  # as a machine that gets hot
  seconds = bench_kernels.in_turns(
      {"ours": slowing(1.0), "other": slowing(2.0), "last": slowing(3.0)}, 12)
  case = kernel_cases.Case("op", "", 1.0, "TFLOP/s", tuple, {})
  for side, ratio in (("other", 2), ("last", 3)):
    row = bench_kernels._row(case, side, seconds, {"bf16 TFLOP/s": 1.0}, {})
    assert row["ours_over_it"] == pytest.approx((ratio, ratio, ratio))


def test_a_side_or_reference_that_does_not_fit_is_absent_and_a_fault_is_raised():
  def measure(message):
    def fail(x):
      raise jax.errors.JaxRuntimeError(message)

    case = kernel_cases.Case("op", "", 1.0, "TFLOP/s", lambda: (jnp.ones(2),),
                             {"ours": lambda x: x, "other": fail}, reference=fail)
    cfg = bench_kernels.BenchConfig(rounds=2, seconds=0)
    return bench_kernels._measure(case, cfg, {"bf16 TFLOP/s": 1.0})

  reason = "RESOURCE_EXHAUSTED: no memory"
  rows = measure(f"{reason}\nmuch more")
  assert [row.get("absent") for row in rows] == [None, reason]
  assert (rows[0]["error"], rows[0]["reference_absent"]) == (None, reason)
  with pytest.raises(jax.errors.JaxRuntimeError, match="illegal address"):
    measure("INTERNAL: illegal address")


def test_kernels_are_not_timed_where_there_are_none():
  with pytest.raises(ValueError, match="has none"):
    bench_kernels.main(Options("bench_kernels", scale="gpu"))


def test_an_operation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="only=int4 is in no operation's name"):
    bench_kernels.main(Options("bench_kernels", settings=("rounds=4", "seconds=0", "only=int4")))


def test_torch_sees_the_numbers_that_we_do():
  pytest.importorskip("torch", exc_type=ImportError)
  torch_kernels = importlib.import_module("experiments.peers.torch_kernels")
  x = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)), jnp.float32))
  (values, scales), plain = torch_kernels.tensors((x, jnp.arange(3.0)))
  np.testing.assert_array_equal(
      values.float().numpy().reshape(4, 2, 128) * scales.numpy()[..., None],
      np.asarray(dequantize(x)).reshape(4, 2, 128))
  np.testing.assert_array_equal(plain.numpy(), [0, 1, 2])
