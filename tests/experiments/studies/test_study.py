"""Studies of synthetic runs: choice of learning rates, pairing of seeds, and verdicts."""

import contextlib
import dataclasses
import json
import math

import pytest

import model
from experiments import settings, stats
from experiments.options import Options
from experiments.programs.ab import flops_to_loss
from experiments.stats import Claim
from experiments.studies import runner as studies_runner
from experiments.studies.judging.again import judge_again
from experiments.studies.judging.commands import reproducing_command
from experiments.studies.judging.comparing import compare, corrected, without_another_look
from experiments.studies.runner import Runner, execute
from experiments.studies.runs import Task
from experiments.studies.study import Arm, Comparison, Scale, Study
from experiments.studies.text.text_runs import TextRuns
from experiments.studies.v3 import load_balancing
from train.config import DataConfig, RunConfig, Source

RATES = (1e-3, 2e-3, 4e-3)
CFG = RunConfig(model=model.get_config("nano"))
LOWER = Claim("sign", sign=-1)
WIDE = ("optimizer.beta1=0.8",)  # a setting for every arm; nothing is trained with it


def question(arm, baseline, metric="validation_loss", claim=LOWER, **fields) -> Comparison:
  return Comparison(f"{arm} and {baseline}", metric, arm, baseline, claim, **fields)


def a_study(*comparisons, arms=("plain", "new"), cfg=CFG, sweep_seeds=1, extra_rates=0) -> Study:
  scale = Scale(cfg, RATES, seeds=2, minutes=1, hardware="none", sweep_seeds=sweep_seeds,
                extra_rates=extra_rates)
  return Study("invented", "new is better", "nowhere", tuple(Arm(name, WIDE) for name in arms),
               arms[0], comparisons or (question("new", "plain"),), {"tiny": scale})


def runner(folder, invented=None, **options):
  return Runner(invented or a_study(), "tiny",
                Options(experiment="invented", out=folder, **options))


def a_run(arm, rate, seed, loss, status="finished", **metrics) -> dict:
  """Returns a run as parts record it; a failed run has no metrics."""
  cost = {"device_seconds": 2.0, "flops": 1e9, "tokens": 10, "joules": None}
  run = {"arm": arm, "learning_rate": rate, "seed": seed, "status": status, "cost": cost}
  if status != "finished":
    return run | {"metrics": {}}
  return run | {"metrics": {"validation_loss": loss, **metrics}, "flops": 1e9,
                "curve": [[1, loss + 1], [2, loss]], "validation_curve": [[0, 9.0], [2, loss]]}


def a_sweep(arm, losses, first_seed=1000) -> list[dict]:
  """Returns one run for each learning rate; a loss of None stands for a failed run."""
  return [a_run(arm, rate, first_seed, loss, "finished" if loss else "failed: not finite")
          for rate, loss in zip(RATES, losses, strict=True)]


def write_part(folder, name, runs, device="1 x cpu") -> None:
  parts = folder / "parts"
  parts.mkdir(parents=True, exist_ok=True)
  where = {"commit": "c0ffee", "dirty": False, "versions": {"jax": "0.12"}, "device": device,
           "cpu": "Some CPU", "cores": 2}
  (parts / f"{name}.json").write_text(json.dumps({"provenance": where, "runs": runs}))


# Comparisons.

def seeds(values, metric="validation_loss", **others) -> dict[int, dict]:
  return {seed: {metric: value, **others} for seed, value in values.items()}


def test_arms_are_paired_on_the_seeds_that_both_have():
  compared = {"new": seeds({3: 1.0, 1: 2.0, 7: 100.0}), "plain": seeds({1: 2.5, 2: 50.0, 3: 2.5})}
  outcome = compare(question("new", "plain"), compared)
  assert (outcome["paired"]["n"], outcome["paired"]["same_sign"]) == (2, 2)
  assert outcome["paired"]["mean"] == pytest.approx((1.0 - 2.5 + 2.0 - 2.5) / 2)
  assert outcome["paired"]["std"] == pytest.approx(1 / math.sqrt(2))  # of the differences


def test_a_group_is_represented_by_the_arm_whose_matched_metric_is_closest_to_the_baseline():
  balance = {"loss_1": 0.9, "loss_2": 0.34, "loss_3": 0.1, "other": 0.3}
  compared = {name: seeds({0: 2.0 + i, 1: 2.1 + i}, max_violation=violation)
              for i, (name, violation) in enumerate(balance.items())}
  compared["free"] = seeds({0: 1.0, 1: 1.0}, max_violation=0.3)
  compared["loss_none"] = {}
  outcome = compare(question("loss_*", "free"), compared)
  assert outcome["arm"] == "loss_2"
  assert outcome["paired"]["mean"] == pytest.approx(2.05)
  by_loss = question("loss_*", "free", matched="validation_loss")
  assert compare(by_loss, compared)["arm"] == "loss_1"


