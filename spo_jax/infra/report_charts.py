"""The report's charts: inline SVG, one for each choice of the x-axis, and the data for hovering."""

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spo_jax.infra.progress import compact

# More points than this cannot be told apart on a screen.
MAX_POINTS = 240
MAX_DOTS = 60
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 34
NARROW, MEDIUM = 360, 740
GAP = 20

Numbers = Sequence[float | None]


class Series(NamedTuple):
  """One line of a chart: its key in the page's data, its label and its values, None for gaps."""

  key: str
  label: str
  values: Numbers


class Chart(NamedTuple):
  """One chart.

  Attributes:
    title: Its heading.
    series: Its lines.
    kind: "noisy" (faint, with a smoothed line), "points" (sparse, with dots) or "stack" (areas).
    percent: Values are shares of one.
    note: What the values are.
  """

  title: str
  series: Sequence[Series]
  kind: str = "noisy"
  percent: bool = False
  note: str = ""


class Axis(NamedTuple):
  """One choice of the x-axis: its name in CSS, its caption and where every row stands on it."""

  name: str
  caption: str
  values: Sequence[float]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers within [low, high], about `count` of them."""
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Like `nice_ticks`, at multiples of seconds, minutes or hours that a clock would show."""
  raw = (high - low) / count
  steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)
  step = next((s for s in steps if s >= raw), 86400 * math.ceil(raw / 86400))
  return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(values: Numbers, window: int) -> list[float | None]:
  """Centred moving average that skips gaps and is cut off at the ends."""
  half = window // 2
  sums = [0.0, *itertools.accumulate(value or 0.0 for value in values)]
  counts = [0, *itertools.accumulate(value is not None for value in values)]
  result: list[float | None] = []
  for i, value in enumerate(values):
    a, b = max(0, i - half), min(len(values), i + half + 1)
    result.append(None if value is None else (sums[b] - sums[a]) / (counts[b] - counts[a]))
  return result


def pick_rows(count: int, sparse: Sequence[int]) -> list[int]:
  """At most about `MAX_POINTS` of `count` row numbers, and as many of the `sparse` ones."""

  def thin(rows: Sequence[int]) -> set[int]:
    if len(rows) <= MAX_POINTS:
      return set(rows)
    return {rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)}

  return sorted(thin(range(count)) | thin(sparse))


def tick_labels(ticks: Sequence[float], percent: bool) -> list[str]:
  """Labels of the y-axis, all with the same number of decimals."""
  if percent:
    ticks = [100 * tick for tick in ticks]
  top = max((abs(tick) for tick in ticks), default=0)
  step = ticks[1] - ticks[0] if len(ticks) > 1 else top or 1
  if top >= 1000:
    labels = [compact(tick).replace(".0", "") for tick in ticks]
  elif step < 1e-3:
    labels = [f"{tick:.1e}".replace("e-0", "e-").replace(".0e", "e") for tick in ticks]
    labels = ["0" if tick == 0 else label for tick, label in zip(ticks, labels, strict=True)]
  else:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
      decimals += 1
    labels = [f"{tick:.{decimals}f}" for tick in ticks]
  return [label.replace("-", "−") + ("%" if percent else "") for label in labels]


def value_text(value: float | None, percent: bool = False) -> str:
  """A value in a legend; `fmt` in the page's script writes the same."""
  if value is None:
    return "–"
  if percent:
    return f"{100 * value:.1f}%"
  if abs(value) >= 1000:
    return compact(value).replace("-", "−")
  if value and abs(value) < 1e-3:
    return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
  return f"{value:.3g}".replace("-", "−")


def _x_label(axis: Axis, tick: float) -> str:
  if axis.name != "seconds":
    return compact(tick).replace(".0", "")
  hours, rest = divmod(round(tick), 3600)
  return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _attribute(text: str) -> str:
  return html.escape(text, quote=True)


def _tenths(number: int) -> str:
  """A tenth of `number`, in as few characters as SVG needs."""
  return f"{number / 10:g}".replace("0.", ".") if abs(number) < 10 else f"{number / 10:g}"


