"""Methods at equal sampled tokens a prompt: the largest group, tree or number of probes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spo_jax.analysis.designs import chain_cuts, tree_levels
from spo_jax.analysis.truth import Trajectory
from spo_jax.config import Config
from spo_jax.run import Run
from spo_jax.sampling.strategies import Partition

LARGEST = 64  # children, or probes, or responses


def partition_of(run: Run, config: Config) -> Partition:
  """The partition of a chain's config."""
  return dataclasses.replace(run, config=config).partition()


def prompt_tokens(run: Run, config: Config, trajectories: Sequence[Trajectory]) -> float:
  """Expected sampled tokens a prompt, from the lengths of trajectories."""
  lengths = np.array([len(t.tokens) for t in trajectories])
  rollout = config.rollout
  if rollout.strategy == "group":
    return float(rollout.samples * lengths.mean())
  if rollout.strategy == "tree":
    nodes = np.cumprod(config.branches)
    levels = [tree_levels(length, config.budgets) for length in lengths]
    return float(
      np.mean(
        [sum(n * (b - a) for n, (a, b) in zip(nodes, level, strict=False)) for level in levels]
      )
    )
  partition = partition_of(run, config)
  remaining = []
  for trajectory in trajectories:
    cuts = np.flatnonzero(chain_cuts(trajectory, partition))
    inner = cuts[cuts > 0]
    # The prompt is probed once for all of its trajectories.
    root = len(trajectory.tokens) * np.any(cuts == 0) / rollout.samples
    remaining.append(root + np.sum(len(trajectory.tokens) - inner))
  return float(rollout.samples * (lengths.mean() + rollout.probes * np.mean(remaining)))


def resized(config: Config, size: int) -> Config:
  """The method with so many responses, or probes, or children of a node.

  A tree's levels keep their proportions: `size` is the first one's number of children.
  """
  rollout = config.rollout
  if rollout.strategy == "group":
    changed = {"samples": size}
  elif rollout.strategy == "chain":
    changed = {"probes": size}
  else:
    changed = {"branches": tuple(size * b // config.branches[0] for b in config.branches)}
  return dataclasses.replace(config, rollout=dataclasses.replace(rollout, **changed))


def fitted(
  run: Run, config: Config, trajectories: Sequence[Trajectory], tokens: int
) -> Config | None:
  """The method in the largest size of at most so many sampled tokens a prompt; None if it has none.

  A group and the levels of a tree have at least two members.
  """
  least = 1 if config.rollout.strategy == "chain" else 2
  best = None
  for size in range(least, LARGEST + 1):
    candidate = resized(config, size)
    if prompt_tokens(run, candidate, trajectories) > tokens:
      break
    if config.rollout.strategy != "tree" or min(candidate.branches) >= 2:
      best = candidate
  return best
