"""RL runs of a study: shared bases, stopping and resuming, merging and judging."""

import contextlib
import dataclasses
import json
import pathlib
import threading

import pytest

from experiments import settings
from experiments.options import Options
from experiments.studies.r1 import rl_maj_pass
from experiments.studies.rl_evaluation import EvaluationConfig, Evaluator
from experiments.studies.rl_runs import RLRuns
from experiments.studies.runner import Runner, execute
from experiments.studies.runs import Task
from experiments.studies.study import Scale
from rl.loading import load_model
from train.run_folder import MetricsFile, RunFolder

TINY = (
    "base.model.num_layers=1", "base.model.num_dense_layers=0", "base.model.d_model=32",
    "base.model.moe=none", "base.model.mtp=none", "base.model.rope.layout=half",
    "base.model.attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16)",
    "base.train.steps=2", "base.data.heldout_bytes=500", "documents.count=300", "rl.loop.steps=2",
    "rl.loop.eval_problems=2", "rl.loop.eval_samples=2", "evaluation.problems=4",
    "rl.rewards.random=1")  # the only reward that so small a model receives
RATES = (1e-4, 1e-3, 1e-2)


def a_study():
  tiny = settings.apply(rl_maj_pass.STUDY.scales["smoke"].config, TINY)
  scale = Scale(tiny, RATES, seeds=1, minutes=1, hardware="none", extra_rates=0)
  return dataclasses.replace(rl_maj_pass.STUDY, scales={"tiny": scale})


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("cache")


def run_study(cache, folder, **options):
  options = Options("rl_maj_pass", out=folder, settings=(f"base.data.cache_dir={cache}",),
                    **options)
  return execute(a_study(), "tiny", options)


@pytest.fixture(scope="module")
def folder(cache) -> pathlib.Path:
  """A study in which one command ran out of time and then two commands ran one arm each."""
  out = cache / "study"
  judged = run_study(cache, out, arms=("grpo",), max_minutes=1e-9)
  assert judged["comparisons"] == [] and judged["runs"] == []
  for arm in ("grpo", "format_only"):
    run_study(cache, out, arms=(arm,))
  return out


@pytest.fixture(scope="module")
def results(folder) -> dict:
  return json.loads((folder / "results.json").read_text())


def runs_of(results, arm) -> list[dict]:
  return [run for run in results["runs"] if run["arm"] == arm]


def test_the_runs_of_two_commands_are_merged_and_judged(folder, results):
  assert len(list((folder / "parts").iterdir())) == 2
  assert {arm: len(runs_of(results, arm)) for arm in ("grpo", "format_only")} == {
      "grpo": 4, "format_only": 4}
  assert all(run["status"] == "finished" for run in results["runs"])
  assert {c["name"] for c in results["comparisons"]} == {
      c.name for c in rl_maj_pass.STUDY.comparisons}
  assert all(c["paired"]["n"] == 1 for c in results["comparisons"])


def test_all_arms_and_seeds_share_one_base_that_is_trained_once(cache, results):
  assert len(list((cache / "bases").iterdir())) == 1
  (base,) = (cache / "bases").iterdir()
  assert len(list((base / "cost").iterdir())) == 1
  assert [row["step"] for row in MetricsFile(base / "metrics.jsonl").read()] == [1, 2]
  assert {run["base"]["name"] for run in results["runs"]} == {base.name}
  before = {seed: [run["before"] for run in results["runs"] if run["seed"] == seed]
            for seed in (0, 1000)}
  assert all(found == same[0] for same in before.values() for found in same)
  assert len(list(base.glob("evaluation-*.json"))) == 2  # one for each seed


def test_gains_are_metrics_after_rl_minus_metrics_before(results):
  for run in results["runs"]:
    before, after = run["before"]["metrics"], run["after"]["metrics"]
    for name in ("pass@1", "format", "length", "pass@k", "cons@k"):
      assert run["metrics"][f"{name}_gain"] == after[name] - before[name]
    assert run["metrics"]["pass@1"] == after["pass@1"] == run["after"]["pass@K"][0][1]
    assert run["metrics"]["pass@k"] == run["after"]["pass@K"][-1][1]
    assert [k for k, _ in run["after"]["cons@K"]] == [1, 2, 4]


