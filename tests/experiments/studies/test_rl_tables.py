"""The contents of reports on RL studies that only several arms, seeds and bases show."""

from experiments.studies import rl_tables


def run(base: str, seed: int = 0, pass_at_1: float = 0.5) -> dict:
  by_k = {"pass@K": [[1, pass_at_1], [4, 1.0]], "cons@K": [[1, pass_at_1], [4, 0.5]]}
  return {"seed": seed, "base": {"name": base}, "before": by_k, "after": by_k,
          "curves": {"reward": [[step, pass_at_1] for step in range(3 + seed)]}}


def test_every_set_of_bases_has_one_curve_that_all_columns_share():
  runs = {"subset": [run("x")], "whole": [run("x"), run("y", 1)], "other": [run("z")]}
  _, by_k = rl_tables.panels(runs)
  assert by_k["shared"] == ["base", "base of other"]
  assert list(by_k["curves"]["pass@K"]) == ["subset", "base", "whole", "base of other", "other"]


def test_curves_have_the_range_of_several_seeds_and_the_length_of_the_shortest():
  steps, _ = rl_tables.panels({"a": [run("x", 0, 0.25), run("x", 1, 0.75)], "b": [run("x")]})
  curves = steps["curves"]["reward (mean of a rollout)"]
  assert curves["a"] == [[0, 1, 2], [0.5] * 3, [0.25] * 3, [0.75] * 3]
  assert curves["b"] == [[0, 1, 2], [0.5] * 3]
