"""What a method would make of a given trajectory: its own forest, with rewards that can be drawn.

The trajectory's tokens stay; the rollouts around it are drawn anew. A response method (GRPO, RLOO)
has one advantage for all tokens, whose rest is not given: for each token its forest is a group in
which one response goes on from behind that token and the others from the prompt. A chain's forest
is the trajectory with its probes at its cuts, a tree's the trajectory with its siblings and the
children of its segments; what lies under a sibling is summed up in its value.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spo_jax.analysis.truth import Trajectory
from spo_jax.config import Config
from spo_jax.forest import Forest
from spo_jax.sampling.strategies import Partition
from spo_jax.training.estimate import estimate

# (trajectory, state) -> rewards, or values, that are independent draws of what starts there.
Bank = Callable[[int, int], np.ndarray]


class Design(NamedTuple):
  """A forest of N nodes for S tokens, those of all trajectories end to end."""

  forest: Forest
  leaves: np.ndarray  # [n] node ids
  banks: list[np.ndarray]  # [n] of 1-D arrays: what a leaf's reward is drawn from
  place: np.ndarray  # [n], a leaf's number among its siblings from the same bank
  group: np.ndarray  # [n], number of that set of siblings
  node: np.ndarray  # [S] node ids, whose advantages the tokens get


class _Builder:
  def __init__(self):
    self.parent, self.depth, self.probe = [], [], []
    self.leaves, self.banks, self.place, self.group = [], [], [], []
    self.groups = 0

  def node(self, parent: int) -> int:
    self._add(parent, probe=False)
    return len(self.parent) - 1

  def draws(self, parent: int, count: int, bank: np.ndarray, *, probe: bool = False) -> int:
    """Adds `count` leaves whose rewards are from one bank; returns the first one's id."""
    first = len(self.parent)
    for place in range(count):
      self._add(parent, probe=probe)
      self.leaves.append(first + place)
      self.banks.append(bank)
      self.place.append(place)
      self.group.append(self.groups)
    self.groups += 1
    return first

  def _add(self, parent: int, *, probe: bool) -> None:
    self.parent.append(parent)
    self.depth.append(self.depth[parent] + 1 if parent >= 0 else 0)
    self.probe.append(probe)

  def build(self, nodes: Sequence[int]) -> Design:
    count = len(self.parent)
    parent, depth = np.array(self.parent, np.int32), np.array(self.depth, np.int32)
    forest = Forest(
      tree=np.cumsum(parent < 0, dtype=np.int32) - 1,
      parent=parent,
      depth=depth,
      finished=np.ones(count, bool),
      probe=np.array(self.probe),
      offsets=np.arange(count + 1),
      tokens=np.zeros(count, np.int32),
      logprobs=np.zeros(count, np.float32),
    )
    place, group = np.array(self.place), np.array(self.group)
    return Design(forest, np.array(self.leaves), self.banks, place, group, np.array(nodes))


def group_design(trajectories: Sequence[Trajectory], samples: int) -> Design:
  """A group of `samples` responses for each token of each trajectory."""
  builder, nodes = _Builder(), []
  for trajectory in trajectories:
    for token in range(len(trajectory.tokens)):
      root = builder.node(-1)
      nodes.append(builder.draws(root, 1, trajectory.rewards[token + 1]))
      builder.draws(root, samples - 1, trajectory.rewards[0])
  return builder.build(nodes)


def chain_cuts(trajectory: Trajectory, partition: Partition) -> np.ndarray:
  """[L] bool, where the trajectory's segments begin."""
  rows = trajectory.tokens[None], trajectory.logprobs[None]
  return np.array(partition(*rows, np.ones_like(rows[0], bool)))[0]


def chain_design(trajectories: Sequence[Trajectory], partition: Partition, probes: int) -> Design:
  """Each trajectory cut into segments, with `probes` rollouts at each cut."""
  builder, nodes = _Builder(), []
  for trajectory in trajectories:
    cuts = chain_cuts(trajectory, partition)
    node = builder.node(-1)
    starts = np.flatnonzero(cuts | (np.arange(len(cuts)) == 0))
    for start, end in zip(starts, [*starts[1:], len(cuts)], strict=True):
      if cuts[start]:
        builder.draws(node, probes, trajectory.rewards[start], probe=True)
      last = end == len(cuts)
      node = builder.draws(node, 1, trajectory.rewards[end]) if last else builder.node(node)
      nodes += [node] * (end - start)
  return builder.build(nodes)


def tree_levels(length: int, budgets: Sequence[int]) -> list[tuple[int, int]]:
  """(start, end) of the segments of a response, by level."""
  ends = np.minimum(np.cumsum(budgets), length)
  starts = [0, *ends[:-1]]
  return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True) if a < b]


def tree_design(
  trajectories: Sequence[Trajectory],
  branches: Sequence[int],
  budgets: Sequence[int],
  child_values: Bank,
) -> Design:
  """For each segment of each trajectory, its siblings and its own children.

  Args:
    trajectories: S tokens together.
    branches: children of a node by depth.
    budgets: tokens of a segment by depth.
    child_values: (trajectory, level) -> independent values of the children of the state in which
      its segment of that level begins, each sampled with all that is under it.
  """
  builder, nodes = _Builder(), []
  for index, trajectory in enumerate(trajectories):
    length = len(trajectory.tokens)
    for level, (start, end) in enumerate(tree_levels(length, budgets)):
      root = builder.node(-1)
      if end == length:
        node = builder.draws(root, 1, trajectory.rewards[end])
      else:
        node = builder.node(root)
        builder.draws(node, branches[level + 1], child_values(index, level + 1))
      builder.draws(root, branches[level] - 1, child_values(index, level))
      nodes += [node] * (end - start)
  return builder.build(nodes)


def draw_advantages(
  design: Design, config: Config, draws: int, rng: np.random.Generator
) -> np.ndarray:
  """[draws, S] float32 advantages, each from rewards drawn anew, by the method's own estimator.

  Siblings get different members of their bank, which begin at a random one: so they are as
  independent as rollouts are.
  """
  probed = config.rollout.strategy == "chain"
  groups = design.group[-1] + 1
  sizes = np.array([len(bank) for bank in design.banks])
  offsets = np.cumsum(sizes) - sizes
  flat = np.concatenate(design.banks)
  rewards = np.zeros(len(design.forest.parent), np.float32)
  found = []
  for _ in range(draws):
    begin = rng.random(groups)[design.group]
    member = (np.floor(begin * sizes).astype(int) + design.place) % sizes
    rewards[design.leaves] = flat[offsets + member]
    estimated = estimate(design.forest, rewards, config.advantage, probed=probed)
    found.append(estimated.advantages[design.node])
  return np.stack(jax.device_get(found))
