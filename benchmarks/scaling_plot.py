"""Panels of `benchmarks.scaling`: tokens a second against size, measured and by the roofline."""

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.comparison.plots import COLOURS, DPI, no_matplotlib

CAPTIONS = {
  "batch": "continuations, one a prompt",
  "context": "tokens of a shared prompt",
  "branches": "children of a node, three levels",
}
WIDTH, HEIGHT = 3.7, 3.6  # inches, of a panel
TICKS = (1, 2, 5)  # of a power of ten that have a number
LINE, CAP = 1.6, 3  # width of a line and of a bar's ends, in points


def draw(record: Mapping[str, Any], path: pathlib.Path) -> str:
  """Draws a panel an axis; returns what was done, in words."""
  if word := no_matplotlib(path):
    return word
  from matplotlib.figure import Figure

  axes = [axis for axis in CAPTIONS if any(p["axis"] == axis for p in record["points"])]
  figure = Figure(figsize=(WIDTH * len(axes), HEIGHT), layout="constrained")
  panels = figure.subplots(1, len(axes), squeeze=False)[0]
  for panel, axis in zip(panels, axes, strict=True):
    points = sorted((p for p in record["points"] if p["axis"] == axis), key=lambda p: p["size"])
    fill(panel, points)
    panel.set_xlabel(CAPTIONS[axis])
  panels[0].set_ylabel("new tokens a second")
  panels[0].legend(frameon=False)
  figure.suptitle(
    f"{record['machine']}, {record['dtype']}, {record['parameters'] / 1e6:.1f} M parameters",
    fontsize=10,
  )
  figure.savefig(path, dpi=DPI)
  return f"plot: {path}"


def fill(panel, points: list[Mapping[str, Any]]) -> None:
  """The lines of an axis, on logarithmic scales."""
  from matplotlib.ticker import LogLocator

  sizes = [point["size"] for point in points]
  rates = [point["tokens_per_s"] for point in points]
  median = [rate["median"] for rate in rates]
  bars = [
    [rate["median"] - rate["least"] for rate in rates],
    [rate["most"] - rate["median"] for rate in rates],
  ]
  panel.errorbar(
    sizes, median, yerr=bars, color=COLOURS[0], lw=LINE, marker="o", capsize=CAP, label="measured"
  )
  panel.plot(
    sizes,
    [point["roofline_tokens_per_s"] for point in points],
    color=COLOURS[1],
    lw=LINE,
    ls="--",
    label="roofline of decode",
  )
  panel.set_xscale("log", base=2)
  panel.set_yscale("log")
  panel.set_xticks(sizes, [str(size) for size in sizes])
  panel.minorticks_off()
  panel.yaxis.set_major_locator(LogLocator(subs=TICKS))
  panel.yaxis.set_major_formatter("{x:,.0f}")
  panel.grid(axis="y", color="0.9")
  panel.spines[["top", "right"]].set_visible(False)
