"""Monte Carlo values over a forest of segment nodes: the paper's segment advantage estimation."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class ForestValues(NamedTuple):
  """Values of the states in which the nodes' segments end; see `forest_values`."""

  values: jax.Array  # [N] float; 0 where neither known nor filled
  stds: jax.Array  # [N] float, population deviation of the children's values; 0 without children
  counts: jax.Array  # [N] int32, children that entered the mean
  known: jax.Array  # [N] bool, a reward or estimated from counted children
  filled: jax.Array  # [N] bool, taken from the node's only continuation, for want of an estimate


def forest_values(
  parent: jax.Array,
  depth: jax.Array,
  rewards: jax.Array,
  leaf: jax.Array,
  counted: jax.Array,
  *,
  max_depth: int,
) -> ForestValues:
  """Bottom-up values of all nodes of a forest, in flat arrays.

    V(leaf) = its reward
    V(n)    = mean of V(c) over the counted, known children c of n
    S(n)    = sqrt(mean of (V(c) - V(n))²)      over the same children
    V(n)    = V(c)                              if n has no such child, and one uncounted child c

  Children count equally, whatever the size of their subtrees. This replaces the value code of
  every method of the family, which differ in the shape of the forest alone:

  - SPO-tree: segments are nodes, all are counted.
  - SPO-chain, VinePPO: a trajectory is a path of segment nodes that are not counted; the probe
    rollouts from a segment's end hang off its node as counted leaves, those from the prompt off
    the root. The last segment is a leaf with the trajectory's own reward. A state without probes
    takes the value of the next one (VinePPO's Vᵢ = Vᵢ₊₁ while Vᵢ is missing), so its segment has
    advantage 0, and a path's advantages add up to its reward less the first estimate. A prompt
    without probes that several trajectories continue stays without a value.
  - GRPO, RLOO: one level; prompts are roots, responses leaves, all are counted.

  A node that is neither a leaf nor has a counted, known child is not known (the reference's value 0
  with deviation -1, or None) and is left out of its own parent's mean, filled or not.

  Args:
    parent: [N] int32, index of the parent, anywhere in the array; -1 for roots and padding.
    depth: [N] int32, 0 for roots, one more than the parent's otherwise, -1 for padding.
    rewards: [N] float, read at leaves; may be anything (NaN too) elsewhere.
    leaf: [N] bool, the node has a reward of its own and no children.
    counted: [N] bool, the node enters the mean of its parent.
    max_depth: at least the largest depth; a smaller one leaves the inner nodes below it unknown.

  Returns:
    `ForestValues`, in the dtype of rewards (the reference works in float64).
  """
  chex.assert_rank(parent, 1)
  chex.assert_equal_shape([parent, depth, rewards, leaf, counted])
  chex.assert_type([parent, depth, rewards, leaf, counted], [int, int, float, bool, bool])
  num_nodes = parent.shape[0]

  def value_level(nodes: ForestValues, level: jax.Array) -> tuple[ForestValues, None]:
    below = (depth == level + 1) & (parent >= 0)
    child = below & counted & nodes.known
    owner = jnp.where(child, parent, num_nodes)  # segment_sum drops what is out of range
    total = lambda x: jax.ops.segment_sum(x, owner, num_segments=num_nodes)
    counts = total(child.astype(jnp.int32))
    divisor = jnp.maximum(counts, 1).astype(rewards.dtype)
    means = total(nodes.values) / divisor
    stds = jnp.sqrt(total(jnp.square(nodes.values - means[parent])) / divisor)
    inner = (depth == level) & ~leaf
    known = inner & (counts > 0)

    after = jnp.where(below & ~counted, parent, num_nodes)
    total_after = lambda x: jax.ops.segment_sum(x, after, num_segments=num_nodes)
    # The sum is 1 where there is one such child, and it has a value.
    sole = total_after(jnp.where(nodes.known | nodes.filled, 1, 2)) == 1
    filled = inner & ~known & sole
    return ForestValues(
      values=jnp.where(known, means, jnp.where(filled, total_after(nodes.values), nodes.values)),
      stds=jnp.where(known, stds, nodes.stds),
      counts=jnp.where(known, counts, nodes.counts),
      known=known | nodes.known,
      filled=filled | nodes.filled,
    ), None

  graded = leaf & (depth >= 0)
  leaves = ForestValues(
    values=jnp.where(graded, rewards, 0),
    stds=jnp.zeros_like(rewards),
    counts=jnp.zeros(num_nodes, jnp.int32),
    known=graded,
    filled=jnp.zeros_like(graded),
  )
  nodes, _ = jax.lax.scan(value_level, leaves, jnp.arange(max_depth - 1, -1, -1))
  return nodes
