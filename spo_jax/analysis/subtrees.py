"""Values of the children of states inside trajectories, each child with its own subtree sampled."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from spo_jax.analysis.truth import Trajectory
from spo_jax.config import Config
from spo_jax.rewards import shape_unfinished
from spo_jax.run import Run
from spo_jax.sampling import strategies
from spo_jax.training.estimate import estimate


def child_values(
  run: Run,
  params: Any,
  config: Config,
  trajectories: Sequence[Trajectory],
  answers: Sequence[str],
  *,
  level: int,
  children: int,
) -> np.ndarray:
  """Values of `children` children of the states in which segments of a level begin.

  Args:
    run: the task and the model.
    params: parameters of the policy.
    config: the method, a tree.
    trajectories: n of them, in which the level is reached.
    answers: [n], to the trajectories' prompts.
    level: of the segments, 0 at the prompt.
    children: of each state; what is under a child is of the method's own branches.

  Returns:
    [n, children] float32, independent given the state.
  """
  start = sum(config.budgets[:level])
  prompts = _as_prompts(trajectories, start, run.config.rollout.max_prompt_tokens, config.seed)
  forest = strategies.grow_tree(
    dataclasses.replace(run, config=config).sampler(
      temperature=config.rollout.temperature, as_rollout=True
    ),
    params,
    prompts,
    branches=(children, *config.branches[level + 1 :]),
    budgets=config.budgets[level:],
  )
  leaves = np.flatnonzero(forest.leaf)
  tree = forest.tree[leaves]
  responses = [
    np.concatenate([trajectories[i].tokens[:start], forest.response(leaf)])
    for i, leaf in zip(tree, leaves, strict=True)
  ]
  rewards = np.zeros(len(forest.parent), np.float32)
  texts = run.task.texts(responses)
  rewards[leaves], _ = run.task.grade(texts, [answers[i] for i in tree], shaped=True)
  if not config.advantage.grade_unfinished:
    cut_off = forest.leaf & ~forest.finished
    rewards = shape_unfinished(rewards, cut_off, config.advantage.unfinished_penalty)
  values = estimate(forest, rewards, config.advantage, probed=False).values
  return values[forest.depth == 1].reshape(len(trajectories), children)


def _as_prompts(
  trajectories: Sequence[Trajectory], start: int, room: int, seed: int
) -> strategies.Prompts:
  """Prompts that are trajectories' prompts and their first `start` tokens."""
  whole = [np.concatenate([t.prompt_tokens, t.tokens[:start]]) for t in trajectories]
  lengths = np.array([len(tokens) for tokens in whole], np.int32)
  table = np.zeros((len(whole), room + start), np.int32)
  for row, tokens in zip(table, whole, strict=True):
    row[: len(tokens)] = tokens
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), start), len(whole))
  return strategies.Prompts(table, lengths, keys)
