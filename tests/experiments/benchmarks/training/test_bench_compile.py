import json
import subprocess
import sys

import pytest

from experiments.benchmarks.training import bench_compile
from experiments.benchmarks.training.bench_compile import CompileConfig, seconds
from experiments.options import Options

_RUN = {"seconds": 9.0, "programs": {
    "train_step": {"trace": [1.0], "lower": [0.5], "compile": [4.0]},
    "count": {"trace": [0.25], "lower": [0.25], "compile": [1.0, 1.0]}}}


def test_a_process_records_the_programs_that_it_compiles_and_how_often(tmp_path):
  code = ("import sys, pathlib\n"
          "from experiments.benchmarks.training.compile_child import record_to\n"
          "record_to(pathlib.Path(sys.argv[1]))\n"
          "import jax, numpy as np\n"
          "double = jax.jit(lambda x: x + x)\n"
          "for size in (2, 3): double(np.ones(size))\n")
  subprocess.run([sys.executable, "-c", code, str(tmp_path / "times.json")], check=True)
  found = json.loads((tmp_path / "times.json").read_text())
  times = found["programs"]["<lambda>"]
  assert len(times["compile"]) == len(times["lower"]) == 2
  assert 0 < seconds(found, ["<lambda>"]) <= seconds(found) < found["seconds"]


def test_seconds_are_summed_over_the_named_programs_and_stages():
  assert seconds(_RUN) == 8.0
  assert seconds(_RUN, ["count"]) == 2.5
  assert seconds(_RUN, None, ["compile"]) == 6.0


def test_the_summary_judges_cold_runs_and_several_at_once_against_the_targets():
  slow = json.loads(json.dumps(_RUN))
  slow["programs"]["train_step"]["compile"] = [14.0]
  result = {"scale": "gpu", "at_once": 2, "on_gpu": True, "device": "1 x NVIDIA H200",
            "command": "", "commit": "", "versions": {}, "cores": 16, "cpu": "",
            "commands": {"pretraining": {"cold": [_RUN], "warm": [_RUN], "at once": [_RUN, slow],
                                         "tuned": [slow]}}}
  claims = bench_compile.summary(result)["claims"]
  assert [(claim["value"], claim["verdict"]) for claim in claims] == [
      (8.0, "met"), (18 / 8, "missed"), (8 / 18, "met")]


@pytest.mark.parametrize(("settings", "message"), [
    ({"commands": ("pretrainning",)}, "no command pretrainning"),
    ({"commands": ()}, "at least"),
    ({"tuned": ("training of base",)}, "must be some of"),
    ({"at_once": 0}, "at_once"),
])
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    CompileConfig(**settings)


def test_programs_for_a_gpu_are_refused_without_one(monkeypatch):
  monkeypatch.setattr(bench_compile, "_has_gpu", lambda: False)
  with pytest.raises(ValueError, match="--scale=cpu"):
    bench_compile.main(Options("bench_compile", scale="gpu"))


def test_a_command_that_fails_is_reported_with_the_end_of_its_output(tmp_path):
  command = bench_compile.Command(("--experiment=nothing",), ())
  with pytest.raises(ValueError, match="no experiment 'nothing'"):
    bench_compile._run(command, [str(tmp_path)])
