"""The rollout: a forest of segments in flat arrays, on the host.

Every method samples one tree a prompt, whose nodes are segments of tokens; the methods differ in
its shape alone. Tokens stay ids from here to the loss: text is made for graders and for people
only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Forest(NamedTuple):
  """N nodes, parents before children; the tokens of all nodes lie end to end."""

  tree: np.ndarray  # [N] int32, index of the prompt
  parent: np.ndarray  # [N] int32, -1 at the roots, which are the prompts
  depth: np.ndarray  # [N] int32, 0 at the roots
  finished: np.ndarray  # [N] bool, the segment ended by itself (end-of-sequence)
  probe: np.ndarray  # [N] bool, a rollout that only estimates its parent's value
  offsets: np.ndarray  # [N + 1] int64; node i's tokens are offsets[i]:offsets[i + 1]
  tokens: np.ndarray  # [sum of lengths] int32
  logprobs: np.ndarray  # [sum of lengths] float32, of the sampling policy; 0 in prompts

  @property
  def lengths(self) -> np.ndarray:
    """[N] int64, tokens a node."""
    return np.diff(self.offsets)

  @property
  def leaf(self) -> np.ndarray:
    """[N] bool, nodes that nothing continues, probes aside; the roots are never leaves."""
    leaf = self.depth > 0
    leaf[self.parent[(self.depth > 0) & ~self.probe]] = False
    return leaf

  def node_tokens(self, node: int) -> np.ndarray:
    """[length] int32, the node's own tokens."""
    return self.tokens[self.offsets[node] : self.offsets[node + 1]]

  def response(self, node: int) -> np.ndarray:
    """[sum] int32, tokens from the end of the prompt to the end of the node."""
    path = []
    while self.parent[node] >= 0:
      path.append(self.node_tokens(node))
      node = self.parent[node]
    return np.concatenate(path[::-1]) if path else np.zeros(0, np.int32)


