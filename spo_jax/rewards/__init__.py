"""Graders of responses, by name, and their application to a batch."""

import contextlib
import os
from collections.abc import Sequence

import numpy as np
from absl import logging

from spo_jax.rewards import registry
from spo_jax.rewards.pool import GraderPool
from spo_jax.rewards.registry import Grader

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_MEMORY_MB = 2048


def open_grader(
  name: str,
  *,
  workers: int = 0,
  timeout_s: float = DEFAULT_TIMEOUT_S,
  memory_mb: int = DEFAULT_MEMORY_MB,
) -> Grader | GraderPool:
  """A grader, ready to use: a function if it is bounded, else a pool, which the caller closes.

  Args:
    name: a key of `registry.GRADERS`, or MODULE:FUNCTION.
    workers: processes of a pool; 0 is one per CPU core.
    timeout_s: seconds a response in a pool.
    memory_mb: address space of a pool's process that grades.

  Raises:
    UserError: if there is no such grader, or it cannot be loaded.
  """
  entry = registry.find(name)
  if entry.bounded:
    return registry.load(entry.path)
  pool = GraderPool(
    entry.path, workers=workers or os.cpu_count() or 1, timeout_s=timeout_s, memory_mb=memory_mb
  )
  pool.check()
  return pool


def find_vote(name: str) -> registry.Vote | None:
  """The function that reads the answer of a response for majority votes; None if there is none.

  Raises:
    UserError: if there is no such grader.
  """
  path = registry.find(name).vote
  return registry.load(path) if path else None


def close_grader(grader: Grader | GraderPool) -> None:
  """Ends the processes of a grader that has any."""
  if isinstance(grader, GraderPool):
    grader.close()


def shape(
  rewards: np.ndarray, responses: Sequence[str], repeated_marker_reward: float
) -> np.ndarray:
  """Rewards `[R]` to train on: those of responses with two or more `####` replaced, unless by 0.

  The reference gives -2 to a response that states several answers.
  """
  repeats = np.asarray([response.count("####") >= 2 for response in responses], bool)
  return np.where(repeats & (repeated_marker_reward != 0), repeated_marker_reward, rewards)


def shape_unfinished(rewards: np.ndarray, cut_off: np.ndarray, penalty: np.ndarray) -> np.ndarray:
  """Rewards to train on: a response cut off by the length limit has the penalty, whatever it says.

  Args:
    rewards: [N] float, graded; may be anything (NaN too) where cut off.
    cut_off: [N] bool.
    penalty: scalar or what broadcasts to [N]; 0 is "as good as wrong".

  Returns:
    [N] float32.
  """
  return np.where(cut_off, penalty, rewards).astype(np.float32)


def grade_all(
  responses: Sequence[str], answers: Sequence[str], grader: Grader | GraderPool | str
) -> tuple[np.ndarray, np.ndarray]:
  """Grades a batch; a grader's failure costs the response its reward but not the run its life.

  Args:
    responses: R texts, without their prompts.
    answers: R reference answers.
    grader: What `open_grader` returns, or a name, which is then opened for this batch alone.

  Returns:
    Rewards `[R]` float32, and `[R]` bool, True where the reward is 0 because the grader raised,
    returned something else than a finite number, or, in a pool, hung, died or ran out of memory.

  Raises:
    ValueError: If there are not as many answers as responses.
    UserError: If the grader's name is unknown, or it cannot be loaded.
  """
  if len(responses) != len(answers):
    raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
  with contextlib.ExitStack() as stack:
    if isinstance(grader, str):
      grader = open_grader(grader)
      stack.callback(close_grader, grader)
    if isinstance(grader, GraderPool):
      outcomes = grader.grade(responses, answers)
    else:
      pairs = zip(responses, answers, strict=True)
      outcomes = [registry.attempt(grader, response, answer) for response, answer in pairs]
  for outcome in outcomes:
    if outcome.failure:
      logging.log_first_n(logging.WARNING, "grader failed: %s", 3, outcome.failure)
  graded = np.asarray([outcome.reward for outcome in outcomes], np.float32)
  return graded, np.asarray([outcome.failure != "" for outcome in outcomes], bool)
