"""Graders of responses, by name, and their application to a batch."""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from spo_jax.errors import UserError
from spo_jax.rewards import numbers

Grader = Callable[[str, str], float]  # (response, reference answer) -> reward

GRADERS: dict[str, Grader] = {"numbers": numbers.grade}


def get_grader(name: str) -> Grader:
  """Looks up a grader; raises UserError if there is none of that name."""
  if name not in GRADERS:
    raise UserError(f"unknown grader '{name}', known are: {', '.join(sorted(GRADERS))}")
  return GRADERS[name]


def grade_all(
  responses: Sequence[str], answers: Sequence[str], grader: Grader | str
) -> tuple[np.ndarray, int]:
  """Grades a batch; a grader's failure costs the response its reward but not the run its life.

  Args:
    responses: R texts, without their prompts.
    answers: R reference answers.
    grader: A function, or a key of `GRADERS`.

  Returns:
    Rewards `[R]` float32, and how many of them are 0 because the grader raised or returned
    something else than a finite number.

  Raises:
    ValueError: If there are not as many answers as responses.
    UserError: If the grader's name is unknown.
  """
  if len(responses) != len(answers):
    raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
  grader = get_grader(grader) if isinstance(grader, str) else grader
  rewards = np.zeros(len(responses), np.float32)
  failures = 0
  for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
    try:
      reward = float(grader(response, answer))
      if not np.isfinite(reward):
        raise ValueError(f"reward {reward}")
      rewards[i] = reward
    except Exception as error:  # A grader may be anyone's code, and parses what a model wrote.
      failures += 1
      logging.log_first_n(logging.WARNING, "grader failed: %r", 3, error)
  return rewards, failures
