"""What attention does in a layer, whichever backend computes it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.numerics import soft_cap

ATTENTION = "attention"  # what a backward pass needs of attention is kept by this name
NOWHERE = np.iinfo(np.int32).max  # position of an empty slot: behind all others
NEG_INF = -1e30  # finite: a fully masked row gives a uniform softmax, not NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """What attention does in a layer; hashable, a static argument."""

  scale: float  # of the products of queries and keys
  window: int | None = None  # a query sees the keys of its last `window` positions; None: of all
  cap: float | None = None  # soft cap of the scaled products
  backend: str = "blocks"  # who computes it, of BACKENDS in __init__.py
  mesh: Mesh | None = None  # that rows and heads are split over, for kernels; None is one device

  def scores(self, products: jax.Array) -> jax.Array:
    """Scores before the softmax, from products of queries and keys."""
    return soft_cap(products * self.scale, self.cap)
