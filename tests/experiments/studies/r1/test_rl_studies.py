"""The RL studies as they are written: arms that exist and differ, metrics that are measured."""

import pathlib
import random

import jax
import jax.numpy as jnp
import pytest

from experiments import catalogue, settings
from experiments.studies.comparing import compare
from experiments.studies.r1 import rl_length
from experiments.studies.rl_metrics import metrics_of_rows
from experiments.studies.rl_runs import RLRuns
from experiments.studies.runs import Task
from experiments.studies.study import Study
from rl import rewards
from rl.objective import SPECS, policy_loss
from rl.tasks import get_task
from rl.templates import get_template

NAMES = [name for name, entry in catalogue.experiments().items()
         if entry.results_folder == f"r1/{name}" and name.startswith("rl_")]
CASES = [(name, scale) for name in NAMES for scale in ("smoke", "cpu", "gpu")]
# As `judged` and `gains` have them; of a run's rows, those of a row with everything in it.
ROW = {"step": 1, "completions/mean_length": 1, "seconds/step": 1, "kl": 1, "entropy": 1,
       "clip_ratio/region": 1, "sampling_gap": 1, "routing_agreement": 1}
OUT = pathlib.Path("study")
METRICS = {"pass@1", "cons@k", "pass@k", "format", "length", "base_length_pays",
           "base_pass@k", "pass@1_gain", "cons@k_gain", "pass@k_gain", "length_gain",
           "harder_pass@k_gain", *metrics_of_rows([ROW, ROW | {"step": 2}])}


def of(name: str) -> Study:
  return catalogue.find(name).load().STUDY


def configs(name, scale) -> dict:
  return {arm.name: settings.apply(of(name).scales[scale].config, arm.settings)
          for arm in of(name).arms}


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_all_arms_can_be_built_and_differ(name, scale):
  built = configs(name, scale)
  assert len(built) == len(of(name).arms) and len(set(built.values())) == len(built)
  rates = of(name).scales[scale].learning_rates
  assert len(set(rates)) >= 3 and sorted(rates) == list(rates)
  runs = RLRuns(of(name).scales[scale].config, built, (), OUT)
  for arm in built:
    cfg = runs.config(Task(arm, rates[0], 3))
    assert (cfg.rl.optimizer.learning_rate, cfg.rl.loop.seed) == (rates[0], 3)


@pytest.mark.parametrize("name", NAMES)
def test_comparisons_are_of_arms_and_metrics_that_exist(name):
  study = of(name)
  names = [arm.name for arm in study.arms]
  assert study.name == name and study.kind is RLRuns and study.baseline in names
  assert len({c.name for c in study.comparisons}) == len(study.comparisons)
  for c in study.comparisons:
    assert c.metric in METRICS
    assert (c.baseline is None) == (c.claim.kind == "threshold")
    for side in filter(None, (c.arm, c.baseline)):
      assert side in names if not side.endswith("*") else (
          c.matched == "sweep" and len([n for n in names if n.startswith(side[:-1])]) > 1)


@pytest.mark.parametrize("name", NAMES)
def test_arms_that_are_compared_begin_with_the_same_base(name):
  """But where the base is the question."""
  runs = RLRuns(of(name).scales["cpu"].config, configs(name, "cpu"), (), OUT)
  paths = {arm.name: runs.base_folder(Task(arm.name, 1e-3, 0)) for arm in of(name).arms}
  if name == "rl_length":
    assert len(set(paths.values())) == 2
    assert all(len({path for arm, path in paths.items() if arm[0] == base}) == 1 for base in "ab")
  else:
    assert len(set(paths.values())) == 1


def test_all_studies_share_the_base_of_the_defaults():
  paths = {RLRuns(of(name).scales["gpu"].config, configs(name, "gpu"), (), OUT).base_folder(
      Task(of(name).baseline, 1e-3, 0)) for name in NAMES}
  assert len(paths) == 1


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_recorded_wherever_its_agreement_is_compared(name):
  built = configs(name, "cpu")
  for c in of(name).comparisons:
    if c.metric == "routing_agreement":
      for arm in filter(None, (c.arm, c.baseline)):
        assert built[arm].rl.objective.routing == "observed"


def test_epsilon_is_of_tokens_and_all_arms_are_off_policy():
  for cfg in configs("rl_clip", "cpu").values():
    assert cfg.rl.objective.spec(32).ratio == "token"
    assert cfg.rl.objective.updates == 16


