"""Figures open, have the size they promise, and show what they are given."""

import matplotlib.image
import numpy as np
import pytest

from experiments import stats
from experiments.reports import plots

STEPS = range(0, 100, 2)


def rows(level: float = 2.0, seeds: int = 0) -> list[dict]:
  out = []
  for step in STEPS:
    loss = level + 5 * np.exp(-step / 10)
    out.append({"step": step, "loss": loss, "learning_rate": 1e-3 * (step + 1),
                "max_violation": 1 / (1 + step)})
    if seeds:
      out[-1]["per_seed"] = {"loss": [loss + 0.1 * seed for seed in range(seeds)]}
  return out


def line(name: str, values, axis: str = "bits per byte: difference", **fields) -> plots.Comparison:
  return plots.Comparison(name, stats.paired(values, 0), axis, **fields)


def drawn(path) -> np.ndarray:
  """The picture as [height, width, 3], once it is 800 wide and neither blank nor nearly so."""
  image = matplotlib.image.imread(path)[..., :3]
  assert image.shape[1] == 800 and image.shape[0] > 150
  assert 0.005 < (image < 0.95).any(-1).mean() < 0.9
  return image


def has_colour(image: np.ndarray, colour: str) -> bool:
  wanted = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
  return bool((np.abs(image - wanted).max(-1) < 0.02).any())


def test_loss_curves_draw_every_run_in_its_colour(tmp_path):
  plots.loss_curves({"a": rows(), "b": rows(2.2, seeds=3)}, tmp_path / "x.png")
  image = drawn(tmp_path / "x.png")
  assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")
  assert not has_colour(image, "#009E73")


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path):
  broken = rows()
  for i in (3, 4, 20):
    broken[i]["loss"] = (float("nan"), float("inf"), None)[i % 3]
  plots.loss_curves({"": broken}, tmp_path / "x.png")
  assert has_colour(drawn(tmp_path / "x.png"), "#0072B2")


def test_the_average_of_a_constant_is_that_constant():
  np.testing.assert_allclose(plots._smoothed(np.full(200, 3.0)), 3.0)


def test_the_average_smooths_noise_and_keeps_up_with_a_fall():
  rng = np.random.default_rng(0)
  noise = plots._smoothed(rng.normal(0, 1, 1000))
  assert noise[500:].std() < 0.25
  fall = 8 * np.exp(-np.arange(1000) / 50)
  assert np.abs(plots._smoothed(fall) - fall).max() < 1.0


@pytest.mark.parametrize("draw", [plots.max_violation, plots.learning_rate])
def test_curves_by_step_open(draw, tmp_path):
  draw(rows(), tmp_path / "x.png")
  assert has_colour(drawn(tmp_path / "x.png"), "#0072B2")


def test_validation_takes_domains_that_come_late(tmp_path):
  evaluations = [{"step": 0, "bits_per_byte": {"bible": 8.0}},
                 {"step": 9, "bits_per_byte": {"bible": 2.0, "python": 3.0}}]
  plots.validation(evaluations, tmp_path / "x.png")
  image = drawn(tmp_path / "x.png")
  assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")


@pytest.mark.parametrize(("layers", "experts", "domains"), [(1, 8, 1), (4, 16, 3), (58, 256, 5)])
def test_heat_maps_of_every_shape_open(layers, experts, domains, tmp_path):
  rng = np.random.default_rng(0)
  loads = {f"domain {d}": rng.gamma(2, 1, (layers, experts)) for d in range(domains)}
  plots.load_heat_map(loads, tmp_path / "x.png")
  drawn(tmp_path / "x.png")


def test_heat_map_is_relative_to_each_layers_own_mean(tmp_path):
  skewed = np.array([[3.0, 1.0], [1.0, 3.0]])
  for name, scale in (("x", [[1.0], [1.0]]), ("y", [[1.0], [50.0]])):
    plots.load_heat_map({"d": skewed * scale}, tmp_path / f"{name}.png")
  np.testing.assert_array_equal(drawn(tmp_path / "x.png"), drawn(tmp_path / "y.png"))


def test_heat_map_shows_a_layer_without_load_as_a_gap(tmp_path):
  plots.load_heat_map({"d": [[0.0, 0.0], [1.0, 3.0]]}, tmp_path / "x.png")
  drawn(tmp_path / "x.png")


def test_forest_colours_follow_the_verdicts_and_unbounded_intervals_are_points(tmp_path):
  plots.forest([line("a", [1.0, 1.1], verdict="reproduced", paper=0.9, margin=0.2),
                line("b", [5.0], axis="MaxVio", verdict="unresolved", reference=4.0)],
               tmp_path / "x.png")
  image = drawn(tmp_path / "x.png")
  assert has_colour(image, "#0072B2") and has_colour(image, "#737373")
  assert not has_colour(image, "#D55E00")


def test_forest_grows_with_its_lines(tmp_path):
  heights = []
  for count in (1, 12):
    plots.forest([line("name", [1.0, 2.0])] * count, tmp_path / "x.png")
    heights.append(drawn(tmp_path / "x.png").shape[0])
  assert heights[1] > 3 * heights[0]


def test_scatter_draws_points_with_and_without_error_bars(tmp_path):
  plots.scatter_tradeoff([("a", 1.0, 2.0, 0.1, 0.2), ("b", 2.0, 1.0, None, None)],
                         "cost (J)", "loss (nats per token)", tmp_path / "x.png")
  image = drawn(tmp_path / "x.png")
  assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
  before = dict(matplotlib.rcParams)
  plots.learning_rate(rows(), tmp_path / "x.png")
  assert dict(matplotlib.rcParams) == before
