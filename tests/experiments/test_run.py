"""The command line: what commands do, and the error messages of misuse.

Commands run in the process of the tests, except where the behaviour of a process is tested.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny

import model
from experiments import catalogue, settings
from tests.experiments.here import run_here

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(capsys):
  """Returns a function that runs a command here and returns its exit status, stdout and stderr."""
  return lambda *args: (run_here(*args), *capsys.readouterr())


def run_in_a_process(*args: str) -> subprocess.CompletedProcess:
  # The compiled programs run a few times only, so optimising them costs more than it saves.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  return subprocess.run([sys.executable, "-m", "experiments.run", *args], cwd=ROOT, env=env,
                        capture_output=True, text=True)


@pytest.mark.long("compiles seven forms of nano")
def test_check_model_passes_all_its_checks(command):
  status, out, err = command("--experiment=check_model")
  assert status == 0, err
  assert out.count("\nok  ") == 7
  assert "671,026,404,352 parameters" in out


def test_check_model_passes_all_its_checks_of_a_folder(command, tmp_path):
  cfg = dataclasses.replace(tiny.V3, num_layers=1, num_dense_layers=0, mtp=None)
  model.hf.save(tmp_path / "folder", cfg, tiny.variables(cfg))
  status, out, err = command("--experiment=check_model", f"--set=checkpoint={tmp_path / 'folder'}")
  assert status == 0, err
  assert out.count("ok  ") == 6 and f"{cfg.param_count():,} parameters" in out


def test_list_shows_every_experiment_and_the_cost_of_every_study(command):
  status, out, _ = command("--list")
  assert status == 0
  listed = {line.split()[0] for line in out.splitlines() if line[:3].count(" ") == 2}
  assert listed == set(catalogue.experiments()) >= {"pretrain", "bench_train", "load_balancing"}
  assert "arXiv:2408.15664" in out
  assert "67 runs (9 arms x 3 learning rates + 10 arms x 4 seeds)" in out


def test_the_catalogue_has_every_module_that_defines_an_experiment():
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
    (("--experiment=zzzzzzzz",), "there is no experiment 'zzzzzzzz'. --list shows all"),
    (("--list", "--experiment=chek_model"), "did you mean 'check_model'"),
    (("--experiment=check_model", "extra"), "unexpected argument 'extra'"),
    (("load_balancing", "--list"), "did you mean --experiment=load_balancing?"),
    (("--experiment=load_balancing", "--set=balance.bias_rate=0.1"),
     "--set balance.bias_rate cannot apply to the arm loss_free, which sets balance.bias"),
    (("--experiment=r1_zero", "--set=mesh.fsdp=2"), "did you mean rl.mesh.fsdp"),
    (("--experiment=pretrain", "--out={folder}/study"), "/study holds the study x, where this"),
    (("--experiment=generate", "--set=checkpoint={folder}/study"), "keeps no checkpoints"),
    (("--experiment=evaluate", "--set=checkpoint={folder}/study"), "keeps no checkpoints"),
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
    (("--experiment=pretrain", "--out="), "--out is empty"),
    (("--experiment=pretrain", "--out= "), "--out is empty"),
    (("--experiment=pretrain", "--set=train.steps=99999999999999999999"), "below 2^31"),
    (("--experiment=pretrain", "--set=train.steps=3e9"), "below 2^31"),
    (("--experiment=pretrain", "--set=data.seq_len=4096"), "model.max_seq_len=512: lower"),
    (("--experiment=pretrain", "--set=model=deepseek_v3", "--set=data.seq_len=64"),
     "the training state alone needs"),
    (("--experiment=pretrain", "--set=mesh.fsdp=3"), "mesh.fsdp=3 is a mesh of 3 devices, and"),
    (("--experiment=pretrain", "--set=data.template=shrot"), "did you mean 'short'"),
    (("--experiment=pretrain", "--set=optimizer.schedule=wsd"), "decay_steps=0 must be positive"),
    (("--experiment=pretrain", "--set=extend=true", "--out={folder}/new"), "no run to extend"),
    (("--experiment=pretrain", "--set=data.cache_dir={folder}", "--out={folder}/new",
      "--set=data.sources=Source(path={folder}/one.jsonl)"), "at least two different documents"),
    (("--experiment=pretrain", "--set=data.cache_dir={folder}", "--out={folder}/new",
      "--set=data.sources=Source(path={folder}/null.jsonl)"), "'text' is null"),
    (("--experiment=pretrain", "--set=init="), "init is empty, perhaps from a variable"),
    (("--experiment=pretrain", "--set=data.bpe_vocab_size=1e9"), "at most 4,194,304"),
    (("--experiment=pretrain", "--set=optimizer.decay_steps=-1"), "decay_steps=-1 must be"),
    (("--experiment=pretrain", "--set=optimizer.schedule=wsd", "--set=optimizer.decay_steps=500"),
     "decay_steps=500 must be at most the 40 optimizer steps"),
    (("--experiment=pretrain", "--seeds=" + 5000 * "9"), "--seeds=9999"),
    (("--experiment=r1_zero", "--seeds=" + 5000 * "9"), "--seeds=9999"),
    (("--experiment=r1_zero", "--seeds="), "--seeds= must be a number"),
    (("--experiment=pretrain", "--set=data.sources=Source(path=x, domain='a\x1b[2J')"),
     "Source.domain='a\\x1b[2J' must not have control characters"),
    (("--experiment=evaluate", "--set=checkpoint=x", "--set=samples=1e12"), "ask for fewer"),
    (("--experiment=evaluate", "--set=checkpoint=x", "--set=problems=1e12"), "ask for fewer"),
    (("--experiment=evaluate", "--set=checkpoint=x", "--set=template="), "template is empty"),
    (("--experiment=generate", "--set=seed=-1"), "seed=-1 must lie in 0..2^31 - 1"),
    (("--experiment=bench_seeds", "--set=seeds=1"), "seeds=1 must be at least 2"),
    (("--experiment=r1_zero", "--set=rl.rewards.custom=nomod:x"), "cannot be imported"),
    (("--experiment=r1_zero", "--set=rl.rewards.accuracy=1e300"), "weights add up to 1e+300"),
    (("--experiment=r1_zero", "--set=evaluation.problems=1"), "evaluation.problems=1 must be at"),
    (("--experiment=r1_zero", "--set=evaluation.problems=1e12"), "ask for fewer"),
    (("--experiment=r1_zero", "--set=rl.sampling.max_prompt_length=1e9"), "the model's context"),
    (("--experiment=r1_zero", "--arms=grpo", "--set=rl.objective.gae_lambda=0.9"),
     "rl.objective.gae_lambda would have no effect"),
    (("--experiment=r1_zero", "--set=rl.task=foo"), "there is no task 'foo'. The tasks are"),
    (("--experiment=export",), "--set checkpoint=DIR"),
    (("--experiment=export", "--set=checkpoint=x"), "--set to=DIR"),
    (("--experiment=export", "--set=checkpoint=x", "--set=to=x"), "is the checkpoint itself"),
    (("--experiment=export", "--set=checkpoint=/nowhere", "--set=to=x"), "is not a folder"),
])
def test_misuse_is_reported_in_one_line_without_a_traceback(args, message, tmp_path, command):
  (tmp_path / "study" / "parts").mkdir(parents=True)
  (tmp_path / "study" / "config.json").write_text('{"study": "x", "config": {}, "settings": []}')
  (tmp_path / "one.jsonl").write_text('{"text": "A single document."}\n')
  (tmp_path / "null.jsonl").write_text('{"text": null}\n')
  status, _, err = command(*(arg.format(folder=tmp_path) for arg in args))
  assert status == 2
  assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_all_invalid_settings_are_reported_together(command):
  status, _, err = command("--experiment=pretrain", "--set=model.moe.num_expert=3",
                           "--set=train.steps=abc")
  assert status != 0
  assert "did you mean model.moe.num_experts?" in err
  assert "train.steps" in err and "abc" in err


SLOW = pytest.mark.long("applies every setting of studies and benchmarks")


@pytest.mark.parametrize("name", [
    pytest.param(entry.name, marks=SLOW if entry.kind != "programs" else ())
    for entry in catalogue.experiments().values() if entry.name != "ab"])  # which needs an arm
def test_settings_of_a_wrong_type_are_refused_before_anything_is_written(
    name, tmp_path, command, monkeypatch):
  monkeypatch.chdir(tmp_path)
  configs = list(catalogue.experiments()[name].configs().values())
  for setting, kind, _ in settings.fields(configs[0]) if configs else []:
    if "str" in kind or "Source" in kind or "CustomReward" in kind:
      continue  # any text will do
    status, _, err = command(f"--experiment={name}", f"--set={setting}=?")
    assert status == 2 and err.startswith("error: "), (setting, err)
    assert setting.rpartition(".")[2] in err and "Traceback" not in err, (setting, err)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flag", "message"), [
    ("--experimet=check_model", "Did you mean: experiment"),
    ("--max_minutes=0", "max_minutes"), ("--max_minutes=nan", "finite number of minutes"),
    ("--profile=perhaps", "profile")])
def test_an_invalid_flag_is_reported_in_one_line_like_other_errors(flag, message):
  done = run_in_a_process(flag)
  assert done.returncode == 2 and message in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_is_not_an_error():
  done = run_in_a_process("--help")
  assert done.returncode == 0 and "--experiment" in done.stdout


def test_list_shows_only_the_experiment_that_is_named(command):
  status, out, _ = command("--list", "--experiment=fp8")
  assert status == 0 and "arXiv:2412.19437" in out and "load_balancing" not in out


def write_documents(path: pathlib.Path) -> None:
  documents = [{"domain": "prose", "text": f"Here is the abc of {i}: abc. " * 6}
               for i in range(30)]
  documents += [{"domain": "sums", "text": "".join(f"{i}+{j}={i + j}\n" for j in range(30))}
                for i in range(30)]
  path.write_text("".join(json.dumps(document) + "\n" for document in documents))


MOE = ("model.num_layers=1", "model.num_dense_layers=0")
DENSE = (*MOE, "model.moe=none", "model.rope.layout=half",  # compiles in half the time
         "model.attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16)")


def pretraining(folder: pathlib.Path, steps: int = 6, model: tuple[str, ...] = DENSE,
                ) -> tuple[str, ...]:
  return ("--experiment=pretrain", "--scale=smoke", f"--out={folder / 'run'}", *(
      f"--set={setting}" for setting in (
          *model, f"train.steps={steps}", "model.d_model=32", "model.mtp=none", "data.seq_len=32",
          f"data.sources={folder / 'text.jsonl'}", "data.heldout_bytes=2000",
          f"data.cache_dir={folder / 'cache'}", "sample_tokens=0",
          f"export={folder / 'exported'}")))


def test_a_finished_run_stays_as_it_is_and_its_model_generates_text(
    tmp_path, command):
  """Trains, repeats the command, changes a setting on the same folder, and generates."""
  write_documents(tmp_path / "text.jsonl")
  first = run_in_a_process("--profile", *pretraining(tmp_path, model=MOE))
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
  assert list((folder / "profile").rglob("*.xplane.pb"))

  status, out, err = command(*pretraining(tmp_path, model=MOE))
  assert status == 0 and "is finished, nothing is left to train" in out, err
  assert (folder / "metrics.jsonl").read_text() == metrics

  status, _, err = command(*pretraining(tmp_path, steps=7, model=MOE))
  assert status != 0 and "config.train.steps: 6 in the folder, 7 now" in err
  assert (folder / "metrics.jsonl").read_text() == metrics

  status, out, err = command("--experiment=export", f"--set=checkpoint={folder}",
                             f"--set=to={tmp_path / 'again'}")
  assert status == 0, err
  for path in (tmp_path / "exported").iterdir():
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()

  generated = [command("--experiment=generate", f"--set=checkpoint={tmp_path / name}",
                       "--set=prompt=abc", "--set=max_new_tokens=4")
               for name in ("run", "exported")]
  assert all(status == 0 for status, _, _ in generated)
  assert generated[0][1] == generated[1][1] and generated[0][1].startswith("abc")


def test_every_seed_is_exported_to_a_folder_of_its_own(tmp_path, command):
  write_documents(tmp_path / "text.jsonl")
  status, _, err = command("--seeds=2", *pretraining(tmp_path, steps=2))
  assert status == 0, err
  command("--experiment=export", f"--set=checkpoint={tmp_path / 'run'}",
          f"--set=to={tmp_path / 'again'}")
  weights = [(tmp_path / name / f"seed{seed}" / "model.safetensors").read_bytes()
             for seed in (0, 1) for name in ("exported", "again")]
  assert weights[0] == weights[1] != weights[2] == weights[3]


def test_an_export_that_would_fail_is_refused_before_training(tmp_path, command):
  write_documents(tmp_path / "text.jsonl")
  (tmp_path / "exported").mkdir()
  (tmp_path / "exported" / "thesis.tex").write_text("precious")
  status, _, err = command(*pretraining(tmp_path))
  assert status == 2 and "other files, such as thesis.tex" in err
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_signal_before_the_first_step_ends_the_command_within_seconds(tmp_path):
  write_documents(tmp_path / "text.jsonl")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
                      "JAX_ENABLE_COMPILATION_CACHE": "false"}
  # Compiling nano's step takes much longer than the limit below.
  process = subprocess.Popen(
      [sys.executable, "-m", "experiments.run",
       *pretraining(tmp_path, model=("model=nano", "model.num_layers=12"))],
      cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
  for line in process.stderr:
    if "evaluating" in line or "compiling" in line:
      break
  process.send_signal(signal.SIGINT)
  began = time.monotonic()
  _, err = process.communicate(timeout=60)
  assert time.monotonic() - began < 5
  assert process.returncode == 130 and "nothing to save" in err


def test_a_signal_during_the_imports_ends_the_command_silently():
  # The first module that is imported after the handler is set is absl's.
  process = subprocess.Popen(
      [sys.executable, "-X", "importtime", "-m", "experiments.run", "--list"], cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
  for line in process.stderr:
    if "absl" in line:
      break
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_a_run_resumes_on_other_data_only_if_asked_to(tmp_path, command):
  write_documents(tmp_path / "text.jsonl")
  assert command("--max_minutes=0.01", *pretraining(tmp_path), "--set=train.checkpoint_every=2")[
      0] == 0
  with open(tmp_path / "text.jsonl", "a") as file:
    file.write('{"domain": "prose", "text": "One more document about the abc."}\n')
  status, _, err = command(*pretraining(tmp_path), "--set=train.checkpoint_every=2")
  assert status == 2 and "text.jsonl changed since the run" in err
  settings = ("--set=train.checkpoint_every=2", "--set=accept_changed_data=true")
  status, _, err = command(*pretraining(tmp_path), *settings)
  assert status == 0, err


def test_a_finished_run_is_extended_exactly_under_a_constant_learning_rate(tmp_path, command):
  (tmp_path / "extended").mkdir()
  for folder in (tmp_path, tmp_path / "extended"):
    write_documents(folder / "text.jsonl")
  constant = ("--set=optimizer.schedule=constant", "--set=optimizer.warmup_steps=2")
  wsd = ("--set=optimizer.schedule=wsd", "--set=optimizer.warmup_steps=2",
         "--set=optimizer.decay_steps=2")
  assert command(*pretraining(tmp_path, steps=6), *wsd)[0] == 0
  assert command(*pretraining(tmp_path / "extended", steps=3), *constant)[0] == 0
  status, _, err = command(*pretraining(tmp_path / "extended", steps=6), *wsd)
  assert status == 2 and "config.train.steps: 3 in the folder, 6 now" in err
  status, _, err = command(*pretraining(tmp_path / "extended", steps=6), *wsd, "--set=extend=true")
  assert status == 0 and "changes the schedule" not in err, err
  losses = [[json.loads(line)["loss"] for line in
             (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            for folder in (tmp_path, tmp_path / "extended")]
  assert losses[0] == losses[1] and len(losses[0]) == 6

  # A decayed run can be extended, too, but is told what differs from a longer run.
  status, _, err = command(*pretraining(tmp_path, steps=8), *wsd, "--set=extend=true")
  assert status == 0 and "learning_rate of step 6: 0.0003 as trained, 0.003 in a run of 8" in err
  status, _, err = command(*pretraining(tmp_path, steps=9), *wsd, "--set=extend=true",
                           "--set=data.seq_len=16")
  assert status == 2 and "data.seq_len" in err
