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

from spo_jax.models.attention.pallas_decode import merge, partial_attention
from spo_jax.models.attention.spec import NEG_INF, NOWHERE, AttentionSpec
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
  matrix a key-value head. "pallas" has a kernel for it, `pallas_decode.py`, but not in int8;
  every other backend takes products.

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
  B, _, _, Dh = q.shape
  K = k.shape[2]
  last = write_chunk(cache.last, k.reshape(B, K, Dh, 1), v.reshape(B, K, 1, Dh), context)
  in_int8 = isinstance(last[0], Quantised)
  attend = _by_kernel if spec.backend == "pallas" and not in_int8 else _by_products
  q_BxKxGxDh = q.reshape(B, K, -1, Dh)
  mixed = attend(q_BxKxGxDh, positions, context, cache._replace(last=last), spec)
  return mixed.astype(v.dtype).reshape(q.shape), last


def _by_products(q_BxKxGxDh, positions, context: DecodeContext, cache: LayerCache, spec):
  """The scores of prefix and chunks share one softmax, normalised after the products with the
  values."""
  B, K, G, Dh = q_BxKxGxDh.shape
  R, n = context.visible.shape
  prefix_k, prefix_v = cache.prefix
  position_Rx1xP = context.prefix_positions[:, None]
  seen_RxnxP = position_Rx1xP < context.visible[..., None]
  if spec.window is not None:
    seen_RxnxP &= positions.reshape(R, n, 1) - position_Rx1xP < spec.window
  products = _products("rnkgd,rkdp->rkngp", q_BxKxGxDh.reshape(R, n, K, G, Dh), prefix_k)
  to_prefix = jnp.where(seen_RxnxP[:, None, :, None], spec.scores(products), NEG_INF)
  chunks = (*cache.full, cache.last)
  to_chunks = []
  for (chunk_k, _), age_S in zip(chunks, context.ages, strict=True):
    seen_RxS = age_S[None] <= context.steps[:, None]
    if spec.window is not None:
      seen_RxS &= age_S[None] < spec.window
    products = _products("bkgd,bkds->bkgs", q_BxKxGxDh, chunk_k)
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
  mixed = by_continuation(_mix("rkngp,rkpd->rkngd", weights, prefix_v, q_BxKxGxDh.dtype))
  for scores, (_, chunk_v) in zip(to_chunks, chunks, strict=True):
    weights = jnp.exp(scores - peak)
    total = total + weights.sum(-1, keepdims=True)
    mixed = mixed + _mix("bkgs,bksd->bkgd", weights, chunk_v, q_BxKxGxDh.dtype)
  return mixed / total


def _by_kernel(q_BxKxGxDh, positions, context: DecodeContext, cache: LayerCache, spec):
  """Prefix and chunks are read by a kernel each time, and joined by their log-sum-exps."""
  B, K, G, Dh = q_BxKxGxDh.shape
  R, n = context.visible.shape
  everything = spec.window or NOWHERE
  oldest_Rxn = jnp.maximum(positions.reshape(R, n) - everything + 1, 0)
  bounds_RxMx2 = jnp.repeat(jnp.stack([oldest_Rxn, context.visible], -1), G, axis=1)
  q_RxKxMxDh = q_BxKxGxDh.reshape(R, n, K, G, Dh).swapaxes(1, 2).reshape(R, K, n * G, Dh)
  to_prefix = partial_attention(
    q_RxKxMxDh, *cache.prefix, context.prefix_positions, bounds_RxMx2, spec
  )

  def by_continuation(x_RxKxMxE):
    return x_RxKxMxE.reshape(R, K, n, G, -1).swapaxes(1, 2).reshape(B, K, G, -1)

  parts = [(by_continuation(to_prefix[0]), by_continuation(to_prefix[1])[..., 0])]
  ages_R = jnp.minimum(context.steps + 1, everything)
  bounds_BxGx2 = jnp.broadcast_to(
    jnp.stack([jnp.zeros_like(ages_R), ages_R], -1).repeat(n, axis=0)[:, None], (B, G, 2)
  )
  for chunk, age_S in zip((*cache.full, cache.last), context.ages, strict=True):
    parts.append(partial_attention(q_BxKxGxDh, *chunk, age_S[None], bounds_BxGx2, spec))
  return merge(parts)


def write_chunk(chunk, k, v, context: DecodeContext):
  """The chunk with a column of keys [B, K, Dh, 1] and a row of values [B, K, 1, Dh]."""

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