@pytest.mark.parametrize(("arm", "compared"), [
    ("new", {"new": {}, "plain": seeds({0: 1.0})}),
    ("new", {"new": seeds({0: 1.0}), "plain": {}}),
    ("new", {"new": seeds({0: 1.0}), "plain": seeds({1: 1.0})}),
    ("group_*", {"group_1": {}, "plain": seeds({0: 1.0}, max_violation=1.0)}),
    ("group_*", {"group_1": seeds({0: 1.0}, max_violation=1.0), "plain": {}}),
])
def test_without_common_seeds_there_is_no_outcome(arm, compared):
  assert compare(question(arm, "plain"), compared) is None


def test_without_a_baseline_the_arms_own_values_are_judged():
  compared = {"new": seeds({0: 0.2, 1: 0.21, 2: 0.22}, "max_violation"), "plain": {}}
  own = lambda **claim: compare(
      question("new", None, "max_violation", Claim("threshold", **claim)), compared)
  assert own(sign=-1, threshold=0.3)["verdict"] == "reproduced"
  assert own(sign=1, threshold=0.3)["verdict"] == "contradicted"
  assert own(sign=-1, threshold=0.21)["verdict"] == "unresolved"
  assert own(sign=-1, threshold=0.3)["paired"]["mean"] == pytest.approx(0.21)
  assert own(sign=-1, threshold=0.3)["baseline"] is None


def test_problems_that_all_seeds_share_widen_the_interval_of_a_metric_that_is_known_for_each():
  compared = {"new": seeds({0: 0.5, 1: 0.6}, "pass@1"), "plain": seeds({0: 0.2, 1: 0.25}, "pass@1")}
  at = lambda *rows: {seed: {"pass@1": list(row)} for seed, row in enumerate(rows)}
  problems = {"new": at((1.0, 0.0), (1.0, 0.2)), "plain": at((0.0, 0.4), (0.0, 0.5))}
  ask = lambda metric, known: compare(
      question("new", "plain", metric, Claim("sign", sign=1)), compared, by_problem=known)
  own, shared = ask("pass@1", {}), ask("pass@1", problems)
  assert "shared_problems" not in own and shared["shared_problems"] == 2
  assert shared["paired"]["mean"] == own["paired"]["mean"] == pytest.approx(0.325)
  differences = [[1.0, -0.4], [1.0, -0.3]]
  assert shared["paired"]["std"]**2 == pytest.approx(
      own["paired"]["std"]**2 + 2 * stats.problem_variance(differences))
  del problems["plain"][1]
  assert ask("pass@1", problems)["paired"] == own["paired"]


def test_groups_matched_by_sweep_are_represented_by_the_arms_that_swept_best():
  compared = {name: seeds({0: value, 1: value + 0.1}) for name, value in {
      "new_1": 1.0, "new_2": 2.0, "old_1": 3.0, "old_2": 4.0}.items()}
  swept = {"new_1": -0.5, "new_2": -0.4, "old_1": -9.0, "old_2": -9.5}
  outcome = compare(question("new_*", "old_*", matched="sweep"), compared, swept)
  assert (outcome["arm"], outcome["baseline"]) == ("new_2", "old_1")
  assert outcome["paired"]["mean"] == pytest.approx(2.0 - 3.0)
  assert compare(question("new_*", "old_*", matched="sweep"), compared, {"new_1": 0.0}) is None


def test_a_comparison_at_one_rate_is_not_judged_if_the_best_rates_differ():
  compared = {"new": seeds({0: 1.0, 1: 1.1}), "plain": seeds({0: 2.0, 1: 2.11})}
  outcome = lambda at_one_rate, **rates: compare(
      question("new", "plain", at_one_rate=at_one_rate), compared, None, rates)
  assert outcome(True, new=1e-3, plain=1e-3)["verdict"] == "reproduced"
  differing = outcome(True, new=1e-3, plain=2e-3)
  assert differing["verdict"] == "unresolved"
  assert "learning rate of new is 0.001, that of plain 0.002" in differing["not_judged"]
  anyway = outcome(False, new=1e-3, plain=2e-3)
  assert anyway["verdict"] == "reproduced" and "not_judged" not in anyway


def test_pairs_that_all_differ_by_the_same_are_determinism_and_are_not_judged():
  compared = {"new": seeds({0: 1.0, 1: 1.5}), "plain": seeds({0: 2.0, 1: 2.5})}
  outcome = compare(question("new", "plain"), compared)
  assert outcome["verdict"] == "unresolved"
  assert "all 2 pairs differ by exactly -1" in outcome["not_judged"]


def test_the_power_of_a_comparison_is_stated_with_the_papers_effect():
  compared = {"new": seeds({0: 1.0, 1: 1.1, 2: 1.3}), "plain": seeds({0: 2.0, 1: 2.3, 2: 2.1})}
  claim = Claim("sign", sign=-1, paper=-0.5)
  known = compare(question("new", "plain", claim=claim), compared)
  unknown = compare(question("new", "plain"), compared)
  (alone,), (first, second) = corrected([known]), corrected([known, unknown])
  assert alone["power"]["effect"] == -0.5 and 0 < alone["power"]["probability"] < 1
  assert first["power"]["probability"] < alone["power"]["probability"]  # one claim of two
  assert alone["power"]["seeds"] > 3 and second["power"] is None


