"""Figures of runs and benchmarks: each function draws its data into a PNG, and returns the figure.

See `drawing` for what they share, and `study_plots` for the figures of studies alone.
"""

import math
import pathlib
from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reports import drawing
from experiments.reports.drawing import Curve

_UNITS = {
    "loss": "training loss (nats per token)",
    "learning_rate": "learning rate (per step)",
    "max_violation": "MaxVio (max ÷ mean − 1)",
}
_SMOOTHED_FRACTION = 0.03  # time constant of the moving average over a curve's number of points
_LABEL_WIDTH = 25  # characters per line in the axis label of a small panel
_CURVES_PER_PANEL = 4  # more cannot be told apart


def _ends(values: np.ndarray) -> str:
  """Returns the first and last finite values, in words that follow "goes"."""
  finite = values[np.isfinite(values)]
  return f"from {finite[0]:.3g} to {finite[-1]:.3g}" if finite.size else "through no finite value"


def _legend(axes: Axes) -> None:
  handles, names = axes.get_legend_handles_labels()
  if len(names) > 1:
    axes.legend(handles, names, fontsize=drawing.SMALL)


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and values of the rows that have the key; NaN for values that are not finite."""
  rows = [row for row in rows if row.get(key) is not None]
  values = np.array([row[key] for row in rows], float)
  return np.array([row["step"] for row in rows]), np.where(np.isfinite(values), values, np.nan)


def _smoothed(values: np.ndarray) -> np.ndarray:
  """Exponential moving average, with a shorter time constant at the start, where the loss falls.

  Values that are NaN remain NaN.
  """
  longest = max(1.0, _SMOOTHED_FRACTION * len(values))
  average, averages = 0.0, np.full(len(values), np.nan)
  for seen, i in enumerate(np.flatnonzero(~np.isnan(values))):
    average += (values[i] - average) / min(longest, 1 + 0.1 * seen)
    averages[i] = average
  return averages


@drawing.styled
def training_loss(rows: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws the moving average of the training loss, on top of the faint values of every seed.

  Args:
    rows: rows with "step", "loss" and, for several seeds, "per_seed": {"loss": one value per seed}.
    path: path of the PNG.
  """
  figure, ((axes,),) = drawing.new_figure()
  colour = drawing.COLOURS[0]
  steps, values = _series(rows, "loss")
  with_seeds = [row for row in rows if "loss" in row.get("per_seed", {})]
  if with_seeds:
    axes.plot([row["step"] for row in with_seeds], [row["per_seed"]["loss"] for row in with_seeds],
              color=colour, alpha=0.3, linewidth=0.6)
  else:
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.6)
  smoothed = _smoothed(values)
  axes.plot(steps, smoothed, color=colour)
  drawing.step_axis(axes)
  axes.set_ylabel(_UNITS["loss"])
  return drawing.save(
      figure, path, f"Training loss: the moving average (thick) goes {_ends(smoothed)}; "
      f"the faint {'lines are the seeds' if with_seeds else 'line is the loss of every step'}.")


def _plain_curve(rows: list[dict], path: str | pathlib.Path, key: str) -> Figure:
  figure, ((axes,),) = drawing.new_figure(0.75 * drawing.HEIGHT)
  axes.plot(*_series(rows, key), color=drawing.COLOURS[0])
  drawing.step_axis(axes)
  axes.set_ylabel(_UNITS[key])
  axes.set_ylim(bottom=0)
  axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
  _, values = _series(rows, key)
  name = _UNITS[key].partition(" (")[0]
  return drawing.save(figure, path, f"{name[0].upper()}{name[1:]} goes {_ends(values)}; its "
                                    f"largest value is {np.nanmax(values, initial=-math.inf):.3g}.")


