"""bench_kernels: group sizes, the rows of its result, and a small run."""

import importlib
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.kernels import bench_kernels
from experiments.benchmarks.kernels import cases as kernel_cases
from experiments.benchmarks.timing import alternate
from experiments.options import Options
from pallas_kernels import dequantize, quantize


@pytest.mark.parametrize("skew", ["even", "skewed"])
@pytest.mark.parametrize(("rows", "groups"), [(300, 4), (65536, 64), (10, 32)])
def test_group_sizes_are_even_or_skewed_and_add_up_to_all_rows(rows, groups, skew):
  sizes = np.asarray(kernel_cases.group_sizes(rows, groups, skew))
  assert sizes.sum() == rows and sizes.min() >= 0 and len(sizes) == groups
  if skew == "even":
    assert sizes.max() - sizes.min() <= 1
  else:
    assert sizes[0] > 1.5 * rows / groups


def test_a_small_run_times_every_contender_and_records_absent_peers(tmp_path, capsys):
  options = Options("bench_kernels", scale="smoke", out=tmp_path,
                    settings=("rounds=4", "seconds=0", "only=fp8_matmul"))
  bench_kernels.main(options)
  result = json.loads((tmp_path / "results.json").read_text())
  rows = {row["contender"]: row for row in result["rows"]}
  assert rows["ours"]["rate"] == pytest.approx(2 * 128 * 256 * 384 / rows["ours"]["seconds"] / 1e12)
  assert rows["ours"]["error"] < 2**-8  # the result is rounded to bfloat16
  assert len(rows["XLA bf16"]["speedup"]) == 3
  assert "absent" in rows["torch _scaled_mm"]
  assert "fp8_matmul" in capsys.readouterr().out
  summary = json.loads((tmp_path / "summary.json").read_text())
  (claim,) = summary["claims"]
  assert (claim["claim"], claim["value"]) == (
      "fp8_matmul, 128 x 256 x 384: ours against XLA bf16", rows["XLA bf16"]["speedup"][0])


def test_a_machine_that_slows_down_steadily_changes_no_speedup_and_widens_no_interval():
  calls = itertools.count()
  slowing = lambda seconds: lambda: seconds * 1.1 ** next(calls)  # as on a machine that heats up
  seconds = alternate(
      {"ours": slowing(1.0), "other": slowing(2.0), "last": slowing(3.0)}, 12)
  case = kernel_cases.Case("op", "", 1.0, "TFLOP/s", tuple, {})
  for name, ratio in (("other", 2), ("last", 3)):
    row = bench_kernels._row(case, name, seconds, {"bf16 TFLOP/s": 1.0}, {})
    assert row["speedup"] == pytest.approx((ratio, ratio, ratio))


def test_a_contender_or_reference_that_runs_out_of_memory_is_absent_other_errors_are_raised():
  def measure(message):
    def fail(x):
      raise jax.errors.JaxRuntimeError(message)

    case = kernel_cases.Case("op", "", 1.0, "TFLOP/s", lambda: (jnp.ones(2),),
                             {"ours": lambda x: x, "other": fail}, reference=fail)
    cfg = bench_kernels.BenchConfig(rounds=2, seconds=0)
    return bench_kernels._measure(case, bench_kernels._compile(case), cfg, {"bf16 TFLOP/s": 1.0})

  reason = "RESOURCE_EXHAUSTED: no memory"
  rows = measure(f"{reason}\nmuch more")
  assert [row.get("absent") for row in rows] == [None, reason]
  assert (rows[0]["error"], rows[0]["reference_absent"]) == (None, reason)
  with pytest.raises(jax.errors.JaxRuntimeError, match="illegal address"):
    measure("INTERNAL: illegal address")


def test_random_shapes_are_those_of_the_seed_and_within_what_every_contender_takes():
  shapes = kernel_cases.SHAPES["gpu_random"]
  assert shapes.products == kernel_cases.random_shapes(kernel_cases.DENSE_SEED).products
  assert shapes.grouped == kernel_cases.random_shapes(kernel_cases.GROUPED_SEED).grouped
  assert kernel_cases.random_shapes(1) == kernel_cases.random_shapes(1) != shapes
  assert len(shapes.grouped) == 24 and len(shapes.products) == 36
  many = [shape for shape in shapes.products if shape[0] > 64]
  assert len(many) == 24 and all(m % 4 == n % 64 == k % 128 == 0 for m, n, k in many)
  assert all(k % 128 == n % 128 == 0 for _, _, k, n, _ in shapes.grouped)
  assert {skew for *_, skew in shapes.grouped} == {"even", "skewed"}


def test_an_operation_with_many_shapes_has_the_mean_of_its_speed_ups_and_the_number_of_slow_ones():
  rows = []
  for shape, ratio in enumerate((1.0, 2.0, 4.0, 0.5, 1.0, 1.0)):
    rows += [
        {"operation": "op", "shape": shape, "contender": "ours", "by_round": [1.0] * 12},
        {"operation": "op", "shape": shape, "contender": "torch", "by_round": [ratio] * 12,
         "speedup": (ratio,) * 3, "target": 1.0}]
  mean, slower = bench_kernels._over_shapes(rows, 12)
  assert mean["value"] == pytest.approx(4 ** (1 / 6)) and mean["verdict"] == "met"
  assert (slower["value"], slower["verdict"]) == (1, "missed")
  assert bench_kernels._over_shapes(rows[:-2], 12) == []


def test_shapes_are_not_counted_as_slow_without_intervals():
  rows = [{"operation": "product", "shape": str(i), "contender": name, "by_round": [1.0] * 10,
           **({"speedup": [1.0, None, None]} if name == "peer" else {})}  # as read from JSON
          for i in range(bench_kernels._MANY) for name in ("ours", "peer")]
  mean, = bench_kernels._over_shapes(rows, 10)
  assert mean["value"] == 1 and mean["low"] is None


def test_a_copy_that_is_too_slow_voids_the_run(monkeypatch):
  device = types.SimpleNamespace(device_kind="NVIDIA H200")
  monkeypatch.setattr(bench_kernels.jax, "devices", lambda: [device])
  with pytest.raises(ValueError, match="no other program may use it"):
    bench_kernels._ceilings("smoke", bench_kernels.BenchConfig(rounds=2, seconds=0))


def test_the_gpu_scale_is_refused_on_a_device_without_kernels(monkeypatch):
  monkeypatch.setattr(bench_kernels.implementations, "local_backend", lambda: None)
  with pytest.raises(ValueError, match="has none"):
    bench_kernels.main(Options("bench_kernels", scale="gpu"))


def test_an_operation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="only=int4 is in no operation's name"):
    bench_kernels.main(Options("bench_kernels", settings=("rounds=4", "seconds=0", "only=int4")))


def test_torch_is_given_the_same_values():
  pytest.importorskip("torch", exc_type=ImportError)
  torch_kernels = importlib.import_module("experiments.benchmarks.peers.torch_kernels")
  x = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)), jnp.float32))
  (values, scales), plain = torch_kernels.tensors((x, jnp.arange(3.0)))
  np.testing.assert_array_equal(
      values.float().numpy().reshape(4, 2, 128) * scales.numpy()[..., None],
      np.asarray(dequantize(x)).reshape(4, 2, 128))
  np.testing.assert_array_equal(plain.numpy(), [0, 1, 2])
