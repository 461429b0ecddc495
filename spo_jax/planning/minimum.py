"""What programs cost, against the least that any program of the same algorithm must.

FLOPs are the compiler's figure, bytes that of `traffic`. They count a loop's body once, so two are
told that this does not spoil: those of one decode step, which has no loop but that of rejected
draws, and those of one layer in `train_step`, the difference between two compilations, whose loop
over micro-batches then counts one of them. There the optimiser's pass over a layer's parameters is
counted with it; and attention in full by "pallas", which tells its cost for all listed blocks, and
by "blocks", while of the loops of "flash" one turn is counted.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.infra.mesh import row_shards
from spo_jax.infra.speed import TRAIN_FLOPS
from spo_jax.models.decoder import DecoderConfig
from spo_jax.planning.measure import Measured
from spo_jax.planning.programs import Setup, abstract_params, decoded_at_once, decoded_levels

REMAT_FLOPS = 8  # the same with the forward product once more, which "dots" keeps
FORWARD_FLOPS = 2  # a weight and token
ATTENTION_FLOPS = 4  # a key and a number of a query: a product with the key, one with the value
LOGIT_BYTES = 4  # float32 whatever the activations are
SCALE_BYTES = 4  # of a key or a value in int8


class Work(NamedTuple):
  """What a part of a step must do."""

  flops: float
  accessed: float  # bytes


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
    found.append(Cost("decode step, a chip at a full suffix", "bytes", step.moved_in_loops, least))
  if train.layer_flops is not None:
    packing = setup.config.packing
    each = setup.mesh.size / (packing.rows * packing.row_length)
    least = train_minimum(setup)
    found += [
      Cost("train_step, a layer and packed token", "FLOPs", train.layer_flops * each, least),
      Cost("train_step, a layer and packed token", "bytes", train.layer_moved * each, None),
    ]
  return found


def decode_minimum(setup: Setup) -> float:
  """Bytes that a chip must read for a decode step at a full suffix.

  Its share of the weights, once; the keys and values of each group's prefix, once, and of each
  continuation's suffix. What a window hides is not read. Logits are not counted, nor the scales of
  weights, nor what a chip sends to others.
  """
  model, config = setup.model, setup.config
  _, level = decoded_levels(config)[-1]
  groups = decoded_at_once(config, level) / row_shards(setup.mesh)
  parts = step_work(
    model,
    abstract_params(setup),
    groups,
    level.n,
    level.prefix,
    level.budget,
    weights=config.rollout.weights,
    cache=config.rollout.cache,
  )
  rows = groups * level.n
  logits = 2 * rows * model.vocab_size * LOGIT_BYTES
  return sum(work.accessed for work in parts.values()) - logits


def step_work(
  model: DecoderConfig,
  params,
  groups: float,
  n: int,
  prefix: int,
  suffix: int,
  *,
  weights: str = "full",
  cache: str = "full",
) -> dict[str, Work]:
  """The least that a chip must do for a decode step, by part.

  Weights are read once, keys and values of a prefix once a group, logits written and read once.
  Norms, activations, what lies between the layers and what chips send one another are left out.

  Args:
    model: the decoder.
    params: its parameters, or shapes of them, with shardings.
    groups: that a chip decodes.
    n: continuations of a group.
    prefix: tokens of it that a continuation sees.
    suffix: tokens of its own that it sees, with the one that the step feeds.
    weights: of `quantised.KINDS`.
    cache: likewise.

  Returns:
    By part: `blocks`, their matrices; attention to `prefix` and to `suffix`; `cache write`, of keys
    and values; `unembedding`; `draw`.
  """
  number = jnp.dtype(model.dtype).itemsize
  of_weight = 1 if weights == "int8" else number
  of_vector = model.head_dim + SCALE_BYTES if cache == "int8" else model.head_dim * number
  rows = groups * n
  unembedding = "embedding" if model.tie_embeddings else "unembedding"
  of_blocks = _matrix_sizes({k: v for k, v in params.items() if k.startswith("block_")})
  of_logits = _matrix_sizes(params[unembedding])
  logits = rows * model.vocab_size * LOGIT_BYTES
  seen_prefix = seen_suffix = 0
  for layer in range(model.layers):
    window = model.layer_kind(layer).window or math.inf
    in_suffix = min(suffix, window)
    seen_suffix += in_suffix
    seen_prefix += min(prefix, window - in_suffix)
  of_token = 2 * model.kv_heads * of_vector
  of_query = ATTENTION_FLOPS * model.heads * model.head_dim
  # The newest token of a suffix is written, and not read again.
  return {
    "blocks": Work(FORWARD_FLOPS * rows * of_blocks, of_blocks * of_weight),
    "prefix": Work(rows * seen_prefix * of_query, groups * seen_prefix * of_token),
    "suffix": Work(rows * seen_suffix * of_query, rows * (seen_suffix - model.layers) * of_token),
    "cache write": Work(0, rows * model.layers * of_token),
    "unembedding": Work(FORWARD_FLOPS * rows * of_logits, of_logits * of_weight + logits),
    "draw": Work(0, logits),
  }


def _matrix_sizes(params) -> int:
  """Numbers in the matrices of a chip; an embedding that is looked up is none of them."""
  matrices = [x for x in jax.tree.leaves(params) if x.ndim > 1]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in matrices)


def train_minimum(setup: Setup) -> float:
  """FLOPs of a packed token in the matrices of a layer, forwards and backwards; attention's own are
  not counted."""
  layer = abstract_params(setup)["block_0"]
  weights = sum(x.size for x in jax.tree.leaves(layer) if x.ndim > 1)
  return weights * (REMAT_FLOPS if setup.model.remat == "blocks" else TRAIN_FLOPS)
