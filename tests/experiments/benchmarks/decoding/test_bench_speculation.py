"""The benchmark of drafts by MTP modules: what it measures, and what its report says."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

import model
from experiments.benchmarks.decoding import bench_speculation
from experiments.benchmarks.decoding.bench_speculation import SpeculationConfig
from experiments.options import Options
from train.loading import LoadedModel

CFG = dataclasses.replace(
    tiny.PLAIN_MLA, num_layers=1, mtp=model.MTPConfig(depth=1))
START = LoadedModel(CFG, tiny.variables(CFG), None)


def test_every_number_of_drafts_is_compared_with_plain_decoding_on_the_same_texts():
  cfg = SpeculationConfig(model=CFG, batches=(2,), drafts=(1, 2), new_tokens=6, rounds=2)
  rows = bench_speculation._measure(
      cfg, START, ["a", "b"], np.asarray(tiny.tokens(CFG, 2, 5)))
  assert [row["drafts"] for row in rows] == [1, 2]
  for row in rows:
    assert row["texts_that_differ"] == 0
    assert len(row["speedups"]) == 1 and len(row["seconds"]["plain"]) == 2
    assert np.shape(row["accepted"]) == (2, row["drafts"])
    passes = 5 / np.array(row["tokens_per_pass"])
    np.testing.assert_allclose(passes.max(), row["longest_passes"])


def test_the_report_has_speed_ups_acceptance_by_position_and_domains():
  row = {"batch": 2, "drafts": 2, "domains": ["a", "b"],
         "seconds": {"plain": [1.0] * 12, "drafted": [0.5] * 12}, "speedups": [2.0] * 6,
         "tokens_per_pass": [2.0, 3.0], "accepted": [[0.5, 0.25], [0.75, 0.5]],
         "longest_passes": 4, "texts_that_differ": 0}
  found = bench_speculation.summary({
      "rows": [row], "parameters": 10, "new_tokens": 10, "prompt_tokens": 4, "temperature": 0.0,
      "numerics": "float32", "device": "1 x cpu", "command": "python -m experiments.run"})
  (speedup,) = found["claims"]
  assert speedup["claim"].startswith("batch 2, 2 drafts") and speedup["value"] == 2.0
  passes, domains = found["tables"]
  (line,) = passes["rows"]
  assert line[2:5] == [pytest.approx(100.0), pytest.approx(100.0), pytest.approx(1.0)]
  assert line[6].startswith("0.62 (") and "; 0.38 (" in line[6]
  assert [name for name, _ in domains["rows"]] == ["a", "b"]


@pytest.mark.parametrize(("setting", "message"), [
    ("drafts=0", "positive numbers"), ("rounds=3", "must be even"), ("batches=", "positive"),
    ("temperature=-1", "not be negative")])
def test_invalid_settings_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    bench_speculation.main(Options("bench_speculation", settings=(setting,)))


def test_a_smoke_run_trains_a_model_and_writes_its_results(tmp_path):
  bench_speculation.main(Options("bench_speculation", out=tmp_path, settings=(
      "train.steps=2", "data.heldout_bytes=2000", f"data.cache_dir={tmp_path}",
      "data.sources=builtin:arithmetic", "new_tokens=4", "model.num_layers=1")))
  result = json.loads((tmp_path / "results.json").read_text())
  assert [row["texts_that_differ"] for row in result["rows"]] == [0]
