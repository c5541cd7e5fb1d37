"""What objectives cost is measured on the same rollouts, and recorded with its ratios."""

import json

import pytest

from experiments.benchmarks.rl import bench_rl_cost
from experiments.options import Options

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = ("bench.rounds=2", "model.moe=none", "model.num_dense_layers=0", "model.num_layers=1",
        "model.d_model=32", "model.vocab_size=64", "rl.sampling.num_prompts=2",
        "rl.sampling.num_generations=2", "rl.sampling.max_prompt_length=3",
        "rl.sampling.max_completion_length=5", "rl.objective.minibatches=2")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  bench_rl_cost.main(Options("bench_rl_cost", out=folder, settings=TINY))
  return json.loads((folder / "results.json").read_text())


def test_every_objective_learns_from_completions_of_the_same_length(result):
  assert list(result["objectives"]) == ["grpo_r1", "ppo", "rft"]
  assert result["tokens"] == 2 * 2 * 5
  assert len(result["rollout_seconds_by_round"]) == 2
  for cost in result["objectives"].values():
    assert len(cost["update_seconds_by_round"]) == 2 and min(cost["update_seconds_by_round"]) > 0
    assert cost["step_seconds"] == pytest.approx(
        cost["update_seconds"] + result["rollout_seconds"])


def test_bytes_are_those_of_what_each_objective_keeps(result):
  cost, parameters = result["objectives"], 4 * result["params"]
  # Parameters and two moments of float32, and 2 counters; a reference but for RFT; PPO's value
  # model is another three, each with a head of 32 weights and a bias, and 2 counters.
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
def test_what_cannot_be_measured_is_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    bench_rl_cost.main(Options("bench_rl_cost", settings=(setting,)))


def test_a_file_in_the_place_of_the_folder_is_noticed_before_anything_runs(tmp_path):
  (tmp_path / "out").write_text("")
  with pytest.raises(FileExistsError):
    bench_rl_cost.main(Options("bench_rl_cost", out=tmp_path / "out", settings=TINY))
