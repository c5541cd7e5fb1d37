"""Definitions of the RL studies: distinct arms, and comparisons of existing arms and metrics."""

import functools
import pathlib
import random

import jax
import jax.numpy as jnp
import pytest

from experiments import catalogue, settings
from experiments.studies.judging.comparing import compare
from experiments.studies.r1 import rl_length
from experiments.studies.rl_metrics import metrics_of_rows
from experiments.studies.rl_runs import RLRuns
from experiments.studies.runs import Task
from experiments.studies.study import Study
from rl import rewards
from rl.objective import SPECS, policy_loss
from rl.tasks import get_task
from train.templates import get_template

NAMES = [name for name, entry in catalogue.experiments().items()
         if entry.results_folder == f"r1/{name}" and name.startswith("rl_")]
CASES = [(name, scale) for name in NAMES for scale in ("smoke", "cpu", "gpu")]
# A row with every column that metrics are computed from.
ROW = {"step": 1, "completions/mean_length": 1, "seconds/step": 1, "kl": 1, "entropy": 1,
       "clip_ratio/region": 1, "sampling_gap": 1, "routing_agreement": 1}
OUT = pathlib.Path("study")
# What evaluations, `gains` and `metrics_of_rows` produce.
METRICS = {"pass@1", "cons@k", "pass@k", "format", "length", "base_length_pays",
           "base_pass@k", "pass@1_gain", "cons@k_gain", "pass@k_gain", "length_gain",
           "harder_pass@k_gain", *metrics_of_rows([ROW, ROW | {"step": 2}])}


def study_of(name: str) -> Study:
  return catalogue.find(name).load().STUDY


@functools.cache
def configs(name, scale) -> dict:
  return {arm.name: settings.apply(study_of(name).scales[scale].config, arm.settings)
          for arm in study_of(name).arms}


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_arms_have_distinct_configurations_and_take_their_tasks_learning_rate_and_seed(name, scale):
  built = configs(name, scale)
  assert len(built) == len(study_of(name).arms) and len(set(built.values())) == len(built)
  rates = study_of(name).scales[scale].learning_rates
  assert len(set(rates)) >= 3 and sorted(rates) == list(rates)
  runs = RLRuns(study_of(name).scales[scale].config, built, (), OUT)
  for arm in built:
    cfg = runs.config(Task(arm, rates[0], 3))
    assert (cfg.rl.optimizer.learning_rate, cfg.rl.loop.seed) == (rates[0], 3)


@pytest.mark.parametrize("name", NAMES)
def test_comparisons_refer_to_existing_arms_and_metrics(name):
  study = study_of(name)
  names = [arm.name for arm in study.arms]
  assert study.name == name and study.kind is RLRuns and study.baseline in names
  assert len({c.name for c in study.comparisons}) == len(study.comparisons)
  for c in study.comparisons:
    assert c.metric in METRICS
    assert (c.baseline is None) == (c.claim.kind == "threshold")
    for arm in filter(None, (c.arm, c.baseline)):
      assert arm in names if not arm.endswith("*") else (
          c.matched == "sweep" and len([n for n in names if n.startswith(arm[:-1])]) > 1)


@pytest.mark.parametrize("name", NAMES)
def test_all_arms_start_from_one_base_except_where_bases_are_compared(name):
  runs = RLRuns(study_of(name).scales["cpu"].config, configs(name, "cpu"), (), OUT)
  paths = {arm.name: runs.base_folder(Task(arm.name, 1e-3, 0)) for arm in study_of(name).arms}
  if name == "rl_length":
    assert len(set(paths.values())) == 2
    assert all(len({path for arm, path in paths.items() if arm[0] == base}) == 1 for base in "ab")
  else:
    assert len(set(paths.values())) == 1


def test_the_baselines_of_all_studies_start_from_the_same_base():
  paths = {RLRuns(study_of(name).scales["gpu"].config, configs(name, "gpu"), (), OUT).base_folder(
      Task(study_of(name).baseline, 1e-3, 0)) for name in NAMES}
  assert len(paths) == 1


def test_arms_whose_routing_agreement_is_compared_record_their_routing():
  compared = {(name, arm) for name in NAMES for c in study_of(name).comparisons
              if c.metric == "routing_agreement" for arm in filter(None, (c.arm, c.baseline))}
  assert compared
  for name, arm in compared:
    assert configs(name, "cpu")[arm].rl.objective.routing == "observed"


def test_rl_clip_clips_ratios_of_tokens_over_16_updates_per_rollout():
  for cfg in configs("rl_clip", "cpu").values():
    assert cfg.rl.objective.spec(32).ratio == "token"
    assert cfg.rl.objective.updates == 16