def _path(points: Sequence[tuple[float, float] | None]) -> str:
  """Path through the points, broken at gaps; in relative steps, which take fewer characters."""
  parts, last, pen = [], None, "l"
  for point in points:
    if point is None:
      last = None
      continue
    x, y = round(10 * point[0]), round(10 * point[1])
    if last is None:
      parts.append(f"M{_tenths(x)} {_tenths(y)}")
      pen = "l"
    else:
      parts.append(f"{pen}{_tenths(x - last[0])} {_tenths(y - last[1])}")
      pen = " "
    last = x, y
  return "".join(parts).replace(" -", "-")


def _stacked(series: Sequence[Series]) -> list[list[float]]:
  """Running sums over the series; gaps count as nothing."""
  tops, total = [], [0.0] * len(series[0].values)
  for one in series:
    total = [t + (v or 0.0) for t, v in zip(total, one.values, strict=True)]
    tops.append(total)
  return tops


def _y_range(chart: Chart, drawn: Sequence[Numbers]) -> tuple[float, float]:
  values = [v for line in drawn for v in line if v is not None]
  low, high = min(values), max(values)
  if low >= 0:
    low = 0.0
  if chart.percent:
    high = min(max(high * 1.15, 0.05), 1.0)
  if high <= low:
    low, high = low - (abs(low) or 1) * (low != 0), high + (abs(high) or 1)
  pad = 0.04 * (high - low)
  return low - (pad if low < 0 else 0), high + (0 if chart.percent and high == 1.0 else pad)


