"""Pictures of what the instrument found; they need matplotlib."""

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from spo_jax.analysis.alignment import Alignment
from spo_jax.analysis.truth import Trajectory
from spo_jax.analysis.values import Drawn
from spo_jax.infra.progress import compact

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GAIN, LOSS = COLOURS[0], COLOURS[1]
DASHES = ("-", "--", ":", "-.")
DPI = 150
ROW_HEIGHT, TOKEN_WIDTH = 1.0, 0.3  # inches
LABEL_SHARE = 0.035  # height of a label, of the axis
SPREAD = (16, 84)  # percentiles of a method's draws
TRAJECTORY_FILE, COSINE_FILE = "credit_trajectory.png", "credit_cosine.png"


def available() -> bool:
  """Whether matplotlib is installed."""
  return importlib.util.find_spec("matplotlib") is not None


def most_telling(trajectories: Sequence[Trajectory]) -> int:
  """Index of the trajectory whose state loses and gains the most value by single tokens."""
  return int(np.argmax([-t.advantages.min() * t.advantages.max() for t in trajectories]))


def draw_trajectory(
  folder: pathlib.Path,
  trajectories: Sequence[Trajectory],
  texts: Sequence[Sequence[str]],
  drawn: Sequence[Drawn],
) -> pathlib.Path:
  """One response: its values, its true advantages, and below each method's.

  A bar is one draw, as an update would see it; the line through it spans 68 % of draws.

  Args:
    folder: where the picture goes.
    trajectories: all that were judged.
    texts: of the tokens of each.
    drawn: methods, of one share.
  """
  import matplotlib.figure

  index = most_telling(trajectories)
  trajectory = trajectories[index]
  first = sum(len(t.tokens) for t in trajectories[:index])
  length = len(trajectory.tokens)
  positions = np.arange(length)
  rows = 2 + len(drawn)
  figure = matplotlib.figure.Figure(
    figsize=(3.5 + TOKEN_WIDTH * length, 1.2 + ROW_HEIGHT * rows), layout="constrained"
  )
  axes = figure.subplots(rows, 1, sharex=True)
  edges = np.arange(length + 1) - 0.5
  axes[0].plot(edges, trajectory.values, color="black")
  low, high = (trajectory.values + sign * 2 * trajectory.errors for sign in (-1, 1))
  axes[0].fill_between(edges, low, high, color="#bbbbbb")
  axes[0].set_ylim(-0.05, 1.05)
  _name(axes[0], "value V*")
  _bars(axes[1], positions, trajectory.advantages)
  _name(axes[1], "true\nadvantage")
  for axis, one in zip(axes[2:], drawn, strict=True):
    draws = one.of_trajectory(first, length)
    _bars(axis, positions, draws[0])
    axis.vlines(positions, *np.percentile(draws, SPREAD, axis=0), color="#555555", linewidth=0.8)
    _name(axis, f"{one.judged.method}\n{one.judged.tokens:.0f} tokens\na prompt")
  axes[-1].set_xticks(positions, texts[index], family="monospace")
  axes[-1].set_xlim(-0.7, length - 0.3)
  figure.suptitle("Which tokens earned the reward?\nOne response, and one draw of each method")
  path = folder / TRAJECTORY_FILE
  figure.savefig(path, dpi=DPI)
  return path


def _bars(axis, positions: np.ndarray, heights: np.ndarray) -> None:
  colours = np.where(heights >= 0, GAIN, LOSS)
  axis.bar(positions, heights, color=colours, width=0.8)
  axis.axhline(0, color="#999999", linewidth=0.6)
  axis.margins(y=0.1)


def _name(axis, text: str) -> None:
  axis.set_ylabel(text, rotation=0, ha="right", va="center")
  axis.spines[["top", "right"]].set_visible(False)


def draw_cosines(folder: pathlib.Path, aligned: Mapping[str, Sequence[Alignment]]) -> pathlib.Path:
  """Cosine of an update's gradient to the true one against its sampled tokens, a line a method."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(9, 6.5), layout="constrained")
  axis = figure.subplots()
  styles = _styles(list(aligned))
  for name, found in aligned.items():
    tokens = [at.tokens for at in found]
    cosines = [at.cosine.value for at in found]
    errors = [at.cosine.error for at in found]
    axis.errorbar(tokens, cosines, errors, marker="o", markersize=3, capsize=2, **styles[name])
  axis.set_xscale("log")
  budgets = [at.tokens for at in next(iter(aligned.values()))]
  axis.set_xticks(budgets, [compact(tokens) for tokens in budgets])
  axis.set_xticks([], minor=True)
  axis.set_xlabel("sampled tokens an update")
  axis.set_ylabel("cosine to the true gradient")
  axis.spines[["top", "right"]].set_visible(False)
  ends = {name: found[-1].cosine.value for name, found in aligned.items()}
  low, high = axis.get_ylim()
  heights = _spaced(list(ends.values()), LABEL_SHARE * (high - low))
  for (name, end), height in zip(ends.items(), heights, strict=True):
    axis.annotate(
      name,
      (aligned[name][-1].tokens, end),
      xytext=(1.03, (height - low) / (high - low)),
      textcoords="axes fraction",
      color=styles[name]["color"],
      va="center",
      fontsize=8,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": styles[name]["color"],
        "linewidth": 0.5,
        "relpos": (0, 0.5),
        "shrinkA": 0,
      },
    )
  path = folder / COSINE_FILE
  figure.savefig(path, dpi=DPI)
  return path


def _styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
  """A colour for each first word of the names, dashes for its variants."""
  families: dict[str, int] = {}
  styles = {}
  for name in names:
    family = name.replace(",", " ").split()[0]
    seen = families.get(family, 0)
    families[family] = seen + 1
    colour = COLOURS[list(families).index(family) % len(COLOURS)]
    styles[name] = {"color": colour, "linestyle": DASHES[seen % len(DASHES)]}
  return styles


def _spaced(heights: Sequence[float], least: float) -> list[float]:
  """Heights in their order, at least so far apart: from the lowest up, and back from the middle."""
  order = np.argsort(heights, kind="stable")
  placed = np.array(heights, float)
  for below, above in zip(order[:-1], order[1:], strict=True):
    placed[above] = max(placed[above], placed[below] + least)
  return list(placed - (placed.mean() - np.mean(heights)))
