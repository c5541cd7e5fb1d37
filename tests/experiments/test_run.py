"""The command line: what it does, and what it says when used wrongly.

Commands run in this process wherever nothing of a process of its own is tested.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import catalogue, run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a command in this process: its exit status, and what it prints to stdout and stderr."""
  monkeypatch.setattr(run, "_start_again_tuned_for_cpus", lambda: None)
  monkeypatch.setattr(run, "_keep_compiled_programs", lambda: None)

  def give(*args: str) -> tuple[int, str, str]:
    argv, status = ["run.py", *args], 0
    monkeypatch.setattr(sys, "argv", argv)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
      try:
        run.main(flags.FLAGS(argv))
      except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()

  return give


def in_a_process(*args: str) -> subprocess.CompletedProcess:
  # Programs that run a few times need no optimising, and are compiled once for all tests.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  return subprocess.run([sys.executable, "-m", "experiments.run", *args], cwd=ROOT, env=env,
                        capture_output=True, text=True)


def test_check_model_passes_all_its_checks(command, quick_compiles):
  status, out, err = command("--experiment=check_model")
  assert status == 0, err
  assert out.count("\nok  ") == 7
  assert "671,026,404,352 parameters" in out


def test_list_names_every_experiment_and_what_studies_cost(command):
  status, out, _ = command("--list")
  assert status == 0
  listed = {line.split()[0] for line in out.splitlines() if line[:3].count(" ") == 2}
  assert listed == set(catalogue.experiments()) >= {"pretrain", "bench_train", "load_balancing"}
  assert "arXiv:2408.15664" in out and "63 runs (9 arms x (3 learning rates + 4 seeds))" in out


def test_experiments_are_found_by_folder_and_not_by_a_list():
  found = catalogue.experiments()
  for path in (ROOT / "experiments").rglob("*.py"):
    text = path.read_text()
    if "\nSTUDY = " in text or "\ndef main(options: Options)" in text:
      assert found[path.stem].module.endswith(path.stem)
      assert found[path.stem].summary
  assert [found[name].results_folder for name in ("fp8", "rl_clip", "pretrain", "bench_moe")] == [
      "v3/fp8", "r1/rl_clip", "programs/pretrain", "bench/bench_moe"]


@pytest.mark.parametrize(("args", "message"), [
    ((), "name an --experiment"),
    (("--experiment=chek_model",), "did you mean 'check_model'"),
    (("--experiment=check_model", "extra"), "unexpected argument 'extra'"),
    (("--experiment=check_model", "--set=checkpoint=/nowhere"), "is not a folder"),
    (("--experiment=pretrain", "--set=train.batch_size=8", "--set=train.micro_batch_size=3"),
     "micro_batch_size=3 must divide batch_size=8"),
    (("--experiment=pretrain", "--scale=big"), "there are smoke, cpu, gpu"),
    (("--experiment=pretrain", "--arms=x"), "--arms is not supported by --experiment=pretrain"),
    (("--experiment=pretrain", "--seeds=0"), "--seeds=0 must be a positive number"),
    (("--experiment=pretrain", "--set=train.fsdp=2"), "train.fsdp has been renamed: set mesh.fsdp"),
    (("--experiment=pretrain", "--set=mesh.pipe=2"), "MeshConfig.pipe=2 is not supported"),
    (("--experiment=load_balancing", "--arms=nope"), "load_balancing has nothing, loss_free"),
    (("--experiment=pretrain", "--out={folder}/run", "--set=data.cache_dir={folder}",
      "--set=data.sources=/nowhere.jsonl"), "/nowhere.jsonl"),
    (("--experiment=generate",), "--set checkpoint=DIR"),
    (("--experiment=evaluate",), "--set checkpoint=DIR"),
    (("--experiment=evaluate", "--set=checkpoint=x", "--set=ks=32"), "must lie in 1..samples=16"),
    (("--experiment=r1_zero", "--arms=gpro"), "r1_zero has grpo, format_only, random, rft, ppo"),
    (("--experiment=r1_zero", "--set=rl.task=arithmetik"), "did you mean 'arithmetic'"),
    (("--experiment=r1_zero", "--set=rl.objective.name=rloop"), "did you mean 'rloo'"),
    (("--experiment=r1_zero", "--set=rl.sampling.num_generations=1"), "at least 2"),
    (("--experiment=r1_zero", "--set=rl.objective.minibatches=3"), "must divide the 16 sequences"),
    (("--experiment=r1_zero", "--set=problems=3"), "set evaluation.problems"),
])
def test_misuse_is_one_clear_line_and_no_traceback(args, message, tmp_path, command):
  status, _, err = command(*(arg.format(folder=tmp_path) for arg in args))
  assert status not in (0, None)
  assert message in err and "Traceback" not in err


def test_all_settings_that_are_wrong_are_named_at_once(command):
  status, _, err = command("--experiment=pretrain", "--set=model.moe.num_expert=3",
                           "--set=train.steps=abc")
  assert status != 0
  assert "did you mean model.moe.num_experts?" in err
  assert "train.steps" in err and "abc" in err


def test_a_process_ends_with_a_status_and_no_traceback():
  done = in_a_process("--experimet=check_model")
  assert done.returncode != 0 and "Did you mean: experiment" in done.stderr
  assert "Traceback" not in done.stderr


def write_documents(path: pathlib.Path) -> None:
  documents = [{"domain": "prose", "text": f"The abc of {i} is told here: abc. " * 6}
               for i in range(30)]
  documents += [{"domain": "sums", "text": "".join(f"{i}+{j}={i + j}\n" for j in range(30))}
                for i in range(30)]
  path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def pretraining(folder: pathlib.Path, steps: int = 6) -> tuple[str, ...]:
  return ("--experiment=pretrain", "--scale=smoke", f"--out={folder / 'run'}", *(
      f"--set={setting}" for setting in (
          f"train.steps={steps}", "model.d_model=32", "model.mtp=none", "data.seq_len=32",
          f"data.sources={folder / 'text.jsonl'}", "data.heldout_bytes=2000",
          f"data.cache_dir={folder / 'cache'}", "sample_tokens=0",
          f"export={folder / 'exported'}")))


def test_a_run_is_recorded_once_and_its_model_speaks(tmp_path, command, quick_compiles):
  """Training, the same command again, another command on its folder, and text from its model."""
  write_documents(tmp_path / "text.jsonl")
  first = in_a_process(*pretraining(tmp_path))
  assert first.returncode == 0, first.stderr
  folder = tmp_path / "run"
  metrics = (folder / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in metrics.splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert all(0 < row["loss"] < 10 for row in rows)
  results = json.loads((folder / "results.json").read_text())
  assert {"commit", "dirty", "sources", "versions", "command"} <= results["provenance"].keys()
  assert set(results["evaluations"][-1]["bits_per_byte"]) == {"prose", "sums"}
  assert "6 steps" in (folder / "report.md").read_text()

  status, out, err = command(*pretraining(tmp_path))
  assert status == 0 and "is finished, nothing is left to train" in out, err
  assert (folder / "metrics.jsonl").read_text() == metrics

  status, _, err = command(*pretraining(tmp_path, steps=7))
  assert status != 0 and "config.train.steps: 6 in the folder, 7 now" in err
  assert (folder / "metrics.jsonl").read_text() == metrics

  said = [command("--experiment=generate", f"--set=checkpoint={tmp_path / name}",
                  "--set=prompt=abc", "--set=max_new_tokens=4") for name in ("run", "exported")]
  assert all(status == 0 for status, _, _ in said)
  assert said[0][1] == said[1][1] and said[0][1].startswith("abc")
