"""What programs cost, against the least that any program of the same algorithm must.

Costs are the compiler's own figures. They count a loop's body once, so two are told that this does
not spoil: those of one decode step, which has no loop but that of rejected draws, and those of one
layer in `train_step`, the difference between two compilations, whose loop over micro-batches then
counts one of them. There the optimiser's pass over a layer's parameters is counted with it; and
attention in full by "pallas", which tells its cost for all listed blocks, and by "blocks", while
of the loops of "flash" one turn is counted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from spo_jax.infra.mesh import row_shards
from spo_jax.planning.measure import Measured
from spo_jax.planning.programs import Setup, abstract_params, decoded_at_once, decoded_levels

TRAIN_FLOPS = 6  # a weight and token: a product forwards and two backwards, of 2 FLOPs each
REMAT_FLOPS = 8  # the same with the forward product once more
SCALE_BYTES = 4  # of a key or a value in int8


@dataclasses.dataclass(frozen=True)
class Cost:
  """A figure of a program, and its minimum."""

  name: str
  unit: str
  found: float
  minimum: float | None  # None: not told

  @property
  def ratio(self) -> float | None:
    """How many times the minimum it is."""
    return None if self.minimum is None else self.found / self.minimum


def costs(setup: Setup, step: Measured, train: Measured) -> list[Cost]:
  """The figures of a run.

  Args:
    setup: the run.
    step: what was measured of `programs.decode_step`.
    train: of `train_step`; its figures are left out if one number of layers was compiled.
  """
  found = []
  if step.compiled:
    least = decode_minimum(setup)
    found.append(Cost("decode step, a chip at a full suffix", "bytes", step.accessed, least))
  if train.layer_flops is not None:
    packing = setup.config.packing
    each = setup.mesh.size / (packing.rows * packing.row_length)
    least = train_minimum(setup)
    found += [
      Cost("train_step, a layer and packed token", "FLOPs", train.layer_flops * each, least),
      Cost("train_step, a layer and packed token", "bytes", train.layer_accessed * each, None),
    ]
  return found


def decode_minimum(setup: Setup) -> float:
  """Bytes that a chip must read for a decode step at a full suffix.

  The weights that it holds, once; the keys and values of each group's prefix, once, and of each
  continuation's suffix. What a window hides is not read. Logits are not counted, nor the scales of
  weights, nor what a chip sends to others.
  """
  model, config = setup.model, setup.config
  _, level = decoded_levels(config)[-1]
  groups = decoded_at_once(config, level) / row_shards(setup.mesh)
  of_vector = model.head_dim * jnp.dtype(model.dtype).itemsize
  if config.rollout.cache == "int8":
    of_vector = model.head_dim + SCALE_BYTES
  of_token = 2 * model.kv_heads * of_vector
  tokens = 0.0
  for layer in range(model.layers):
    window = model.layer_kind(layer).window or math.inf
    suffix = min(level.budget, window)
    tokens += groups * (min(level.prefix, window - suffix) + level.n * suffix)
  return _weight_bytes(setup) + tokens * of_token


def _weight_bytes(setup: Setup) -> float:
  """Of the matrices of a chip, as they are multiplied; of an embedding rows are read, not all."""
  params = abstract_params(setup)
  if not setup.model.tie_embeddings:
    params = {name: leaf for name, leaf in params.items() if name != "embedding"}
  sizes = [
    math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params) if x.ndim > 1
  ]
  of_weight = jnp.dtype(setup.model.dtype).itemsize
  return sum(sizes) * (1 if setup.config.rollout.weights == "int8" else of_weight)


def train_minimum(setup: Setup) -> float:
  """FLOPs of a packed token in the matrices of a layer, forwards and backwards; attention's own are
  not counted."""
  layer = abstract_params(setup)["block_0"]
  weights = sum(x.size for x in jax.tree.leaves(layer) if x.ndim > 1)
  return weights * (REMAT_FLOPS if setup.model.remat else TRAIN_FLOPS)
