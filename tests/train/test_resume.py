"""A run that is killed at any moment and resumed ends with the same bits as one that was not."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from train.checkpoint import read_newest
from train.config import RunConfig
from train.config_io import from_dict
from train.program import Program
from train.run_folder import MetricsFile

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS, EVERY = 60, 6
SETTINGS = (
    f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.batch_size=4",
    "train.micro_batch_size=2", "train.batch_ramp_fraction=0.5", "train.batch_ramp_start=0.5",
    "train.eval_every=20", "optimizer.ema_decay=0.9", "data.sources=builtin:arithmetic",
    "data.seq_len=32", "data.heldout_bytes=2000", "model.d_model=32", "model.mtp=none",
    "model.num_layers=1", "model.num_dense_layers=0", "model.rope.layout=half",
    "model.attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16)", "sample_tokens=0")
TIMES = ("time", "tokens_per_second", "utilisation")


def start(folder: pathlib.Path) -> subprocess.Popen:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return subprocess.Popen(
      [sys.executable, "-m", "experiments.run", "--experiment=pretrain", "--scale=smoke",
       f"--out={folder}", *(f"--set={setting}" for setting in SETTINGS)],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: pathlib.Path) -> str:
  process = start(folder)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  return output


def wait_for(process: subprocess.Popen, ready) -> bool:
  """Waits for `ready`; returns whether it became true before the process ended."""
  while process.poll() is None:
    if ready():
      return True
    time.sleep(0.0005)
  return False


def committed(folder: pathlib.Path) -> list[int]:
  return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*[0-9]"))


def saving(folder: pathlib.Path) -> bool:
  return any(not path.name.startswith("step_") for path in (folder / "checkpoints").glob("*"))


def rows(folder: pathlib.Path, name: str) -> list[dict]:
  return [{key: value for key, value in row.items() if key not in TIMES}
          for row in MetricsFile(folder / name).read()]


def final_state(folder: pathlib.Path):
  plain = json.loads((folder / "config.json").read_text())
  program = Program([from_dict(RunConfig, plain["config"])], {})
  return read_newest(folder / "checkpoints", program.abstract_state())


def check_same(folder: pathlib.Path, reference: pathlib.Path) -> None:
  for name in ("metrics.jsonl", "evaluations.jsonl"):
    assert rows(folder, name) == rows(reference, name)
  ours, theirs = final_state(folder), final_state(reference)
  assert ours.step == theirs.step == STEPS
  assert ours.extra == theirs.extra
  jax.tree.map(np.testing.assert_array_equal, ours.arrays, theirs.arrays)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reference") / "run"
  finish(folder)
  return folder


def test_sigterm_saves_a_checkpoint_and_the_same_command_ends_bit_identically(tmp_path, reference):
  folder = tmp_path / "run"
  process = start(folder)
  assert wait_for(process, lambda: len(rows(folder, "metrics.jsonl")) >= EVERY + 2)
  process.send_signal(signal.SIGTERM)
  output = process.communicate()[0]
  assert process.returncode == 143 and "stopped after step" in output, output
  stopped = int(output.rpartition("stopped after step ")[2].split(",")[0])
  assert stopped % EVERY and stopped in committed(folder)
  finish(folder)
  check_same(folder, reference)


@pytest.mark.long("kills a training process repeatedly")
def test_sigkill_at_any_moment_changes_no_bit_of_the_result(tmp_path, reference):
  folder, rng = tmp_path / "run", random.Random(0)
  inside_saves = 0
  for attempt in range(40):
    before, process = committed(folder), start(folder)
    if attempt % 2:  # kill it inside a save
      known = set(before)
      killed = wait_for(process, lambda known=known: saving(folder) and (
          known or committed(folder)))
      inside_saves += killed and saving(folder)
    else:
      goal = (before[-1] if before else EVERY) + rng.randrange(1, EVERY)
      killed = wait_for(process, lambda goal=goal: (
          committed(folder) and len(rows(folder, "metrics.jsonl")) >= goal))
    process.kill()
    process.communicate()
    assert killed, "the run ended before it could be killed often enough: make it longer"
    if attempt >= 5 and inside_saves >= 2:
      break
  assert inside_saves >= 2
  finish(folder)
  check_same(folder, reference)
