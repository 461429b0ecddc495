"""A softmax over keys that come block by block (https://arxiv.org/abs/1805.02867).

Axis letters: B rows, K key-value heads, G queries of a key-value head, C queries of a row, S keys
of a block, Dh head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.models.attention.spec import NEG_INF

# Of a query that has seen no key: far above NEG_INF, so that masked keys get weight 0.
EMPTY = NEG_INF / 2


class Running(NamedTuple):
  """What has been seen so far, float32."""

  peak: jax.Array  # [B, K, G, C], largest score
  total: jax.Array  # [B, K, G, C], sum of exp(score - peak)
  mixed: jax.Array  # [B, K, G, C, Dh], sum of the values, each by its exp(score - peak)


def no_keys(B: int, K: int, G: int, C: int, Dh: int) -> Running:
  """Nothing seen yet."""
  zeros = jnp.zeros((B, K, G, C))
  return Running(zeros + EMPTY, zeros, jnp.zeros((B, K, G, C, Dh)))


def add_keys(seen: Running, scores_BxKxGxCxS: jax.Array, v_BxKxSxDh: jax.Array) -> Running:
  """What has been seen after one block more; scores are NEG_INF where a key is hidden."""
  peak = jnp.maximum(seen.peak, scores_BxKxGxCxS.max(-1))
  shrink = jnp.exp(seen.peak - peak)
  weights = jnp.exp(scores_BxKxGxCxS - peak[..., None])
  total = seen.total * shrink + weights.sum(-1)
  return Running(peak, total, seen.mixed * shrink[..., None] + mix(weights, v_BxKxSxDh))


def mix(weights_BxKxGxCxS: jax.Array, v_BxKxSxDh: jax.Array) -> jax.Array:
  """[B, K, G, C, Dh] float32, sums of values."""
  weights_BxKxGxCxS = weights_BxKxGxCxS.astype(v_BxKxSxDh.dtype)
  return jnp.einsum(
    "bkgcs,bksd->bkgcd", weights_BxKxGxCxS, v_BxKxSxDh, preferred_element_type="float32"
  )
