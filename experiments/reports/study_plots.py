"""Figures of studies: comparisons, and what every arm did, each drawn into a PNG.

See `drawing` for what they share.
"""

import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reports import drawing
from experiments.reports.drawing import Curve
from experiments.stats import Paired

_VERDICT_COLOURS = {"reproduced": "#0072B2", "contradicted": "#D55E00", "unresolved": "#737373"}
_COLUMNS = 3  # panels per row of small multiples
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks, in the leading digits


class Comparison(NamedTuple):
  """One line of `forest`.

  Attributes:
    name: what is compared.
    paired: the estimate with its interval; if the interval is infinite, only the estimate is drawn.
    axis: label of the horizontal axis, with its unit; lines with the same label share an axis.
    paper: the paper's value, on the same axis; None if there is none.
    margin: half-width of the band around `reference` within which a difference counts as none.
    verdict: what `stats.judge` returns.
    reference: the value of no effect, or the threshold that is claimed.
  """

  name: str
  paired: Paired
  axis: str
  paper: float | None = None
  margin: float | None = None
  verdict: str = "unresolved"
  reference: float = 0.0


def _forest_line(axes: Axes, y: float, line: Comparison) -> None:
  colour = _VERDICT_COLOURS[line.verdict]
  if line.margin:
    axes.fill_between([line.reference - line.margin, line.reference + line.margin],
                      y - 0.42, y + 0.42, color="#56B4E9", alpha=0.25, linewidth=0)
  axes.plot([line.reference] * 2, [y - 0.5, y + 0.5], color="black", linewidth=0.8)
  if math.isfinite(line.paired.low):
    axes.plot([line.paired.low, line.paired.high], [y, y], color=colour, linewidth=2)
  axes.plot(line.paired.mean, y, "o", color=colour, markersize=5)
  if line.paper is not None:
    axes.plot(line.paper, y, "D", color="black", markerfacecolor="none", markersize=6)
  seeds = f"{line.paired.n} seed{'s' * (line.paired.n > 1)}"
  axes.text(1.02, y, f"{line.verdict}\n{seeds}", color=colour, fontsize=8, va="center",
            transform=axes.get_yaxis_transform())


@drawing.styled
def forest(comparisons: list[Comparison], path: str | pathlib.Path) -> Figure:
  """Draws every comparison's interval, with its margin, the paper's value and the verdict.

  Args:
    comparisons: the lines, from top to bottom.
    path: path of the PNG.
  """
  groups: dict[str, list[Comparison]] = {}
  for comparison in comparisons:
    groups.setdefault(comparison.axis, []).append(comparison)
  sizes = [len(group) for group in groups.values()]
  names = {line.name: drawing.wrapped(line.name, 30) for line in comparisons}
  lines = max(name.count("\n") + 1 for name in names.values())
  height = max(0.42, 0.14 * lines) * sum(sizes) + 0.55 * len(groups) + 0.3
  figure, panels = drawing.new_figure(height, len(groups), 1,
                                      height_ratios=[size + 0.3 for size in sizes])
  for axes, (label, group) in zip(panels.flat, groups.items(), strict=True):
    for y, line in enumerate(group):
      _forest_line(axes, y, line)
    axes.set_yticks(range(len(group)), [names[line.name] for line in group],
                    fontsize=drawing.SMALL)
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.margins(x=0.08)
    # With more ticks, long numbers would overlap.
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.compact(value)))
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
  keys = [axes.plot([], [], "o-", color="black", markersize=5, label="mean, 95 % interval")[0]]
  if any(line.paper is not None for line in comparisons):
    keys += axes.plot([], [], "D", color="black", markerfacecolor="none", label="paper's value")
  if any(line.margin for line in comparisons):
    keys.append(axes.fill_between([], [], color="#56B4E9", alpha=0.25,
                                  label="margin: counts as no difference"))
  figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=drawing.SMALL)
  verdicts = [line.verdict for line in comparisons]
  found = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
  alone = any(line.paired.n < 2 for line in comparisons)
  return drawing.save(figure, path, " ".join(filter(None, [
      f"Of {len(verdicts)} claims {found}.",
      "The black line marks no effect, or the claimed threshold.",
      "A single seed has no interval." * alone])))


