"""The examples of docs/how_to_add.md work as they stand there."""

import ast
import dataclasses
import json
import pathlib
import random
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import catalogue, settings
from experiments.options import Options
from experiments.studies.runner import execute
from rl.objective import SPECS
from rl.tasks.documents import Noise
from train.config import Source
from train.templates import get_template

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "how_to_add.md").read_text()
BLOCKS = {re.match(r"# (.+)\n", block)[1]: block
          for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)}


def load(path: str, monkeypatch) -> types.ModuleType:
  """An example as the module that its first line names."""
  name = path.removesuffix(".py").replace("/", ".")
  module = types.ModuleType(name)
  monkeypatch.setitem(sys.modules, name, module)
  exec(compile(BLOCKS[path], path, "exec"), module.__dict__)
  return module


def test_the_page_has_an_example_of_everything_that_it_promises():
  assert [path.partition("/")[0] for path in BLOCKS] == [
      "experiments", "pallas_kernels", "pallas_kernels", "rl", "an entry of SPECS in rl", "rl",
      "in your own code"]


# The study.


@pytest.fixture
def study(monkeypatch):
  return load("experiments/studies/v3/shared_expert.py", monkeypatch).STUDY


def test_the_study_would_be_found_and_its_arms_are_matched_as_it_says(study):
  source = BLOCKS["experiments/studies/v3/shared_expert.py"]
  assert catalogue._is_experiment(ast.parse(source), "studies")
  assert not catalogue._is_experiment(ast.parse(source.replace("STUDY =", "other =")), "studies")
  for scale in study.scales.values():
    shared, routed = (settings.apply(scale.config, arm.settings).model for arm in study.arms)
    assert shared.moe.num_shared_experts > 0 == routed.moe.num_shared_experts
    gate = shared.num_layers * shared.d_model  # of one more routed expert, in every MoE layer
    assert abs(shared.param_count() - routed.param_count()) <= gate
    assert abs(shared.active_param_count() - routed.active_param_count()) <= gate


def test_the_study_runs_and_judges_its_claim(study, tmp_path):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(60)))
  scale = study.scales["smoke"]
  cfg = dataclasses.replace(
      scale.config,
      data=dataclasses.replace(scale.config.data, sources=(Source(str(text)),), seq_len=16,
                               heldout_bytes=500, cache_dir=str(tmp_path / "cache")),
      train=dataclasses.replace(scale.config.train, steps=2))
  small = ("model.num_layers=1", "model.num_dense_layers=0", "model.mtp=none", "model.d_model=16",
           "model.moe.expert_dim=16")
  tiny = dataclasses.replace(study, scales={"smoke": dataclasses.replace(
      scale, config=settings.apply(cfg, small), learning_rates=(), seeds=1)})
  judged = execute(tiny, "smoke", Options("shared_expert", out=tmp_path / "out"))
  assert [run["status"] for run in judged["runs"]] == ["finished"] * 2
  (claim,) = json.loads((tmp_path / "out" / "summary.json").read_text())["claims"]
  assert claim["verdict"] == "unresolved" and claim["n"] == "1 seed" and claim["value"] != 0


# The kernel.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_equals_its_reference_and_refuses_what_it_does_not_support(monkeypatch, dtype):
  kernel = load("pallas_kernels/mosaic_tpu/squared_relu.py", monkeypatch)
  operation = load("pallas_kernels/ops/squared_relu.py", monkeypatch).squared_relu
  x_MF = jnp.asarray(np.random.default_rng(0).standard_normal((64, 128)), dtype)
  expected = np.maximum(np.asarray(x_MF, np.float32), 0) ** 2
  for result in (operation(x_MF), kernel.run(x_MF, interpret=True)):
    assert result.dtype == dtype
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, rtol=2**-7)
  assert kernel.unsupported_reason(x_MF) is None
  assert "not 33" in kernel.unsupported_reason(jnp.ones((33, 128)))
  if jax.default_backend() != "tpu":
    with pytest.raises(ValueError, match="needs a TPU"):
      operation(x_MF, implementation="mosaic_tpu")


# The task.


def test_the_task_poses_checks_and_documents_problems_in_disjoint_splits(monkeypatch):
  task = load("rl/tasks/reversal.py", monkeypatch).Reversal(letters=3)
  splits = {split: [task.problem(split, i) for i in range(40)] for split in task.splits}
  questions = {split: {problem.question for problem in problems}
               for split, problems in splits.items()}
  assert not questions["train"] & questions["heldout"] and len(questions["train"]) > 30
  for problem in (*splits["train"], *splits["harder"]):
    word = problem.question.removeprefix("reverse ")
    assert task.check(word[::-1], problem.row())
    assert not task.check(word[::-1] + "x", problem.row())
  assert len(splits["harder"][0].question) == len(splits["train"][0].question) + 1
  prompt, completion = task.document(
      random.Random(0), Noise(direct=0, step_error=0, malformed=0), get_template("short"))
  word = re.search("reverse ([a-z]+)", prompt)[1]
  assert f"<answer>{word[::-1]}</answer>" in completion
  with pytest.raises(ValueError, match="letters"):
    load("rl/tasks/reversal.py", monkeypatch).Reversal(letters=1)


# The objective and the reward.


def test_the_objective_is_a_spec_like_the_others(monkeypatch):
  monkeypatch.setitem(SPECS, "dapo_kl", None)  # removed again afterwards
  exec(BLOCKS["an entry of SPECS in rl/objective.py"], {})
  added = SPECS["dapo_kl"]
  assert (added.aggregation, added.epsilon_high, added.kl_in) == ("token_mean", 0.28, "loss")
  assert dataclasses.replace(added, kl_in="none", kl="k3", beta=0.0) == SPECS["dapo"]


def test_the_reward_scores_and_combines(capsys):
  scope = {}
  exec(BLOCKS["rl/rewards.py"], scope)
  assert scope["no_repetition"](["p"] * 3, ["a\nb", "a\na", ""]) == [1.0, 0.0, None]
  exec(BLOCKS["in your own code"], scope)
  assert scope["scored"].rewards == [1.2]
  assert "rewards/no_repetition/mean" in capsys.readouterr().out
