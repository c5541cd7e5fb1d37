"""Decoding is timed apart from reading prompts, and compared with what memory allows."""

import dataclasses

import jax
import pytest

import model
from experiments.benchmarks.decoding import bench_decode
from experiments.options import Options
from experiments.reports import provenance


def test_a_smoke_run_reports_every_shape(tmp_path, capsys):
  bench_decode.main(Options("bench_decode", out=tmp_path))
  assert "2x8x4: " in capsys.readouterr().out
  assert "2x8x4" in (tmp_path / "report.md").read_text()


def test_a_pass_reads_all_weights_but_those_of_experts_that_no_token_chose():
  cfg = dataclasses.replace(model.get_config("nano"), mtp=None)
  weights = sum(x.size for x in jax.tree.leaves(model.abstract_variables(cfg)["params"]))
  weights -= cfg.vocab_size * cfg.d_model
  cache = 10**6 * (8 + 2) * cfg.kv_cache_elements_per_token()
  everything = bench_decode._bytes_of_a_pass(cfg, 10**6, 8, 4)
  assert everything == pytest.approx(4 * (weights + cache))
  moe = cfg.moe
  unread = (moe.num_experts - moe.experts_per_token) * 3 * cfg.d_model * moe.expert_dim
  one = bench_decode._bytes_of_a_pass(cfg, 1, 8, 4)
  assert one == pytest.approx(4 * (
      weights - cfg.num_moe_layers * unread + 10 * cfg.kv_cache_elements_per_token()))


def test_shares_are_those_of_the_passes_without_the_prompts():
  rounds = lambda seconds: [seconds] * 6
  result = provenance.describe() | {
      "parameters": 1, "numerics": "bfloat16", "bandwidth": 1000.0, "share": 0.4, "cases": [
          {"shape": "4x10x11", "read": rounds(1.0), "all": rounds(2.0), "bytes": 5e10}]}
  found = bench_decode.summary(result)
  rate, share = found["claims"]
  assert rate["value"] == pytest.approx(22) and share["value"] == pytest.approx(0.5)
  assert share["verdict"] == "met"
  assert found["tables"][0]["rows"] == [["4x10x11", 22, 40, pytest.approx(100), 50]]


@pytest.mark.parametrize("shape", ["1x2", "0x8x8", "1x8x1", "axbxc", "1x8x100000"])
def test_impossible_shapes_are_refused(shape):
  with pytest.raises(ValueError, match="shapes: "):
    dataclasses.replace(bench_decode.SCALES["cpu"], shapes=(shape,))