@pytest.mark.parametrize("name", NAMES)
def test_what_a_learning_rate_moves_by_itself_is_compared_at_one(name):
  for c in of(name).comparisons:
    moved = c.metric in ("kl", "clip_ratio", "routing_agreement", "length_slope", "gap", "entropy")
    assert c.at_one_rate == (moved and c.baseline is not None)


def test_what_is_called_a_guard_does_not_divide_by_an_outputs_length():
  """What a token of a longer output weighs beside a shorter one's: 1 without the artefact."""
  mask, logp = jnp.array([[True] * 2 + [False] * 6, [True] * 8]), jnp.full((2, 8), -1.0)

  def weight(spec):
    gradient = jax.grad(lambda x: policy_loss(x, logp, logp, jnp.ones(2), mask, spec)[0])(logp)
    return float(gradient[1, 0] / gradient[0, 0])

  built = configs("rl_length", "cpu")
  of_arm = {arm: weight(cfg.rl.objective.spec(32).replace(beta=0.0)) for arm, cfg in built.items()}
  for base in "ab":
    assert of_arm[f"{base}_grpo"] == pytest.approx(2 / 8)
    assert of_arm[f"{base}_dapo"] == pytest.approx(1)
  for same in ("grpo_r1", "dr_grpo"):  # so that one guard is enough
    assert weight(SPECS[same].replace(beta=0.0)) == pytest.approx(1)
  assert weight(SPECS["gspo"]) == pytest.approx(2 / 8)


def right_shares(arm: str) -> dict[str, float]:
  """Of all documents, direct and worked, the share that earns the reward; no model in it."""
  cfg = configs("rl_length", "cpu")[arm]
  task, template, rng = get_task(cfg.rl.task), get_template(cfg.rl.template), random.Random(0)
  right = {"direct": [], "worked": [], "all": []}
  for _ in range(4000):
    prompt, completion = task.document(rng, cfg.documents.noise, template)
    answer = str(eval(prompt.split(":")[1].split("\n")[0]))  # of a sum
    value = rewards.accuracy([prompt], [completion], answer=[answer], task=[cfg.rl.task])[0]
    for kind in ("worked" if "=" in completion else "direct", "all"):
      right[kind].append(value)
  return {kind: sum(values) / len(values) for kind, values in right.items()}


def test_worked_documents_are_right_more_often_in_a_and_direct_ones_in_b():
  # 4,000 documents, 1,400 of them worked: a share's standard error is at most 0.013.
  a, b = right_shares("a_grpo"), right_shares("b_grpo")
  assert a["worked"] > a["direct"] + 0.2
  assert b["direct"] > b["worked"] + 0.2
  # Of all, 0.007: four of the difference's, which is sqrt(2) as large.
  assert b["all"] == pytest.approx(a["all"], abs=0.04)


def test_a_and_b_differ_in_what_is_right_not_in_how_much_is_worked_or_malformed():
  built = configs("rl_length", "cpu")
  noise = [built[f"{base}_grpo"].documents.noise for base in "ab"]
  for name in ("direct", "detailed", "malformed"):
    assert getattr(noise[0], name) == getattr(noise[1], name)
  assert built["a_grpo"].documents == rl_length.STUDY.scales["cpu"].config.documents
  assert len({(cfg.rl.objective.group_baseline, cfg.rl.objective.spec(32).beta)
              for cfg in built.values()}) == 1


def test_of_ppos_value_rates_the_one_that_swept_best_is_compared():
  question = next(c for c in of("rl_ppo").comparisons if c.arm and c.baseline == "ppo_1_*")
  at = lambda value: {seed: {"pass@1": value} for seed in (0, 1)}
  compared = {"ppo_1_value1x": at(0.9), "ppo_1_value4x": at(0.5), "ppo_0.95_value1x": at(0.4),
              "ppo_0.95_value4x": at(0.8), "grpo": at(0.6)}
  swept = {"ppo_1_value1x": 0.1, "ppo_1_value4x": 0.2, "ppo_0.95_value1x": 0.3,
           "ppo_0.95_value4x": 0.2, "grpo": 0.9}
  outcome = compare(question, compared, swept)
  assert (outcome["arm"], outcome["baseline"]) == ("ppo_0.95_value1x", "ppo_1_value4x")
  assert outcome["paired"]["mean"] == pytest.approx(0.4 - 0.5)
  assert compare(question, compared, {"ppo_1_value1x": 0.1}) is None
