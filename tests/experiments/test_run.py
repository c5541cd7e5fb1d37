"""The command line: what it does, and what it says when used wrongly."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(*args: str) -> subprocess.CompletedProcess:
  # Programs that run a few times need no optimising, and are compiled once for all tests.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
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
    (("--experiment=pretrain", "--set=train.batch_size=8", "--set=train.micro_batch_size=3"),
     "micro_batch_size=3 must divide batch_size=8"),
    (("--experiment=pretrain", "--scale=big"), "there are smoke, cpu, gpu"),
    (("--experiment=pretrain", "--arms=x"), "--arms means nothing to --experiment=pretrain"),
    (("--experiment=pretrain", "--seeds=0"), "--seeds=0 must be a positive number"),
    (("--experiment=load_balancing", "--arms=nope"), "load_balancing has nothing, loss_free"),
    (("--experiment=pretrain", "--out={folder}/run", "--set=data.cache_dir={folder}",
      "--set=data.sources=/nowhere.jsonl"), "/nowhere.jsonl"),
    (("--experiment=generate",), "--set checkpoint=DIR"),
    (("--experiment=evaluate",), "--set checkpoint=DIR"),
    (("--experiment=evaluate", "--set=checkpoint=x", "--set=ks=32"), "must lie in 1..samples=16"),
    (("--experiment=r1_zero", "--arms=gpro"), "there are grpo, format_only, random, rft, ppo"),
    (("--experiment=r1_zero", "--set=rl.task=arithmetik"), "did you mean 'arithmetic'"),
    (("--experiment=r1_zero", "--set=rl.objective.name=rloop"), "did you mean 'rloo'"),
    (("--experiment=r1_zero", "--set=rl.sampling.num_generations=1"), "at least 2"),
    (("--experiment=r1_zero", "--set=rl.objective.minibatches=3"), "must divide the 16 sequences"),
])
def test_misuse_is_one_clear_line_and_no_traceback(args, message, tmp_path):
  done = run(*(arg.format(folder=tmp_path) for arg in args))
  assert done.returncode != 0
  assert message in done.stderr and "Traceback" not in done.stderr


def test_all_settings_that_are_wrong_are_named_at_once():
  done = run("--experiment=pretrain", "--set=model.moe.num_expert=3", "--set=train.steps=abc")
  assert done.returncode != 0 and "Traceback" not in done.stderr
  assert "did you mean model.moe.num_experts?" in done.stderr
  assert "train.steps" in done.stderr and "abc" in done.stderr


def write_documents(path: pathlib.Path) -> None:
  documents = [{"domain": "prose", "text": f"The abc of {i} is told here: abc. " * 6}
               for i in range(30)]
  documents += [{"domain": "sums", "text": "".join(f"{i}+{j}={i + j}\n" for j in range(30))}
                for i in range(30)]
  path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def pretrain(folder: pathlib.Path, steps: int = 6) -> subprocess.CompletedProcess:
  return run(
      "--experiment=pretrain", "--scale=smoke", f"--out={folder / 'run'}", *(
          f"--set={setting}" for setting in (
              f"train.steps={steps}", "model.d_model=32", "model.mtp=none", "data.seq_len=32",
              f"data.sources={folder / 'text.jsonl'}", "data.heldout_bytes=2000",
              f"data.cache_dir={folder / 'cache'}", "sample_tokens=0",
              f"export={folder / 'exported'}")))


def test_a_run_is_recorded_once_and_its_model_speaks(tmp_path):
  """Training, the same command again, another command on its folder, and text from its model."""
  write_documents(tmp_path / "text.jsonl")
  first = pretrain(tmp_path)
  assert first.returncode == 0, first.stderr
  folder = tmp_path / "run"
  metrics = (folder / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in metrics.splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert all(0 < row["loss"] < 10 for row in rows)
  results = json.loads((folder / "results.json").read_text())
  assert {"commit", "dirty", "versions", "command"} <= results["provenance"].keys()
  assert set(results["evaluations"][-1]["bits_per_byte"]) == {"prose", "sums"}
  assert "6 steps" in (folder / "report.md").read_text()

  again = pretrain(tmp_path)
  assert again.returncode == 0, again.stderr
  assert (folder / "metrics.jsonl").read_text() == metrics

  other = pretrain(tmp_path, steps=7)
  assert other.returncode != 0 and "Traceback" not in other.stderr
  assert "config.train.steps: 6 in the folder, 7 now" in other.stderr
  assert (folder / "metrics.jsonl").read_text() == metrics

  said = [run("--experiment=generate", f"--set=checkpoint={tmp_path / name}", "--set=prompt=abc",
              "--set=max_new_tokens=4") for name in ("run", "exported")]
  for done in said:
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("abc") and len(done.stdout) > len("abc\n")
  assert said[0].stdout == said[1].stdout
