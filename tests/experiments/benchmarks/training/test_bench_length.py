"""Runs of several lengths train in several processes, and their deviations are compared."""

import dataclasses
import json

import pytest

from experiments.benchmarks.training import bench_length
from experiments.options import Options
from experiments.reports import provenance

TINY = ("model.d_model=32", "model.num_layers=2", "data.tokenizer=bytes", "data.seq_len=32",
        "data.heldout_bytes=2000", "train.batch_size=2", "lengths=64,128", "seeds=2", "at_once=2")


def test_runs_train_in_several_processes_and_a_second_command_goes_on(tmp_path, capsys):
  options = Options("bench_length", settings=TINY, out=tmp_path)
  bench_length.main(options)
  first = json.loads((tmp_path / "results.json").read_text())["runs"]
  assert len(first) == 8 and len({run["loss"] for run in first}) > 4
  assert "deviation of 2 seeds" in capsys.readouterr().out
  result = json.loads((tmp_path / "results.json").read_text())
  (tmp_path / "results.json").write_text(json.dumps(result | {"runs": result["runs"][:7]}))
  bench_length.main(options)
  again = json.loads((tmp_path / "results.json").read_text())["runs"]
  assert again[:7] == first[:7]
  assert again[7]["loss"] == first[7]["loss"]  # a CPU repeats a run exactly
  assert capsys.readouterr().out.count("validation loss") == 1


def test_a_process_that_fails_is_an_error_with_its_log():
  cfg = bench_length.SCALES["cpu"].without_extras()
  with pytest.raises(ValueError, match=r"ended with status 1:(.|\n)*Error"):
    list(bench_length._train(cfg, [(-1, 0, False)], 0x7FFFFFFF, 1))


def test_deviations_are_those_between_seeds_and_within_pairs():
  runs = [{"tokens": tokens, "seed": seed, "nudge": nudge,
           "loss": 3 + scale * (seed + 0.25 * nudge * (-1)**seed)}
          for tokens, scale in ((64, 1.0), (128, 0.5))
          for seed in range(4) for nudge in (False, True)]
  result = provenance.describe() | {
      "lengths": [64, 128], "tokens_per_step": 64, "parameters": 1, "numerics": "bfloat16",
      "runs": [*runs, {"tokens": 64, "seed": 4, "nudge": False, "loss": 100.0}]}
  found = bench_length.summary(result)
  (_, seeds, loss, deviation, paired, *_), longer = found["tables"][0]["rows"]
  assert seeds == 4 and loss == pytest.approx(4.5)
  assert deviation == pytest.approx((5 / 3) ** 0.5) and paired == pytest.approx(0.25 * (4 / 3)**0.5)
  assert longer[3] == pytest.approx(deviation / 2)
  for claim in found["claims"]:
    assert claim["value"] == pytest.approx(0.5)
    assert claim["high"] / 0.5 == pytest.approx(3.93, abs=0.01)  # sqrt(F), F = 15.44
    assert claim["low"] / 0.5 == pytest.approx(1 / 3.93, abs=0.001)


def test_lengths_are_ascending_and_of_at_least_a_step():
  for lengths in ((128, 64), (64,), (1, 10**9)):
    with pytest.raises(ValueError, match="lengths="):
      dataclasses.replace(bench_length.SCALES["cpu"], lengths=lengths)
