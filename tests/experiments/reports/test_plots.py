"""Figures show the given data, with labelled axes, legends and a caption computed from the data."""

import functools
import itertools
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments import stats
from experiments.reports import drawing, plots, study_plots

STEPS = np.arange(0, 100, 2)
RNG = np.random.default_rng(0)


def rows(level: float = 2.0, seeds: int = 0) -> list[dict]:
  out = []
  for step in STEPS.tolist():
    loss = level + 5 * math.exp(-step / 10)
    out.append({"step": step, "loss": loss, "learning_rate": 1e-3 * (step + 1),
                "max_violation": 1 / (1 + step)})
    if seeds:
      out[-1]["per_seed"] = {"loss": [loss + 0.1 * seed for seed in range(seeds)]}
  return out


def line(name: str, values, axis: str = "bits per byte: difference",
         **fields) -> study_plots.Comparison:
  return study_plots.Comparison(name, stats.paired(values, 0), axis, **fields)


def curves(axes) -> dict[str, np.ndarray]:
  """Returns the labelled curves of a panel, each [points, 2], by label."""
  return {curve.get_label(): np.asarray(curve.get_xydata(), float) for curve in axes.lines
          if not curve.get_label().startswith("_")}


def caption(figure) -> str:
  """Returns the caption on one line, with plain spaces."""
  return " ".join(figure.texts[-1].get_text().split())


@pytest.fixture
def path(tmp_path):
  return tmp_path / "x.png"


# Properties of all figures.

EVALUATIONS = [{"step": 0, "bits_per_byte": {"bible": 8.0}},
               {"step": 9, "bits_per_byte": {"bible": 2.0, "python": 3.0}}]
PANELS = {"reward": {"a": ([0, 1], [0.0, 1.0]), "b": ([0, 1], [0.5, None])},
          "length": {"a": ([0, 1], [3.0, 4.0])}}
LEARNING = {"ours": {"steps": [{"time": 1.0, "mean_reward": 0.5}],
                     "evaluations": [{"time": 0.0, "pass@1": [0.1, 0.0, 0.2]},
                                     {"time": 2.5, "pass@1": [0.8, 0.7, 0.9]}]}}
BAND = [[0, 1, 2, 3], [0.0, -0.1, -0.1, -0.2], [0.0, -0.2, -0.3, -0.4], [0.0, 0.0, 0.1, 0.0]]
DIFFERENCES = {"a": BAND, "b": [[0, 1, 2, 3], [0.0, 0.2, 0.1, 0.3]]}
OUTCOMES = {"MaxVio (max ÷ mean − 1)": {"base": [2.0, 4.0], "a": [0.25, 0.75]},
            "loss (nats)": {"base": [3.0, 3.2], "a": [3.1, 3.3]}}
multiples = functools.partial(study_plots.multiples, label="loss − loss of base (nats)",
                              first=("base", "loss (nats)", ([0, 1], [8.0, 3.0])))
FIGURES = {
    "loss": (plots.training_loss, rows(seeds=3)),
    "max_violation": (plots.max_violation, rows()),
    "learning_rate": (plots.learning_rate, rows()),
    "validation": (plots.validation, EVALUATIONS),
    "panels": (plots.panels, PANELS),
    "learning": (plots.learning, LEARNING),
    "loads": (plots.load_heat_map, {"bible": [[3.0, 1.0]], "python": [[2.0, 2.0]]}),
    "forest": (study_plots.forest, [line("a", [1.0, 1.1], verdict="reproduced")]),
    "multiples": (multiples, DIFFERENCES),
    "outcomes": (study_plots.outcomes, OUTCOMES)}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_png_800_pixels_wide_with_labelled_axes_and_a_caption(name, path):
  draw, data = FIGURES[name]
  figure = draw(data, path)
  image = matplotlib.image.imread(path)[..., :3]
  assert image.shape[1] == 800 and image.shape[0] > 150
  assert 0.005 < (image < 0.95).any(-1).mean() < 0.9  # neither nearly blank nor nearly full
  assert caption(figure).endswith(".") and len(caption(figure)) > 20
  for axes in figure.axes:
    if axes.get_visible() and name != "forest":  # whose vertical axes have names as ticks
      row = [other for other in figure.axes if other.get_ylim() == axes.get_ylim()]
      assert axes.get_xlabel() or not axes.images
      assert any(other.get_ylabel() for other in row) or name == "outcomes"