@drawing.styled
def max_violation(rows: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws the imbalance of experts over training, from rows with "step" and "max_violation"."""
  return _plain_curve(rows, path, "max_violation")


@drawing.styled
def learning_rate(rows: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws the learning rate that every step used, from rows with "step" and "learning_rate"."""
  return _plain_curve(rows, path, "learning_rate")


@drawing.styled
def validation(evaluations: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws held-out bits per byte over training, one curve per domain.

  Args:
    evaluations: {"step": int, "bits_per_byte": {domain: value}}, in order of steps.
    path: path of the PNG.
  """
  figure, ((axes,),) = drawing.new_figure()
  domains = dict.fromkeys(name for e in evaluations for name in e["bits_per_byte"])
  for (i, domain), (colour, dash) in zip(enumerate(domains), drawing.styles(), strict=False):
    points = [(e["step"], e["bits_per_byte"][domain]) for e in evaluations
              if domain in e["bits_per_byte"]]
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=domain,
              marker=drawing.MARKERS[i % len(drawing.MARKERS)], markersize=4)
  drawing.step_axis(axes)
  axes.set_ylabel("validation (bits per byte)")
  axes.set_ylim(bottom=0)
  _legend(axes)
  last = evaluations[-1]["bits_per_byte"]
  each = ", ".join(f"{domain} {bits:.3f}" for domain, bits in last.items())
  step = evaluations[-1]["step"]
  return drawing.save(figure, path,
                      f"Bits per byte after step {step:,}: {each}; lower is better.")


@drawing.styled
def panels(
    drawn: Mapping[str, Mapping[str, Curve]], path: str | pathlib.Path, ratios: str | None = None,
    logarithmic: bool = False, references: Mapping[str, tuple[float, str]] | None = None,
    shared: Collection[str] = (), note: str = "") -> Figure:
  """Draws small panels of curves over steps.

  There are two panels per row. More curves than can be told apart are divided into groups: each
  group then has a column of panels, whose vertical axes are those of the other columns.

  A vertical axis becomes logarithmic if a few large values would hide all others.

  Args:
    drawn: by the panel's label, curves by name (see `drawing`). A name has the same style in every
      panel, and no other name of the same column has it.
    path: path of the PNG.
    ratios: label of the horizontal axis if it shows quantities whose ratios matter, on a
      logarithmic scale; None for steps.
    logarithmic: whether all vertical axes are logarithmic.
    references: by the panel's label, a value that a horizontal line marks, and its name.
    shared: names of curves that are drawn in every group, in black.
    note: a sentence that is added to the caption.
  """
  names = list(dict.fromkeys(name for curves in drawn.values() for name in curves))
  shared = [name for name in names if name in shared]
  groups = _groups([name for name in names if name not in shared])
  style = {name: pair for group in groups for name, pair in _group_styles(groups, group)}
  style |= {name: (drawing.BLACK, dash) for name, dash in zip(shared, ("-.", ":", "--", "-"),
                                                              strict=False)}
  columns = 2 if len(groups) == 1 else len(groups)
  places = [(label, group + shared) for label in drawn for group in groups]
  rows = -(-len(places) // columns)
  grouped = len(groups) > 1
  lines = max(_legend_lines(group + shared, grouped) for group in groups)
  height = (0.5 if grouped else 0.66) * drawing.HEIGHT * rows + 0.17 * lines + 0.3 * grouped
  figure, axes_RC = drawing.new_figure(height, rows, columns, sharey="row" if grouped else False)
  for axes in axes_RC.flat[len(places):]:
    axes.set_visible(False)
  for axes, (label, group) in zip(axes_RC.flat, places, strict=False):
    curves = {name: drawn[label][name] for name in group if name in drawn[label]}
    for name, curve in curves.items():
      drawing.draw_curve(axes, curve, *style[name], name)
    _panel_axes(axes, label, drawn[label].values(), ratios, logarithmic)
    if references and label in references:
      _reference(axes, *references[label])
    if grouped:
      axes.label_outer(remove_inner_ticks=False)
  _panel_legends(figure, axes_RC, grouped)
  last = {label: {name: drawing.last_value(values) for name, (_, values, *_) in curves.items()}
          for label, curves in drawn.items()}
  where = f"largest {drawing.without_unit(ratios)}" if ratios else "last step"
  at_end = "; ".join(
      f"{drawing.without_unit(label)} "
      f"{drawing.extremes(of_label, drawing.percent_of(label))}"
      for label, of_label in last.items())
  return drawing.save(figure, path, " ".join(filter(None, [
      f"At the {where}: {at_end}.", _bands(drawn), note])))


def _groups(names: list[str]) -> list[list[str]]:
  """Divides names, in their order, into the fewest groups whose curves can be told apart."""
  count = max(1, -(-len(names) // _CURVES_PER_PANEL))
  return [part.tolist() for part in np.array_split(np.array(names, object), count)]


def _group_styles(groups: list[list[str]], group: list[str]):
  """Yields the names of a group with colours and dashes that no name of the group shares."""
  before = sum(len(other) for other in groups[:groups.index(group)])
  colours = drawing.COLOURS[:-1]  # black is for shared curves
  for i, name in enumerate(group):
    yield name, (colours[(before + i) % len(colours)], drawing.DASHES[i % len(drawing.DASHES)])


def _panel_axes(axes: Axes, label: str, curves: Collection[Curve], ratios: str | None,
                logarithmic: bool) -> None:
  """Labels and scales the axes of a panel, in which some of the curves are drawn."""
  axes.set_ylabel(drawing.wrapped(label, _LABEL_WIDTH), fontsize=drawing.SMALL)
  values = drawing.curve_values(curves)
  positive = values[values > 0]
  if positive.size and (logarithmic or drawing.heavy_tailed(values)):
    axes.set_yscale("log", nonpositive="mask")
    # A curve that starts at almost 0 would otherwise determine the axis.
    low = positive.min() if logarithmic else max(positive.min(), 1e-5 * positive.max())
    axes.set_ylim(low / 1.2, positive.max() * 1.2)
    drawing.log_axis(axes.yaxis, low, positive.max())
  if ratios:
    drawing.ratio_axis(axes, ratios, (x for steps, *_ in curves for x in steps))
  else:
    drawing.step_axis(axes, 5)


def _reference(axes: Axes, value: float, name: str) -> None:
  axes.axhline(value, color=drawing.GREY, linewidth=1, linestyle=(0, (1, 1)))
  axes.annotate(name, (0.98, value), (0, -2), xycoords=axes.get_yaxis_transform(), ha="right",
                va="top", textcoords="offset points", fontsize=7, color=drawing.GREY)


def _panel_legends(figure: Figure, axes_RC: np.ndarray, grouped: bool) -> None:
  """Adds a legend of all panels or, for names that are grouped by column, one above each column."""
  parts = [(axes_R[0], axes_R) for axes_R in axes_RC.T] if grouped else [(figure, axes_RC.flat)]
  for place, several in parts:
    handles = {name: handle for axes in several
               for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    where = ({"loc": "lower left", "bbox_to_anchor": (-0.05, 1), "borderaxespad": 0.2} if grouped
             else {"loc": "outside upper center"})
    place.legend(handles.values(), handles, fontsize=drawing.SMALL, handlelength=2.5,
                 ncols=_legend_columns(handles, grouped), **where)


def _legend_columns(names: Collection[str], grouped: bool) -> int:
  """Returns how many columns of a legend fit above one column of panels, or above two."""
  width = max((len(line) for name in names for line in name.split("\n")), default=0)
  if grouped:
    return 2 if width < 11 else 1
  return 4 if width < 14 else 3 if width < 20 else 2 if width < 40 else 1


def _legend_lines(names: list[str], grouped: bool) -> int:
  """Returns the height of the legend in lines."""
  columns = np.array_split(np.array(names, object), _legend_columns(names, grouped))
  return max(sum(name.count("\n") + 1 for name in column) for column in columns)


def _bands(drawn: Mapping[str, Mapping[str, Curve]]) -> str:
  banded = any(len(curve) > 2 for curves in drawn.values() for curve in curves.values())
  return "Lines are means over seeds, bands go from the lowest to the highest seed." * banded


@drawing.styled
def learning(runs: dict[str, dict], path: str | pathlib.Path) -> Figure:
  """Draws reward and held-out pass@1 of several trainers, each over its own training time.

  Args:
    runs: by trainer, "steps": [{"time", "mean_reward"}] and "evaluations": [{"time", "pass@1":
      [estimate, low, high]}], with times in seconds.
    path: path of the PNG.
  """
  figure, axes_RC = drawing.new_figure(drawing.HEIGHT * 0.8, 1, 2, sharex=True)
  left, right = axes_RC[0]
  for (name, run), (colour, dash) in zip(runs.items(), drawing.styles(), strict=False):
    style = {"color": colour, "linestyle": dash, "label": name}
    left.plot([step["time"] for step in run["steps"]],
              [step["mean_reward"] for step in run["steps"]], **style)
    times = [one["time"] for one in run["evaluations"]]
    mean, low, high = zip(*(one["pass@1"] for one in run["evaluations"]), strict=True)
    right.plot(times, mean, marker="o", markersize=3, **style)
    right.fill_between(times, low, high, color=colour, alpha=0.2, linewidth=0)
  for axes, label in ((left, "reward of a rollout"), (right, "held-out pass@1")):
    axes.set(xlabel="seconds (without evaluations)", ylabel=label, ylim=(0, 1))
  _legend(left)
  last = {name: run["evaluations"][-1] for name, run in runs.items()}
  reached = ", ".join(f"{name} {one['pass@1'][0]:.2f} after {one['time']:.3g} seconds"
                      for name, one in last.items())
  return drawing.save(figure, path, f"Held-out pass@1 at the end: {reached}. Bands are 95 % "
                                    "intervals.")


@drawing.styled
def load_heat_map(
    loads_by_domain: dict[str, np.ndarray | list], path: str | pathlib.Path) -> Figure:
  """Draws each expert's load relative to its layer's mean, on one colour scale for all domains.

  Args:
    loads_by_domain: tokens that each expert received, [layers, experts], by domain.
    path: path of the PNG.
  """
  relative = {}
  for domain, load_LE in loads_by_domain.items():
    load_LE = np.asarray(load_LE, float)
    # A layer that received no tokens has no mean to compare with, and is shown as a gap.
    mean_L1 = load_LE.mean(1, keepdims=True)
    relative[domain] = np.divide(load_LE, mean_L1, where=mean_L1 > 0,
                                 out=np.full_like(load_LE, np.nan))
  columns = min(3, len(relative))
  rows = -(-len(relative) // columns)
  layers, experts = next(iter(relative.values())).shape
  panel_width = (drawing.WIDTH - 1.2) / columns
  panel_height = min(max(panel_width * layers / experts, 0.9), 1.6 * panel_width)
  figure, panels = drawing.new_figure(rows * (panel_height + 0.5) + 0.4, rows, columns, sharey=True)
  top = max(2.0, *(np.nanmax(load, initial=0) for load in relative.values()))
  for panel in panels.flat[len(relative):]:
    panel.remove()
  used = list(panels.flat[:len(relative)])
  for panel, (domain, load_LE) in zip(used, relative.items(), strict=True):
    image = panel.imshow(load_LE, norm=TwoSlopeNorm(1, 0, top), cmap="PuOr_r", aspect="auto",
                         interpolation="nearest")
    panel.set_title(domain, fontsize=9)
    panel.grid(False)
    panel.xaxis.set_major_locator(MaxNLocator(12 // columns, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
  for i, panel in enumerate(used):
    if i + columns >= len(used):  # the lowest of its column
      panel.set_xlabel("expert")
    if i % columns == 0:
      panel.set_ylabel("MoE layer")
  bar = figure.colorbar(image, ax=used, ticks=[0, 0.5, 1, (1 + top) / 2, top], format="%.2g",
                        aspect=25, pad=0.02)
  bar.set_label("load ÷ mean")
  busiest = {domain: np.nanmax(load, initial=0) for domain, load in relative.items()}
  domain = max(busiest, key=busiest.get)
  top_LE = relative[domain] == busiest[domain]
  layer, expert = np.argwhere(top_LE)[0] if busiest[domain] else (0, 0)
  return drawing.save(
      figure, path, f"The highest load is {busiest[domain]:.2f} times its layer's mean: expert "
                    f"{expert} of MoE layer {layer} on {domain}. 1 is balanced.")