def test_verdicts_are_corrected_for_the_number_of_claims_that_are_judged():
  compared = {"new": seeds({0: 1.9, 1: 2.0, 2: 2.05}), "plain": seeds({0: 2.0, 1: 2.2, 2: 2.2})}
  (alone,) = corrected([compare(question("new", "plain"), compared)])
  assert alone["verdict"] == "reproduced" and 0.025 < alone["p_value"] < 0.05
  several = corrected([compare(question("new", "plain"), compared)] * 2)
  assert [each["verdict"] for each in several] == ["unresolved"] * 2
  assert several[0]["p_value"] == pytest.approx(2 * alone["p_value"])
  assert several[0]["paired"] == alone["paired"]

  barred = compare(question("new", "plain"), compared, at_end=("new",))
  first, second = corrected([compare(question("new", "plain"), compared), barred])
  assert first["verdict"] == "reproduced" and second["p_value"] is None


def test_a_claim_about_every_rate_is_judged_at_the_end_of_a_sweep():
  compared = {"new": seeds({0: 1.0, 1: 1.1}), "plain": seeds({0: 2.0, 1: 2.2})}
  found = compare(question("new", "plain", any_rate=True), compared, at_end=("new", "plain"))
  assert "not_judged" not in found


def test_a_claim_that_a_metric_does_not_rise_is_not_judged_without_room_to_rise():
  no_rise = Claim("threshold", sign=-1, threshold=0.02)
  outcome = lambda before: compare(
      question("new", None, "gain", no_rise, room=("before", 0.98)),
      {"new": {seed: {"gain": 0.0 + 0.001 * seed, "before": before} for seed in range(3)}})
  assert outcome(0.9)["verdict"] == "reproduced" and "not_judged" not in outcome(0.9)
  assert outcome(0.99)["verdict"] == "unresolved"
  assert outcome(0.99)["not_judged"].endswith("before is 0.99, not below 0.98")


# Learning rates.

def test_a_sweep_of_fewer_than_three_learning_rates_is_refused():
  with pytest.raises(ValueError, match="at least three learning rates"):
    Scale(CFG, RATES[:2], seeds=2, minutes=1, hardware="none")


def best(folder, runs, sweep_seeds=1) -> dict[str, float]:
  known = {Task(run["arm"], run["learning_rate"], run["seed"]): run for run in runs}
  invented = a_study(sweep_seeds=sweep_seeds)
  return runner(folder, invented).best_learning_rates(known)


def test_every_arm_gets_the_learning_rate_with_its_lowest_validation_loss(tmp_path):
  runs = a_sweep("plain", (3.0, 2.0, 2.5)) + a_sweep("new", (1.0, 2.0, 3.0))
  runs.append(a_run("plain", RATES[2], 0, 0.1))  # seeds that are compared do not affect the choice
  assert best(tmp_path, runs) == {"plain": RATES[1], "new": RATES[0]}


def test_with_one_rate_only_the_baseline_is_swept_and_all_arms_use_its_best(tmp_path):
  invented = dataclasses.replace(a_study(), one_rate=True)
  assert "3 learning rates + 3 arms x 2 seeds" in invented.cost("tiny")  # one of them again
  assert "3 learning rates + 2 arms x 1 seed)" in invented.cost("tiny", num_seeds=1)
  trained = []
  losses = dict(zip(RATES, (3.0, 2.0, 2.5), strict=True))

  class Invented(TextRuns):

    def prepare(self):
      pass

    def program(self, task):
      return task

    def train(self, tasks, folder, max_seconds):
      trained.extend(tasks)
      return [{"metrics": {"validation_loss": losses[task.learning_rate]}} for task in tasks]

  assert runner(tmp_path, dataclasses.replace(invented, kind=Invented), arms=("new",)).run()
  assert trained == [Task("plain", rate, 1000) for rate in RATES] + [
      Task("new", RATES[1], seed) for seed in range(2)]


def test_an_unfinished_sweep_chooses_no_learning_rate(tmp_path):
  assert best(tmp_path, a_sweep("plain", (3.0, 2.0, 2.5))[:2]) == {}


def test_the_learning_rate_of_a_failed_run_is_not_chosen(tmp_path):
  assert best(tmp_path, a_sweep("plain", (None, 2.0, 2.5))) == {"plain": RATES[1]}


def test_the_learning_rate_of_a_run_whose_loss_is_not_finite_is_not_chosen(tmp_path):
  assert best(tmp_path, a_sweep("plain", (math.nan, 2.0, 2.5))) == {"plain": RATES[1]}