def _svg(
  chart: Chart, axis: Axis, rows: Sequence[int], group: str, width: int, height: int, css: str
) -> str:
  """One chart for one x-axis at one size."""
  right, bottom = width - RIGHT, height - BOTTOM
  xs = [axis.values[row] for row in rows]
  x0, x1 = min(xs), max(xs)
  if x1 <= x0:
    x0, x1 = (0.0, x1) if x1 > 0 else (x0, x0 + 1)
  stack = chart.kind == "stack"
  if stack:
    rows = [row for row in rows if any(one.values[row] is not None for one in chart.series)]
  drawn = _stacked(chart.series) if stack else [one.values for one in chart.series]
  y0, y1 = _y_range(chart, drawn)
  to_x: Callable[[float], float] = lambda x: LEFT + (x - x0) / (x1 - x0) * (right - LEFT)
  to_y: Callable[[float], float] = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

  def points(values: Numbers) -> list[tuple[float, float] | None]:
    return [
      None if values[row] is None else (to_x(axis.values[row]), to_y(values[row])) for row in rows
    ]

  out = [
    f'<svg class="x-{axis.name} {css}" viewBox="0 0 {width} {height}" role="img"'
    f' aria-label="{_attribute(chart.title)} over {axis.caption}"'
    f' data-g="{group}" data-x="{axis.name}"'
    f' data-b="{LEFT},{right},{TOP},{bottom},{x0:.6g},{x1:.6g},{y0:.6g},{y1:.6g}">'
  ]
  ticks = nice_ticks(y0, y1)
  for tick, label in zip(ticks, tick_labels(ticks, chart.percent), strict=True):
    y = to_y(tick)
    out.append(f'<path class="{"axis" if tick == 0 else "grid"}" d="M{LEFT} {y:.1f}H{right}"/>')
    out.append(f'<text class="y" x="{LEFT - 7}" y="{y + 3.5:.1f}">{label}</text>')
  count = 4 if width == NARROW else 8
  for tick in (time_ticks if axis.name == "seconds" else nice_ticks)(x0, x1, count):
    if axis.name == "iterations" and tick != int(tick):
      continue
    x = to_x(tick)
    out.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
    out.append(f'<text class="x" x="{x:.1f}" y="{bottom + 15}">{_x_label(axis, tick)}</text>')
  out.append(f'<text class="cap" x="{right}" y="{height - 4}">{axis.caption}</text>')
  window = max(5, len(axis.values) // 16) | 1
  floor = [(to_x(axis.values[row]), bottom) for row in rows]
  for i, line in enumerate(drawn):
    at = points(line)
    if stack:
      out.append(f'<path class="area c{i}" d="{_path(at + floor[::-1])}Z"/>')
      floor = at
    elif chart.kind == "points":
      known = [point for point in at if point is not None]
      out.append(f'<path class="line c{i}" d="{_path(known)}"/>')
      if len(known) <= MAX_DOTS:
        out += [f'<circle class="mark c{i}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in known]
    else:
      out.append(f'<path class="raw c{i}" d="{_path(at)}"/>')
      out.append(f'<path class="line c{i}" d="{_path(points(smooth(line, window)))}"/>')
      if sum(point is not None for point in at) == 1:
        x, y = next(point for point in at if point is not None)
        out.append(f'<circle class="mark c{i}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
  out.append(f'<path class="cross" d="M0 {TOP}V{bottom}"/>')
  if not stack:
    out += [
      f'<circle class="dot c{i}" r="3.5" data-k="{_attribute(one.key)}"/>'
      for i, one in enumerate(chart.series)
    ]
  out.append("</svg>")
  return "".join(out)


def has_data(chart: Chart) -> bool:
  """Whether any of its lines has a value."""
  return any(value is not None for one in chart.series for value in one.values)


def figure(
  chart: Chart, axes: Sequence[Axis], rows: Sequence[int], group: str, span: int = 1
) -> str:
  """A chart with its heading and legend, over `span` of the grid's three columns.

  Args:
    chart: What to draw.
    axes: Choices of the x-axis.
    rows: Which values are drawn.
    group: Name of the page data that the chart's keys belong to.
    span: Columns; a chart of more than one is also drawn for narrow screens.
  """
  legend = []
  for i, one in enumerate(chart.series):
    last = next((v for v in reversed(one.values) if v is not None), None)
    flag = " data-p" if chart.percent else ""
    legend.append(
      f'<span class="key"><i class="c{i}"></i>{html.escape(one.label)} '
      f'<b data-g="{group}" data-k="{_attribute(one.key)}"{flag}>'
      f"{value_text(last, chart.percent)}</b></span>"
    )
  width = NARROW * span + GAP * (span - 1)
  svgs = []
  for axis in axes:
    if span > 1:
      svgs.append(_svg(chart, axis, rows, group, width, 210 if span == 2 else 280, "wide"))
    if span > 2:
      svgs.append(_svg(chart, axis, rows, group, MEDIUM, 250, "mid"))
    svgs.append(_svg(chart, axis, rows, group, NARROW, 210, "narrow" if span > 1 else ""))
  note = f' <small title="{_attribute(chart.note)}">?</small>' if chart.note else ""
  return (
    f'<figure class="card span{span}"><figcaption><h3>{html.escape(chart.title)}{note}</h3>'
    f'<div class="legend">{"".join(legend)}</div></figcaption>{"".join(svgs)}</figure>'
  )


def grid(charts: Sequence[Chart], axes: Sequence[Axis], rows: Sequence[int], group: str) -> str:
  """The charts that have data, three a row; the last one fills its row."""
  charts = [chart for chart in charts if has_data(chart)]
  spans = [1] * len(charts)
  if charts:
    spans[-1] = 3 - (len(charts) - 1) % 3
  cards = [
    figure(chart, axes, rows, group, span) for chart, span in zip(charts, spans, strict=True)
  ]
  return f'<div class="grid">{"".join(cards)}</div>'


def chart_data(
  charts: Sequence[Chart], axes: Sequence[Axis], rows: Sequence[int]
) -> Mapping[str, Any]:
  """What the page's script reads: x per axis and y per series, at the drawn rows."""

  def at(values: Numbers) -> list[float | None]:
    return [None if values[row] is None else float(f"{values[row]:.4g}") for row in rows]

  return {
    "x": {axis.name: [float(f"{axis.values[row]:.7g}") for row in rows] for axis in axes},
    "y": {one.key: at(one.values) for chart in charts for one in chart.series},
  }
