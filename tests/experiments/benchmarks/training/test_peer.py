"""The torch training peer: its messages if libraries are missing or arguments are invalid."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[4]
SCRIPT = ROOT / "experiments/benchmarks/peers/transformers_train.py"
CONFIG = json.dumps({"shape": {"vocab_size": 64}, "batch": 1, "seq": 8, "steps": 1})
# Runs the script as if torch and transformers were not installed.
WITHOUT_TORCH = ("import runpy, sys; sys.modules.update(torch=None, transformers=None); "
                 "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")


def run(*args: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, SCRIPT, *args],
                        stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize(("args", "message"), [
    ((CONFIG,), "lacks torch: run this with an interpreter that has torch and transformers"),
    ((), "the following arguments are required: config"),
    (("{",), "not JSON"),
    (('{"shape": {}, "batch": 8}',), "with the keys ['batch', 'seq', 'shape', 'steps']"),
    ((CONFIG, "--experts=fast"), "invalid choice: 'fast'"),
    ((CONFIG, "--threads=two"), "invalid int value: 'two'"),
])
def test_errors_are_reported_without_a_traceback(args, message):
  done = run(*args)
  assert done.returncode != 0 and not done.stdout
  assert message in done.stderr and "Traceback" not in done.stderr
