"""What a finished run reached, and what several of them say together."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.comparison.budgets import Pace, pace
from spo_jax.infra.metrics import read_metrics

CONFIDENCE = 0.95
SAMPLED, GREEDY = "eval/accuracy", "eval/accuracy_greedy"


class Interval(NamedTuple):
  """A mean over runs, and half the width of its confidence interval."""

  mean: float
  half: float | None  # None of a single run
  count: int


def interval(values: Sequence[float]) -> Interval:
  """The mean with its t-interval, t_{n-1} s / sqrt(n), at `CONFIDENCE`."""
  values = np.asarray(values, np.float64)
  count = len(values)
  if count < 2:
    return Interval(float(values.mean()), None, count)
  quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
  return Interval(
    float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(count)), count
  )


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
  """Ours - theirs, over the seeds that both have; None if there are none."""
  seeds = sorted(ours.keys() & theirs.keys())
  return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def final_accuracy(workdir: pathlib.Path) -> float:
  """Sampled accuracy of the last policy."""
  return [row for row in read_metrics(workdir) if SAMPLED in row][-1][SAMPLED]


def figures(workdir: pathlib.Path, updates: int, paced: Pace | None = None) -> dict[str, Any]:
  """Figures of a finished run, and its curve: the same at each evaluation.

  Seconds are those of a median iteration times iterations, so compilation and evaluation are left
  out.

  Args:
    workdir: of the run.
    updates: in an iteration.
    paced: from a calibration, on a machine that did nothing else; None takes the run's own.
  """
  rows = read_metrics(workdir)
  of_iteration = (paced or pace(rows)).seconds
  curve = [
    {
      "iteration": row["iteration"],
      "updates": row["iteration"] * updates,
      "sampled_tokens": row["tokens/sampled"],
      "trained_tokens": row["tokens/trained"],
      "seconds": row["iteration"] * of_iteration,
      "accuracy": row[SAMPLED],
      "accuracy_greedy": row[GREEDY],
    }
    for row in rows
    if SAMPLED in row
  ]
  first, last = curve[0], curve[-1]
  return {
    **last,
    "accuracy_before": first["accuracy"],
    "accuracy_greedy_before": first["accuracy_greedy"],
    "elapsed_s": rows[-1]["time/elapsed_s"],
    "curve": curve,
  }
