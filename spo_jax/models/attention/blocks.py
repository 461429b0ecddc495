"""Interval attention with the key blocks of all blocks of queries gathered at once.

Few and large operations, fast where a row's scores fit the machine's caches; its memory is the
number of queries times that of the keys listed for each.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from spo_jax.models.attention.spec import NEG_INF, AttentionSpec


def interval_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  until_BxJxL: jax.Array,
  key_blocks_BxNxW: jax.Array,
  spec: AttentionSpec,
  first: jax.Array | int = 0,
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
    first: scalar, row index of the first query, if queries are a part of the row; N is of the part.

  Returns:
    [B, T, H, Dh], dtype of v; T as queries have.
  """
  B, T, H, Dh = q_BxTxHxDh.shape
  keys, K = k_BxTxKxDh.shape[1:3]
  N, W = key_blocks_BxNxW.shape[1:]
  J, L = until_BxJxL.shape[1:]
  chex.assert_shape(until_BxJxL, (B, J, keys // J))
  chex.assert_is_divisible(keys, J)
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
  query_1xNxCx1 = first + jnp.arange(T).reshape(1, N, C, 1)
  visible_BxNxCxS = (key_BxNx1xS <= query_1xNxCx1) & (query_1xNxCx1 < until_BxNx1xS)
  if spec.window is not None:
    at_key_BxNx1xS = take(positions_BxT.reshape(B, J, L), index_BxNxW).reshape(B, N, 1, S)
    of_queries_BxT = jax.lax.dynamic_slice_in_dim(positions_BxT, first, T, axis=1)
    at_query_BxNxCx1 = of_queries_BxT.reshape(B, N, C, 1)
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


def causal_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  spec: AttentionSpec,
) -> jax.Array:
  """Attention in which a query sees itself and what comes before it in its row.

  Args:
    q_BxTxHxDh: queries; H a multiple of K.
    k_BxTxKxDh: keys.
    v_BxTxKxDh: values.
    positions_BxT: [B, T] int32, read if there is a window.
    spec: scale, window and cap.

  Returns:
    [B, T, H, Dh], dtype of v.
  """
  B, T = k_BxTxKxDh.shape[:2]
  until = jnp.full((B, 1, T), T, jnp.int32)
  blocks = jnp.zeros((B, 1, 1), jnp.int32)
  return interval_attention(q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, positions_BxT, until, blocks, spec)


def causal_in_blocks(
  interval_attention: Callable[..., jax.Array],
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  spec: AttentionSpec,
  block: int,
) -> jax.Array:
  """`causal_attention` by another backend's `interval_attention`, on rows cut into equal blocks.

  A row is a forest of one path, and a query block sees all key blocks up to its own, or those
  that its window reaches; with a window, positions must rise along the row.
  """
  B, T = q_BxTxHxDh.shape[:2]
  N = -(-T // block)
  W = N if spec.window is None else min(N, 1 - (1 - spec.window) // block)
  n_Nx1 = jnp.arange(N)[:, None]
  key_block_NxW = jnp.maximum(n_Nx1 - (W - 1), 0) + jnp.arange(W)[None]
  key_block_NxW = jnp.where(key_block_NxW <= n_Nx1, key_block_NxW, -1)
  lengthen = lambda x: jnp.pad(x, ((0, 0), (0, N * block - T), *((0, 0),) * (x.ndim - 2)))
  mixed_BxTxHxDh = interval_attention(
    *map(lengthen, (q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, positions_BxT)),
    jnp.full((B, N, block), N * block, jnp.int32),
    jnp.broadcast_to(key_block_NxW, (B, N, W)),
    spec,
  )
  return mixed_BxTxHxDh[:, :T]
