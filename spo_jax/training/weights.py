"""How much a segment's tokens weigh in the policy loss, and what a segment is of an episode."""

import numpy as np

from spo_jax.config import Config
from spo_jax.forest import Forest
from spo_jax.training.trimming import loss_tokens


def segment_weights(forest: Forest, trained: np.ndarray, config: Config) -> np.ndarray | None:
  """The weight of each node's tokens, by `loss.segment_weights` and `loss.normalization`.

  Args:
    forest: N nodes.
    trained: [N] bool, segments that enter the loss.
    config: the run.

  Returns:
    [N] float32; None if all are 1.
  """
  if not has_weights(config):
    return None
  by_share = config.loss.segment_weights == "share"
  by_sequence = config.loss.normalization == "sequence"
  weights = shares(forest, probes=config.advantage.train_probes) if by_share else trained
  weights = weights.astype(np.float32)
  if by_sequence:
    mask = np.repeat(trained, forest.lengths)
    if config.loss.use_probability_mask:
      mask = loss_tokens(forest, trained, config)
    node = np.repeat(np.arange(len(trained)), forest.lengths)
    owner = sequences(forest)
    tokens = np.bincount(owner[node[mask]], minlength=len(trained))
    weights = weights / np.maximum(tokens, 1)[owner].astype(np.float32)
  return weights


def episode_shares(forest: Forest, trained: np.ndarray, config: Config) -> np.ndarray:
  """What each trained segment is of an episode, the reference's unit of training.

  An episode is a segment of a tree, a response of a group, or all trained segments of a response
  that was cut (SPO-chain, VinePPO), however many: the weight of the KL, a mean over episodes, does
  not depend on the partition.

  Args:
    forest: N nodes.
    trained: [N] bool, segments that enter the loss.
    config: the run.

  Returns:
    [N] float64; 0 for segments that are not trained.
  """
  if config.rollout.strategy != "chain":
    return trained.astype(np.float64)
  owner = sequences(forest)
  return trained / np.maximum(np.bincount(owner[trained], minlength=len(trained)), 1)[owner]


def has_weights(config: Config) -> bool:
  """Whether tokens weigh differently in the policy loss."""
  return config.loss.segment_weights == "share" or config.loss.normalization == "sequence"


def shares(forest: Forest, *, probes: bool) -> np.ndarray:
  """The share of its prompt's rollouts that each segment stands for, if siblings share alike.

    w(root) = 1,  w(n) = w(parent(n)) / children of parent(n)

  With these the sum of w(n) A(n) ∇ log π(n) is an unbiased estimate of the policy gradient; with
  equal weights a level counts as often as it has segments, and in a tree the last have the most.

  Args:
    forest: N nodes.
    probes: whether probes are segments like the others; else they weigh 0.

  Returns:
    [N] float64.
  """
  own = (forest.depth > 0) & (~forest.probe | probes)
  children = np.bincount(forest.parent[own], minlength=len(own))
  weights = np.where(forest.depth == 0, 1.0, 0.0)
  for depth in range(1, int(forest.depth.max(initial=0)) + 1):
    level = np.flatnonzero(own & (forest.depth == depth))
    above = forest.parent[level]
    weights[level] = weights[above] / children[above]
  return weights


def sequences(forest: Forest) -> np.ndarray:
  """[N] int, the first node of the sequence that each node belongs to.

  A sequence is a path without branches: a whole response where trajectories are cut (SPO-chain,
  VinePPO) or a group is sampled (GRPO), a segment of a tree where nodes have siblings.
  """
  continues = (forest.depth > 0) & ~forest.probe
  children = np.bincount(forest.parent[continues], minlength=len(continues))
  first = np.arange(len(continues))
  for depth in range(2, int(forest.depth.max(initial=0)) + 1):
    level = np.flatnonzero(continues & (forest.depth == depth))
    only = level[children[forest.parent[level]] == 1]
    first[only] = first[forest.parent[only]]
  return first
