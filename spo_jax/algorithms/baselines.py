"""A baseline from the whole forest: what siblings, aunts, great-aunts and other prompts tell of a
state's value, each weighed by how well it tells it.

Values of a forest are modelled as sums of independent parts, one a level: the prompt's difficulty,
then what each segment gains. The baseline of a segment is the best linear guess of the value in
which it begins, by all leaves but its own (a Kalman filter from the root down). It does not depend
on what the segment or its continuations did, but for the variances, which are those of the whole
batch; so the policy gradient stays unbiased. And two siblings need not be each other's only
baseline, which doubles the variance of a binary tree. With one level it is RLOO's mean, shrunk
towards the mean of the other prompts.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms.values import ForestValues


class Spread(NamedTuple):
  """Variances of the values of siblings, by their depth; roots are siblings. [max_depth + 1]."""

  observed: jax.Array  # float, of their estimates
  true: jax.Array  # float, of what they estimate: without the noise of the estimates


def sibling_spread(
  forest: ForestValues, parent: jax.Array, depth: jax.Array, counted: jax.Array, *, max_depth: int
) -> Spread:
  """Components of the variance of values, by the moments of all siblings of a depth together.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    depth: [N] int32, -1 for padding.
    counted: [N] bool, as given to `forest_values`.
    max_depth: at least the largest depth.

  Returns:
    The spread. 0 at depths without siblings.
  """
  chex.assert_equal_shape([parent, depth, counted, *forest])
  root = (depth == 0) & forest.known
  child = (depth > 0) & counted & forest.known
  level = jnp.where(root | child, depth, max_depth + 1)  # segment_sum drops what is out of range
  total = lambda x: jax.ops.segment_sum(
    x.astype(forest.values.dtype), level, num_segments=max_depth + 1
  )
  roots = jnp.maximum(root.sum(), 1)
  middle = jnp.where(root, jnp.sum(forest.values, where=root) / roots, forest.values[parent])
  siblings = jnp.where(root, roots, forest.counts[parent]).astype(forest.values.dtype)
  freedom = total(1 - 1 / jnp.maximum(siblings, 1))  # Σ of (n - 1) / n over n siblings
  observed = total(jnp.square(forest.values - middle)) / jnp.where(freedom > 0, freedom, 1)
  below = jnp.append(observed[1:], 0)[jnp.maximum(depth, 0)]
  noise = jnp.where(forest.counts > 0, below / jnp.maximum(forest.counts, 1), 0)
  mean_noise = total(noise) / jnp.maximum(total(jnp.ones_like(noise)), 1)
  return Spread(observed, jnp.maximum(observed - mean_noise, 0))


def forest_baseline(
  forest: ForestValues, parent: jax.Array, depth: jax.Array, counted: jax.Array, spread: Spread
) -> jax.Array:
  """The guess of the value in which each node's segment begins, without the node's own leaves.

  Two guesses of V(q), q = parent(n), whose errors are independent: what was guessed of V(q) from
  above, m(q) with variance P(q), and the mean of n's siblings, with variance S = τ / (siblings):

    b(n) = (S m(q) + P(q) mean) / (S + P(q)),   m(n) = b(n),   P(n) = S P(q) / (S + P(q)) + ω

  τ and ω are the observed and the true variance of siblings at n's depth. For a root, m is the mean
  of the other roots that have a value, and P their true variance. A lone prompt has no such m: its
  segments have their siblings alone, and 0 without.

  Args:
    forest: values of the nodes, [N] each.
    parent: [N] int32, -1 for roots and padding.
    depth: [N] int32, -1 for padding.
    counted: [N] bool, as given to `forest_values`.
    spread: of the values, see `sibling_spread`.

  Returns:
    [N] float; of no meaning at roots.
  """
  own = (counted & forest.known).astype(jnp.int32)
  siblings = forest.counts[parent] - own
  sibling_sum = forest.counts[parent] * forest.values[parent] - own * forest.values
  sibling_mean = sibling_sum / jnp.maximum(siblings, 1)

  def descend(state, level):
    guess, error = state
    above, above_error = guess[parent], error[parent]
    sibling_error = spread.observed[level] / jnp.maximum(siblings, 1)
    weight = _weight_of_first(above_error, jnp.where(siblings > 0, sibling_error, jnp.inf))
    here = depth == level
    merged = weight * above + (1 - weight) * sibling_mean
    merged_error = jnp.where(siblings > 0, (1 - weight) * sibling_error, above_error)
    return (
      jnp.where(here, merged, guess),
      jnp.where(here, merged_error + spread.true[level], error),
    ), None

  root = (depth == 0) & forest.known
  others = root.sum() - root
  apart = jnp.sum(forest.values, where=root) - jnp.where(root, forest.values, 0)
  first = (depth == 0) & (others > 0)
  guess = jnp.where(first, apart / jnp.maximum(others, 1), 0)
  # One value has no spread: how far another is from it is not known.
  error = jnp.where(first & (root.sum() > 1), spread.true[0], jnp.inf)
  levels = jnp.arange(1, len(spread.true))
  (guess, _), _ = jax.lax.scan(descend, (guess, error), levels)
  return guess


def _weight_of_first(first: jax.Array, second: jax.Array) -> jax.Array:
  """The weight of the first of two guesses in the best mean of both, by the variances of their
  errors; 0 if both have none, 1 if the second's is infinite.
  """
  share = second / jnp.where(first + second > 0, first + second, 1)
  return jnp.where(jnp.isinf(second), 1, jnp.where(jnp.isinf(first), 0, share))