def test_with_one_update_per_rollout_no_token_is_clipped(results):
  assert all(run["metrics"]["max_clip_ratio"] == 0 for run in results["runs"])
  # The policies did change: rounding alone would leave a KL of about (1e-7)^2 nats.
  assert all(run["metrics"]["kl"] > 1e-6 for run in results["runs"]
             if run["learning_rate"] == RATES[-1])


def test_the_report_has_panels_over_steps_and_over_k_and_no_loss_figure(folder, results):
  report = (folder / "report.md").read_text()
  assert "curves.png" in report and "by_k.png" in report and "loss.png" not in report
  steps, by_k = results["panels"]
  assert {"reward (mean of a rollout)", "held-out pass@1", "length (tokens)"} <= set(
      steps["curves"])
  assert set(steps["curves"]["held-out pass@1"]) == {"grpo", "format_only"}
  assert steps["curves"]["held-out pass@1"]["grpo"][0] == [0, 2]
  assert set(by_k["curves"]) == {"pass@K", "maj@K (cons@K in R1)"}
  assert set(by_k["curves"]["pass@K"]) == {"base", "grpo", "format_only"}
  assert by_k["curves"]["pass@K"]["base"][0] == [1, 2, 4]


def test_finished_runs_are_not_run_again(cache, folder):
  rows = {path: path.read_bytes() for path in folder.glob("runs/*/metrics.jsonl")}
  parts = set((folder / "parts").iterdir())
  run_study(cache, folder)
  assert len(rows) == 8 and all(path.read_bytes() == before for path, before in rows.items())
  assert set((folder / "parts").iterdir()) == parts


def test_a_stopped_run_resumes_and_ends_with_the_same_metrics(cache, folder, results, tmp_path):
  base = settings.apply(a_study().scales["tiny"].config, (f"base.data.cache_dir={cache}",))
  arm = settings.apply(base, ("rl.objective.name=grpo",))
  runs = RLRuns(base, {"grpo": arm}, (), tmp_path)
  whole = next(run for run in runs_of(results, "grpo") if run["seed"] == 1000)
  task = Task("grpo", whole["learning_rate"], 1000)
  out = RunFolder(tmp_path / "run")
  # Any step takes longer than this limit, so the run stops after the first.
  assert runs.train([task], out, 1e-9) is None
  assert [row["step"] for row in MetricsFile(out.path / "metrics.jsonl").read()] == [1]
  (found,) = runs.train([task], out, None)
  out.close()
  timed = lambda metrics: metrics | {"seconds_per_step": 0}
  assert timed(found["metrics"]) == timed(whole["metrics"])
  assert found["curves"] == whole["curves"] and found["after"] == whole["after"]


def test_a_run_stops_if_time_runs_out_while_its_base_is_pretrained(cache, folder, tmp_path):
  base = settings.apply(a_study().scales["tiny"].config, (
      f"base.data.cache_dir={tmp_path}", "base.train.checkpoint_every=1"))
  runs = RLRuns(base, {"grpo": base}, (), tmp_path)
  out = RunFolder(tmp_path / "run")
  assert runs.train([Task("grpo", 1e-3, 0)], out, 1e-9) is None
  out.close()
  (made,) = (tmp_path / "bases").iterdir()
  assert not (made / "finished").exists()
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


@contextlib.contextmanager
def held_for_a_moment(path, before_release=lambda: None):
  """Holds the folder as another process would, and releases it after 0.2 s."""
  holder = RunFolder(path)

  def release():
    before_release()
    holder.close()

  timer = threading.Timer(0.2, release)
  timer.start()
  yield
  timer.join()


