"""Pairs of responses to one prompt, a better and a worse one, for losses on preferences."""

import numpy as np

from spo_jax.forest import Forest


def match_pairs(forest: Forest, rewards: np.ndarray) -> np.ndarray:
  """Matches the responses of each prompt, the best with the worst, and so on inwards.

  Args:
    forest: a group of responses a prompt.
    rewards: [N] float32, read at the leaves.

  Returns:
    [P, 2] int64 node ids, chosen and rejected; rewards of a pair differ.
  """
  leaves = np.flatnonzero(forest.leaf)
  order = leaves[np.lexsort((-rewards[leaves], forest.tree[leaves]))]
  sizes = np.bincount(forest.tree[order])
  pairs = []
  for group in np.split(order, np.cumsum(sizes)[:-1]):
    half = len(group) // 2
    pairs.append(np.stack([group[:half], group[::-1][:half]], axis=1))
  pairs = np.concatenate(pairs)
  return pairs[rewards[pairs[:, 0]] > rewards[pairs[:, 1]]]
