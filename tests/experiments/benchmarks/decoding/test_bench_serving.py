"""Costs of tokens follow from the seconds of each phase, and DeepSeek's from published figures."""

import dataclasses

import pytest

from experiments.benchmarks.decoding import bench_serving
from experiments.options import Options
from experiments.reports import provenance


def test_a_smoke_run_writes_costs_and_their_arithmetic(tmp_path, capsys):
  bench_serving.main(Options("bench_serving", out=tmp_path))
  assert capsys.readouterr().out.count("per million tokens at $2.0 an hour") == 3
  report = (tmp_path / "report.md").read_text()
  assert "input, cache hit" in report and "Arithmetic for V3" in report


def test_dollars_are_those_of_the_seconds():
  rounds = lambda seconds: [seconds] * 6
  result = provenance.describe() | {
      "parameters": 1, "numerics": "float32", "price": 3.6, "rows": 10, "shared": 100, "own": 5,
      "new": 11, "seconds": {
          "read the shared part": rounds(1.0), "read the own part after a shared one": rounds(0.3),
          "read the own part alone": rounds(0.1), "answer": rounds(0.5)}}
  costs = {name: cost for name, cost, *_ in bench_serving._costs(result)}
  assert costs == pytest.approx({"input, cache miss": 1.0, "input, cache hit": 0.2, "output": 5.0})
  found = bench_serving.summary(result)
  hit, output = found["claims"]
  assert hit["value"] == pytest.approx(0.2) and hit["verdict"] == "met"
  assert output["value"] == pytest.approx(5.0)
  arithmetic = {name: value for name, value, _ in found["tables"][1]["rows"]}
  # 8 GPUs at $3.6 an hour are 0.8 cents a second.
  assert arithmetic["output, a node's 14,800 tokens/s"] == pytest.approx(0.008 / 14_800 * 1e6)
  assert arithmetic["experts: products of all parameters over those of active ones"] == (
      pytest.approx(671 / 37, rel=0.02))


@pytest.mark.parametrize(("changes", "message"), [
    ({"rounds": 3}, "rounds=3"), ({"new": 1}, "new=1"), ({"rows": 0}, "rows"),
    ({"price": 0}, "price"), ({"shared": 10**6}, "longer than the model's context")])
def test_impossible_requests_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(bench_serving.SCALES["cpu"], **changes)
