"""Interval attention in memory linear in T, forward and backward, in plain XLA.

A loop over blocks of queries, and in it one over chunks of the key blocks listed for them, with a
running softmax. The scores of one chunk exist at a time. The forward pass keeps its output and each
query's log-sum-exp, from which the backward pass computes the scores anew (FlashAttention,
arXiv 2205.14135).

Axis letters, beside those of `blocks.interval_attention`: N query blocks of C queries, J key blocks
of L keys, G queries of a key-value head, X key blocks of a chunk, M chunks, S = X * L keys of one.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spo_jax.models.attention.blocks import causal_in_blocks
from spo_jax.models.attention.running import add_keys, mix, no_keys
from spo_jax.models.attention.spec import ATTENTION, NEG_INF, AttentionSpec

# Most scores of a head that exist at a time, unless a pair of blocks has more. On a CPU larger ones
# leave its caches; much smaller ones are many small operations.
SCORES = 2**17
CAUSAL_BLOCK = 256  # most queries, and keys, of a block of a causal row


class _Listed(NamedTuple):
  """Who sees whom, in integers."""

  chunks: jax.Array  # [N, B, M, X] key blocks; -1 pads
  used: jax.Array  # [N] chunks that are not padding alone
  until: jax.Array  # [B, J, L]
  positions: jax.Array  # [B, T]
  first: jax.Array | int  # row index of the first query


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
  """As `blocks.interval_attention`, of the same arguments; a query that sees no key yields 0.

  The key blocks of a query block must differ from each other, and -1 must come last among them, as
  `key_blocks.visible_blocks` has it.
  """
  B, T, H, Dh = q_BxTxHxDh.shape
  keys, K = k_BxTxKxDh.shape[1:3]
  N, W = key_blocks_BxNxW.shape[1:]
  J, L = until_BxJxL.shape[1:]
  chex.assert_shape(until_BxJxL, (B, J, keys // J))
  chex.assert_is_divisible(keys, J)
  chex.assert_is_divisible(T, N)
  C = T // N
  X = min(W, max(1, SCORES // (C * L)))
  M = -(-W // X)
  padding = ((0, 0), (0, 0), (0, M * X - W))
  blocks_BxNxMX = jnp.pad(key_blocks_BxNxW, padding, constant_values=-1)
  chunks_NxBxMxX = blocks_BxNxMX.reshape(B, N, M, X).swapaxes(0, 1)
  used_N = jnp.sum(jnp.any(chunks_NxBxMxX >= 0, axis=(1, 3)), axis=-1)
  listed = _Listed(chunks_NxBxMxX, used_N, until_BxJxL, positions_BxT, first)
  q = q_BxTxHxDh.reshape(B, N, C, K, H // K, Dh).transpose(1, 0, 3, 4, 2, 5)
  k, v = (x.reshape(B, J, L, K, Dh).transpose(0, 3, 1, 2, 4) for x in (k_BxTxKxDh, v_BxTxKxDh))
  mixed_NxBxKxGxCxDh = _attention(spec, q, k, v, listed)
  return mixed_NxBxKxGxCxDh.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, H, Dh)


def causal_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  spec: AttentionSpec,
) -> jax.Array:
  """As `blocks.causal_attention`; with a window, positions must rise along the row."""
  block = min(q_BxTxHxDh.shape[1], CAUSAL_BLOCK)
  return causal_in_blocks(
    interval_attention, q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, positions_BxT, spec, block
  )


def _take(x_BxKxJxLxDh, blocks_BxX):
  """The keys of some blocks, [B, K, S, Dh]; -1 takes any."""
  taken = jax.vmap(lambda x, index: x[:, index])(x_BxKxJxLxDh, jnp.maximum(blocks_BxX, 0))
  B, K, _, _, Dh = taken.shape
  return taken.reshape(B, K, -1, Dh)


def _add(sum_BxKxJxLxDh, blocks_BxX, new_BxKxSxDh):
  """Adds to some blocks what `_take` took from; -1 is left out."""
  B, K, J, L, Dh = sum_BxKxJxLxDh.shape
  X = blocks_BxX.shape[1]
  # No two indices are equal: the sum needs no atomic additions, whose order is any.
  index_BxX = jnp.where(blocks_BxX >= 0, blocks_BxX, J + jnp.arange(X)[None])
  add = lambda total, index, new: total.at[:, index].add(new, mode="drop", unique_indices=True)
  return jax.vmap(add)(sum_BxKxJxLxDh, index_BxX, new_BxKxSxDh.reshape(B, K, X, L, Dh))


def _visible(spec: AttentionSpec, listed: _Listed, n, C: int, blocks_BxX):
  """[B, 1, 1, C, S] bool, keys of a chunk that the queries of block n see."""
  B, X = blocks_BxX.shape
  L = listed.until.shape[2]
  take = jax.vmap(lambda x, index: x[index])
  index_BxX = jnp.maximum(blocks_BxX, 0)
  key_BxXxL = index_BxX[..., None] * L + jnp.arange(L)[None, None]
  until_BxXxL = jnp.where(blocks_BxX[..., None] >= 0, take(listed.until, index_BxX), 0)
  key_Bx1xS, until_Bx1xS = key_BxXxL.reshape(B, 1, X * L), until_BxXxL.reshape(B, 1, X * L)
  begin = listed.first + n * C
  query_1xCx1 = (begin + jnp.arange(C))[None, :, None]
  visible = (key_Bx1xS <= query_1xCx1) & (query_1xCx1 < until_Bx1xS)
  if spec.window is not None:
    at_key_Bx1xS = take(listed.positions.reshape(B, -1, L), index_BxX).reshape(B, 1, X * L)
    at_query_BxC = jax.lax.dynamic_slice_in_dim(listed.positions, begin, C, axis=1)
    visible &= at_query_BxC[..., None] - at_key_Bx1xS < spec.window
  return visible[:, None, None]


def _products(q_BxKxGxCxDh, k_BxKxSxDh):
  """[B, K, G, C, S] float32."""
  return jnp.einsum("bkgcd,bksd->bkgcs", q_BxKxGxCxDh, k_BxKxSxDh, preferred_element_type="float32")


def _mix_back(weights_BxKxGxCxS, x_BxKxGxCxDh):
  """[B, K, S, Dh] float32, the transpose of `mix`."""
  weights_BxKxGxCxS = weights_BxKxGxCxS.astype(x_BxKxGxCxDh.dtype)
  return jnp.einsum(
    "bkgcs,bkgcd->bksd", weights_BxKxGxCxS, x_BxKxGxCxDh, preferred_element_type="float32"
  )


def _over_chunks(chunk, used, M: int, carry):
  """The carry after `used` of M chunks; a loop whose length is data waits for it on a GPU."""
  return chunk(0, carry) if M == 1 else jax.lax.fori_loop(0, used, chunk, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, listed):
  """[N, B, K, G, C, Dh], like q; k and v are [B, K, J, L, Dh]."""
  return _forward(spec, q, k, v, listed)[0]


def _forward(spec: AttentionSpec, q, k, v, listed: _Listed):
  N, B, K, G, C, Dh = q.shape

  def query_block(x):
    n, q, chunks, used = x

    def chunk(m, seen):
      blocks = jax.lax.dynamic_index_in_dim(chunks, m, axis=1, keepdims=False)
      visible = _visible(spec, listed, n, C, blocks)
      scores = jnp.where(visible, spec.scores(_products(q, _take(k, blocks))), NEG_INF)
      return add_keys(seen, scores, _take(v, blocks))

    start = no_keys(B, K, G, C, Dh)
    peak, total, mixed = _over_chunks(chunk, used, chunks.shape[1], start)
    total = jnp.where(total > 0, total, 1)
    return (mixed / total[..., None]).astype(v.dtype), peak + jnp.log(total)

  found = jax.lax.map(query_block, (jnp.arange(N), q, listed.chunks, listed.used))
  mixed, log_sum = checkpoint_name(found, ATTENTION)
  return mixed, (q, k, v, listed, mixed, log_sum)


def _backward(spec: AttentionSpec, kept, d_mixed):
  q, k, v, listed, mixed, log_sum = kept
  N, B, K, G, C, Dh = q.shape

  def query_block(d_keys_values, x):
    n, q, chunks, used, mixed, log_sum, d_mixed = x
    # The softmax's own share of the gradient: the same for all keys of a query.
    shared = jnp.einsum("bkgcd,bkgcd->bkgc", mixed, d_mixed, preferred_element_type="float32")

    def chunk(m, carry):
      d_q, d_k, d_v = carry
      blocks = jax.lax.dynamic_index_in_dim(chunks, m, axis=1, keepdims=False)
      visible = _visible(spec, listed, n, C, blocks)
      keys, values = _take(k, blocks), _take(v, blocks)
      scores, pull = jax.vjp(spec.scores, _products(q, keys))
      weights = jnp.exp(jnp.where(visible, scores, NEG_INF) - log_sum[..., None])
      d_scores = weights * (_products(d_mixed, values) - shared[..., None])
      (d_products,) = pull(d_scores)
      d_k = _add(d_k, blocks, _mix_back(d_products, q))
      d_v = _add(d_v, blocks, _mix_back(weights, d_mixed))
      return d_q + mix(d_products, keys), d_k, d_v

    start = (jnp.zeros((B, K, G, C, Dh)), *d_keys_values)
    d_q, *d_keys_values = _over_chunks(chunk, used, chunks.shape[1], start)
    return tuple(d_keys_values), d_q.astype(q.dtype)

  zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
  blocks = (jnp.arange(N), q, listed.chunks, listed.used, mixed, log_sum, d_mixed)
  (d_k, d_v), d_q = jax.lax.scan(query_block, zeros, blocks)
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)
