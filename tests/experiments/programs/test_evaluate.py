"""The evaluate program: errors that are detected before the model is loaded."""

import json
import os
import re

import pytest

from experiments.benchmarks.numerics import fp8_accumulation
from experiments.benchmarks.rl import bench_rl
from experiments.options import Options, writes_results
from experiments.programs import evaluate
from train.run_folder import RunFolder, write_json_atomic


def test_an_output_path_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path):
  path = tmp_path / "out"
  path.write_text("")
  with pytest.raises(ValueError, match=f"{re.escape(str(path))} is a file: give another --out"):
    evaluate.main(Options("evaluate", out=path, settings=("checkpoint=missing",)))


PROGRAMS = {"evaluate": evaluate.main, "fp8_accumulation": fp8_accumulation.main,
            "bench_rl": bench_rl.main}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("config", "kind"), [
    ({"config": {}, "seeds": [0]}, "a training run"), ({"rl": {}}, "a run of RL"),
    ({"study": "fp8"}, "the study fp8"), ({"results_of": "other"}, "the results of other"),
    ({"model_type": "deepseek_v3"}, "a model in Hugging Face's format")])
def test_results_are_not_written_to_the_folder_of_something_else(name, config, kind, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=f"holds {kind}, .* would write the results of {name}: give"):
    PROGRAMS[name](Options(name, out=tmp_path))
  assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_refused_command_leaves_no_output_folder(name, tmp_path):
  with pytest.raises(ValueError, match="nonsense does not exist"):
    PROGRAMS[name](Options(name, out=tmp_path / "new" / "out", settings=("nonsense=1",)))
  assert os.listdir(tmp_path) == []


@writes_results
def record(options):
  with pytest.raises(ValueError, match="in use by process"):
    RunFolder(options.out)
  write_json_atomic(options.out / "results.json", {"command": "run --experiment=record --out=x"})


def test_the_same_experiment_may_replace_its_results(tmp_path):
  record(Options("record", out=tmp_path))
  record(Options("record", out=tmp_path))
  (tmp_path / "config.json").unlink()  # as an earlier version wrote the folder
  record(Options("record", out=tmp_path))
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match=r"holds results.json of something else than recor: give"):
    record(Options("recor", out=tmp_path))


@pytest.mark.parametrize(("setting", "message"), [
    ("seed=-1", "^seed=-1 must"), ("max_prompt_length=0", "^max_prompt_length=0 and"),
    ("max_completion_length=0", "max_completion_length=0 must be positive")])
def test_messages_name_the_settings_of_this_program(setting, message):
  with pytest.raises(ValueError, match=message):
    evaluate.main(Options("evaluate", settings=("checkpoint=missing", setting)))
