"""The benchmark of attention counts pairs, and compares implementations and packing."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.benchmarks.kernels import bench_attention
from experiments.options import Options
from experiments.reports import provenance

SMOKE = bench_attention.SCALES["smoke"]


def test_documents_have_the_lengths_asked_for_and_pairs_are_counted_one_by_one():
  ids_BT = bench_attention._documents(np.random.default_rng(0), 3, 50, (4, 9))
  for row in ids_BT:
    sizes = np.unique(row, return_counts=True)[1]
    assert (np.diff(row) >= 0).all() and sizes[:-1].min() >= 4 and sizes.max() <= 9
    pairs = sum(row[t] == row[s] for t in range(50) for s in range(t + 1))
    assert bench_attention._pairs(row) == pairs
  assert bench_attention._pairs(np.zeros(7)) == 28


def test_it_measures_what_runs_here_and_says_what_does_not(tmp_path, capsys):
  bench_attention.main(Options("bench_attention", scale="smoke", out=tmp_path))
  printed = capsys.readouterr().out
  assert "excluded: 1x32, cudnn, packed: attention by cuDNN needs" in printed
  found = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [(row["packed"], row["implementation"]) for row in found] == [
      (packed, name) for packed in (False, True) for name in ("default", "xla", "blockwise")]
  assert {row["pairs"] for row in found if not row["packed"]} == {2 * 32 * 33 // 2}


def test_packed_sequences_are_compared_by_pairs_per_second():
  row = lambda packed, name, pairs, seconds: {
      "shape": "1x8", "packed": packed, "implementation": name, "pairs": pairs, "bytes": 0,
      "seconds": [seconds] * 6}
  rows = [row(False, "default", 100, 1.0), row(False, "xla", 100, 2.0),
          row(False, "blockwise", 100, 1.0), row(True, "default", 50, 0.625)]
  summary = bench_attention.summary(
      provenance.describe() | {"rows": rows} | dataclasses.asdict(SMOKE))
  values = {each["claim"]: (each["value"], each["verdict"]) for each in summary["claims"]}
  assert values["1x8: blocks against all pairs"] == (2.0, "measured")
  ratio, verdict = values["1x8: pairs per second, documents against whole sequences"]
  assert ratio == pytest.approx(0.8) and verdict == "missed"
  assert [line[-1] for line in summary["tables"][0]["rows"]] == [2.0, 1.0, 2.0, None]


def test_settings_that_make_no_sense_are_refused():
  for changes, message in (({"shapes": ("8x",)}, "is not BxT"), ({"numerics": "int8"}, "int8"),
                           ({"implementations": ("flash",)}, "flash"), ({"rounds": 3}, "even"),
                           ({"documents": (9, 4)}, "the shortest and the longest")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SMOKE, **changes)
