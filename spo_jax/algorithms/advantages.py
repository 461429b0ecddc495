"""From node values to the advantage of the segment that ends in a node.

All functions take `ForestValues` and the `parent` array that it was made from. A root has no
segment, and a segment tells nothing unless both of its ends have a value: these get 0.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms.baselines import forest_baseline, sibling_spread
from spo_jax.algorithms.values import ForestValues

# A spread below this many units in the last place of the largest value is rounding, not signal.
ROUNDING_UNITS = 16


def _gain(forest: ForestValues, parent: jax.Array, quantity: jax.Array) -> jax.Array:
  """What a quantity of the states, [N], gains along each node's segment; 0 without a value."""
  chex.assert_rank(parent, 1)
  chex.assert_equal_shape([parent, quantity, *forest])
  valued = forest.known | forest.filled
  edge = (parent >= 0) & valued & valued[parent]
  return jnp.where(edge, quantity - quantity[parent], 0)


def difference(forest: ForestValues, parent: jax.Array) -> jax.Array:
  """A(n) = V(n) - V(parent(n)), the paper's segment advantage.

  The reference's tree calls this "rloo", though V(parent) contains the node itself; see
  `leave_one_out` for the real one.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.

  Returns:
    [N] float.
  """
  return _gain(forest, parent, forest.values)


def normalized(forest: ForestValues, parent: jax.Array, *, eps: float) -> jax.Array:
  """A(n) = (V(n) - V(q)) / (S(q) + eps), q = parent(n): GRPO's, on every level of a tree.

  Siblings that differ by rounding alone (a spread below 2e-6 of the forest's largest value in
  float32) get 0. The reference divides there too, harmless in float64 (1e-17 / 1e-8), but
  float32 rounding is larger than eps and would become a signal.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    eps: added to the deviation, 1e-8 in the reference.

  Returns:
    [N] float.
  """
  spread = forest.stds[parent]
  unit = jnp.finfo(forest.values.dtype).eps * jnp.max(jnp.abs(forest.values))
  scaled = difference(forest, parent) / (spread + eps)
  return jnp.where(spread > ROUNDING_UNITS * unit, scaled, 0)


def leave_one_out(forest: ForestValues, parent: jax.Array, counted: jax.Array) -> jax.Array:
  """A(n) = V(n) - mean of V over the siblings of n that are counted: RLOO.

  For a counted node among K this is (V(n) - V(q)) K / (K - 1), q = parent(n). Without siblings
  the baseline is 0. A node that is not counted is not in V(q), which is then its baseline.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    counted: [N] bool, as given to `forest_values`.

  Returns:
    [N] float.
  """
  chex.assert_equal_shape([parent, counted])
  group = forest.counts[parent].astype(forest.values.dtype)
  own = counted & forest.known & (parent >= 0)
  scale = jnp.where(own, group / jnp.maximum(group - 1, 1), 1)
  alone = own & (group == 1)
  return jnp.where(alone, forest.values, difference(forest, parent) * scale)


def shrinkage(
  forest: ForestValues, parent: jax.Array, depth: jax.Array, counted: jax.Array, *, max_depth: int
) -> jax.Array:
  """A(n) = V(n) - b(n), with a baseline from the whole forest: see `baselines.forest_baseline`.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    depth: [N] int32, -1 for padding.
    counted: [N] bool, as given to `forest_values`.
    max_depth: at least the largest depth.

  Returns:
    [N] float.
  """
  spread = sibling_spread(forest, parent, depth, counted, max_depth=max_depth)
  baseline = forest_baseline(forest, parent, depth, counted, spread)
  return jnp.where((depth > 0) & (forest.known | forest.filled), forest.values - baseline, 0)