def test_a_run_waits_for_a_base_that_another_command_is_pretraining(cache, folder, capsys):
  base = settings.apply(a_study().scales["tiny"].config, (f"base.data.cache_dir={cache}",))
  runs, task = RLRuns(base, {"grpo": base}, (), folder), Task("grpo", 1e-3, 0)
  making = runs.base_folder(task) / "making"
  with contextlib.closing(RunFolder(making)):
    assert runs._start(task, 1e-9) is None
  with held_for_a_moment(making):
    assert runs._start(task, None) is not None
  assert f"waiting for another process that uses {making}" in capsys.readouterr().err


def test_a_run_waits_for_an_evaluation_of_its_base_by_another_command(cache, folder):
  base = settings.apply(a_study().scales["tiny"].config, (f"base.data.cache_dir={cache}",))
  runs, task = RLRuns(base, {"grpo": base}, (), folder), Task("grpo", 1e-3, 1000)
  texts = {path: path.read_text() for path in runs.base_folder(task).glob("evaluation-*.json")}
  (path,) = (path for path, text in texts.items() if json.loads(text)["of"]["seed"] == 1000)
  path.unlink()
  cfg = runs.config(task)
  with held_for_a_moment(path.with_suffix(""),
                         before_release=lambda: path.write_text(texts[path])):
    # Without a sampler, this evaluator could not evaluate anything itself.
    found = runs._evaluate_base(Evaluator(cfg.evaluation, None), None, path.parent, cfg)
  assert found == json.loads(texts[path])["found"]


def test_a_study_that_ran_out_of_time_prints_how_to_resume(cache, folder, tmp_path, capsys):
  run_study(cache, tmp_path / "out", max_minutes=1e-9)
  out = capsys.readouterr().out
  assert "stopped and saved; rerun the same command to resume" in out and "runs cost" not in out
  run_study(cache, folder)
  out = capsys.readouterr().out
  assert "stopped" not in out and "8 runs cost" in out


def test_a_folder_refuses_another_configuration_of_its_runs(cache, folder):
  changed = Options("rl_maj_pass", out=folder, settings=(f"base.data.cache_dir={cache}",))
  scale = a_study().scales["tiny"]
  other = dataclasses.replace(scale, config=settings.apply(scale.config, ("rl.loop.steps=3",)))
  with pytest.raises(ValueError, match=r"config\.rl\.loop\.steps: 2 in the folder, 3 now"):
    execute(dataclasses.replace(a_study(), scales={"tiny": other}), "tiny", changed)


# What needs no training.

def a_run(arm, rate, seed, rate_of_success) -> dict:
  return {"arm": arm, "learning_rate": rate, "seed": seed, "status": "finished",
          "metrics": {"pass@1": rate_of_success}}


def test_the_learning_rate_with_the_highest_pass_at_1_is_chosen(tmp_path):
  runner = Runner(a_study(), "tiny", Options("rl_maj_pass", out=tmp_path))
  runs = [a_run("grpo", rate, 1000, value) for rate, value in
          zip(RATES, (0.2, 0.6, 0.3), strict=True)]
  runs += [a_run("format_only", rate, 1000, value) for rate, value in
           zip(RATES, (0.1, None, 0.2), strict=True)]
  runs.append(a_run("grpo", RATES[0], 0, 1.0))  # seeds that are compared do not affect the choice
  known = {Task(run["arm"], run["learning_rate"], run["seed"]): run for run in runs}
  assert runner.best_learning_rates(known) == {"grpo": RATES[1], "format_only": RATES[2]}
  runner.out.close()


def runs_with(*arms, base=()) -> RLRuns:
  scale = settings.apply(a_study().scales["tiny"].config, base)
  return RLRuns(scale, {str(i): settings.apply(scale, arm) for i, arm in enumerate(arms)}, (),
                pathlib.Path("study"))


def test_the_folder_of_a_base_depends_only_on_what_the_base_depends_on():
  runs = runs_with((), ("rl.objective.name=dapo", "rl.loop.steps=9", "evaluation.samples=8"),
                   ("documents.noise.direct=0.5",), ("rl.task=arithmetic:terms=3,digits=1",),
                   ("base.train.steps=3",), ("rl.template=r1",))
  paths = [runs.base_folder(Task(str(i), 1e-3, 0)) for i in range(6)]
  assert paths[0] == paths[1] and len(set(paths)) == 5
  assert runs.base_folder(Task("0", 9.0, 0)) == paths[0]