def test_the_outermost_pixels_are_white_even_with_long_labels_and_names(path):
  long = {f"a rather long label of panel {i} with its unit (tokens per second)": {
      f"an arm with a long name {j}": ([0, 1], [0.0, 1e6]) for j in range(5)} for i in range(3)}
  plots.panels(long, path)
  image = matplotlib.image.imread(path)[..., :3]
  edges = [image[0], image[-1], image[:, 0], image[:, -1]]
  assert all((edge > 0.99).all() for edge in edges)


@pytest.mark.parametrize("name", FIGURES)
def test_drawing_does_not_change_matplotlibs_settings(name, path):
  before = dict(matplotlib.rcParams)
  draw, data = FIGURES[name]
  draw(data, path)
  assert dict(matplotlib.rcParams) == before


# Curves.


def test_the_training_loss_shows_its_moving_average_on_top_of_every_seed(path):
  figure = plots.training_loss(rows(seeds=3), path)
  (axes,) = figure.axes
  faint = [curve for curve in axes.lines if curve.get_alpha()]
  assert len(faint) == 3 and len(axes.lines) == 4
  assert axes.get_ylabel() == "training loss (nats per token)"
  assert "goes from 7 to 2" in caption(figure) and "the seeds" in caption(figure)


def test_a_loss_that_is_not_finite_leaves_a_gap(path):
  broken = rows()
  for i, value in ((3, math.nan), (4, math.inf), (20, None)):
    broken[i]["loss"] = value
  figure = plots.training_loss(broken, path)
  faint, smoothed = (np.asarray(curve.get_xydata(), float) for curve in figure.axes[0].lines)
  assert len(faint) == len(STEPS) - 1  # the row without a value is left out
  for curve in (faint, smoothed):
    assert np.isnan(curve[[3, 4], 1]).all() and np.isfinite(np.delete(curve, [3, 4], 0)).all()


def test_the_moving_average_of_a_constant_is_that_constant():
  np.testing.assert_allclose(plots._smoothed(np.full(200, 3.0)), 3.0)


def test_the_moving_average_smooths_noise_and_follows_a_fall():
  noise = plots._smoothed(RNG.normal(0, 1, 1000))
  assert noise[500:].std() < 0.25
  fall = 8 * np.exp(-np.arange(1000) / 50)
  assert np.abs(plots._smoothed(fall) - fall).max() < 1.0


@pytest.mark.parametrize(("draw", "key", "stated"), [
    (plots.max_violation, "max_violation", "MaxVio goes from 1 to 0.0101; its largest value is 1"),
    (plots.learning_rate, "learning_rate", "Learning rate goes from 0.001 to 0.099")])
def test_curves_over_steps_show_the_rows_values(draw, key, stated, path):
  figure = draw(rows(), path)
  (curve,) = figure.axes[0].lines
  np.testing.assert_allclose(curve.get_xydata(), [[row["step"], row[key]] for row in rows()])
  assert stated in caption(figure)


def test_validation_draws_domains_that_only_later_evaluations_have(path):
  figure = plots.validation(EVALUATIONS, path)
  found = curves(figure.axes[0])
  np.testing.assert_array_equal(found["bible"], [[0, 8], [9, 2]])
  np.testing.assert_array_equal(found["python"], [[9, 3]])
  assert "after step 9: bible 2.000, python 3.000" in caption(figure)


# Panels.