@pytest.mark.parametrize("name", NAMES)
def test_only_metrics_that_the_learning_rate_moves_are_compared_at_one_learning_rate(name):
  for c in study_of(name).comparisons:
    moved = c.metric in ("kl", "clip_ratio", "routing_agreement", "length_slope", "gap", "entropy")
    assert c.at_one_rate == (moved and c.baseline is not None)


def test_rl_length_grpo_divides_by_the_outputs_length_and_dapo_and_its_equivalents_do_not():
  mask, logp = jnp.array([[True] * 2 + [False] * 6, [True] * 8]), jnp.full((2, 8), -1.0)

  def weight(spec):
    """Returns a token's gradient in an output of 8 tokens over that in an output of 2 tokens."""
    gradient = jax.grad(lambda x: policy_loss(x, logp, logp, jnp.ones(2), mask, spec)[0])(logp)
    return float(gradient[1, 0] / gradient[0, 0])

  built = configs("rl_length", "cpu")
  weights = {arm: weight(cfg.rl.objective.spec(32).replace(beta=0.0))
             for arm, cfg in built.items()}
  for base in "ab":
    assert weights[f"{base}_grpo"] == pytest.approx(2 / 8)
    assert weights[f"{base}_dapo"] == pytest.approx(1)
  for same in ("grpo_r1", "dr_grpo"):  # dapo's gradient up to a factor, so they need no arms
    assert weight(SPECS[same].replace(beta=0.0)) == pytest.approx(1)
  assert weight(SPECS["gspo"]) == pytest.approx(2 / 8)


def document_accuracy(arm: str) -> dict[str, float]:
  """Returns the fraction of generated documents with a correct answer: direct, worked and all."""
  cfg = configs("rl_length", "cpu")[arm]
  task, template, rng = get_task(cfg.rl.task), get_template(cfg.rl.template), random.Random(0)
  correct = {"direct": [], "worked": [], "all": []}
  for _ in range(4000):
    prompt, completion = task.document(rng, cfg.documents.noise, template)
    answer = str(eval(prompt.split(":")[1].split("\n")[0]))  # the question is a sum
    value = rewards.accuracy([prompt], [completion], answer=[answer], task=[cfg.rl.task])[0]
    for kind in ("worked" if "=" in completion else "direct", "all"):
      correct[kind].append(value)
  return {kind: sum(values) / len(values) for kind, values in correct.items()}


def test_worked_documents_are_correct_more_often_in_base_a_and_direct_ones_in_base_b():
  # Of 4,000 documents, 1,400 are worked: a fraction has a standard error of at most 0.013.
  a, b = document_accuracy("a_grpo"), document_accuracy("b_grpo")
  assert a["worked"] > a["direct"] + 0.2
  assert b["direct"] > b["worked"] + 0.2
  # Over all documents it is 0.007; the tolerance is four standard errors of the difference.
  assert b["all"] == pytest.approx(a["all"], abs=0.04)


def test_bases_a_and_b_differ_in_accuracy_but_not_in_the_types_of_their_documents():
  built = configs("rl_length", "cpu")
  noise = [built[f"{base}_grpo"].documents.noise for base in "ab"]
  for name in ("direct", "detailed", "malformed"):
    assert getattr(noise[0], name) == getattr(noise[1], name)
  assert built["a_grpo"].documents == rl_length.STUDY.scales["cpu"].config.documents
  assert len({(cfg.rl.objective.group_baseline, cfg.rl.objective.spec(32).beta)
              for cfg in built.values()}) == 1


def test_rl_ppo_compares_the_value_learning_rates_that_swept_best():
  question = next(c for c in study_of("rl_ppo").comparisons if c.arm and c.baseline == "ppo_1_*")
  at = lambda value: {seed: {"pass@1": value} for seed in (0, 1)}
  compared = {"ppo_1_value1x": at(0.9), "ppo_1_value4x": at(0.5), "ppo_0.95_value1x": at(0.4),
              "ppo_0.95_value4x": at(0.8), "grpo": at(0.6)}
  swept = {"ppo_1_value1x": 0.1, "ppo_1_value4x": 0.2, "ppo_0.95_value1x": 0.3,
           "ppo_0.95_value4x": 0.2, "grpo": 0.9}
  outcome = compare(question, compared, swept)
  assert (outcome["arm"], outcome["baseline"]) == ("ppo_0.95_value1x", "ppo_1_value4x")
  assert outcome["paired"]["mean"] == pytest.approx(0.4 - 0.5)
  assert compare(question, compared, {"ppo_1_value1x": 0.1}) is None
