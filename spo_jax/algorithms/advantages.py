"""From node values to the advantage of the segment that ends in a node.

All functions take `ForestValues` and the `parent` array that it was made from. A root has no
segment, and a segment with an unknown value at either end tells nothing: both get 0.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms.values import ForestValues

# A spread below this many units in the last place of the largest value is rounding, not signal.
ROUNDING_UNITS = 16


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
  chex.assert_rank(parent, 1)
  chex.assert_equal_shape([parent, *forest])
  edge = (parent >= 0) & forest.known & forest.known[parent]
  return jnp.where(edge, forest.values - forest.values[parent], 0)


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


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
  "difference": lambda forest, parent, counted, *, eps: difference(forest, parent),
  "normalized": lambda forest, parent, counted, *, eps: normalized(forest, parent, eps=eps),
  "leave_one_out": lambda forest, parent, counted, *, eps: leave_one_out(forest, parent, counted),
}


def make_advantage(
  kind: str, *, eps: float
) -> Callable[[ForestValues, jax.Array, jax.Array], jax.Array]:
  """Looks an advantage up by name and binds its hyper-parameters.

  Args:
    kind: a key of `ADVANTAGES`.
    eps: for "normalized".

  Returns:
    A function (forest, parent, counted) -> [N] advantages.

  Raises:
    ValueError: If kind is unknown.
  """
  if kind not in ADVANTAGES:
    raise ValueError(f"unknown advantage {kind!r}, one of {sorted(ADVANTAGES)}")
  return functools.partial(ADVANTAGES[kind], eps=eps)


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