def test_a_name_has_one_style_in_all_panels_and_none_is_a_gap(path):
  figure = plots.panels(PANELS, path)
  reward, length = figure.axes
  assert [axes.get_ylabel() for axes in (reward, length)] == ["reward", "length"]
  style = lambda axes, name: next(
      (curve.get_color(), curve.get_linestyle()) for curve in axes.lines
      if curve.get_label() == name)
  assert style(reward, "a") == style(length, "a") != style(reward, "b")
  assert np.isnan(curves(reward)["b"][1, 1])
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_name_that_only_a_later_panel_has_is_in_the_legend(path):
  figure = plots.panels({"x": {"a": ([0], [1.0])}, "y": {"late": ([0], [1.0])}}, path)
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "late"]


@pytest.mark.parametrize(("x", "shown"), [
    ((1, 2, 4, 8), ["1", "2", "4", "8"]), ((1, 10, 100), ["$10^{0}$", "$10^{1}$", "$10^{2}$"])])
def test_ratios_are_evenly_spaced_with_ticks_at_the_data(x, shown, path):
  drawn = {"pass@K": {"a": (x, [0.1 * (i + 1) for i in range(len(x))])}}
  figure = plots.panels(drawn, path, ratios="K", logarithmic=True)
  axes = figure.axes[0]
  assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "K")
  positions = axes.transData.transform([[k, 0.1] for k in x])[:, 0]
  np.testing.assert_allclose(np.diff(positions), np.diff(positions)[0])
  low, high = axes.get_xlim()
  ticks = {tick.get_text().replace("\\mathdefault{", "").replace("}}$", "}$")
           for tick, at in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
           if low <= at <= high}
  assert ticks == set(shown)
  assert "At the largest K: pass@K" in caption(figure)


def test_an_axis_is_logarithmic_only_if_few_values_would_hide_the_rest(path):
  spikes = [0.0, 0.1, 0.2, 145.0, 0.3]
  figure = plots.panels({"KL": {"a": (range(5), spikes)}, "length": {"a": (range(5), range(5))}},
                        path)
  kl, length = figure.axes
  assert (kl.get_yscale(), length.get_yscale()) == ("log", "linear")
  assert kl.get_ylim()[0] < 0.1 and kl.get_ylim()[1] > 145


def test_bands_are_drawn_around_means_and_explained(path):
  figure = plots.panels({"reward": {"a": BAND}}, path)
  (band,) = figure.axes[0].collections
  vertices = band.get_paths()[0].vertices
  assert (vertices[:, 1].min(), vertices[:, 1].max()) == (-0.4, 0.1)
  assert "bands go from the lowest to the highest seed" in caption(figure)


def test_many_curves_are_divided_into_columns_with_the_shared_one_in_each(path):
  names = [f"arm {i}" for i in range(6)]
  drawn = {label: {name: ([0, 1], [i, i]) for i, name in enumerate([*names, "base"])}
           for label in ("reward", "length")}
  figure = plots.panels(drawn, path, shared=["base"])
  columns = [[list(curves(axes)) for axes in figure.axes[column::2]] for column in (0, 1)]
  assert columns[0] == [[*names[:3], "base"]] * 2
  assert columns[1] == [[*names[3:], "base"]] * 2
  for axes in figure.axes:
    assert len({curve.get_color() for curve in axes.lines}) == 4
    base = next(curve for curve in axes.lines if curve.get_label() == "base")
    assert to_hex(base.get_color()) == "#000000"
  assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
  for axes, group in zip(figure.axes[:2], (names[:3], names[3:]), strict=True):
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*group, "base"]
  assert not figure.legends


def test_a_reference_is_a_named_line_in_its_panel_alone(path):
  drawn = {"x": {"a": ([0, 1], [1.0, 3.0])}, "y": {"a": ([0, 1], [1.0, 3.0])}}
  figure = plots.panels(drawn, path, references={"y": (2.0, "paper: 2")})
  x, y = figure.axes
  assert len(x.lines) == 1 and list(y.lines[1].get_ydata()) == [2.0, 2.0]
  assert [text.get_text() for text in y.texts] == ["paper: 2"] and not x.texts