def prover(forest: ForestValues, parent: jax.Array, *, best_of: int) -> jax.Array:
  """B(V(n)) - B(V(q)), q = parent(n), B(v) = 1 - (1 - v)ᴷ: the advantage under another policy.

  That policy, the prover, samples K responses and keeps a right one if there is one: with rewards 0
  and 1 it succeeds with probability B(v) where the trained policy does with v. A step that makes a
  hard problem easier counts for more with it than one that secures an easy problem.
  See "Rewarding Progress" by Setlur et al., https://arxiv.org/abs/2410.08146.

  Args:
    forest: values of the nodes, [N] each, in [0, 1]; B increases up to 1 only.
    parent: [N] int32, -1 for roots and padding.
    best_of: K >= 1; 1 is `difference`, 4 the reference's.

  Returns:
    [N] float.

  Raises:
    ValueError: If best_of is not positive.
  """
  if best_of < 1:
    raise ValueError(f"best_of must be positive, got {best_of}")
  return _gain(forest, parent, 1 - (1 - forest.values) ** best_of)


def progress(
  forest: ForestValues, parent: jax.Array, *, best_of: int, prover_weight: float
) -> jax.Array:
  """A(n) = V(n) - V(q) + α (B(V(n)) - B(V(q))): the policy's advantage plus α times the prover's.

  The paper's effective reward is Q + α A_prover, with V(n) for Q; so the reference's option
  `use_pav`, V(n) + 5 (B(V(n)) - B(V(q))). Here V(q) is subtracted as a baseline, as in
  `difference`, so that siblings of equal value get 0.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    best_of: K, see `prover`.
    prover_weight: α.

  Returns:
    [N] float.
  """
  return difference(forest, parent) + prover_weight * prover(forest, parent, best_of=best_of)


def reward(forest: ForestValues, parent: jax.Array) -> jax.Array:
  """A(n) = V(n) where it is known, no baseline: REINFORCE. For a leaf it is the response's reward.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.

  Returns:
    [N] float.
  """
  chex.assert_equal_shape([parent, *forest])
  return jnp.where((parent >= 0) & forest.known, forest.values, 0)


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
  "difference": lambda forest, parent, **_: difference(forest, parent),
  "normalized": lambda forest, parent, *, eps, **_: normalized(forest, parent, eps=eps),
  "leave_one_out": lambda forest, parent, *, counted, **_: leave_one_out(forest, parent, counted),
  "shrinkage": lambda forest, parent, *, depth, counted, max_depth, **_: shrinkage(
    forest, parent, depth, counted, max_depth=max_depth
  ),
  "prover": lambda forest, parent, *, best_of, prover_weight, **_: progress(
    forest, parent, best_of=best_of, prover_weight=prover_weight
  ),
  "reward": lambda forest, parent, **_: reward(forest, parent),
}


def make_advantage(
  kind: str, *, eps: float, best_of: int, prover_weight: float, max_depth: int
) -> Callable[..., jax.Array]:
  """Looks an advantage up by name and binds its hyper-parameters.

  Args:
    kind: a key of `ADVANTAGES`.
    eps: for "normalized".
    best_of: K, for "prover"; 4 in the reference.
    prover_weight: α, for "prover"; 5 in the reference.
    max_depth: for "shrinkage", at least the forest's largest depth.

  Returns:
    A function (forest, parent, *, depth, counted) -> [N] advantages.

  Raises:
    ValueError: If kind is unknown.
  """
  if kind not in ADVANTAGES:
    raise ValueError(f"unknown advantage {kind!r}, one of {sorted(ADVANTAGES)}")
  return functools.partial(
    ADVANTAGES[kind], eps=eps, best_of=best_of, prover_weight=prover_weight, max_depth=max_depth
  )


def nonzero(advantages: jax.Array, *, tolerance: float) -> jax.Array:
  """Which segments are trained: |A| > tolerance.

  The reference compares with exact zero in float64 and so keeps edges between equal siblings
  whose mean was rounded (advantages near 1e-17). In float32 such rounding is near 1e-7 and
  common; a tolerance of 1e-6 drops it and nothing else when rewards are 0 and 1.

  Args:
    advantages: [N] float.
    tolerance: largest magnitude that counts as zero.

  Returns:
    [N] bool.
  """
  return jnp.abs(advantages) > tolerance
