"""bench_train: a small run with its report, memory and profiles, and settings that are refused."""

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


def test_a_small_run_times_and_profiles_both_phases_and_records_absent_peers(
    tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench_train, "require_packages", lambda *args: None)
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
def test_the_process_peak_is_reported_only_for_a_single_contender(numerics, alone):
  cfg = bench_train._scales()["cpu"]
  cfg = dataclasses.replace(cfg, bench=dataclasses.replace(cfg.bench, numerics=numerics))
  ours = OwnTrainer(cfg, numerics[0])
  ours.state, ours._start_seconds = jnp.ones(1), 0.0
  ours._compiled = jax.jit(lambda x: x + 1).lower(ours.state).compile()
  found = ours.finish()
  assert found["program_mb"] > 0
  # Otherwise the peak of the compiled program is reported.
  assert (found["peak_mb"] > found["program_mb"] if alone else
          found["peak_mb"] == found["program_mb"])


@pytest.mark.parametrize(("setting", "message"), [
    ("bench.phases=test", "must be some of forward_backward, train"),
    ("bench.numerics=fp4", "must be some of fp32, bf16, fp8"),
    ("bench.rounds=0", "Bench.rounds=0 must be positive"),
])
def test_unknown_phases_and_numerics_and_zero_rounds_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    bench_train.main(Options("bench_train", settings=(setting,)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="applies to a CPU only")
@pytest.mark.parametrize("scale", ["gpu", "v2_lite"])
def test_a_scale_that_takes_hours_on_a_cpu_is_refused(scale):
  with pytest.raises(ValueError, match="takes hours on a CPU"):
    bench_train.main(Options("bench_train", scale=scale))


def test_the_results_of_a_phase_are_saved_before_the_next_phase(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(("name", "short"), [
    ("ours bf16", "ours bf16"), ("transformers", "transformers"),
    ("transformers --experts=eager --adamw=fused --compile",
     "transformers (eager experts, fused AdamW, compiled)"),
    ("transformers --device=cuda --dtype=bfloat16 --attention=cudnn",
     "transformers (cudnn attention)")])
def test_a_peers_flags_are_shown_in_words(name, short):
  assert bench_train._short(name) == short


def test_an_interpreter_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="python=nowhere is not a program"):
    bench_train.main(Options("bench_train", settings=(
        "bench.peer=transformers", "bench.python=nowhere")))


def test_a_peer_without_torch_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_train, "OwnTrainer", None)
  (tmp_path / "python").write_text("#!/bin/sh\necho torch transformers\n")
  (tmp_path / "python").chmod(0o755)
  with pytest.raises(ValueError, match="the peer needs torch and transformers, which"):
    bench_train.main(Options("bench_train", settings=(
        "bench.peer=transformers", f"bench.python={tmp_path / 'python'}")))


def test_a_scale_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="there are cpu, gpu, v2_lite"):
    bench_train.main(Options("bench_train", scale="tpu"))