def test_the_caption_has_the_last_values_of_all_panels_with_percent_signs(path):
  figure = plots.panels({"reward (mean)": {"a": ([0, 1], [0, 2]), "b": ([0, 1], [0, -1])},
                         "error (%)": {"a": ([0, 1], [0, 5]), "b": ([0, 1], [0, 7])}}, path)
  assert caption(figure) == (
      "At the last step: reward −1 (b) to 2 (a); error 5 % (a) to 7 % (b).")


def test_an_odd_number_of_panels_leaves_the_last_place_empty(path):
  figure = plots.panels({str(i): {"a": ([0], [1.0])} for i in range(3)}, path)
  assert [axes.get_visible() for axes in figure.axes] == [True] * 3 + [False]


def test_learning_curves_are_over_each_trainers_own_clock_with_an_interval(path):
  left, right = plots.learning(LEARNING, path).axes
  np.testing.assert_array_equal(curves(left)["ours"], [[1.0, 0.5]])
  np.testing.assert_array_equal(curves(right)["ours"], [[0.0, 0.1], [2.5, 0.8]])
  (band,) = right.collections
  low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
  assert (low, high) == (0.0, 0.9)


# Heat maps.


@pytest.mark.parametrize(("layers", "experts", "domains"), [(1, 8, 1), (4, 16, 3), (58, 256, 5)])
def test_heat_maps_show_every_layer_expert_and_domain(layers, experts, domains, path):
  loads = {f"domain {d}": RNG.gamma(2, 1, (layers, experts)) for d in range(domains)}
  figure = plots.load_heat_map(loads, path)
  panels = [axes for axes in figure.axes if axes.images]
  assert [axes.get_title() for axes in panels] == list(loads)
  assert all(axes.images[0].get_array().shape == (layers, experts) for axes in panels)


def test_heat_map_is_relative_to_each_layers_own_mean(path):
  loads = np.array([[3.0, 1.0], [50.0, 150.0]])
  figure = plots.load_heat_map({"d": loads}, path)
  np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[1.5, 0.5], [0.5, 1.5]])
  assert "1.50 times its layer's mean: expert 0 of MoE layer 0 on d" in caption(figure)


def test_heat_map_shows_a_layer_without_load_as_a_gap(path):
  figure = plots.load_heat_map({"d": [[0.0, 0.0], [1.0, 3.0]]}, path)
  image = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
  assert np.isnan(image[0]).all() and np.isfinite(image[1]).all()


# Forests.


def test_forest_colours_follow_the_verdicts_and_unbounded_intervals_are_points(path):
  figure = study_plots.forest([
      line("a", [1.0, 1.1], verdict="reproduced", paper=0.9, margin=0.2),
      line("b", [5.0], axis="MaxVio", verdict="unresolved", reference=4.0)], path)
  above, below = figure.axes
  colours = {to_hex(curve.get_color()) for curve in above.lines}
  assert "#0072b2" in colours and "#d55e00" not in colours
  assert {to_hex(curve.get_color()) for curve in below.lines} == {"#000000", "#737373"}
  interval = lambda axes: [curve for curve in axes.lines if curve.get_linewidth() == 2]
  assert len(interval(above)) == 1 and not interval(below)
  estimate = next(curve for curve in below.lines if curve.get_marker() == "o")
  assert estimate.get_xdata() == [5.0]
  assert [curve.get_xdata() for curve in above.lines if curve.get_marker() == "D"] == [[0.9]]
  assert (above.get_xlabel(), below.get_xlabel()) == ("bits per byte: difference", "MaxVio")
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ["mean, 95 % interval", "paper's value", "margin: counts as no difference"]
  assert "Of 2 claims 1 reproduced, 1 unresolved" in caption(figure)