def test_a_sweep_of_several_seeds_chooses_by_their_mean_and_needs_all_of_them(tmp_path):
  runs = a_sweep("plain", (1.0, 2.0, 3.0)) + a_sweep("plain", (5.0, 2.0, 3.0), first_seed=1001)
  assert best(tmp_path / "whole", runs, sweep_seeds=2) == {"plain": RATES[1]}
  assert best(tmp_path / "half", runs[:3], sweep_seeds=2) == {}


# Several invocations.

def fill(folder, rate=RATES[1]) -> None:
  """Writes four parts: two sweeps, and compared seeds, one failed and one at another rate.

  The arm "new" has its best loss at `rate`, one of the first two.
  """
  write_part(folder, "1", a_sweep("plain", (3.0, 2.0, 2.5)))
  write_part(folder, "2", a_sweep(
      "new", (2.9, None, 3.0) if rate == RATES[0] else (None, 2.9, 3.0)))
  write_part(folder, "3", [
      a_run(arm, RATES[1], seed, 2.0 + 0.1 * seed + change * seed, max_violation=0.5)
      for arm, change in (("plain", 0), ("plain_again", 0.01)) for seed in range(4)])
  new = [a_run("new", rate, 0, 1.9, max_violation=0.1),
         a_run("new", rate, 1, 1.99, max_violation=0.9),
         a_run("new", rate, 2, 2.11, max_violation=0.3),
         a_run("new", rate, 3, 0, "failed: not finite"),
         a_run("new", RATES[2], 4, 100.0, max_violation=100.0)]
  write_part(folder, "4", new, device="1 x gpu")


COMPARISONS = (
    question("new", "plain"), question("new", "plain", claim=Claim("sign", sign=1)),
    question("new", "plain", claim=Claim("equivalent", margin=0.2)),
    question("new", "plain", "max_violation"),
    question("new", None, claim=Claim("threshold", sign=-1, threshold=3.0)))


def test_the_parts_of_several_invocations_are_merged_and_judged(tmp_path, capsys):
  fill(tmp_path)
  judged = runner(tmp_path, a_study(
      *COMPARISONS, question("absent", "plain"), arms=("plain", "new", "absent")),
                  arms=("plain", "new")).judge()
  assert [c["verdict"] for c in judged["comparisons"]] == [
      "reproduced", "contradicted", "reproduced", "unresolved", "reproduced"]
  pair = judged["comparisons"][0]["paired"]
  assert pair["n"] == 3 and pair["mean"] == pytest.approx(-0.1)
  assert judged["noise"]["validation_loss"] == pytest.approx(math.sqrt(0.05 / 3))
  assert [arm["best learning rate"] for arm in judged["arms"]] == [
      "0.002", "0.002", "0.002"]
  assert judged["again"]["validation_loss"]["std"] == pytest.approx(0.01 * math.sqrt(5 / 3))
  assert judged["again"]["max_violation"] == {"std": 0, "n": 4}
  assert judged["total_cost"] == {
      "device_seconds": 38.0, "flops": 19e9, "tokens": 190, "joules": None}
  where = judged["provenance"]
  assert (where["commit"], where["device"]) == ("c0ffee", {"several": ["1 x cpu", "1 x gpu"]})
  (losses,) = judged["panels"]
  assert losses["first"][0] == "plain" and set(losses["curves"]) == {"new"}
  assert set(judged["outcomes"]["validation_loss"]) == {"plain", "new"}
  assert json.loads((tmp_path / "results.json").read_text()) == judged
  text = (tmp_path / "report.md").read_text()
  assert "3 reproduced, 1 contradicted, 1 unresolved" in text
  assert "2 of 19" in text and "failed: not finite" in text
  assert "0.013" in text and "0, deterministic" in text
  again = ("python -m experiments.run --experiment=invented --scale=tiny --arms=plain,new "
           "--seeds=5:8 --out=runs/invented-tiny-from-seed5")
  assert judged["confirmed_by"] == again and again in text
  assert "on 3 seeds, minimum detectable effect 0.031; paper: no value; A/A: 0.013" in (
      capsys.readouterr().out)


def test_the_arm_that_repeats_the_baseline_starts_one_rounding_away_at_its_rate(tmp_path):
  fill(tmp_path)
  made = runner(tmp_path, seeds="5")
  task = made._compared(made.best_learning_rates(made.finished()))[-1]
  assert (task.arm, task.learning_rate, task.seed) == ("plain_again", RATES[1], 4)
  plain, again = (made.runs.configs[arm] for arm in ("plain", "plain_again"))
  assert again == dataclasses.replace(plain, train=dataclasses.replace(plain.train, nudge=True))
  assert not runner(tmp_path / "one", seeds="1").repeats
  assert not runner(tmp_path / "new", arms=("new",)).repeats


def test_there_is_no_verdict_before_all_seeds_that_a_command_asks_for_have_run(tmp_path):
  fill(tmp_path)
  early = runner(tmp_path, seeds="5").judge()["comparisons"][0]
  assert early["verdict"] == "unresolved" and early["paired"]["n"] == 3
  # Of the seed 4 of both arms and of the baseline again.
  assert early["not_judged"] == "3 of the runs are missing"


