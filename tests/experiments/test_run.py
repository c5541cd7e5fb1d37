"""The command line: what it does, and what it says when used wrongly."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(*args: str) -> subprocess.CompletedProcess:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return subprocess.run([sys.executable, "-m", "experiments.run", *args], cwd=ROOT, env=env,
                        capture_output=True, text=True)


def test_check_model_passes_all_its_checks():
  done = run("--experiment=check_model")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("\nok  ") == 7
  assert "671,026,404,352 parameters" in done.stdout


def test_list_names_every_experiment():
  done = run("--list")
  assert done.returncode == 0
  listed = {line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()}
  assert listed == {path.stem for path in (ROOT / "experiments").glob("*.py")
                    if "\ndef main(options: Options)" in path.read_text()
                    or "\nSTUDY = " in path.read_text()}


@pytest.mark.parametrize(("args", "message"), [
    ((), "name an --experiment"),
    (("--experiment=chek_model",), "did you mean 'check_model'"),
    (("--experiment=check_model", "extra"), "unexpected argument 'extra'"),
    (("--experiment=check_model", "--set=checkpoint=/nowhere"), "is not a folder"),
    (("--experimet=check_model",), "Did you mean: experiment"),
])
def test_misuse_is_one_clear_line_and_no_traceback(args, message):
  done = run(*args)
  assert done.returncode != 0
  assert message in done.stderr and "Traceback" not in done.stderr
