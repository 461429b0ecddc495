"""The learning rate of each method, chosen by the same small sweep."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from spo_jax.errors import UserError

DIGITS = 3  # significant ones of a rate beyond the grid

Scores = Mapping[float, Sequence[float]]  # final accuracies over seeds, by rate


def best(scores: Scores) -> float:
  """The rate of the highest mean accuracy, the lower one of equals."""
  return max(sorted(scores), key=lambda rate: statistics.fmean(scores[rate]))


def at_edge(scores: Scores) -> bool:
  """Whether the best rate is the least or the largest that was tried."""
  return best(scores) in (min(scores), max(scores))


def beyond(scores: Scores) -> float | None:
  """The next rate past the edge that the best one lies at, by the grid's own ratio there.

  None if the best rate lies inside, or a single rate tells no ratio.
  """
  tried = sorted(scores)
  if len(tried) < 2 or not at_edge(scores):
    return None
  edge, inner = (tried[0], tried[1]) if best(scores) == tried[0] else (tried[-1], tried[-2])
  return float(f"{edge * edge / inner:.{DIGITS}g}")


def read_rates(path: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
  """Chosen rates by task, arm and method.

  Raises:
    UserError: if the file is missing or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
