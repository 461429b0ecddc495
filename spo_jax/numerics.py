"""Arithmetic that model, sampler and losses share."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), which stays within ±cap (Gemma 2); None leaves x as it is."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def pick(x_BxTxE: jax.Array, places_BxR: jax.Array) -> jax.Array:
  """[B, R, ...]: of each row of [B, T, ...], the elements at its places."""
  return jax.vmap(lambda row, places: row[places])(x_BxTxE, places_BxR)
