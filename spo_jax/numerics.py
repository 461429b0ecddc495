"""Arithmetic that model, sampler and losses share."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), which stays within ±cap (Gemma 2); None leaves x as it is."""
  return x if cap is None else cap * jnp.tanh(x / cap)