@drawing.styled
def multiples(
    curves: Mapping[str, Curve], path: str | pathlib.Path, label: str,
    bound: tuple[float, str] | None = None, first: tuple[str, str, Curve] | None = None,
    other_scale: Collection[str] = (), note: str = "") -> Figure:
  """Draws every arm's difference from a baseline in a panel of its own, on the same scale.

  The vertical axes leave out the first tenth of the curves, in which the loss falls steeply.

  Args:
    curves: differences by name, with their bands (see `drawing`).
    path: path of the PNG.
    label: label of the vertical axes, with what the differences are relative to, and their unit.
    bound: the largest difference that a claim allows, and its name; None for no such claim.
    first: title, axis label and curve of a panel that comes before the others and shows the
      baseline itself; None for no such panel.
    other_scale: names of curves whose vertical axes have their own scale.
    note: a sentence that is added to the caption.
  """
  columns = min(_COLUMNS, len(curves) + bool(first))
  rows = -(-(len(curves) + bool(first)) // columns)
  figure, axes_RC = drawing.new_figure(0.2 + 0.56 * drawing.HEIGHT * rows, rows, columns)
  panels = list(axes_RC.flat)
  for axes in panels[len(curves) + bool(first):]:
    axes.set_visible(False)
  if first:
    title, of_baseline, curve = first
    axes = panels.pop(0)
    drawing.draw_curve(axes, curve, drawing.BLACK)
    axes.set_title(title, fontsize=drawing.SMALL)
    axes.set_ylabel(drawing.wrapped(of_baseline, 20), fontsize=drawing.SMALL)
    drawing.step_axis(axes, 4)
  extent = bound[0] if bound else 0
  limits = _limits([curve for name, curve in curves.items() if name not in other_scale], extent)
  for i, (axes, (name, curve)) in enumerate(zip(panels, curves.items(), strict=False)):
    if bound:
      for value in (-bound[0], bound[0]):
        axes.axhline(value, color=drawing.VERMILION, linewidth=0.8, linestyle="--")
    axes.axhline(0, color=drawing.BLACK, linewidth=0.8)
    drawing.draw_curve(axes, curve, drawing.COLOURS[0])
    axes.set_title(name, fontsize=drawing.SMALL)
    axes.set_ylim(*(_limits([curve], extent) if name in other_scale else limits))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    if (i + bool(first)) % columns == 0 or (i == 0 and rows == 1):
      axes.set_ylabel(drawing.wrapped(label, 20), fontsize=drawing.SMALL)
    drawing.step_axis(axes, 4)
  found = ", ".join(f"{name} {drawing.signed(_late_mean(curve))}{drawing.percent_of(label)}"
                    for name, curve in curves.items())
  shown = drawing.curve_values(curve for name, curve in curves.items() if name not in other_scale)
  cut = shown.size and (shown.min() < limits[0] or shown.max() > limits[1])
  return drawing.save(figure, path, " ".join(filter(None, [
      f"Mean over the second half of the steps: {found}.",
      f"Dashed: {bound[1]}." if bound else "",
      "Larger differences in the first tenth of the steps are cut off." if cut else "", note])))


def _limits(curves: Sequence[Curve], extent: float) -> tuple[float, float]:
  """Returns limits for the later parts of curves that also include 0 and ±`extent`."""
  late = [[part[len(part) // 10:] for part in curve] for curve in curves]
  values = np.append(drawing.curve_values(late), [-extent, 0, extent])
  low, high = values.min(), values.max()
  return low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9


def _late_mean(curve: Curve) -> float:
  _, values, *_ = curve
  late = np.array(values[len(values) // 2:], float)
  return float(late[np.isfinite(late)].mean()) if np.isfinite(late).any() else math.nan


@drawing.styled
def outcomes(
    values: Mapping[str, Mapping[str, Sequence[float]]], path: str | pathlib.Path,
    thresholds: Mapping[str, float] | None = None) -> Figure:
  """Draws every arm's metrics, one panel per metric, with a point for each seed.

  Args:
    values: by the metric's label and the arm's name, one value per seed. The first arm is the
      baseline.
    path: path of the PNG.
    thresholds: by the metric's label, a threshold that a claim states.
  """
  thresholds = thresholds or {}
  arms = list(dict.fromkeys(arm for by_arm in values.values() for arm in by_arm))
  figure, (axes_C,) = drawing.new_figure(0.7 + 0.25 * len(arms), 1, len(values), sharey=True)
  for axes, (label, by_arm) in zip(axes_C, values.items(), strict=True):
    by_arm = {arm: known for arm, of_seeds in by_arm.items()
              if (known := [value for value in of_seeds if value is not None])}
    for arm, of_seeds in by_arm.items():
      y = arms.index(arm)
      axes.plot(of_seeds, [y] * len(of_seeds), "o", color=drawing.COLOURS[0], markersize=4,
                alpha=0.5, markeredgewidth=0)
      axes.plot([np.mean(of_seeds)] * 2, [y - 0.35, y + 0.35], color=drawing.COLOURS[0])
    if arms[0] in by_arm:
      axes.axvline(np.mean(by_arm[arms[0]]), color=drawing.GREY, linewidth=1, linestyle="--")
    if label in thresholds:
      axes.axvline(thresholds[label], color=drawing.BLACK, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    if 0 < axes.get_xlim()[0] < 0.3 * axes.get_xlim()[1]:
      axes.set_xlim(left=0)
    axes.set_xlabel(label.replace(" (", "\n("), fontsize=drawing.SMALL)
    axes.grid(False, axis="y")
  axes_C[0].set_yticks(range(len(arms)), arms)
  axes_C[0].set_ylim(len(arms) - 0.5, -0.5)
  means = {label: {arm: float(np.mean(of_seeds)) for arm, of_seeds in by_arm.items()}
           for label, by_arm in values.items()}
  found = "; ".join(f"{drawing.without_unit(label)} {drawing.extremes(by_arm)}"
                    for label, by_arm in means.items())
  claimed = "; ".join(f"{drawing.without_unit(label)} {value:g}"
                      for label, value in thresholds.items() if label in values)
  return drawing.save(figure, path, " ".join(filter(None, [
      f"Means over seeds (bars): {found}.",
      f"Dashed: the mean of {arms[0]}.",
      f"Black: the claimed threshold ({claimed})." if claimed else ""])))
