"""What is held equal, and how many iterations a method has for it.

A run's length is fixed before it starts, since the learning rate decays over all of it. Tokens and
seconds of an iteration are therefore taken from a short run, the calibration.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import Config
from spo_jax.errors import UserError

# own: every config at its own length; else what all methods have the same of.
ARMS = ("own", "prompts", "tokens", "seconds")


@dataclasses.dataclass(frozen=True)
class Budgets:
  """How much of it; None where an arm is not asked for."""

  prompts: int | None = None  # of an update
  updates: int | None = None
  tokens: float | None = None  # sampled
  seconds: float | None = None  # of training

  def told(self, arm: str) -> str:
    """The budget of an arm in words.

    Raises:
      UserError: if the command line does not give it.
    """
    if arm == "own":
      return "every config at its own length"
    needed = ("prompts", "updates") if arm == "prompts" else (arm,)
    for name in needed:
      if getattr(self, name) is None:
        raise UserError(f"the arm {arm!r} needs --{name}")
    if arm == "prompts":
      return f"{self.updates} updates, each on {self.prompts} prompts"
    if arm == "tokens":
      return f"{self.tokens / 1e6:g} million sampled tokens"
    return f"{self.seconds:g} seconds of training"


@dataclasses.dataclass(frozen=True)
class Pace:
  """What an iteration of a method takes."""

  tokens: float  # sampled, mean
  seconds: float  # median, without compilation and evaluation


def pace(rows: Sequence[Mapping[str, Any]]) -> Pace:
  """The pace of a run, from its metrics.

  Raises:
    UserError: if no iteration is left when those that compile or evaluate are taken out.
  """
  spans = [
    row["time/elapsed_s"] - before["time/elapsed_s"]
    for before, row in zip(rows[1:], rows[2:], strict=False)
    if "eval/accuracy" not in row
  ]
  if not spans:
    raise UserError(
      f"a run of {len(rows) - 1} iterations does not tell the seconds of one: the first compiles, "
      "and those with an evaluation do not count (--evaluations gives their number)"
    )
  last = rows[-1]
  return Pace(last["tokens/sampled"] / last["iteration"], statistics.median(spans))


def length(config: Config, arm: str, budgets: Budgets, paced: Pace | None) -> dict[str, int]:
  """Fields that make a run as long as its arm allows.

  In the arm `prompts` a batch is as many prompts as its updates share, so a method that takes
  several updates an iteration keeps doing so.
  """
  each = config.minibatches * config.epochs  # updates an iteration
  if arm == "own":
    return {"iterations": config.iterations}
  if arm == "prompts":
    iterations = max(1, round(budgets.updates / each))
    return {"rollout.prompts": budgets.prompts * config.minibatches, "iterations": iterations}
  share = budgets.tokens / paced.tokens if arm == "tokens" else budgets.seconds / paced.seconds
  return {"iterations": max(1, round(share))}


def write_calibration(path: pathlib.Path, paces: Mapping[str, Mapping[str, Pace]]) -> None:
  """Writes paces by task and method."""
  table = {
    task: {name: dataclasses.asdict(one) for name, one in of_task.items()}
    for task, of_task in paces.items()
  }
  path.write_text(json.dumps(table, indent=2) + "\n")


def read_calibration(path: pathlib.Path) -> dict[str, dict[str, Pace]]:
  """Paces by task and method; none if there is no such file.

  Raises:
    UserError: if the file is not what `write_calibration` wrote.
  """
  if not path.exists():
    return {}
  try:
    table = json.loads(path.read_text())
    return {
      task: {name: Pace(**one) for name, one in of_task.items()} for task, of_task in table.items()
    }
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is no calibration: {error}") from error
