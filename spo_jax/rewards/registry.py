"""Graders by name, and one attempt at grading a response."""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

from spo_jax.errors import UserError

Grader = Callable[[str, str], float]  # (response, reference answer) -> reward


Vote = Callable[[str], str | None]  # response -> its answer, in a form that others can equal


class Entry(NamedTuple):
  """A grader: where it is, as MODULE:FUNCTION, and whether its time is bounded whatever the text.

  `vote` is where the function is that reads the answer of a response, for majority votes; "" is
  nowhere. Its time is bounded.
  """

  path: str
  bounded: bool
  vote: str = ""


class Outcome(NamedTuple):
  """A reward, and why the grader failed to give one ("" if it did not; the reward is 0 then)."""

  reward: float
  failure: str


_NUMBERS = "spo_jax.rewards.numbers"
_GSM8K = Entry(f"{_NUMBERS}:grade", bounded=True, vote=f"{_NUMBERS}:vote")
GRADERS = {
  "numbers": _GSM8K,
  "gsm8k": _GSM8K,
  "last_number": Entry(
    f"{_NUMBERS}:grade_last_number", bounded=True, vote=f"{_NUMBERS}:vote_last_number"
  ),
  "countdown": Entry("spo_jax.rewards.countdown:grade", bounded=True),
  "game24": Entry("spo_jax.rewards.game24:grade", bounded=True),
  "math": Entry("spo_jax.rewards.maths:grade", bounded=False, vote="spo_jax.rewards.maths:vote"),
}


def find(name: str) -> Entry:
  """A grader of the table, or, for a name MODULE:FUNCTION, anyone's own, taken as unbounded.

  Raises:
    UserError: if the name is neither.
  """
  if name in GRADERS:
    return GRADERS[name]
  if ":" in name:
    return Entry(name, bounded=False)
  known = ", ".join(sorted(GRADERS))
  raise UserError(f"unknown grader '{name}', known are: {known}, or your own as MODULE:FUNCTION")


def load(path: str) -> Grader:
  """Imports the function MODULE:FUNCTION; raises whatever that import raises."""
  module, _, function = path.partition(":")
  return getattr(importlib.import_module(module), function)


def attempt(grader: Grader, response: str, answer: str) -> Outcome:
  """Grades a response; what the grader raises, or a reward that is not finite, is a failure."""
  try:
    reward = float(grader(response, answer))
  except Exception as error:  # A grader may be anyone's code, and parses what a model wrote.
    return Outcome(0.0, f"{type(error).__name__}: {str(error)[:100]}")
  if not math.isfinite(reward):
    return Outcome(0.0, f"reward {reward}")
  return Outcome(reward, "")
