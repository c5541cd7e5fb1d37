"""Figures of runs and studies: each function draws its data into a PNG that is 800 pixels wide.

Every figure has axes with units, a legend if there is more than one curve, and below it a caption
that states its main values, computed from the same data. Figures are drawn without pyplot, so that
no display is needed and no state is global. Colours are those of Okabe and Ito, which colour-blind
readers can tell apart; line style or marker changes with the colour.

All functions also return the figure.
"""

import itertools
import math
import pathlib
import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.stats import Paired

_DPI, _WIDTH, _HEIGHT = 150, 800 / 150, 480 / 150
_LEGEND_LINE = 0.3  # inches
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"
_VERDICT_COLOURS = {"reproduced": "#0072B2", "contradicted": "#D55E00", "unresolved": "#737373"}
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.alpha": 0.3, "grid.linewidth": 0.5, "legend.frameon": False, "lines.linewidth": 1.5}
_styled = matplotlib.rc_context(_STYLE)
_UNITS = {
    "loss": "training loss (nats per token)",
    "loss_mtp": "MTP loss (nats per token)",
    "grad_norm": "gradient norm (before clipping)",
    "learning_rate": "learning rate (per step)",
    "max_violation": "MaxVio (max ÷ mean − 1)",
    "tokens_per_second": "tokens per second",
    "utilisation": "fraction of peak FLOP/s",
}
_SMOOTHED_FRACTION = 0.03  # time constant of the moving average over a curve's number of points
_CAPTION_LINE = 0.17  # inches
_CAPTION_WIDTH = 88  # characters
_LABEL_WIDTH = 26  # characters per line in the axis label of a small panel


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


def _figure(height: float = _HEIGHT, rows: int = 1, columns: int = 1, **ratios):
  """Returns a figure and the array of its axes, [rows, columns]."""
  figure = Figure((_WIDTH, height), layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False, **ratios)


def _save(figure: Figure, path: str | pathlib.Path, caption: str) -> Figure:
  """Writes the PNG with the caption below the figure, and returns the figure."""
  lines = textwrap.wrap(caption, _CAPTION_WIDTH)
  width, height = figure.get_size_inches()
  below = _CAPTION_LINE * len(lines) + 0.06
  figure.set_size_inches(width, height + below)
  figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))
  figure.text(0.01, 0.05 / (height + below), "\n".join(lines), fontsize=8, style="italic",
              va="bottom")
  figure.savefig(path, dpi=_DPI, format="png")
  return figure


def _last(values: np.ndarray) -> float:
  """Returns the last finite value; NaN if there is none."""
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if finite.size else math.nan


def _ends(values: np.ndarray) -> str:
  """Returns the first and last finite values, in words that follow "goes"."""
  finite = values[np.isfinite(values)]
  return f"from {finite[0]:.3g} to {finite[-1]:.3g}" if finite.size else "through no finite value"


def _extremes(last: dict[str, float]) -> str:
  """Returns which curves end lowest and highest, in words."""
  known = {name: value for name, value in last.items() if math.isfinite(value)}
  if not known:
    return "no curve has finite values"
  low, high = min(known, key=known.get), max(known, key=known.get)
  if known[low] == known[high]:
    return f"{'all end' if len(known) > 1 else f'{low} ends'} at {known[low]:.3g}"
  return f"{low} ends lowest, at {known[low]:.3g}, {high} highest, at {known[high]:.3g}"


def _styles():
  """Yields pairs of colour and dash, of which the first 28 are distinct."""
  for i in itertools.count():
    yield _COLOURS[i % len(_COLOURS)], _DASHES[(i + i // 28) % len(_DASHES)]


def _step_axis(axes: Axes) -> None:
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))