def test_seeds_share_the_configured_number_of_bases():
  seeds = (0, 1, 2, 1000)
  chosen = lambda bases: [runs_with((), base=(f"bases={bases}",)).base(Task("0", 1e-3, seed)).seed
                          for seed in seeds]
  assert chosen(1) == [0, 0, 0, 0] and chosen(3) == [0, 1, 2, 1]
  assert chosen("none") == [0, 1, 2, 1000]


def test_the_value_models_learning_rate_is_a_multiple_of_the_policys():
  runs = runs_with(("rl.objective.name=ppo", "value_rate_ratio=4"), ())
  assert runs.config(Task("0", 2e-3, 0)).rl.objective.value_learning_rate == 8e-3
  other = runs.config(Task("1", 2e-3, 7)).rl
  assert other.objective.value_learning_rate is None
  assert (other.optimizer.learning_rate, other.loop.seed) == (2e-3, 7)


def test_prompts_that_are_too_long_are_an_error_before_a_base_is_trained(tmp_path):
  base = settings.apply(a_study().scales["tiny"].config, (
      f"base.data.cache_dir={tmp_path}", "rl.sampling.max_prompt_length=1"))
  runs = RLRuns(base, {"grpo": base}, (), tmp_path)
  with pytest.raises(ValueError, match=r"prompt_length=1 is too small: prompts of \S+ have up to "
                                       r"\d+ tokens"):
    runs._start(Task("grpo", 1e-3, 0), None)
  assert not (tmp_path / "bases").exists()


def test_a_reward_that_cannot_be_imported_is_an_error_before_a_base_is_trained(tmp_path):
  base = settings.apply(a_study().scales["tiny"].config, ("rl.rewards.custom=nowhere:brevity",))
  with pytest.raises(ValueError, match="'nowhere' cannot be imported"):
    RLRuns(base, {"grpo": base}, (), tmp_path).prepare()


@pytest.mark.parametrize("setting", [
    "rl.optimizer.learning_rate=1e-3", "rl.loop.seed=4", "base.train.seed=4", "base.init=runs/x",
    "base.data.sources=mine.jsonl", "base.data.template=r1"])
def test_settings_that_an_rl_study_would_overwrite_are_refused(tmp_path, setting):
  options = Options("rl_maj_pass", out=tmp_path / "out", settings=(setting,))
  with pytest.raises(ValueError, match=f"{setting.partition('=')[0]} would have no effect: "):
    Runner(a_study(), "tiny", options)


def test_a_studys_folder_is_no_checkpoint_and_the_runs_inside_are_named(tmp_path):
  (tmp_path / "grpo-seed0" / "checkpoints").mkdir(parents=True)
  (tmp_path / "config.json").write_text('{"study": "r1_zero"}')
  with pytest.raises(ValueError, match=r"is not a run itself: give one of them, .*grpo-seed0$"):
    load_model(tmp_path)
  (tmp_path / "grpo-seed0" / "checkpoints").rmdir()
  (tmp_path / "parts").mkdir()
  with pytest.raises(ValueError, match="keeps no checkpoints of its runs"):
    load_model(tmp_path)


def test_invalid_settings_are_refused_before_anything_runs(tmp_path):
  def run(**options):
    run_study(tmp_path, tmp_path / "out", **options)

  with pytest.raises(ValueError, match="nope does not exist; rl_maj_pass has grpo, format_only"):
    run(arms=("nope",))
  with pytest.raises(ValueError, match=r"did you mean documents\.noise"):
    settings.apply(a_study().scales["tiny"].config, ("documents.noize.direct=0.5",))
  with pytest.raises(ValueError, match="samples=12 must be a power of two"):
    EvaluationConfig(samples=12)
  with pytest.raises(ValueError, match="temperature=0 must be positive"):
    EvaluationConfig(temperature=0)
  assert not (tmp_path / "bases").exists()