def test_no_claim_is_judged_while_another_arm_of_the_command_has_not_run(tmp_path):
  fill(tmp_path)
  invented = a_study(question("new", "plain"), question("late", "plain"),
                     arms=("plain", "new", "late"))
  found, = runner(tmp_path, invented, seeds="4").judge()["comparisons"]
  assert found["verdict"] == "unresolved" and found["not_judged"].endswith("runs are missing")


def test_seeds_that_another_arm_has_not_run_are_missing_too(tmp_path):
  fill(tmp_path)
  write_part(tmp_path, "5", [a_run("new", RATES[1], seed, 1.9, max_violation=0.1)
                             for seed in (4, 5)])
  found, = runner(tmp_path, a_study(question("new", "plain")), arms=("new",),
                  seeds="6").judge()["comparisons"]
  assert found["not_judged"] == "2 of the runs are missing"


def test_many_failed_seeds_bar_a_verdict_and_few_do_not(tmp_path):
  fill(tmp_path)  # one of four failed
  judged = runner(tmp_path, a_study(question("new", "plain")))
  (found,) = judged.outcome()["comparisons"]
  assert found["verdict"] == "reproduced" and found["paired"]["n"] == 3
  write_part(tmp_path, "5", [a_run(arm, RATES[1], seed, 1.0, status)
                             for seed in (4, 5) for arm, status in (
                                 ("plain", "finished"), ("new", "failed: not finite"))])
  (found,) = judged.outcome()["comparisons"]
  assert found["verdict"] == "unresolved" and found["not_judged"].startswith("3 of 6 seeds failed")


def test_there_is_no_second_verdict_on_more_seeds(tmp_path):
  fill(tmp_path)

  def verdict():
    made = runner(tmp_path, seeds="3")
    with contextlib.closing(made.out):
      return made.judge()["comparisons"][0]

  assert verdict()["verdict"] == "reproduced" and verdict()["verdict"] == "reproduced"
  write_part(tmp_path, "5", [a_run(arm, RATES[1], 5, 1.0, max_violation=0.1)
                             for arm in ("plain", "new")])
  for _ in range(2):  # it is refused every time
    again = verdict()
    assert again["verdict"] == "unresolved" and again["paired"]["n"] == 4
    assert again["not_judged"].startswith("a verdict was given on 3 seeds, and one on 4 would be")


def test_a_verdict_on_one_seed_is_no_look():
  outcome = {"name": "it", "paired": {"n": 1}, "claim": {"single_run": False},
             "verdict": "unresolved"}
  (first,) = without_another_look([outcome], [], [])
  (second,) = without_another_look([outcome | {"paired": {"n": 8}}], [first], [])
  assert first["seen"] == 0 and second["seen"] == 8 and "not_judged" not in second


def test_committed_runs_are_judged_again_at_the_rates_that_their_sweep_reached(tmp_path):
  fill(tmp_path, RATES[0])
  write_part(tmp_path, "6", [a_run("new", 5e-4, 1000, 2.8), a_run("new", 2.5e-4, 1000, 2.85)])
  write_part(tmp_path, "7", [a_run("new", 5e-4, seed, 1.9 + 0.11 * seed, max_violation=0.1)
                             for seed in range(4)])
  invented = a_study(question("new", "plain"), extra_rates=2)
  made = runner(tmp_path, invented, seeds="4")
  before = made.judge()
  made.out.close()
  assert before["best_learning_rates"]["new"] == 5e-4
  assert before["comparisons"][0]["verdict"] == "reproduced"
  # Today the arm has other settings, and there is one more.
  changed = dataclasses.replace(
      invented, arms=(invented.arms[0], Arm("new", ()), Arm("later", ())))
  after = judge_again(changed, tmp_path, before["provenance"])
  assert after["comparisons"] == before["comparisons"]
  assert after["definition"] == before["definition"]  # that of the arms that were trained
  with pytest.raises(ValueError, match="has no scale 'tiny' any more"):
    judge_again(dataclasses.replace(invented, scales={}), tmp_path, before["provenance"])


def test_a_pilot_gives_the_power_of_the_seeds_that_are_planned_and_no_verdict(tmp_path):
  fill(tmp_path)
  write_part(tmp_path, "5", [
      a_run(arm, RATES[1], seed, 2.0 + 0.1 * seed * (arm == "new") - 90 * (arm == "new"))
      for arm in ("plain", "new") for seed in range(900, 904)])
  claim = Claim("sign", sign=-1, paper=-1.0)
  made = runner(tmp_path, a_study(question("new", "plain", claim=claim)), seeds="900:904")
  (found,) = made.judge()["comparisons"]
  assert found["paired"]["n"] == 4 and "pilot seeds are never judged" in found["not_judged"]
  assert found["power"] == stats.power(claim, found["paired"]["std"], 2)._asdict()
  made.out.close()
  judged = runner(tmp_path, a_study(question("new", "plain", claim=claim))).judge()
  assert judged["comparisons"][0]["paired"]["n"] == 3  # without those of the pilot
  with pytest.raises(ValueError, match="seeds from 900 on are for pilots"):
    runner(tmp_path / "mixed", seeds="898:902")