def test_forest_grows_with_its_lines(path):
  heights = [study_plots.forest([line("name", [1.0, 2.0])] * count, path).get_size_inches()[1]
             for count in (1, 12)]
  assert heights[1] > 3 * heights[0]


def test_forest_labels_do_not_overlap(path):
  name = "a claim whose name is so long that it needs no fewer than four lines of the space it has"
  figure = study_plots.forest([line(name, [1.0, 2.0])] * 4, path)
  figure.draw_without_rendering()
  boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
  assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))


# Small multiples and outcomes of arms.


def test_every_difference_has_its_own_panel_on_one_scale_after_the_baseline(path):
  figure = multiples(DIFFERENCES, path)
  base, a, b = figure.axes
  assert [axes.get_title() for axes in figure.axes] == ["base", "a", "b"]
  assert base.get_ylabel() == "loss (nats)" and base.get_ylim()[1] > 8
  assert a.get_ylim() == b.get_ylim() and a.get_ylim()[0] < -0.4 and a.get_ylim()[1] > 0.3
  for axes in (a, b):
    assert any(list(curve.get_ydata()) == [0, 0] for curve in axes.lines)
  assert len(a.collections) == 1 and not b.collections
  assert "a −0.15, b +0.2" in caption(figure) and "cut off" not in caption(figure)


def test_a_difference_that_is_large_only_at_first_is_cut_off_and_that_is_stated(path):
  values = [5.0, *[0.1] * 19]
  figure = study_plots.multiples({"a": (range(20), values)}, path, "difference (nats)")
  assert figure.axes[0].get_ylim()[1] < 1
  assert "Larger differences in the first tenth of the steps are cut off" in caption(figure)


def test_the_bound_of_a_claim_is_drawn_and_a_curve_may_have_its_own_scale(path):
  large = {"a": BAND, "seeds": [[0, 1, 2, 3], [0.0, 9.0, 9.0, 9.0]]}
  figure = study_plots.multiples(
      large, path, "loss ÷ loss of base − 1 (%)", bound=(0.25, "the paper's bound"),
      other_scale=["seeds"])
  a, seeds = figure.axes
  dashed = lambda axes: [curve.get_ydata()[0] for curve in axes.lines
                         if curve.get_linestyle() == "--"]
  assert dashed(a) == dashed(seeds) == [-0.25, 0.25]
  assert a.get_ylim()[1] < 1 < 9 < seeds.get_ylim()[1]
  assert "seeds +9 %. Dashed: the paper's bound" in caption(figure)


def test_outcomes_have_a_point_per_seed_the_mean_and_the_claimed_threshold(path):
  figure = study_plots.outcomes(OUTCOMES, path, {"MaxVio (max ÷ mean − 1)": 0.3})
  violation, loss = figure.axes
  assert [label.get_text() for label in violation.get_yticklabels()] == ["base", "a"]
  points = [list(curve.get_xdata()) for curve in violation.lines if curve.get_marker() == "o"]
  assert points == [[2.0, 4.0], [0.25, 0.75]]
  upright = {curve.get_xdata()[0] for curve in violation.lines if curve.get_marker() != "o"}
  assert upright == {3.0, 0.5, 0.3}  # both means and the threshold
  assert len(loss.lines) == len(violation.lines) - 1
  assert "MaxVio 0.5 (a) to 3 (base)" in caption(figure) and "(MaxVio 0.3)" in caption(figure)


def test_only_heavy_tails_of_values_that_are_not_negative_count_as_such():
  assert drawing.heavy_tailed(np.array([0.1, 0.2, 0.1, 50.0, np.nan]))
  assert not drawing.heavy_tailed(np.array([1.0, 2.0, 3.0]))
  assert not drawing.heavy_tailed(np.array([-0.1, 0.2, 0.1, 50.0]))
  assert not drawing.heavy_tailed(np.zeros(4)) and not drawing.heavy_tailed(np.empty(0))