class ForestBuilder:
  """Collects nodes block by block."""

  def __init__(self):
    self._blocks: list[dict[str, np.ndarray]] = []
    self._depth = np.zeros(0, np.int32)
    self._tree = np.zeros(0, np.int32)

  @property
  def next_id(self) -> int:
    """Id of the node that is added next."""
    return len(self._tree)

  def add_roots(self, tokens_RxP: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    """Adds the prompts; returns their node ids [R]."""
    self._tree = np.arange(len(lengths_R), dtype=np.int32)
    self._depth = np.zeros(len(lengths_R), np.int32)
    mask = np.arange(tokens_RxP.shape[1]) < lengths_R[:, None]
    nothing = np.zeros(len(lengths_R), bool)
    self._append(tokens_RxP[mask], np.zeros(mask.sum(), np.float32), lengths_R, nothing, nothing)
    self._blocks[-1]["parent"] = np.full(len(lengths_R), -1, np.int32)
    return self._tree.copy()

  def add(self, parent, tokens, logprobs, lengths, finished, *, probe: bool) -> np.ndarray:
    """Adds k segments.

    Args:
      parent: [k] node ids.
      tokens: [sum of lengths] int32, end to end.
      logprobs: [sum of lengths] float32.
      lengths: [k], each at least 1.
      finished: [k] bool.
      probe: whether these are probes.

    Returns:
      [k] int32 node ids.
    """
    if len(lengths) and np.min(lengths) < 1:
      raise ValueError("a segment has at least one token")
    ids = np.arange(self.next_id, self.next_id + len(lengths), dtype=np.int32)
    self._append(tokens, logprobs, lengths, finished, np.full(len(lengths), probe))
    self._blocks[-1]["parent"] = np.asarray(parent, np.int32)
    # A parent may be of this very block (a chain's path), hence one by one along the new nodes.
    self._tree = np.concatenate([self._tree, np.zeros(len(ids), np.int32)])
    self._depth = np.concatenate([self._depth, np.zeros(len(ids), np.int32)])
    for node, above in zip(ids, self._blocks[-1]["parent"], strict=True):
      self._tree[node] = self._tree[above]
      self._depth[node] = self._depth[above] + 1
    return ids

  def _append(self, tokens, logprobs, lengths, finished, probe):
    self._blocks.append(
      {
        "tokens": np.asarray(tokens, np.int32),
        "logprobs": np.asarray(logprobs, np.float32),
        "lengths": np.asarray(lengths, np.int64),
        "finished": np.asarray(finished, bool),
        "probe": np.asarray(probe, bool),
      }
    )

  def build(self) -> Forest:
    """The forest of everything added."""
    joined = {
      name: np.concatenate([block[name] for block in self._blocks]) for name in self._blocks[0]
    }
    return Forest(
      tree=self._tree,
      parent=joined["parent"],
      depth=self._depth,
      finished=joined["finished"],
      probe=joined["probe"],
      offsets=np.concatenate([[0], np.cumsum(joined["lengths"])]),
      tokens=joined["tokens"],
      logprobs=joined["logprobs"],
    )


def concatenate(forests: Sequence[Forest]) -> Forest:
  """One forest of at least one: nodes in order, trees of each numbered after those before it."""
  columns = {name: np.concatenate([getattr(f, name) for f in forests]) for name in Forest._fields}
  before = lambda sizes: np.cumsum([0, *sizes[:-1]])
  nodes = [len(f.parent) for f in forests]
  shift = lambda by: np.repeat(by, nodes).astype(np.int32)
  first_tree = before([int(f.tree.max(initial=-1)) + 1 for f in forests])
  parent = columns["parent"]
  lengths = np.concatenate([f.lengths for f in forests])
  return Forest(**columns)._replace(
    tree=columns["tree"] + shift(first_tree),
    parent=np.where(parent < 0, -1, parent + shift(before(nodes))),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
  )


def interleave(
  forests: Sequence[Forest], trees: Sequence[np.ndarray], *, by_level: bool
) -> tuple[Forest, np.ndarray]:
  """One forest of several whose prompts are mixed, with its nodes in the order of the prompts.

  Trees that grew level by level lie as they do where all prompts are sampled at once; so do chains,
  but for their probes, which here lie prompt by prompt.

  Args:
    forests: at least one.
    trees: of each forest, the indices [R] that its trees have among the prompts of all.
    by_level: nodes are ordered by depth before prompts (`strategies.grow_tree`); else those of a
      prompt stay together (`strategies.grow_chain`). Probes are last either way.

  Returns:
    (forest of N nodes, [N] int64 which nodes of the forests, end to end, they are).
  """
  joined = concatenate(forests)
  tree = np.concatenate(trees).astype(np.int32)[joined.tree]
  level = joined.depth if by_level else np.minimum(joined.depth, 1)  # roots first
  order = np.lexsort((tree, level, joined.probe))
  return _pick(joined._replace(tree=tree), order), order


def prune(forest: Forest, keep: np.ndarray) -> tuple[Forest, np.ndarray]:
  """The kept nodes and their ancestors, in the order they had; trees are numbered anew from 0.

  What has lost its children looks like a leaf: values are to be estimated before.

  Args:
    forest: N nodes.
    keep: [N] bool.

  Returns:
    (forest of K nodes, [K] int64 which nodes of the old one they are).
  """
  kept = keep.copy()
  nodes = np.flatnonzero(keep)
  while len(nodes):
    above = forest.parent[nodes]
    above = np.unique(above[above >= 0])
    nodes = above[~kept[above]]
    kept[nodes] = True
  index = np.flatnonzero(kept)
  pruned = _pick(forest, index)
  tree = np.unique(pruned.tree, return_inverse=True)[1].astype(np.int32)
  return pruned._replace(tree=tree), index


def _pick(forest: Forest, nodes: np.ndarray) -> Forest:
  """Nodes [K] in the order given, each after its parent; trees keep their numbers."""
  number = np.zeros(len(forest.parent), np.int32)  # of a picked node in the new forest
  number[nodes] = np.arange(len(nodes))
  parent, lengths = forest.parent[nodes], forest.lengths[nodes]
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  source = np.repeat(forest.offsets[:-1][nodes] - offsets[:-1], lengths) + np.arange(offsets[-1])
  return Forest(
    tree=forest.tree[nodes],
    parent=np.where(parent < 0, -1, number[parent]),
    depth=forest.depth[nodes],
    finished=forest.finished[nodes],
    probe=forest.probe[nodes],
    offsets=offsets,
    tokens=forest.tokens[source],
    logprobs=forest.logprobs[source],
  )


def shorten(forest: Forest, lengths: np.ndarray) -> Forest:
  """The same N nodes, each with its first so many tokens, [N]."""
  within = np.arange(len(forest.tokens)) - np.repeat(forest.offsets[:-1], forest.lengths)
  kept = within < np.repeat(lengths, forest.lengths)
  return forest._replace(
    offsets=np.concatenate([[0], np.cumsum(np.minimum(lengths, forest.lengths))]),
    tokens=forest.tokens[kept],
    logprobs=forest.logprobs[kept],
  )
