"""int8 in the place of floats, for what every step of decode reads again.

A scale is shared by all that a product sums over. So it multiplies what comes out of the product,
and no array is ever turned back into floats as a whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ("full", "int8")  # full: in the dtype of the activations
MOST = 127  # largest int; -128 is not used, so that both signs have as many


class Quantised(NamedTuple):
  """x ≈ ints * scales."""

  ints: jax.Array  # int8
  scales: jax.Array  # float32, of the same rank; 1 along the axes that share a scale


def quantise(x: jax.Array, axes: int | tuple[int, ...]) -> Quantised:
  """The nearest ints, with one scale for all of the axes; zeros have the scale 0."""
  x = x.astype(jnp.float32)
  scales = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / MOST
  return Quantised(jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8), scales)
