"""bench_rl_cost: the cost of objectives on the same rollouts, and its ratios to the first."""

import json
import re

import pytest

from experiments.benchmarks.rl import bench_rl_cost
from experiments.options import Options

TINY = ("bench.rounds=2", "model.moe=none", "model.num_dense_layers=0", "model.num_layers=1",
        "model.d_model=32", "model.vocab_size=64", "rl.sampling.num_prompts=2",
        "rl.sampling.num_generations=2", "rl.sampling.max_prompt_length=3",
        "rl.sampling.max_completion_length=5", "rl.objective.minibatches=2")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  bench_rl_cost.main(Options("bench_rl_cost", out=folder, settings=TINY))
  return json.loads((folder / "results.json").read_text())


def test_every_objective_is_timed_on_completions_of_the_maximum_length(result):
  assert list(result["objectives"]) == ["grpo_r1", "ppo", "rft"]
  assert result["tokens"] == 2 * 2 * 5
  assert len(result["rollout_seconds_by_round"]) == 2
  for cost in result["objectives"].values():
    assert len(cost["update_seconds_by_round"]) == 2 and min(cost["update_seconds_by_round"]) > 0
    assert cost["step_seconds"] == pytest.approx(
        cost["update_seconds"] + result["rollout_seconds"])


def test_state_bytes_are_those_of_the_models_and_moments_that_each_objective_keeps(result):
  cost, parameters = result["objectives"], 4 * result["params"]
  # Parameters and two moments in float32, and 2 counters; a reference model, except for RFT; and
  # PPO's value model, again with two moments, a head of 32 weights and a bias, and 2 counters.
  assert cost["rft"]["state_bytes"] == 3 * parameters + 8
  assert cost["grpo_r1"]["state_bytes"] == 4 * parameters + 8
  assert cost["ppo"]["state_bytes"] == 7 * parameters + 3 * 4 * 33 + 16
  for each in cost.values():
    assert each["peak_bytes"] >= each["state_bytes"] + each["temporary_bytes"]


def test_ratios_are_to_the_first_objective(result):
  assert set(result["ratios"]["grpo_r1"].values()) == {1.0}
  ppo, grpo = result["objectives"]["ppo"], result["objectives"]["grpo_r1"]
  for name, ratio in result["ratios"]["ppo"].items():
    assert ratio == pytest.approx(ppo[name] / grpo[name])
  assert result["ratios"]["ppo"]["peak_bytes"] > 1.3


@pytest.mark.parametrize(("setting", "message"), [
    ("bench.objectives=grpo,pp", "did you mean 'ppo'"), ("bench.objectives=ppo,ppo", "each once"),
    ("bench.rounds=0", "must be positive"), ("rl.mesh.data=2", "measures one device"),
    ("rl.objective.routing=replayed", "keeps no routing")])
def test_unsupported_settings_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    bench_rl_cost.main(Options("bench_rl_cost", settings=(setting,)))


def test_an_output_path_that_is_a_file_is_refused_before_anything_runs(tmp_path, monkeypatch):
  path = tmp_path / "out"
  path.write_text("")
  monkeypatch.setattr(bench_rl_cost, "init_on_host", lambda *_: pytest.fail("a model was made"))
  with pytest.raises(ValueError, match=re.escape(f"{path} is a file")):
    bench_rl_cost.main(Options("bench_rl_cost", out=path, settings=TINY))