def test_nothing_is_trained_if_no_run_is_missing(tmp_path):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
  data = DataConfig(sources=(Source(str(text)),), tokenizer="bytes", seq_len=16,
                    cache_dir=str(tmp_path / "cache"))
  folder = tmp_path / "study"
  fill(folder)
  options = Options(experiment="invented", out=folder, seeds="0:3")
  invented = a_study(cfg=RunConfig(model=CFG.model, data=data))
  judged = execute(invented, "tiny", options)
  assert len(judged["runs"]) == 19
  assert not (folder / "runs").exists()
  assert len(list((folder / "parts").iterdir())) == 4


def test_a_seed_whose_loss_is_not_finite_is_left_out_and_the_others_are_judged(tmp_path):
  fill(tmp_path)
  write_part(tmp_path, "5", [a_run("new", RATES[1], 3, math.inf, max_violation=0.1)])
  judged = runner(tmp_path, a_study(*COMPARISONS)).judge()
  assert judged["comparisons"][0]["paired"]["n"] == 3


def test_a_best_rate_at_an_end_extends_the_sweep_and_bars_verdicts_until_it_is_inside(tmp_path):
  fill(tmp_path, RATES[0])
  fixed = runner(tmp_path, a_study(question("new", "plain")))
  (outcome,) = fixed.judge()["comparisons"]
  assert outcome["verdict"] == "unresolved"
  assert outcome["not_judged"] == "the best learning rate of an arm is at an end of its sweep"
  assert fixed.outcome()["arms"][1]["best learning rate"] == "0.001 (at the edge of the sweep)"
  fixed.out.close()

  extended = runner(tmp_path, a_study(question("new", "plain"), extra_rates=2))
  rates = lambda: [task.learning_rate for task in extended._sweep(extended.finished())
                   if task.arm == "new"]
  assert rates() == [5e-4, *RATES]
  assert extended.missing()[0] == "new-lr0.0005-seed1000"
  assert extended.best_learning_rates(extended.finished()) == {"plain": RATES[1]}
  write_part(tmp_path, "6", [a_run("new", 5e-4, 1000, 2.8)])
  assert rates() == [2.5e-4, 5e-4, *RATES]
  write_part(tmp_path, "7", [a_run("new", 2.5e-4, 1000, 2.85)])
  assert rates() == [2.5e-4, 5e-4, *RATES]
  assert extended.best_learning_rates(extended.finished()) == {"plain": RATES[1], "new": 5e-4}


def test_a_smoke_run_extends_no_sweep_and_gives_no_verdict(tmp_path):
  fill(tmp_path, RATES[0])
  study = a_study(question("new", "plain"), extra_rates=3)
  study = dataclasses.replace(study, scales={"smoke": study.scales["tiny"]})
  small = Runner(study, "smoke", Options(experiment="invented", out=tmp_path))
  assert len(small._sweep(small.finished())) == 2 * len(RATES)
  (outcome,) = small.judge()["comparisons"]
  assert outcome["verdict"] == "unresolved" and "smoke run" in outcome["not_judged"]


def test_the_report_and_the_output_say_why_a_comparison_was_not_judged(tmp_path, capsys):
  fill(tmp_path, RATES[0])
  judged = runner(tmp_path, a_study(question("new", "plain", at_one_rate=True))).judge()
  assert judged["comparisons"][0]["verdict"] == "unresolved"
  why = "learning rate of new is 0.001, that of plain 0.002"
  assert why in (tmp_path / "report.md").read_text() and why in capsys.readouterr().out


def one_seed(folder) -> None:
  write_part(folder, "1", a_sweep("plain", (3.0, 2.0, 2.5)) + a_sweep("new", (3.0, 2.0, 2.5)))
  write_part(folder, "2", [a_run("plain", RATES[1], 0, 2.0), a_run("new", RATES[1], 0, 1.0)])


def test_a_single_seed_leaves_a_comparison_unresolved(tmp_path):
  one_seed(tmp_path)
  judged = runner(tmp_path).judge()
  assert [c["verdict"] for c in judged["comparisons"]] == ["unresolved"]


def test_results_are_strict_json_even_if_an_interval_is_infinite(tmp_path):
  one_seed(tmp_path)
  runner(tmp_path).judge()

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)


def test_without_runs_nothing_is_compared_and_the_report_says_that_no_sweep_is_finished(tmp_path):
  judged = runner(tmp_path).judge()
  assert judged["comparisons"] == [] and judged["noise"] == {}
  assert "sweep not finished" in (tmp_path / "report.md").read_text()


# Definitions.

def test_a_folder_refuses_another_definition_of_its_study(tmp_path):
  first = runner(tmp_path)
  write_part(tmp_path, "1", [a_run("plain", 0.1, 0, 1.0)])
  first.out.close()
  other = a_study(question("new", "plain", claim=Claim("sign", sign=1)))
  with pytest.raises(ValueError, match=r"definition\.claims\.0"):
    runner(tmp_path, other)


