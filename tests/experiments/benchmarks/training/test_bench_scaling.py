"""Steps on two simulated devices are compared with steps on one; a single device is refused."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks.training import bench_scaling
from experiments.options import Options
from experiments.reports import provenance

ROOT = pathlib.Path(__file__).parents[4]
TINY = ("model=nano", "train.batch_size=2", "data.seq_len=16", "train.unroll=1", "steps=1",
        "mebibytes=1", "axes=data")


def test_steps_on_two_devices_are_compared_with_steps_on_one(tmp_path):
  command = [sys.executable, "-m", "experiments.run", "--experiment=bench_scaling",
             *(f"--set={setting}" for setting in TINY), f"--out={tmp_path}"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "DEEPSEEK_JAX_RESTART": "0",
                      "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "results.json").read_text())
  assert result["devices"] == 2 and set(result["seconds_per_step"]) == {"one device", "data"}
  assert "2 devices against one, mesh.data=2" in (tmp_path / "report.md").read_text()


def test_the_ratio_is_that_of_tokens_per_second():
  result = provenance.describe() | {
      "devices": 4, "tokens_of_a_device": 100, "params": 1, "numerics": "bfloat16",
      "seconds_per_step": {"one device": [1.0] * 7, "fsdp": [1.25] * 7},
      "all_reduce": {"mebibytes": 1024, "seconds": [0.5] * 7}}
  (fsdp, rate), table = (bench_scaling.summary(result)[key] for key in ("claims", "tables"))
  assert fsdp["value"] == pytest.approx(4 / 1.25) and fsdp["verdict"] == "missed"
  assert rate["value"] == pytest.approx(2**30 / 1e9 / 0.5)
  assert [row[2] for row in table[0]["rows"]] == [100, pytest.approx(320)]


@pytest.mark.parametrize(("setting", "error"), [
    ("steps=1", "there is a single device"), ("axes=seq", "axes has 'seq', which is not")])
def test_what_cannot_be_compared_is_refused(monkeypatch, setting, error):
  monkeypatch.setattr(bench_scaling.jax, "device_count", lambda: 1)
  with pytest.raises(ValueError, match=error):
    bench_scaling.main(Options("bench_scaling", settings=(setting,)))
