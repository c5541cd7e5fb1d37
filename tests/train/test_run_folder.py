"""A run's folder has one writer, one configuration, and rows that survive a kill."""

import contextlib
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from train.run_folder import Events, MetricsFile, RunFolder, write_json_atomic

ROOT = pathlib.Path(__file__).parent.parent.parent
HOLD = """
import os, sys, time
from train.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
child = os.fork()  # like a worker of a data loader
if not child:  # reports once it has released the inherited lock
  print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_the_lock_is_refused_to_a_second_process_and_released_by_sigkill(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], text=True,
                            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
  worker = int(holder.stdout.readline())
  try:
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}: .*another --out"):
      RunFolder(tmp_path / "run")
    holder.kill()
    holder.wait()
    os.kill(worker, 0)  # the worker is alive, but does not hold the lock
    RunFolder(tmp_path / "run").close()
  finally:
    holder.kill()
    os.kill(worker, signal.SIGKILL)


def test_a_closed_folder_can_be_opened_again(tmp_path):
  RunFolder(tmp_path).close()
  folder = RunFolder(tmp_path)
  assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
  with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
    RunFolder(tmp_path)
  folder.close()


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match=r"file is a file: give another --out"):
    RunFolder(tmp_path / "file")
  with pytest.raises(ValueError, match="cannot be made or written to"):
    RunFolder(tmp_path / "file" / "run")
  for path in ("/proc/self/run", tmp_path / ("x" * 300)):
    with pytest.raises(ValueError, match=r"cannot be made or written to .*another --out"):
      RunFolder(path)


CONFIG = {"train": {"steps": 200, "rate": 0.1}, "data": {"sources": ({"path": "a"},), "dir": None}}


def test_a_folder_accepts_the_configuration_that_it_holds(tmp_path):
  folder = RunFolder(tmp_path)
  folder.check_config(CONFIG)
  folder.check_config(CONFIG)
  folder.close()


def test_every_changed_field_is_named(tmp_path):
  folder = RunFolder(tmp_path)
  folder.check_config(CONFIG)
  changed = {"train": {"steps": 300, "rate": 0.1, "seed": 0},
             "data": {"sources": ({"path": "a"}, {"path": "b"}), "dir": "x"}}
  with pytest.raises(ValueError) as raised:
    folder.check_config(changed)
  assert str(raised.value) == (
      f"{tmp_path} holds a run with another configuration:\n"
      "  train.steps: 200 in the folder, 300 now\n"
      "  data.dir: null in the folder, \"x\" now\n"
      "  train.seed: absent in the folder, 0 now\n"
      "  data.sources.1.path: absent in the folder, \"b\" now\n"
      "Give another --out for a new run, or the old values to resume this one.")
  folder.check_config(CONFIG)  # the folder keeps its configuration
  folder.close()


def test_a_run_without_a_checkpoint_does_not_claim_its_folder(tmp_path):
  with contextlib.closing(RunFolder(tmp_path / "run")) as folder:
    folder.check_config({"config": 1, "seeds": [0]})
    (folder.path / "metrics.jsonl").touch()
    folder.check_config({"config": 2, "seeds": [0]})
    assert json.loads((folder.path / "config.json").read_text())["config"] == 2
    (folder.path / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(ValueError, match="config: 2 in the folder, 3 now"):
      folder.check_config({"config": 3, "seeds": [0]})


@pytest.mark.parametrize("name", ["model.safetensors", "results.json", "arm-seed0", "thesis.txt"])
def test_a_folder_with_other_files_keeps_its_configuration(tmp_path, name):
  with contextlib.closing(RunFolder(tmp_path)) as folder:
    folder.check_config({"config": 1})
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="another configuration"):
      folder.check_config({"config": 2})


def test_a_folder_that_nothing_was_written_to_is_removed(tmp_path):
  RunFolder(tmp_path / "new").close()
  assert not (tmp_path / "new").exists()
  (tmp_path / "old").mkdir()
  RunFolder(tmp_path / "old").close()
  assert (tmp_path / "old").exists()


def prepare(path):
  """Returns the folder of a run that has written everything that precedes its first step."""
  folder = RunFolder(path)
  folder.check_config({"config": 1, "seeds": [0]})
  for name in ("events", "checkpoints", "parts", "runs/arm", "huggingface"):
    (folder.path / name).mkdir(parents=True)
  for name in ("tokenizer.json", "huggingface/a.model", "metrics.jsonl", "runs/arm/config.json"):
    (folder.path / name).touch()
  (folder.path / "evaluations.jsonl").write_text('{"step": 0}\n')
  return folder


def test_a_run_that_is_refused_before_training_leaves_its_folder_as_it_was(tmp_path):
  prepare(tmp_path / "new" / "run").close()
  assert os.listdir(tmp_path) == []
  (tmp_path / "thesis.txt").touch()
  prepare(tmp_path).close()
  assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("name", [
    "metrics.jsonl", "runs/arm/metrics.jsonl", "parts/1.json", "checkpoints/step_00000001/a",
    "results.json", "finished"])
def test_a_run_that_has_trained_keeps_its_folder(tmp_path, name):
  folder = prepare(tmp_path / "run")
  (folder.path / name).parent.mkdir(exist_ok=True)
  (folder.path / name).write_text("{}\n")
  folder.close()
  assert (folder.path / "config.json").exists() and (folder.path / name).exists()


def test_a_refused_command_does_not_change_a_folder_with_a_configuration(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
  with contextlib.closing(RunFolder(tmp_path)) as folder, pytest.raises(
      ValueError, match=r"holds a model in Hugging Face's format, .* write a training run"):
    folder.check_config({"config": 1, "seeds": [0]})
  assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", ['{"train": ', "[]", "null", "3"])
def test_a_damaged_configuration_is_an_error(tmp_path, content):
  folder = RunFolder(tmp_path)
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(ValueError, match=r"config.json is damaged"):
    folder.check_config(CONFIG)
  folder.close()


def test_a_json_file_is_replaced_completely_or_not_at_all(tmp_path):
  write_json_atomic(tmp_path / "a.json", {"x": 1})
  with pytest.raises(TypeError):
    write_json_atomic(tmp_path / "a.json", {"x": object()})
  assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'
  assert os.listdir(tmp_path) == ["a.json"]


def test_floats_are_read_back_bit_for_bit(tmp_path):
  metrics = MetricsFile(tmp_path / "metrics.jsonl")
  values = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, math.nan, math.inf, -math.inf]
  row = {"step": 1, "values": values, "f32": np.float32(0.1), "jax": jnp.float32(0.2), "name": "x"}
  metrics.append(row)
  [back] = metrics.read()
  assert struct.pack("8d", *back.pop("values")) == struct.pack("8d", *values)
  assert back == {"step": 1, "f32": float(np.float32(0.1)), "jax": float(jnp.float32(0.2)),
                  "name": "x"}
  text = (tmp_path / "metrics.jsonl").read_text()
  assert '"nan", "inf", "-inf"' in text and text.count("\n") == 1
  metrics.close()


TORN = ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', '{"step": 4, "lo\n', "\0\0\0"]


@pytest.mark.parametrize("torn", TORN)
def test_rows_past_a_step_and_a_torn_last_row_are_dropped(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  metrics = MetricsFile(path)
  for step in (1, 2, 3):
    metrics.append({"step": step, "loss": step / 3})
  assert len(path.read_text().splitlines()) == 3  # each append is flushed
  with open(path, "a") as file:
    file.write(torn)
  resumed = MetricsFile(path)
  assert [row["step"] for row in resumed.read()] == [1, 2, 3]
  resumed.truncate_after(2)
  resumed.append({"step": 3, "loss": 0.0})
  resumed.close()
  assert resumed.read() == [
      {"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 0.0}]


def test_a_row_is_not_appended_to_a_torn_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"ste')
  metrics = MetricsFile(path)
  metrics.append({"step": 2})
  metrics.close()
  assert metrics.read() == [{"step": 1}, {"step": 2}]


def test_a_bad_row_before_the_last_is_an_error_that_names_it(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl .*'nonsense"):
    MetricsFile(tmp_path / "metrics.jsonl").read()


def test_a_missing_metrics_file_has_no_rows(tmp_path):
  metrics = MetricsFile(tmp_path / "metrics.jsonl")
  metrics.truncate_after(3)
  assert metrics.read() == []


def read_events(folder):
  """Returns (step, tag, value, time) of every scalar; a record is length, CRC, data and CRC."""
  found = []
  for path in folder.glob("events.out.tfevents.*"):
    content, at = path.read_bytes(), 0
    while at < len(content):
      [length] = struct.unpack_from("<Q", content, at)
      event = Event.FromString(content[at + 12:at + 12 + length])
      found += [(event.step, value.tag, value.simple_value, event.wall_time)
                for value in event.summary.value]
      at += length + 16
  return sorted(found)


def test_resumed_events_hold_the_kept_rows_and_none_past_the_step(tmp_path):
  rows = [{"step": step, "loss": step / 4, "time": 1e9 + step, "note": "x", "loads": [1, 2],
           "lr": np.float32(0.5)} for step in range(1, 5)]
  first = Events(tmp_path / "events")
  for row in rows:
    first.append(row)
  first.close()
  expected = [(row["step"], tag, value, row["time"])
              for row in rows for tag, value in (("loss", row["loss"]), ("lr", 0.5))]
  assert read_events(tmp_path / "events") == expected
  killed = Events(tmp_path / "events", rows[:3])
  killed.append({"step": 4, "loss": 9.0})
  killed.close()
  [file] = (tmp_path / "events").iterdir()
  # Event files are named by the second: within the same second, it might only be overwritten.
  file.rename(f"{file}.a_second_ago")
  resumed = Events(tmp_path / "events", rows[:2])
  resumed.append({"step": 3, "loss": 7.0, "time": 5.0})
  resumed.close()
  assert read_events(tmp_path / "events") == [*expected[:4], (3, "loss", 7.0, 5.0)]