def test_a_study_without_finished_runs_does_not_claim_its_folder(tmp_path):
  runner(tmp_path / "study").out.close()
  assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"runs": 3}', b'{"provenance": {}, "runs": 3}',
    b'{"provenance": {}, "runs": [3]}', b'{"provenance": {}, "runs": [{"arm": 1}]}',
    b'{"runs": []}'])
def test_a_damaged_part_is_an_error_that_names_the_file(tmp_path, content):
  study = runner(tmp_path)
  (tmp_path / "parts" / "7.json").write_bytes(content)
  with pytest.raises(ValueError, match=r"parts/7\.json .*restore it from a copy, or delete it"):
    study.outcome()
  study.out.close()


def test_a_definition_has_what_decides_the_outcome_but_not_the_wording():
  same = a_study(dataclasses.replace(question("new", "plain"), name="other words", paper="more"))
  assert same.definition("tiny") == a_study().definition("tiny")
  for changed in (a_study(question("new", "plain", "other_metric")),
                  a_study(question("new", "plain", claim=Claim("sign", sign=-1, margin=0.1))),
                  a_study(arms=("plain", "new", "newer"))):
    assert changed.definition("tiny") != a_study().definition("tiny")


def test_a_folder_of_an_earlier_version_is_resumed(tmp_path):
  """It recorded the arms, with its own setting names, and a source hash, but no definition."""
  arms = {"plain": ["optimizer.clip=2"], "new": ["balance.bias_share=1"]}
  (tmp_path / "config.json").write_text(json.dumps({
      "study": "invented", "scale": "tiny", "settings": ["data.heldout_share=0.1"], "arms": arms,
      "source_hash": "abc"}))
  invented = dataclasses.replace(a_study(), arms=(
      Arm("plain", ("optimizer.max_grad_norm=2",)), Arm("new", ("balance.bias_fraction=1",))))
  runner(tmp_path, invented, settings=("data.heldout_fraction=0.1",)).out.close()
  with pytest.raises(ValueError, match=r"definition\.arms\.new\.0"):
    runner(tmp_path, a_study(), settings=("data.heldout_fraction=0.1",))


def test_unknown_arms_and_scales_are_refused(tmp_path):
  with pytest.raises(ValueError, match="nope does not exist; invented has plain, new"):
    runner(tmp_path, arms=("nope",))
  with pytest.raises(ValueError, match="--scale=big does not exist for invented; there are tiny"):
    studies_runner.main(a_study(), Options(experiment="invented", out=tmp_path, scale="big"))


@pytest.mark.parametrize("scale", load_balancing.STUDY.scales)
def test_the_arms_of_load_balancing_have_distinct_configurations_of_the_same_size(scale):
  base = load_balancing.STUDY.scales[scale].config
  configs = [settings.apply(base, arm.settings) for arm in load_balancing.STUDY.arms]
  assert len(set(configs)) == len(configs)
  assert len({cfg.model.active_param_count() for cfg in configs}) == 1


def test_the_comparisons_of_load_balancing_refer_to_existing_arms_and_metrics():
  names = [arm.name for arm in load_balancing.STUDY.arms]
  metrics = {"validation_loss", "bits_per_byte", "max_violation", "specialisation"}
  assert load_balancing.STUDY.baseline in names and len(set(names)) == len(names)
  for c in load_balancing.STUDY.comparisons:
    assert {c.metric, c.matched} <= metrics
    assert c.baseline is None or c.baseline in names
    assert (c.baseline is None) == (c.claim.kind == "threshold")
    matching = [name for name in names if name.startswith(c.arm[:-1])]
    assert len(matching) > 1 if c.arm.endswith("*") else c.arm in names


# Settings without effect.

@pytest.mark.parametrize(("setting", "message"), [
    ("optimizer.learning_rate=0.1", "invented sweeps the learning rate of every arm over 0.001, "),
    ("optimizer=OptimizerConfig(learning_rate=0.1)", "invented sweeps the learning rate"),
    ("train.seed=3", "every run has its own seed: give --seeds"),
    ("init=runs/mine", "start from random weights"),
    ("optimizer.beta1=0.7", "cannot apply to the arm plain, which sets optimizer.beta1=0.8")])
def test_settings_that_a_study_would_overwrite_are_refused(tmp_path, setting, message):
  with pytest.raises(ValueError) as raised:
    runner(tmp_path / "out", settings=(setting,))
  assert message in str(raised.value) and not (tmp_path / "out").exists()


def test_without_a_sweep_the_learning_rate_can_be_set(tmp_path):
  invented = a_study()
  scale = dataclasses.replace(invented.scales["tiny"], learning_rates=())
  invented = dataclasses.replace(invented, scales={"tiny": scale})
  made = runner(tmp_path, invented, settings=("optimizer.learning_rate=0.1",))
  assert {cfg.optimizer.learning_rate for cfg in made.runs.configs.values()} == {0.1}


