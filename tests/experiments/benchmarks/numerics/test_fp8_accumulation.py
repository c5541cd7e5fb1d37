"""fp8_accumulation: its error metrics on a known product, and a small run without a GPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.numerics import fp8_accumulation
from experiments.options import Options
from pallas_kernels import implementations


def test_error_metrics_of_a_known_product_equal_hand_computed_values():
  exact = np.array([[1.0, 2.0], [4.0, 5.0]])  # standard deviation sqrt(2.5)
  ours = exact + np.array([[0.0, 0.2], [0.0, 0.0]])
  found = fp8_accumulation.errors(ours, exact, "positive")
  assert found["relative"] == pytest.approx(0.1)
  assert found["of_deviation"] == pytest.approx(0.2 / np.sqrt(2.5))
  assert found["frobenius"] == pytest.approx(0.2 / np.sqrt(46))
  assert "relative" not in fp8_accumulation.errors(ours, exact, "normal")


def test_promotion_reduces_the_error_at_every_width_and_is_reported(tmp_path, capsys):
  options = Options(experiment="fp8_accumulation", out=tmp_path,
                    settings=("widths=512,1024", "rows=64"))
  fp8_accumulation.main(options)
  assert capsys.readouterr().out.count("emulated, promoted") == 4
  assert (tmp_path / "errors.png").stat().st_size > 0
  report = (tmp_path / "report.md").read_text()
  assert "| positive | 1,024 | emulated, promoted |" in report
  claims = json.loads((tmp_path / "summary.json").read_text())["claims"]
  for width in (512, 1024):
    raw, promoted = (claim["value"] for claim in claims
                     if claim["claim"].startswith(f"sums of {width}"))
    assert raw > 2 * promoted


def test_implementations_with_nearly_the_same_errors_share_a_curve_named_after_all():
  rows = [{"numbers": numbers, "width": 128, "way": way, "of_deviation": error, "relative": error}
          for numbers in ("normal", "positive")
          for way, error in (("emulated", 0.1), ("XLA's dot", 0.2), ("raw_matmul", 0.104))]
  by_name = {way: {numbers: [row for row in rows if (row["way"], row["numbers"]) == (way, numbers)]
                   for numbers in ("normal", "positive")}
             for way in ("emulated", "XLA's dot", "raw_matmul")}
  groups = fp8_accumulation._indistinguishable(by_name)
  assert groups == [["raw_matmul", "emulated"], ["XLA's dot"]]
  assert fp8_accumulation._label("raw_matmul") == "ours, not promoted"


@pytest.mark.skipif(implementations.local_backend() != "mosaic_gpu",
                    reason="runs on an NVIDIA GPU of capability 9.0")
def test_every_implementation_on_the_gpu_is_within_1_percent_of_the_exact_product():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((128, 512)), jnp.float32)
  operands = x.astype(jnp.float8_e4m3fn), x[::-1].astype(jnp.float8_e4m3fn)
  exact = np.asarray(operands[0], np.float64) @ np.asarray(operands[1], np.float64).T
  products = fp8_accumulation.implementations(*operands)
  assert {"raw_matmul", "fp8_matmul, promoted"} < products.keys()
  for product in products.values():
    assert isinstance(out := product(*operands), jax.Array)
    assert fp8_accumulation.errors(np.asarray(out), exact, "normal")["frobenius"] < 0.01
