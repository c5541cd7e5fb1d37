"""The benchmark of the cache's formats measures what it says, and reports it."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from experiments.benchmarks.decoding import bench_cache
from experiments.options import Options
from experiments.reports import provenance
from tests.rl import small
from train.loading import LoadedModel

CFG = dataclasses.replace(tiny.PLAIN_MLA, num_layers=2)


def test_fewer_bits_change_logits_more_and_none_change_the_losses_of_float32():
  start = LoadedModel(CFG, tiny.variables(CFG), None)
  tokens_RT = np.asarray(tiny.tokens(CFG, 3, 9))
  mask_RT = np.ones((3, 8), bool)
  mask_RT[1, 5:] = False
  found = bench_cache.measure(start, tokens_RT, mask_RT, ("float8_e5m2", "bfloat16"), 4)
  errors = {name: each["logit_error"] for name, each in found.items()}
  assert errors["float32"] == 0 < errors["bfloat16"] < errors["float8_e5m2"] < 0.5
  assert found["float32"]["same_choice"] == 1
  logits = np.asarray(tiny.apply(CFG)(tiny.variables(CFG), tokens_RT[:, :-1]).logits_BTV, float)
  logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  loss_RT = -np.take_along_axis(logp, tokens_RT[:, 1:, None], -1)[..., 0]
  want = [row[mask].mean() for row, mask in zip(loss_RT, mask_RT, strict=True)]
  np.testing.assert_allclose(found["float32"]["loss"], want, atol=1e-4)


def test_the_benchmark_trains_a_model_and_writes_its_report(tmp_path, capsys):
  bench_cache.main(Options("bench_cache", scale="smoke", out=tmp_path))
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert [row[0] for row in summary["tables"][0]["rows"]] == [
      "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
  sizes = [row[1] for row in summary["tables"][0]["rows"]]
  assert sizes == [sizes[2] * factor for factor in (4, 2, 1, 1)]
  assert len(summary["claims"]) == 3 and "e4m3fn: loss" in capsys.readouterr().out


def test_problems_are_solved_with_each_format_of_the_cache_by_the_same_random_numbers(tmp_path):
  small.tokenizer().save(tmp_path / "tokenizer.json")
  start = LoadedModel(dataclasses.replace(small.MODEL, max_seq_len=128), small.variables(),
                      str(tmp_path / "tokenizer.json"))
  cfg = dataclasses.replace(
      bench_cache.SCALES["smoke"], checkpoint="x", task=small.write_task(tmp_path), problems=2,
      samples=16, max_completion_length=3)
  found = {name: bench_cache.solved(start, cfg, name) for name in ("float32", "float8_e5m2")}
  assert len(found["float32"]) == 2 and 0 < np.mean(found["float32"]) < 1
  assert found["float32"] == bench_cache.solved(start, cfg, "float32")
  assert np.mean(found["float8_e5m2"]) == pytest.approx(np.mean(found["float32"]), abs=0.3)
  each = {"loss": [1.0, 2.0], "logit_error": 0.0, "same_choice": 1.0}
  result = provenance.describe() | {
      "formats": {name: each | {"solved": solved} for name, solved in found.items()},
      "task": "a task", "samples": 16, "elements": 4, "tokens": 8, "chunk": 4, "parameters": 9,
      "numerics": "float32"}
  summary = bench_cache.summary(result)
  assert summary["tables"][0]["rows"][0][-1] == np.mean(found["float32"])
  assert "a task: pass@1" in summary["claims"][1]["claim"]


def test_settings_that_make_no_sense_are_refused():
  for changes, message in (({"chunk": 7}, "chunk=7 must divide"), ({"formats": ("int4",)}, "int4"),
                           ({"task": "arithmetic"}, "needs a model that solves it"),
                           ({"problems": 1}, "problems=1 must be at least 2")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(bench_cache.SCALES["cpu"], **changes)
