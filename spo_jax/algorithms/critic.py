"""The critic's loss, as sums that the caller divides by counts of the whole batch, and how much of
the returns the critic explains.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms import kl, masking

# Σ(G - mean)² below this share of ΣG² is taken for rounding: float32 sums of hundreds of equal
# returns leave up to 4e-6.
SPREAD_TOLERANCE = 1e-5


class ValueSums(NamedTuple):
  """Sums over the mask, float32 scalars; those of micro-batches and devices add up."""

  loss: jax.Array
  count: jax.Array  # tokens
  squared_error: jax.Array  # (V - G)²
  clipped: jax.Array  # tokens whose clipped error is the larger one
  values: jax.Array
  returns: jax.Array
  squared_returns: jax.Array


def value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  value_clip: float | jax.Array,
) -> ValueSums:
  """PPO's clipped value loss (https://arxiv.org/abs/2005.12729, sec. 3, with max).

    loss = ½ Σₜ max((Vₜ - Gₜ)², (clip(Vₜ, V_oldₜ ± value_clip) - Gₜ)²)

  A token whose value has moved further than value_clip towards its return has gradient 0.
  Whatever stands outside the mask (-1e9, NaN) neither changes a sum nor reaches a gradient.

  Args:
    values: [B, T] float, of the trained critic.
    old_values: [B, T] float, of the critic that the advantages were computed with.
    returns: [B, T] float, the targets G.
    mask: [B, T] bool, the response tokens.
    value_clip: infinity clips nothing, which leaves half the squared error.

  Returns:
    `ValueSums`.
  """
  chex.assert_rank(values, 2)
  chex.assert_equal_shape([values, old_values, returns, mask])
  chex.assert_type([values, old_values, returns, mask], [float, float, float, bool])
  values, old_values, returns = (jnp.where(mask, x, 0) for x in (values, old_values, returns))
  near_old = kl.clip(values, old_values - value_clip, old_values + value_clip)
  error, clipped_error = jnp.square(values - returns), jnp.square(near_old - returns)
  total = lambda x: masking.masked_sum_count(x, mask)[0]
  return ValueSums(
    loss=total(jnp.maximum(error, clipped_error)) / 2,
    count=jnp.sum(mask, dtype=jnp.float32),
    squared_error=total(error),
    clipped=jnp.sum(clipped_error > error, dtype=jnp.float32),
    values=total(values),
    returns=total(returns),
    squared_returns=total(jnp.square(returns)),
  )


def explained_variance(sums: ValueSums) -> jax.Array:
  """1 - Σ(G - V)² / Σ(G - mean G)²: 1 for a perfect critic, 0 for the best constant.

  A critic's bias counts against it: it is never more than 1 - Var(G - V) / Var(G), which other
  libraries report and which forgives a constant error.

  Args:
    sums: of the whole batch.

  Returns:
    float32 scalar, at most 1; 0 where the returns do not vary, to rounding.
  """
  spread = sums.squared_returns - jnp.square(sums.returns) / jnp.maximum(sums.count, 1)
  varies = spread > SPREAD_TOLERANCE * sums.squared_returns
  return jnp.where(varies, 1 - sums.squared_error / jnp.where(varies, spread, 1), 0)
