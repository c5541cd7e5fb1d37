"""What all figures of reports share: their size, colours and axes, and the caption below them.

A figure is a PNG that is 800 pixels wide, has axes with units, and below it a caption that states
its main values, computed from the same data. Figures are drawn without pyplot, so that no display
is needed and no state is global. Colours are those of Okabe and Ito, which colour-blind readers can
tell apart; line style or marker changes with the colour.

A curve is given as `(steps, values)`, or as `(steps, values, low, high)` if a band surrounds it,
such as from the lowest to the highest seed. A value of None is a gap.
"""

import itertools
import math
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

DPI, WIDTH, HEIGHT = 150, 800 / 150, 480 / 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
SMALL = 8  # points: size of legends and of the labels of small panels
GREY, BLACK, VERMILION = "#737373", "#000000", "#D55E00"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.alpha": 0.3, "grid.linewidth": 0.5, "legend.frameon": False, "lines.linewidth": 1.5}
styled = matplotlib.rc_context(_STYLE)
_CAPTION_LINE = 0.14  # inches
_CAPTION_WIDTH = 82  # characters
_TAIL = 20.0  # a series is heavy-tailed if its maximum is more than this many times its median

Curve = Sequence[Sequence[float | None]]


def new_figure(height: float = HEIGHT, rows: int = 1, columns: int = 1, **ratios):
  """Returns a figure and the array of its axes, [rows, columns]."""
  figure = Figure((WIDTH, height), layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False, **ratios)


def save(figure: Figure, path: str | pathlib.Path, caption: str) -> Figure:
  """Writes the PNG with the caption below the figure, and returns the figure."""
  lines = wrapped(caption, _CAPTION_WIDTH).split("\n")
  width, height = figure.get_size_inches()
  below = _CAPTION_LINE * len(lines) + 0.12
  figure.set_size_inches(width, height + below)
  figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))
  figure.text(0.01, 0.05 / (height + below), "\n".join(lines), fontsize=8, style="italic",
              va="bottom")
  figure.savefig(path, dpi=DPI, format="png")
  return figure


# Words for captions and labels.


def wrapped(text: str, width: int) -> str:
  """Returns the text in lines of at most `width` characters; percent signs follow their number."""
  return textwrap.fill(text.replace(" %", "\N{NO-BREAK SPACE}%"), width,
                       break_on_hyphens=False)


def last_value(values: Iterable[float | None]) -> float:
  """Returns the last finite value; NaN if there is none."""
  values = np.array(values, float)
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if finite.size else math.nan


def extremes(values: dict[str, float], unit: str = "") -> str:
  """Returns the lowest and the highest value with their names, in words.

  Args:
    values: values by name, of which captions have the first line.
    unit: what follows each value.
  """
  known = {name.partition("\n")[0]: value for name, value in values.items()
           if math.isfinite(value)}
  if not known:
    return "no finite values"
  if len(values) == 1:
    return f"{compact(*known.values())}{unit}"
  low, high = min(known, key=known.get), max(known, key=known.get)
  if known[low] == known[high]:
    return f"{compact(known[low])}{unit} ({'all' if len(known) > 1 else low})"
  return f"{compact(known[low])}{unit} ({low}) to {compact(known[high])}{unit} ({high})"


def compact(value: float) -> str:
  """Returns a value to three significant digits, with a minus sign that is as wide as a plus."""
  return f"{value:.3g}".replace("-", "−")


def signed(value: float) -> str:
  """Returns a difference as `compact` does, with its sign."""
  return ("+" if value > 0 else "") + compact(value)


def percent_of(label: str) -> str:
  """Returns the percent sign that follows values of this axis label, if it states that unit."""
  return " %" if label.endswith("(%)") else ""


def without_unit(label: str) -> str:
  """Returns a label without the unit that follows it in parentheses."""
  return label.partition(" (")[0]


# Styles and axes.


def styles() -> Iterator[tuple[str, str]]:
  """Yields pairs of colour and dash, of which the first 28 are distinct."""
  for i in itertools.count():
    yield COLOURS[i % len(COLOURS)], DASHES[(i + i // 28) % len(DASHES)]


def step_axis(axes: Axes, ticks: int = 8) -> None:
  """Labels the horizontal axis as training steps, with at most `ticks` intervals between ticks."""
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))


def ratio_axis(axes: Axes, label: str, values: Iterable[float]) -> None:
  """Makes the horizontal axis logarithmic, with ticks at powers of 2 or 10 that are in the data.

  Args:
    axes: the panel.
    label: label of the axis.
    values: the horizontal positions of the data.
  """
  values = sorted(set(values))
  doubling = all(math.log2(value).is_integer() for value in values)
  axes.set_xscale("log", base=2 if doubling else 10)
  if doubling:
    axes.set_xticks(values[::-(-len(values) // 4)], minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set_xlabel(label)


def log_axis(axis: Axis, low: float, high: float) -> None:
  """Sets ticks with plain numbers on a logarithmic axis.

  Args:
    axis: the axis.
    low: lowest positive value of the data.
    high: highest value of the data.
  """
  decades = math.log10(high / low)
  axis.set_major_locator(LogLocator(10, subs=(1,) if decades > 2 else (1, 2, 5), numticks=7))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axis.set_minor_locator(NullLocator())


def heavy_tailed(values: np.ndarray) -> bool:
  """Whether a few of these values are so large that a linear axis would hide the rest."""
  finite = values[np.isfinite(values)]
  return bool(finite.size and finite.min() >= 0 and finite.max() > _TAIL * np.median(finite) > 0)


def curve_values(curves: Iterable[Curve]) -> np.ndarray:
  """Returns all finite values of curves and of their bands."""
  parts = [np.array(part, float).ravel() for curve in curves for part in curve[1:]]
  values = np.concatenate(parts) if parts else np.empty(0)
  return values[np.isfinite(values)]


def draw_curve(axes: Axes, curve: Curve, colour: str, dash: str = "-", label: str = "",
               marker: str = "o") -> None:
  """Draws a curve with its band; the points of a short curve have markers."""
  steps, values, *band = (np.array(part, float) for part in curve)
  values, *band = (np.where(np.isfinite(part), part, np.nan) for part in (values, *band))
  axes.plot(steps, values, color=colour, linestyle=dash, label=label,
            marker=marker if len(steps) < 12 else None, markersize=3)
  if band:
    axes.fill_between(steps, *band, color=colour, alpha=0.18, linewidth=0)
