"""Kernels of interval attention for TPUs: FlashAttention-2 (arXiv 2307.08691) on listed key blocks.

A grid point multiplies one block of queries with one block of keys. Which two is read from tables
that the chip has before the kernel starts, so blocks that no query sees are never copied to it.
Forward and the gradient of the queries go through the key blocks of a query block; the gradients of
keys and values go through the same pairs, ordered by key block.

Inside the kernels queries lie along lanes, keys along sublanes: what there is one of per query
(peaks, sums, log-sum-exps) is then a row, which in memory is not padded to 128 numbers a query.

Axis letters, beside those of `pallas.py`: W key blocks of a query block, P = N * W pairs,
R = G * C rows of a matrix of queries.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spo_jax.models.attention.running import EMPTY
from spo_jax.models.attention.spec import ATTENTION, NEG_INF, AttentionSpec

# Of the memory beside a TPU's units, 64 MiB or more since v5; a compiler's own limit is 16.
VMEM_BYTES = 32 * 2**20
# Most numbers of a matrix of R queries with L keys, or with Dh, for which that suffices.
MOST_NUMBERS = 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(spec: AttentionSpec, interpret: bool, q, k, v, facts, key_blocks):
  """Interval attention on one device.

  Args:
    spec: scale, window and cap.
    interpret: whether the kernels run as ordinary operations.
    q: [B, K, N, R, Dh].
    k: [B, K, J, L, Dh].
    v: like k.
    facts: [B, 2, T] int32, until and positions.
    key_blocks: [B, N, W] int32, ascending; -1 pads.

  Returns:
    Like q, dtype of v; 0 for a query that sees no key.
  """
  return _forward(spec, interpret, q, k, v, facts, key_blocks)[0]


def _forward(spec, interpret, q, k, v, facts, key_blocks):
  B, K, N, R, Dh = q.shape
  walk = _through_keys(q, k, key_blocks)
  at = walk.blocks
  outputs = _call(
    functools.partial(_forward_kernel, spec),
    walk,
    of_queries=[(q, at.queries), (facts, at.query_facts)],
    of_keys=[(k, at.keys), (v, at.keys), (facts, at.key_facts)],
    outputs=[
      (jax.ShapeDtypeStruct(q.shape, v.dtype), at.queries),
      (jax.ShapeDtypeStruct((B, K, N, 1, R), jnp.float32), at.per_query),
    ],
    scratch=[(1, R), (1, R), (Dh, R)],
    products=2,
    interpret=interpret,
  )
  mixed, log_sum = checkpoint_name(outputs, ATTENTION)
  return mixed, (q, k, v, facts, key_blocks, mixed, log_sum)


def _backward(spec, interpret, kept, d_mixed):
  q, k, v, facts, key_blocks, mixed, log_sum = kept
  R, Dh, L = *q.shape[3:], k.shape[3]
  # The softmax's own share of the gradient: the same for all keys of a query.
  shared = jnp.einsum("bknrd,bknrd->bknr", mixed, d_mixed, preferred_element_type="float32")

  def run(kernel, walk, like, scratch, products):
    at = walk.blocks
    per_query = [(x, at.per_query) for x in (log_sum, shared[:, :, :, None])]
    spec_of = lambda x: at.queries if x is q else at.keys
    return _call(
      functools.partial(kernel, spec),
      walk,
      of_queries=[(q, at.queries), (d_mixed, at.queries), *per_query, (facts, at.query_facts)],
      of_keys=[(k, at.keys), (v, at.keys), (facts, at.key_facts)],
      outputs=[(jax.ShapeDtypeStruct(x.shape, x.dtype), spec_of(x)) for x in like],
      scratch=scratch,
      products=products,
      interpret=interpret,
    )

  (d_q,) = run(_queries_kernel, _through_keys(q, k, key_blocks), [q], [(Dh, R)], 3)
  d_k, d_v = run(_keys_kernel, _through_queries(q, k, key_blocks), [k, v], [(L, Dh)] * 2, 4)
  # The kernel has no grid point for a key block that is not listed, and leaves it unwritten.
  J = k.shape[2]
  listed_BxJ = jnp.any(key_blocks[..., None] == jnp.arange(J)[None, None, None], axis=(1, 2))
  d_k, d_v = (jnp.where(listed_BxJ[:, None, :, None, None], x, 0) for x in (d_k, d_v))
  return d_q, d_k, d_v, None, None


attention.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
  """Which part of an array a grid point works on."""

  queries: pl.BlockSpec  # [R, Dh]
  per_query: pl.BlockSpec  # [1, R]
  query_facts: pl.BlockSpec  # [2, C]
  keys: pl.BlockSpec  # [L, Dh]
  key_facts: pl.BlockSpec  # [2, L]


class _Walk(NamedTuple):
  """The order of pairs of a query block and a key block."""

  grid: tuple[int, ...]  # rows, key-value heads, ..; a kernel adds up along the last axis
  tables: tuple[jax.Array, ...]  # int32, that the kernel and its block specs read
  blocks: _Blocks
  keys_move: bool  # along the last axis; else the queries do


def _through_keys(q, k, key_blocks_BxNxW) -> _Walk:
  """Through the key blocks of each query block.

  The tables are the number of them [B * N], and which they are [B * N * W]; padding repeats the
  block before it, so that nothing is copied for it.
  """
  B, N, W = key_blocks_BxNxW.shape
  used_BxN = jnp.sum(key_blocks_BxNxW >= 0, axis=2)
  key_BxNxW = jnp.maximum(jax.lax.cummax(key_blocks_BxNxW, axis=2), 0)
  key_at = lambda b, n, w, used, keys: keys[(b * N + n) * W + w]
  blocks = _blocks(q, k, lambda b, n, *_: n, key_at)
  return _Walk((B, q.shape[1], N, W), (used_BxN.ravel(), key_BxNxW.ravel()), blocks, True)


def _through_queries(q, k, key_blocks_BxNxW) -> _Walk:
  """Through the query blocks of each key block.

  The tables are the number of pairs of a row [B], the query block of each pair [B * P] and its key
  block [B * P]. Pairs are ordered by key block; past their number the last of them is repeated.
  """
  B, N, W = key_blocks_BxNxW.shape
  J, P = k.shape[2], N * W
  key_BxP = jnp.where(key_blocks_BxNxW < 0, J, key_blocks_BxNxW).reshape(B, P)
  order_BxP = jnp.argsort(key_BxP, axis=1, stable=True)
  used_B = jnp.sum(key_BxP < J, axis=1)
  place_BxP = jnp.minimum(jnp.arange(P)[None], jnp.maximum(used_B - 1, 0)[:, None])
  order_BxP = jnp.take_along_axis(order_BxP, place_BxP, axis=1)
  key_BxP = jnp.minimum(jnp.take_along_axis(key_BxP, order_BxP, axis=1), J - 1)
  query_at = lambda b, p, used, queries, keys: queries[b * P + p]
  key_at = lambda b, p, used, queries, keys: keys[b * P + p]
  tables = used_B, (order_BxP // W).ravel(), key_BxP.ravel()
  return _Walk((B, q.shape[1], P), tables, _blocks(q, k, query_at, key_at), False)


def _blocks(q, k, query_at: Callable, key_at: Callable) -> _Blocks:
  """From functions of (row, the rest of a grid point, tables) to a query block and a key block."""
  N, R, Dh = q.shape[2:]
  J, L = k.shape[2:4]
  query = lambda b, h, *at: (b, h, query_at(b, *at), 0, 0)
  key = lambda b, h, *at: (b, h, key_at(b, *at), 0, 0)
  return _Blocks(
    queries=pl.BlockSpec((None, None, None, R, Dh), query),
    per_query=pl.BlockSpec((None, None, None, 1, R), query),
    query_facts=pl.BlockSpec((None, 2, J * L // N), lambda b, h, *at: (b, 0, query_at(b, *at))),
    keys=pl.BlockSpec((None, None, None, L, Dh), key),
    key_facts=pl.BlockSpec((None, 2, L), lambda b, h, *at: (b, 0, key_at(b, *at))),
  )


def _call(kernel, walk: _Walk, *, of_queries, of_keys, outputs, scratch, products, interpret):
  """Runs a kernel at all points of a grid.

  Args:
    kernel: of references to (*tables, *of_queries, *of_keys, *outputs, *scratch).
    walk: the grid, and what each point works on.
    of_queries: inputs, pairs of an array and its block spec.
    of_keys: likewise.
    outputs: pairs of a `ShapeDtypeStruct` and its block spec.
    scratch: shapes of float32 memory that lasts from one grid point to the next.
    products: number of products of [L, R] with Dh at a point.
    interpret: see `attention`.
  """
  arrays, in_specs = zip(*of_queries, *of_keys, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)
  points = math.prod(walk.grid)
  R, Dh = of_queries[0][1].block_shape[-2:]
  L = of_keys[0][1].block_shape[-2]
  resting, moving = (of_queries, of_keys) if walk.keys_move else (of_keys, of_queries)
  whole = sum(x.size * x.dtype.itemsize for x, _ in (*resting, *outputs))
  moved = sum(math.prod(filter(None, at.block_shape)) * x.dtype.itemsize for x, at in moving)
  return pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(walk.tables),
      grid=walk.grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * (len(walk.grid) - 1) + ("arbitrary",),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * R * L * Dh * points,
      transcendentals=R * L * points,
      bytes_accessed=whole + moved * points,
    ),
    interpret=interpret,
    name=f"interval{kernel.func.__name__}",
  )(*walk.tables, *arrays)


def _forward_kernel(
  spec, used, keys, q, at_queries, k, v, at_keys, mixed, log_sum, peak, total, sum_DhxR
):
  b, n, w = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  N, W = pl.num_programs(2), pl.num_programs(3)

  @pl.when(w == 0)
  def _():
    peak[...] = jnp.full_like(peak, EMPTY)
    total[...] = jnp.zeros_like(total)
    sum_DhxR[...] = jnp.zeros_like(sum_DhxR)

  @pl.when(w < used[b * N + n])
  def _():
    hidden_LxR = _hidden(spec, n, keys[(b * N + n) * W + w], at_queries, at_keys, q.shape[0])
    scores_LxR = spec.scores(_dot(k[...], 1, q[...], 1)) + hidden_LxR
    new_peak = jnp.maximum(peak[...], scores_LxR.max(0, keepdims=True))
    shrink = jnp.exp(peak[...] - new_peak)
    weights_LxR = jnp.exp(scores_LxR - new_peak)
    peak[...] = new_peak
    total[...] = total[...] * shrink + weights_LxR.sum(0, keepdims=True)
    sum_DhxR[...] = sum_DhxR[...] * shrink + _dot(v[...], 0, weights_LxR.astype(v.dtype), 0)

  @pl.when(w == W - 1)
  def _():
    divisor = jnp.where(total[...] > 0, total[...], 1)
    mixed[...] = (sum_DhxR[...] / divisor).T.astype(mixed.dtype)
    log_sum[...] = peak[...] + jnp.log(divisor)


def _queries_kernel(
  spec, used, keys, q, d_mixed, log_sum, shared, at_queries, k, v, at_keys, d_q, sum_DhxR
):
  b, n, w = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  N, W = pl.num_programs(2), pl.num_programs(3)

  @pl.when(w == 0)
  def _():
    sum_DhxR[...] = jnp.zeros_like(sum_DhxR)

  @pl.when(w < used[b * N + n])
  def _():
    hidden_LxR = _hidden(spec, n, keys[(b * N + n) * W + w], at_queries, at_keys, q.shape[0])
    _, d_products = _weights(spec, hidden_LxR, q, d_mixed, log_sum, shared, k, v)
    sum_DhxR[...] += _dot(k[...], 0, d_products.astype(k.dtype), 0)

  @pl.when(w == W - 1)
  def _():
    d_q[...] = sum_DhxR[...].T.astype(d_q.dtype)


def _keys_kernel(
  spec, used, queries, keys, q, d_mixed, log_sum, shared, at_queries, k, v, at_keys, d_k, d_v,
  sum_k, sum_v,
):  # fmt: skip
  b, p, P = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
  n, j = queries[b * P + p], keys[b * P + p]

  @pl.when((p == 0) | (keys[b * P + jnp.maximum(p - 1, 0)] != j))
  def _():
    sum_k[...] = jnp.zeros_like(sum_k)
    sum_v[...] = jnp.zeros_like(sum_v)

  @pl.when(p < used[b])
  def _():
    hidden_LxR = _hidden(spec, n, j, at_queries, at_keys, q.shape[0])
    weights, d_products = _weights(spec, hidden_LxR, q, d_mixed, log_sum, shared, k, v)
    sum_k[...] += _dot(d_products.astype(q.dtype), 1, q[...], 0)
    sum_v[...] += _dot(weights.astype(d_mixed.dtype), 1, d_mixed[...], 0)
    # The last of these is what stays.
    d_k[...] = sum_k[...].astype(d_k.dtype)
    d_v[...] = sum_v[...].astype(d_v.dtype)


def _dot(x, axis: int, y, of: int):
  """Product of two matrices over an axis of x and one of y, float32."""
  contracted = (((axis,), (of,)), ((), ()))
  return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)


def _hidden(spec, n, j, at_queries, at_keys, R: int):
  """[L, R] float32: 0 where a query of block n sees a key of block j, NEG_INF elsewhere."""
  C, L = at_queries.shape[1], at_keys.shape[1]
  query_1xC = n * C + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
  key_Lx1 = j * L + jax.lax.broadcasted_iota(jnp.int32, (L, 1), 0)
  at_keys_Lx2 = at_keys[...].T
  visible_LxC = (key_Lx1 <= query_1xC) & (query_1xC < at_keys_Lx2[:, :1])
  if spec.window is not None:
    visible_LxC &= at_queries[1:] - at_keys_Lx2[:, 1:] < spec.window
  hidden_LxC = jnp.where(visible_LxC, 0.0, NEG_INF)
  return jnp.concatenate([hidden_LxC] * (R // C), axis=1)


def _weights(spec, hidden_LxR, q, d_mixed, log_sum, shared, k, v):
  """(weights of the softmax, gradient of the products of keys and queries), [L, R] float32."""
  scores, pull = jax.vjp(spec.scores, _dot(k[...], 1, q[...], 1))
  weights = jnp.exp(scores + hidden_LxR - log_sum[...])
  d_scores = weights * (_dot(v[...], 1, d_mixed[...], 1) - shared[...])
  (d_products,) = pull(d_scores)
  return weights, d_products
