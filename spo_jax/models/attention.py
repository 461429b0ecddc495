"""The attention of the three uses of the decoder: packed forests, prefill, shared-prefix decode.

All softmaxes are in float32, so that the sampler's log-probs are the trainer's. The three are
called as `attend(q, k, v, positions, context, cache, spec)`, positions being those of the queries.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax.numerics import soft_cap

NEG_INF = -1e30  # finite: a fully masked row gives a uniform softmax, not NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """What attention does in a layer; hashable, a static argument."""

  scale: float  # of the products of queries and keys
  window: int | None = None  # a query sees the keys of its last `window` positions; None: of all
  cap: float | None = None  # soft cap of the scaled products

  def scores(self, products: jax.Array) -> jax.Array:
    """Scores before the softmax, from products of queries and keys."""
    return soft_cap(products * self.scale, self.cap)


def interval_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  until_BxJxL: jax.Array,
  key_blocks_BxNxW: jax.Array,
  spec: AttentionSpec,
) -> jax.Array:
  """Attention in which query i sees key j iff j <= i < until[j], computed on visible blocks only.

  With a window it must also be true that positions[i] - positions[j] < window: the distance along
  the path from the root, not along the row.

  A row is a forest written depth first (`training/packing.py`), so this one integer a key is
  exactly "the key is an ancestor of the query, or an earlier token of its segment". The row is cut
  into N blocks of C = T / N queries and J blocks of L = T / J keys, and each block of queries is
  multiplied with the W blocks of keys listed for it: cost T * W * L, not T * T. Neighbours in a
  tree share most of their ancestors, so C may be several times L: keys are gathered once for all C
  queries, and short blocks of keys leave out what none of them sees.

  Args:
    q_BxTxHxDh: queries; H a multiple of K.
    k_BxTxKxDh: keys.
    v_BxTxKxDh: values.
    positions_BxT: [B, T] int32, distance from the root of the token's tree; read if there is a
      window.
    until_BxJxL: [B, J, L] int32, first row index past the subtree that hangs off the token.
    key_blocks_BxNxW: [B, N, W] int32, the key blocks that query block n may see; -1 pads.
    spec: scale, window and cap.

  Returns:
    [B, T, H, Dh], dtype of v.
  """
  B, T, H, Dh = q_BxTxHxDh.shape
  K = k_BxTxKxDh.shape[2]
  N, W = key_blocks_BxNxW.shape[1:]
  J, L = until_BxJxL.shape[1:]
  chex.assert_shape(until_BxJxL, (B, J, T // J))
  chex.assert_is_divisible(T, J)
  chex.assert_is_divisible(T, N)
  C, G = T // N, H // K
  S = W * L
  index_BxNxW = jnp.maximum(key_blocks_BxNxW, 0)
  take = jax.vmap(lambda blocks, index: blocks[index])

  def gather(x_BxTxKxDh):
    x_BxNxSxKxDh = take(x_BxTxKxDh.reshape(B, J, L, K, Dh), index_BxNxW).reshape(B, N, S, K, Dh)
    return x_BxNxSxKxDh.swapaxes(2, 3)

  k_BxNxKxSxDh, v_BxNxKxSxDh = gather(k_BxTxKxDh), gather(v_BxTxKxDh)
  listed_BxNxWx1 = key_blocks_BxNxW[..., None] >= 0
  until_BxNx1xS = jnp.where(listed_BxNxWx1, take(until_BxJxL, index_BxNxW), 0).reshape(B, N, 1, S)
  key_BxNxWxL = index_BxNxW[..., None] * L + jnp.arange(L)[None, None, None]
  key_BxNx1xS = key_BxNxWxL.reshape(B, N, 1, S)
  query_1xNxCx1 = jnp.arange(T).reshape(1, N, C, 1)
  visible_BxNxCxS = (key_BxNx1xS <= query_1xNxCx1) & (query_1xNxCx1 < until_BxNx1xS)
  if spec.window is not None:
    at_key_BxNx1xS = take(positions_BxT.reshape(B, J, L), index_BxNxW).reshape(B, N, 1, S)
    at_query_BxNxCx1 = positions_BxT.reshape(B, N, C, 1)
    visible_BxNxCxS = visible_BxNxCxS & (at_query_BxNxCx1 - at_key_BxNx1xS < spec.window)

  # A matrix of R = G * C queries for each key-value head.
  R = G * C
  visible_BxNx1xRxS = jnp.tile(visible_BxNxCxS, (1, 1, G, 1))[:, :, None]
  q_BxNxKxGxCxDh = q_BxTxHxDh.reshape(B, N, C, K, G, Dh).transpose(0, 1, 3, 4, 2, 5)
  q_BxNxKxRxDh = q_BxNxKxGxCxDh.reshape(B, N, K, R, Dh)
  scores = jnp.einsum(
    "bnkrd,bnksd->bnkrs", q_BxNxKxRxDh, k_BxNxKxSxDh, preferred_element_type=jnp.float32
  )
  scores = jnp.where(visible_BxNx1xRxS, spec.scores(scores), NEG_INF)
  # Normalised after the product with the values: Dh divisions a query in place of S.
  peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - peak)
  mixed_BxNxKxRxDh = jnp.einsum(
    "bnkrs,bnksd->bnkrd",
    weights.astype(v_BxTxKxDh.dtype),
    v_BxNxKxSxDh,
    preferred_element_type=jnp.float32,
  )
  mixed_BxNxKxRxDh = mixed_BxNxKxRxDh / weights.sum(-1, keepdims=True)
  mixed_BxNxCxKxGxDh = mixed_BxNxKxRxDh.reshape(B, N, K, G, C, Dh).transpose(0, 1, 4, 2, 3, 5)
  return mixed_BxNxCxKxGxDh.reshape(B, T, H, Dh).astype(v_BxTxKxDh.dtype)


class PackedContext(NamedTuple):
  """What `attend_packed` needs of a batch of packed forests."""

  until: jax.Array  # [B, J, L] int32
  key_blocks: jax.Array  # [B, N, W] int32


def attend_packed(q, k, v, positions, context: PackedContext, cache, spec: AttentionSpec):
  """Training: interval attention, no cache."""
  mixed = interval_attention(q, k, v, positions, context.until, context.key_blocks, spec)
  return mixed, cache


def attend_prefill(q, k, v, positions, context, cache, spec: AttentionSpec):
  """Prefill: plain causal attention; the cache is (keys, values) [B, K, T, Dh], head-major."""
  del context, cache
  B, T = k.shape[:2]
  until = jnp.full((B, 1, T), T, jnp.int32)
  blocks = jnp.zeros((B, 1, 1), jnp.int32)
  mixed = interval_attention(q, k, v, positions, until, blocks, spec)
  return mixed, (k.swapaxes(1, 2), v.swapaxes(1, 2))


class DecodeContext(NamedTuple):
  """What `attend_decode` needs besides the caches: R groups of n continuations, S suffix slots."""

  visible: jax.Array  # [R, n] int32, number of leading prefix tokens that a continuation sees
  suffix_mask: jax.Array  # [R, S] bool, suffix slots that belong to the group
  slot: jax.Array  # scalar int32, suffix slot that this step writes
  writes: jax.Array  # [R] bool, groups that write it; a group that is done keeps its suffix


def attend_decode(q, k, v, positions, context: DecodeContext, cache, spec: AttentionSpec):
  """Decode: one new token a continuation against the group's shared prefix and its own suffix.

  The prefix of a group is read once for all n continuations: their queries form one [n * G, Dh]
  matrix a key-value head. Prefix and suffix scores share one softmax, normalised by their joint
  log-sum-exp.

  Args:
    q: [R * n, 1, H, Dh].
    k: [R * n, 1, K, Dh].
    v: like k.
    positions: [R * n, 1] int32, read if there is a window. A prefix token's position is its index;
      a suffix token is as far back as steps have passed since its slot was written.
    context: see `DecodeContext`.
    cache: (prefix keys, prefix values) [R, K, P, Dh] and (suffix keys, suffix values) [R, n, K, S,
      Dh].
    spec: scale, window and cap.

  Returns:
    ([R * n, 1, H, Dh], (updated suffix keys, updated suffix values)).
  """
  prefix_k, prefix_v, suffix_k, suffix_v = cache
  R, n, K, S, Dh = suffix_k.shape
  G = q.shape[2] // K

  def write(store, new):
    old = jax.lax.dynamic_slice_in_dim(store, context.slot, 1, axis=3)
    new = new.reshape(R, n, K, 1, Dh).astype(store.dtype)
    new = jnp.where(context.writes[:, None, None, None, None], new, old)
    return jax.lax.dynamic_update_slice_in_dim(store, new, context.slot, axis=3)

  suffix_k, suffix_v = write(suffix_k, k), write(suffix_v, v)
  q_RxKxnxGxDh = q.reshape(R, n, K, G, Dh).swapaxes(1, 2)
  to_prefix = jnp.einsum(
    "rkngd,rkpd->rkngp", q_RxKxnxGxDh, prefix_k, preferred_element_type=jnp.float32
  )
  to_suffix = jnp.einsum(
    "rkngd,rnksd->rkngs", q_RxKxnxGxDh, suffix_k, preferred_element_type=jnp.float32
  )
  position_P = jnp.arange(prefix_k.shape[2])[None, None, None, None]
  sees_prefix = position_P < context.visible[:, None, :, None, None]
  sees_suffix = context.suffix_mask[:, None, None, None]
  if spec.window is not None:
    near = positions.reshape(R, 1, n, 1, 1) - position_P < spec.window
    sees_prefix = sees_prefix & near
    age_S = (context.slot - jnp.arange(S)) % S
    sees_suffix = sees_suffix & (age_S < spec.window)[None, None, None, None]
  to_prefix = jnp.where(sees_prefix, spec.scores(to_prefix), NEG_INF)
  to_suffix = jnp.where(sees_suffix, spec.scores(to_suffix), NEG_INF)
  peak = jnp.maximum(to_prefix.max(-1, keepdims=True), to_suffix.max(-1, keepdims=True))
  to_prefix, to_suffix = jnp.exp(to_prefix - peak), jnp.exp(to_suffix - peak)
  total = to_prefix.sum(-1, keepdims=True) + to_suffix.sum(-1, keepdims=True)
  mixed = jnp.einsum("rkngp,rkpd->rkngd", (to_prefix / total).astype(v.dtype), prefix_v)
  mixed = mixed + jnp.einsum("rkngs,rnksd->rkngd", (to_suffix / total).astype(v.dtype), suffix_v)
  return mixed.swapaxes(1, 2).reshape(q.shape), (suffix_k, suffix_v)
