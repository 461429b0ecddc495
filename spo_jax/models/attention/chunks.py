"""Causal attention of a chunk of a prompt to the cache of all that is before it, and to itself.

The loop over blocks of keys ends with the chunk, and begins where its window does: what lies ahead
is in the cache already, and costs nothing. The scores of one block exist at a time. One
implementation in plain XLA serves every backend.

Axis letters, beside those of the decoder: C tokens of a chunk, P slots of the cache, L keys of a
block, G queries of a key-value head.
"""

import jax
import jax.numpy as jnp

from spo_jax.models.attention.running import add_keys, no_keys
from spo_jax.models.attention.spec import NEG_INF, AttentionSpec

# Most keys of a block. On a CPU the scores of more leave its caches; with much fewer, the sums over
# them are written more often than the scores.
KEY_BLOCK = 256


def attend_chunk(q, k, v, positions, start: jax.Array, cache, spec: AttentionSpec):
  """Prefill in chunks: causal attention of C tokens at consecutive positions.

  Args:
    q: [B, C, H, Dh].
    k: [B, C, K, Dh].
    v: like k.
    positions: [B, C] int32; they are those of the slots, `start` and what follows it.
    start: scalar int32, the slot of the chunk's first token, at most P - C.
    cache: (keys [B, K, Dh, P], values [B, K, P, Dh]), written before `start`.
    spec: scale, window and cap.

  Returns:
    ([B, C, H, Dh], the cache with the chunk).
  """
  del positions
  B, C, H, Dh = q.shape
  K, P = k.shape[2], cache[1].shape[2]
  L = min(C, KEY_BLOCK)
  put = jax.lax.dynamic_update_slice_in_dim
  cache_k = put(cache[0], k.transpose(0, 2, 3, 1), start, axis=3)
  cache_v = put(cache[1], v.swapaxes(1, 2), start, axis=2)
  q_BxKxGxCxDh = q.reshape(B, C, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
  query_Cx1 = start + jnp.arange(C)[:, None]

  def block(j, seen):
    first = jnp.minimum(j * L, P - L)
    take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, L, axis=axis)
    products = jnp.einsum(
      "bkgcd,bkds->bkgcs", q_BxKxGxCxDh, take(cache_k, 3), preferred_element_type="float32"
    )
    key_1xL = (first + jnp.arange(L))[None]
    # The cache's last block may begin with keys of the block before it.
    visible_CxL = (key_1xL >= j * L) & (key_1xL <= query_Cx1)
    if spec.window is not None:
      visible_CxL &= query_Cx1 - key_1xL < spec.window
    scores = jnp.where(visible_CxL[None, None, None], spec.scores(products), NEG_INF)
    return add_keys(seen, scores, take(cache_v, 2))

  begin = 0 if spec.window is None else jnp.maximum(start - spec.window + 1, 0) // L
  seen = jax.lax.fori_loop(begin, (start + C + L - 1) // L, block, no_keys(B, K, H // K, C, Dh))
  mixed_BxKxGxCxDh = (seen.mixed / seen.total[..., None]).astype(v.dtype)
  return mixed_BxKxGxCxDh.transpose(0, 3, 1, 2, 4).reshape(q.shape), (cache_k, cache_v)
