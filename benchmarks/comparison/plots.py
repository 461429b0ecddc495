"""Curves of an arm: accuracy against updates, sampled tokens and seconds."""

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.comparison.figures import CONFIDENCE, interval

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # the variants of a config share its colour
AXES = (("updates", 1, "updates"), ("sampled_tokens", 1e6, "million sampled tokens"))
AXES += (("seconds", 1, "seconds of training"),)
WIDTH, HEIGHT, DPI = 11.0, 3.8, 150  # inches, inches, dots an inch
LINE, BAND = 1.6, 0.12  # width of a line, in points; opacity of a band
LABEL_SHARE = 0.055  # height of a label, of the axis
SAMPLE = (1.02, 1.09)  # where a label's piece of line begins and ends, of the axis
LABEL_AT = 1.11  # where its name begins


def styles(methods: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Colour and dashes of each method: a colour a config file, dashes for its variants."""
  configs: dict[str, int] = {}
  chosen = []
  for method in methods:
    seen = configs.get(method["config"], 0)
    configs[method["config"]] = seen + 1
    number = list(configs).index(method["config"])
    chosen.append(
      {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[seen % len(DASHES)]}
    )
  return chosen


def curve(method: Mapping[str, Any], axis: str) -> np.ndarray:
  """[P, 3]: where the points of a method's mean curve lie, the mean, half its interval's width."""
  points = zip(*(run["curve"] for run in method["runs"]), strict=True)
  rows = []
  for at_point in points:
    mean, half, _ = interval([point["accuracy"] for point in at_point])
    rows.append([np.mean([point[axis] for point in at_point]), mean, half or 0.0])
  return np.array(rows)


def spaced(heights: Sequence[float], least: float) -> list[float]:
  """Heights of labels, as near to `heights` as they can be at `least` apart, in their order."""
  order = np.argsort(heights, kind="stable")
  # With i * least taken off, labels must not decrease: neighbours that do are given their mean.
  blocks: list[list[float]] = []
  for i, position in enumerate(order):
    blocks.append([heights[position] - i * least])
    while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
      last = blocks.pop()
      blocks[-1] += last
  flat = [float(np.mean(block)) for block in blocks for _ in block]
  placed = [0.0] * len(heights)
  for i, position in enumerate(order):
    placed[position] = flat[i] + i * least
  return placed


def no_matplotlib(path: pathlib.Path) -> str | None:
  """What to say instead of drawing, where matplotlib is not installed."""
  if importlib.util.find_spec("matplotlib") is None:
    return f"no {path.name}: matplotlib is not installed (pip install -e '.[benchmarks]')"
  return None


def draw(result: Mapping[str, Any], path: pathlib.Path) -> str:
  """Draws the curves of an arm, of a task; returns what was done, in words."""
  if word := no_matplotlib(path):
    return word
  from matplotlib.figure import Figure

  methods = result["methods"]
  figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
  panels = figure.subplots(1, len(AXES), sharey=True)
  chosen = styles(methods)
  for panel, (axis, unit, caption) in zip(panels, AXES, strict=True):
    for method, style in zip(methods, chosen, strict=True):
      at, mean, half = curve(method, axis).T
      panel.fill_between(
        at / unit, mean - half, mean + half, color=style["color"], alpha=BAND, lw=0
      )
      panel.plot(at / unit, mean, lw=LINE, **style)
    panel.set_xlabel(caption)
    panel.set_xlim(left=0)
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel(f"sampled accuracy, {result['split']} split")
  label(panels[-1], methods, chosen)
  seeds = max(len(method["runs"]) for method in methods)
  band = f"mean of {seeds} seeds, band: {CONFIDENCE:.0%} t-interval" if seeds > 1 else "one seed"
  figure.suptitle(f"{result['task']}: {result['budget']} ({band})", fontsize=10)
  figure.savefig(path, dpi=DPI)
  return f"curves: {path}"


def label(panel, methods: Sequence[Mapping[str, Any]], chosen: Sequence[dict[str, str]]) -> None:
  """Names each line right of the panel, at the height where it ends."""
  low, high = panel.get_ylim()
  ends = [curve(method, "updates")[-1, 1] for method in methods]
  heights = spaced(ends, LABEL_SHARE * (high - low))
  for method, style, height in zip(methods, chosen, heights, strict=True):
    panel.plot(
      SAMPLE,
      (height, height),
      transform=panel.get_yaxis_transform(),
      clip_on=False,
      lw=LINE,
      **style,
    )
    panel.text(
      LABEL_AT,
      height,
      method["name"],
      transform=panel.get_yaxis_transform(),
      color=style["color"],
      va="center",
      fontsize=9,
    )
  panel.set_ylim(low, high)
