"""bench_train: a whole small run, what it reports, and peers that cannot run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.training import bench_train
from experiments.benchmarks.training.contenders import OwnTrainer
from experiments.options import Options

TINY = ("model=nano", "model.mtp=none", "model.num_dense_layers=0", "model.num_layers=1",
        "model.ffn_dim=32", "seq_len=16", "batch_size=2", "unroll=1", "bench.rounds=2",
        "bench.steps=1", "bench.warm_up=1")


def test_a_small_run_times_both_phases_profiles_them_and_notes_who_is_absent(tmp_path, capsys):
  bench_train.main(Options("bench_train", scale="v2_lite", out=tmp_path, profile=True, settings=(
      *TINY, "bench.numerics=bf16", "bench.peer=transformers", "bench.python=false",
      "bench.variants=--compile")))
  result = json.loads((tmp_path / "results.json").read_text())
  assert "stopped" in result["absent"]["transformers --compile"]
  for phase in ("forward_backward", "train"):
    timed = result["phases"][phase]
    assert set(timed["contenders"]) == {"ours"} and not timed["speedup"]
    ours = timed["contenders"]["ours"]
    assert len(ours["by_round"]) == 2 and ours["peak_mb"] > ours["program_mb"] > 0
    profile = (tmp_path / f"profile-{phase}-ours.md").read_text()
    assert "| dense products |" in profile
  assert "| optimizer |" in profile
  assert "train, 2 x 16 tokens" in capsys.readouterr().out
  assert "profile-train-ours.md" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("numerics", "alone"), [(("fp32",), True), (("fp8", "bf16"), False)])
def test_the_process_peak_is_quoted_only_where_one_contender_has_it_alone(numerics, alone):
  cfg = bench_train._scales()["cpu"]
  cfg = dataclasses.replace(cfg, bench=dataclasses.replace(cfg.bench, numerics=numerics))
  ours = OwnTrainer(cfg, numerics[0])
  ours.state, ours._start_seconds = jnp.ones(1), 0.0
  ours._compiled = jax.jit(lambda x: x + 1).lower(ours.state).compile()
  said = ours.finish()
  assert (said["peak_mb"] > said["program_mb"] > 0) == alone


@pytest.mark.parametrize(("setting", "message"), [
    ("bench.phases=test", "must be some of forward_backward, train"),
    ("bench.numerics=fp4", "must be some of fp32, bf16, fp8"),
    ("bench.rounds=0", "Bench.rounds"),
])
def test_what_cannot_be_measured_is_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    bench_train.main(Options("bench_train", settings=(setting,)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is of a CPU")
@pytest.mark.parametrize("scale", ["gpu", "v2_lite"])
def test_what_takes_hours_on_a_cpu_is_an_error(scale):
  with pytest.raises(ValueError, match="takes hours on a CPU"):
    bench_train.main(Options("bench_train", scale=scale))


def test_what_a_phase_gave_outlives_the_next(tmp_path, monkeypatch):
  ours = {"tokens_per_second": 1.0, "flops_per_second": 1.0, "fraction_of_peak": 0.5,
          "peak_mb": 1.0, "start_seconds": 1.0}
  measured = {"contenders": {"ours": ours}, "speedup": {}}
  phases = iter([measured])
  monkeypatch.setattr(bench_train, "_measure", lambda *_: next(phases))
  monkeypatch.setattr(bench_train, "_report", lambda *_: None)
  with pytest.raises(StopIteration):
    bench_train.main(Options("bench_train", scale="v2_lite", out=tmp_path, settings=TINY))
  result = json.loads((tmp_path / "results.json").read_text())
  assert result["phases"] == {"forward_backward": measured}


def test_a_peer_needs_an_interpreter():
  with pytest.raises(ValueError, match="python=nowhere is no program"):
    bench_train.main(Options("bench_train", settings=(
        "bench.peer=transformers", "bench.python=nowhere")))


def test_a_scale_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="there are cpu, gpu, v2_lite"):
    bench_train.main(Options("bench_train", scale="tpu"))