def _legend(axes: Axes) -> None:
  handles, names = axes.get_legend_handles_labels()
  if len(names) > 1 or (names and names[0]):
    axes.legend(handles, names, fontsize=8, ncols=1 + len(names) // 9)


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


@_styled
def loss_curves(
    rows_by_name: dict[str, list[dict]], path: str | pathlib.Path, key: str = "loss") -> Figure:
  """Draws each curve's moving average, on top of the faint values of every seed.

  With several curves, the vertical axis leaves out the fall at the start, where all are alike.

  Args:
    rows_by_name: rows by the curve's name (empty for no legend), with "step", `key` and, for
      several seeds, "per_seed": {key: one value per seed}.
    path: path of the PNG.
    key: the metric to draw.
  """
  figure, ((axes,),) = _figure()
  tails, last = [], {}
  for (name, rows), (colour, dash) in zip(rows_by_name.items(), _styles(), strict=False):
    steps, values = _series(rows, key)
    with_seeds = [row for row in rows if key in row.get("per_seed", {})]
    if with_seeds:
      axes.plot([row["step"] for row in with_seeds], [row["per_seed"][key] for row in with_seeds],
                color=colour, alpha=0.3, linewidth=0.6)
    else:
      axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.6)
    smoothed = _smoothed(values)
    axes.plot(steps, smoothed, color=colour, linestyle=dash, label=name)
    tails.append(smoothed[len(smoothed) // 10:])
    last[name] = _last(smoothed)
  # Several curves are there to be compared, and the fall at the start would hide their differences.
  late = np.concatenate(tails) if len(tails) > 1 else np.empty(0)
  if np.isfinite(late).any():
    low, high = np.nanmin(late), np.nanmax(late)
    axes.set_ylim(low - 0.15 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
  _step_axis(axes)
  axes.set_ylabel(_UNITS.get(key, key))
  _legend(axes)
  single = f"the moving average goes {_ends(smoothed)}" if last else ""
  return _save(figure, path, f"{_UNITS.get(key, key).partition(' (')[0].capitalize()}: "
                             f"{_extremes(last) if len(last) > 1 else single}.")


def _plain_curve(rows: list[dict], path: str | pathlib.Path, key: str) -> Figure:
  figure, ((axes,),) = _figure(0.75 * _HEIGHT)
  axes.plot(*_series(rows, key), color=_COLOURS[0])
  _step_axis(axes)
  axes.set_ylabel(_UNITS[key])
  axes.set_ylim(bottom=0)
  axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
  _, values = _series(rows, key)
  name = _UNITS[key].partition(" (")[0]
  return _save(figure, path, f"{name[0].upper()}{name[1:]} goes {_ends(values)}; its largest value "
                             f"is {np.nanmax(values, initial=-math.inf):.3g}.")


@_styled
def max_violation(rows: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws the imbalance of experts over training, from rows with "step" and "max_violation"."""
  return _plain_curve(rows, path, "max_violation")


@_styled
def learning_rate(rows: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws the learning rate that every step used, from rows with "step" and "learning_rate"."""
  return _plain_curve(rows, path, "learning_rate")


@_styled
def validation(evaluations: list[dict], path: str | pathlib.Path) -> Figure:
  """Draws held-out bits per byte over training, one curve per domain.

  Args:
    evaluations: {"step": int, "bits_per_byte": {domain: value}}, in order of steps.
    path: path of the PNG.
  """
  figure, ((axes,),) = _figure()
  domains = dict.fromkeys(name for e in evaluations for name in e["bits_per_byte"])
  for (i, domain), (colour, dash) in zip(enumerate(domains), _styles(), strict=False):
    points = [(e["step"], e["bits_per_byte"][domain]) for e in evaluations
              if domain in e["bits_per_byte"]]
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, label=domain,
              marker=_MARKERS[i % len(_MARKERS)], markersize=4)
  _step_axis(axes)
  axes.set_ylabel("validation (bits per byte)")
  axes.set_ylim(bottom=0)
  _legend(axes)
  last = evaluations[-1]["bits_per_byte"]
  return _save(figure, path, f"Bits per byte after step {evaluations[-1]['step']:,}: " + ", ".join(
      f"{domain} {bits:.3f}" for domain, bits in last.items()) + "; lower is better.")


@_styled
def panels(
    drawn: dict[str, dict[str, tuple[list, list]]], path: str | pathlib.Path,
    doublings: str | None = None, logarithmic: bool = False) -> Figure:
  """Draws small panels of curves over steps, two per row.

  Args:
    drawn: (steps, values) by the panel's label and the curve's name; a value of None is a gap. A
      name has the same colour in every panel.
    path: path of the PNG.
    doublings: label of the horizontal axis if it shows powers of two, evenly spaced, instead of
      steps; None for steps.
    logarithmic: whether the vertical axes are logarithmic.
  """
  names = list(dict.fromkeys(name for curves in drawn.values() for name in curves))
  styles = dict(zip(names, _styles(), strict=False))
  rows = -(-len(drawn) // 2)
  columns = 3 if max(map(len, names), default=0) < 20 else 2  # the largest number that fits
  extra_lines = max(0, -(-len(names) // columns) - 2)  # of the legend, beyond two
  figure, axes_RC = _figure(_HEIGHT * 0.72 * rows + _LEGEND_LINE * extra_lines, rows, 2)
  for axes, (label, curves) in itertools.zip_longest(axes_RC.flat, drawn.items(),
                                                     fillvalue=("", {})):
    if not curves:
      axes.set_visible(False)
      continue
    for name, (steps, values) in curves.items():
      colour, dash = styles[name]
      axes.plot(steps, np.array(values, float), color=colour, linestyle=dash, label=name,
                marker="o" if len(steps) < 12 else None, markersize=3)
    axes.set_ylabel(textwrap.fill(label, _LABEL_WIDTH))
    if logarithmic:
      axes.set_yscale("log")
    if doublings:
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:.0f}")
      axes.set_xlabel(doublings)
    else:
      _step_axis(axes)
  handles = {name: handle for axes in axes_RC.flat
             for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
  figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
  label, curves = next(iter(drawn.items()))
  last = {name: _last(np.array(values, float)) for name, (_, values) in curves.items()}
  return _save(figure, path, f"First panel, {label}: {_extremes(last)}.")


@_styled
def learning(runs: dict[str, dict], path: str | pathlib.Path) -> Figure:
  """Draws reward and held-out pass@1 of several trainers, each over its own training time.

  Args:
    runs: by trainer, "steps": [{"time", "mean_reward"}] and "evaluations": [{"time", "pass@1":
      [estimate, low, high]}], with times in seconds.
    path: path of the PNG.
  """
  figure, axes_RC = _figure(_HEIGHT * 0.8, 1, 2, sharex=True)
  left, right = axes_RC[0]
  for (name, run), (colour, dash) in zip(runs.items(), _styles(), strict=False):
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
  return _save(figure, path, "Held-out pass@1 at the end: " + ", ".join(
      f"{name} {run['evaluations'][-1]['pass@1'][0]:.2f} after "
      f"{run['evaluations'][-1]['time']:.3g} s" for name, run in runs.items()) + ".")


@_styled
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
  panel_width = (_WIDTH - 1.2) / columns
  panel_height = min(max(panel_width * layers / experts, 0.9), 1.6 * panel_width)
  figure, panels = _figure(rows * (panel_height + 0.5) + 0.4, rows, columns, sharey=True)
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
  figure.supxlabel("expert", fontsize=9)
  figure.supylabel("MoE layer", fontsize=9)
  bar = figure.colorbar(image, ax=used, ticks=[0, 0.5, 1, (1 + top) / 2, top], format="%.2g",
                        aspect=25, pad=0.02)
  bar.set_label("load ÷ mean")
  busiest = {domain: np.nanmax(load, initial=0) for domain, load in relative.items()}
  domain = max(busiest, key=busiest.get)
  layer, expert = np.argwhere(relative[domain] == busiest[domain])[0] if busiest[domain] else (0, 0)
  return _save(figure, path, f"The highest load is {busiest[domain]:.2f} times its layer's mean: "
                             f"expert {expert} of MoE layer {layer} on {domain}. 1 is balanced.")


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


@_styled
def forest(comparisons: list[Comparison], path: str | pathlib.Path) -> Figure:
  """Draws every comparison's interval, with its margin, the paper's value and the verdict."""
  groups: dict[str, list[Comparison]] = {}
  for comparison in comparisons:
    groups.setdefault(comparison.axis, []).append(comparison)
  sizes = [len(group) for group in groups.values()]
  height = 0.42 * sum(sizes) + 0.55 * len(groups) + 0.3
  figure, panels = _figure(height, len(groups), 1, height_ratios=[size + 0.3 for size in sizes])
  for axes, (label, group) in zip(panels.flat, groups.items(), strict=True):
    for y, line in enumerate(group):
      _forest_line(axes, y, line)
    axes.set_yticks(range(len(group)), [textwrap.fill(line.name, 26) for line in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # with more, long numbers would overlap
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
  keys = [axes.plot([], [], "o-", color="black", markersize=5, label="mean, 95 % interval")[0]]
  if any(line.paper is not None for line in comparisons):
    keys += axes.plot([], [], "D", color="black", markerfacecolor="none", label="paper")
  if any(line.margin for line in comparisons):
    keys.append(axes.fill_between([], [], color="#56B4E9", alpha=0.25, label="margin"))
  figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=8,
                frameon=False)
  verdicts = [line.verdict for line in comparisons]
  return _save(figure, path, f"Of {len(verdicts)} claims " + ", ".join(
      f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
      + ". The black line marks no effect, or the claimed threshold.")