def test_arms_that_do_not_run_do_not_restrict_the_settings(tmp_path):
  invented = dataclasses.replace(a_study(), arms=(Arm("plain"), Arm("new", WIDE)))
  made = runner(tmp_path, invented, settings=("optimizer.beta1=0.7",), arms=("plain",))
  assert made.runs.configs["plain"].optimizer.beta1 == 0.7


def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path):
  (tmp_path / "config.json").write_text('{"config": {"train": {"steps": 3}}, "seeds": [0]}')
  with pytest.raises(ValueError) as raised:
    runner(tmp_path)
  assert str(raised.value) == (f"{tmp_path} holds a training run, where this command would write "
                               "the study invented: give another --out")


# What is missing, and what reproduces the rest.

def test_missing_runs_are_those_that_the_command_asks_for_and_no_part_has(tmp_path):
  assert runner(tmp_path / "empty", arms=("plain",)).missing() == [
      "plain-lr0.001-seed1000", "plain-lr0.002-seed1000", "plain-lr0.004-seed1000",
      "plain-seed0", "plain-seed1", "plain_again-seed0", "plain_again-seed1"]
  fill(tmp_path / "full")
  made = runner(tmp_path / "full", seeds="6")
  assert made.missing() == ["plain-lr0.002-seed4", "plain-lr0.002-seed5", "new-lr0.002-seed4",
                            "new-lr0.002-seed5", "plain_again-lr0.002-seed4",
                            "plain_again-lr0.002-seed5"]
  made.out.close()
  assert runner(tmp_path / "full").missing() == []


def test_a_report_says_how_many_runs_are_missing(tmp_path):
  write_part(tmp_path, "1", a_sweep("plain", (3.0, 2.0, 2.5)))
  runner(tmp_path, arms=("plain",)).judge()
  assert "**Not finished**: 4 of the runs" in (tmp_path / "report.md").read_text()


def test_an_arm_that_failed_at_every_learning_rate_is_not_missing(tmp_path):
  write_part(tmp_path, "1", a_sweep("plain", (None, None, None)))
  assert runner(tmp_path, arms=("plain",)).missing() == []


def test_the_command_of_a_result_reproduces_all_of_its_arms_and_seeds(tmp_path):
  fill(tmp_path)
  judged = runner(tmp_path, arms=("plain",), seeds="1").judge()
  assert judged["confirmed_by"] is None
  base = "python -m experiments.run --experiment=invented --scale=tiny"
  assert judged["provenance"]["command"] == (
      f"{base} --arms=plain --seeds=4 && {base} --arms=new --seeds=5")
  assert f"```bash\n{base} --arms=plain --seeds=4 && \\\n" in (tmp_path / "report.md").read_text()


def test_a_result_of_the_default_arms_and_seeds_needs_neither_flag(tmp_path):
  options = Options("invented", settings=("data.sources=my text.jsonl",))
  command = lambda **seeds: reproducing_command(a_study(), "tiny", options, seeds)
  base = ("python -m experiments.run --experiment=invented --scale=tiny "
          "--set 'data.sources=my text.jsonl'")
  assert command(plain=[1, 0], new=[0, 1]) == base == command()
  assert command(plain=[0, 1, 5], new=[0, 1, 5]) == f"{base} && {base} --seeds=5:6"


def test_the_seeds_of_a_sweep_are_not_among_the_results_of_an_arm(tmp_path):
  one_seed(tmp_path)
  runner(tmp_path).judge()
  text = (tmp_path / "report.md").read_text()
  arms, _, sweep = text.partition("## Sweep of the learning rates")
  assert "| plain | 0.002 | 0 | 2 |" in arms and "1000" not in arms
  assert "| plain | 0.002 | 1000 | 2 |" in sweep


def test_a_report_lists_only_the_arms_that_were_asked_for_or_ran(tmp_path):
  write_part(tmp_path, "1", a_sweep("plain", (3.0, 2.0, 2.5)))
  invented = a_study(arms=("plain", "new", "absent"))
  judged = runner(tmp_path, invented, arms=("new",)).judge()
  assert [arm["name"] for arm in judged["arms"]] == ["plain", "new"]


# FLOPs needed to reach a loss.

@pytest.mark.parametrize(("target", "steps"), [
    (3.0, 10), (3.5, 5), (2.5, 20), (2.0, 30), (1.9, None), (1.0, None)])
def test_flops_to_a_loss_are_interpolated_linearly_between_evaluations(target, steps):
  curve = [[0, 4.0], [10, 3.0], [30, 2.0], [40, 2.4]]
  flops = flops_to_loss(curve, 4e6, target)
  assert flops is None if steps is None else flops == pytest.approx(steps * 1e5)


def test_flops_to_a_loss_count_until_it_is_first_reached():
  assert flops_to_loss([[0, 4.0], [10, 2.0], [20, 5.0], [30, 1.0]], 3e6, 3.0) == pytest.approx(5e5)
