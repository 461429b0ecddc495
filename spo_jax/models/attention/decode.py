"""Attention of shared-prefix decode.

Keys are stored as [.., Dh, tokens] and values as [.., tokens, Dh]: so both products run along the
memory, and a step adds a column of keys and a row of values. Either may be int8, with a scale for
each row, head and token: those of keys multiply scores, those of values the weights of the softmax.

Axis letters, beside those of the decoder: R groups of n continuations, B = R * n continuations, P
prefix slots, S suffix slots, G queries of a key-value head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.models.attention.spec import NEG_INF, AttentionSpec
from spo_jax.models.quantised import Quantised, quantise

Stored = jax.Array | Quantised  # keys or values


class DecodeContext(NamedTuple):
  """What `attend_decode` needs besides the caches.

  A suffix lies in chunks of slots, the same for all groups: full ones, and the one that is written,
  the last.
  """

  visible: jax.Array  # [R, n] int32, a continuation sees prefix tokens at positions below this one
  prefix_positions: jax.Array  # [R, P] int32
  # [S] int32 a chunk: steps since its slots were written, not below 0
  ages: tuple[jax.Array, ...]
  steps: jax.Array  # [R] int32, steps that the group has taken: no slot of its own is older
  slot: jax.Array  # scalar int32, slot of the last chunk that this step writes
  writes: jax.Array | None = None  # [R] bool, groups that write it; None: all


class LayerCache(NamedTuple):
  """Keys and values of a layer."""

  prefix: tuple[Stored, Stored]  # [R, K, Dh, P], [R, K, P, Dh]
  full: tuple[tuple[Stored, Stored], ...]  # a chunk: [B, K, Dh, S], [B, K, S, Dh]
  last: tuple[Stored, Stored]  # likewise, the chunk that is written


def stored(kind: str, keys: jax.Array, values: jax.Array) -> tuple[Stored, Stored]:
  """[.., K, Dh, S] keys and [.., K, S, Dh] values as a cache of a kind, of `quantised.KINDS`."""
  if kind == "full":
    return keys, values
  return quantise(keys, -2), quantise(values, -1)


def attend_decode(
  q, k, v, positions, context: DecodeContext, cache: LayerCache, spec: AttentionSpec
):
  """Decode: one new token a continuation against the group's shared prefix and its own suffix.

  The prefix of a group is read once for all n continuations: their queries form one [n * G, Dh]
  matrix a key-value head. The scores of prefix and chunks share one softmax, normalised by their
  joint log-sum-exp, after the products with the values.

  Args:
    q: [B, 1, H, Dh].
    k: [B, 1, K, Dh].
    v: like k.
    positions: [B, 1] int32, of the new tokens; read if there is a window.
    context: see `DecodeContext`.
    cache: of the layer.
    spec: scale, window and cap.

  Returns:
    ([B, 1, H, Dh], the updated last chunk).
  """
  B, _, H, Dh = q.shape
  R, n = context.visible.shape
  K = k.shape[2]
  G = H // K
  last = _write(cache.last, k.reshape(B, K, Dh, 1), v.reshape(B, K, 1, Dh), context)
  prefix_k, prefix_v = cache.prefix

  position_Rx1xP = context.prefix_positions[:, None]
  seen_RxnxP = position_Rx1xP < context.visible[..., None]
  if spec.window is not None:
    seen_RxnxP &= positions.reshape(R, n, 1) - position_Rx1xP < spec.window
  products = _products("rnkgd,rkdp->rkngp", q.reshape(R, n, K, G, Dh), prefix_k)
  to_prefix = jnp.where(seen_RxnxP[:, None, :, None], spec.scores(products), NEG_INF)
  chunks = (*cache.full, last)
  to_chunks = []
  for (chunk_k, _), age_S in zip(chunks, context.ages, strict=True):
    seen_RxS = age_S[None] <= context.steps[:, None]
    if spec.window is not None:
      seen_RxS &= age_S[None] < spec.window
    products = _products("bkgd,bkds->bkgs", q.reshape(B, K, G, Dh), chunk_k)
    seen_BxS = jnp.repeat(seen_RxS, n, axis=0)
    to_chunks.append(jnp.where(seen_BxS[:, None, None], spec.scores(products), NEG_INF))

  def by_continuation(x_RxKxnxGxE):
    return x_RxKxnxGxE.swapaxes(1, 2).reshape(B, K, G, -1)

  def by_group(x_BxKxGxE):
    return x_BxKxGxE.reshape(R, n, K, G, -1).swapaxes(1, 2)

  peak = by_continuation(to_prefix.max(-1, keepdims=True))
  for scores in to_chunks:
    peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
  weights = jnp.exp(to_prefix - by_group(peak))
  total = by_continuation(weights.sum(-1, keepdims=True))
  mixed = by_continuation(_mix("rkngp,rkpd->rkngd", weights, prefix_v, v.dtype))
  for scores, (_, chunk_v) in zip(to_chunks, chunks, strict=True):
    weights = jnp.exp(scores - peak)
    total = total + weights.sum(-1, keepdims=True)
    mixed = mixed + _mix("bkgs,bksd->bkgd", weights, chunk_v, v.dtype)
  return (mixed / total).astype(v.dtype).reshape(q.shape), last


def _write(chunk, k, v, context: DecodeContext):
  """The chunk with a column of keys and a row of values."""

  kind = "int8" if isinstance(chunk[0], Quantised) else "full"

  def put(store, new, axis):
    new = new.astype(store.dtype)
    if context.writes is not None:
      old = jax.lax.dynamic_slice_in_dim(store, context.slot, 1, axis=axis)
      writes_B = jnp.repeat(context.writes, len(store) // len(context.writes))
      new = jnp.where(writes_B[:, None, None, None], new, old)
    return jax.lax.dynamic_update_slice_in_dim(store, new, context.slot, axis=axis)

  keys, values = stored(kind, k, v)
  write = lambda axis: lambda store, new: put(store, new, axis)
  return jax.tree.map(write(3), chunk[0], keys), jax.tree.map(write(2), chunk[1], values)


def _products(equation, queries, keys: Stored):
  if not isinstance(keys, Quantised):
    return jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)
  products = _products(equation, queries, keys.ints.astype(queries.dtype))
  return products * _of_slots(keys.scales, products)


def _mix(equation, weights, values: Stored, dtype):
  if isinstance(values, Quantised):
    weights = weights * _of_slots(values.scales, weights)
    values = values.ints.astype(dtype)
  return jnp.einsum(
    equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )


def _of_slots(scales, scores):
  """Scales [.., K, 1, S] or [.., K, S, 1] as they multiply scores [.., K, ..., S]."""
  rows, K = scales.shape[:2]
  return scales.reshape(rows, K, *[1] * (scores.ndim - 3), -1)
