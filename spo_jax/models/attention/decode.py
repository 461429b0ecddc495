"""Attention of shared-prefix decode."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.models.attention.spec import NEG_INF, AttentionSpec


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
