"""The kernel of shared-prefix decode for TPUs: a step reads each key and value once.

What a step costs is what it reads, and written as products and a softmax the scores of a group
weigh as much as its keys, and pass through memory several times. Here they stay beside the units.
Queries lie along sublanes, keys along lanes, as the cache has them.

Axis letters, beside those of `decode.py`: M queries that share keys and values, J blocks of L
slots.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from spo_jax.infra.mesh import ROWS, row_shards
from spo_jax.models.attention.pallas import LANES
from spo_jax.models.attention.pallas_kernels import EMPTY, MOST_NUMBERS, VMEM_BYTES
from spo_jax.models.attention.spec import NEG_INF, AttentionSpec

MOST_SLOTS = 1024  # of a block; more hide no more of the memory's latency


def partial_attention(
  q_BxKxMxDh: jax.Array,
  k_BxKxDhxS: jax.Array,
  v_BxKxSxDh: jax.Array,
  order_BxS: jax.Array,
  bounds_BxMx2: jax.Array,
  spec: AttentionSpec,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of queries to a part of what they see; `merge` joins the parts.

  Args:
    q_BxKxMxDh: queries.
    k_BxKxDhxS: keys.
    v_BxKxSxDh: values.
    order_BxS: int32, a number of each slot; [1, S] is that of all rows.
    bounds_BxMx2: int32, a query sees slots whose number is at least the first, and below the
      second.
    spec: scale and cap; its window is for the caller to put into the bounds.
    interpret: run as ordinary operations, on any device.

  Returns:
    (mixed values [B, K, M, Dh], log-sum-exp of the scores [B, K, M]), float32; zeros and EMPTY
    of a query that sees no slot.
  """
  arrays = (q_BxKxMxDh, k_BxKxDhxS, v_BxKxSxDh, order_BxS, bounds_BxMx2)
  attend = functools.partial(_on_one_device, spec, interpret)
  mesh = spec.mesh
  if mesh is None or mesh.size == 1:
    return attend(*arrays)
  rows = ROWS if len(q_BxKxMxDh) % row_shards(mesh) == 0 else None
  heads = "tensor" if q_BxKxMxDh.shape[1] % mesh.shape["tensor"] == 0 else None
  of_heads, of_rows = PartitionSpec(rows, heads), PartitionSpec(rows)
  of_order = PartitionSpec() if len(order_BxS) == 1 else of_rows
  return jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(of_heads, of_heads, of_heads, of_order, of_rows),
    out_specs=(of_heads, of_heads),
    check_vma=False,
  )(*arrays)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
  """Attention to all parts together, [..., Dh], from pairs that `partial_attention` returns."""
  peak = functools.reduce(jnp.maximum, (log_sum for _, log_sum in parts))
  shares = [jnp.exp(log_sum - peak)[..., None] for _, log_sum in parts]
  mixed = sum(share * mixed for share, (mixed, _) in zip(shares, parts, strict=True))
  return mixed / sum(shares)


def _on_one_device(spec, interpret, q, k, v, order_BxS, bounds_BxMx2):
  B, K, M, Dh = q.shape
  S = k.shape[3]
  most = min(MOST_SLOTS, max(LANES, MOST_NUMBERS // M // LANES * LANES))
  L = S if S <= most else most
  J = -(-S // L)
  # Blocks behind the last that a row sees repeat that one, so that nothing is copied for them.
  least_Bx1, most_Bx1 = bounds_BxMx2[..., 0].min(1)[:, None], bounds_BxMx2[..., 1].max(1)[:, None]
  seen_BxS = (order_BxS >= least_Bx1) & (order_BxS < most_Bx1)
  slot = jnp.arange(S, dtype=jnp.int32)[None]
  used_B = jnp.max(jnp.where(seen_BxS, slot // L + 1, 0), axis=1)

  block_of = lambda b, j, used: jnp.minimum(j, jnp.maximum(used[b] - 1, 0))
  of_queries = lambda b, h, j, used: (b, h, 0, 0)
  one_order = len(order_BxS) == 1
  at_order = lambda b, h, j, used: (0 if one_order else b, 0, block_of(b, j, used))
  per_query = pl.BlockSpec((None, None, M, 1), of_queries)
  if not interpret:
    # Else the compiler fetches a whole cache into the core for the step's write, and puts it back.
    k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))
  mixed, log_sum = pl.pallas_call(
    functools.partial(_kernel, spec, S),
    out_shape=(
      jax.ShapeDtypeStruct((B, K, M, Dh), jnp.float32),
      jax.ShapeDtypeStruct((B, K, M, 1), jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, K, J),
      in_specs=[
        pl.BlockSpec((None, None, M, Dh), of_queries),
        pl.BlockSpec((None, None, Dh, L), lambda b, h, j, used: (b, h, 0, block_of(b, j, used))),
        pl.BlockSpec((None, None, L, Dh), lambda b, h, j, used: (b, h, block_of(b, j, used), 0)),
        pl.BlockSpec((None, 1, L), at_order),
        pl.BlockSpec((None, M, 2), lambda b, h, j, used: (b, 0, 0)),
      ],
      out_specs=[pl.BlockSpec((None, None, M, Dh), of_queries), per_query],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((M, 1), (M, 1), (M, Dh))],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * B * K * M * S * Dh,
      transcendentals=B * K * M * S,
      bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (q, k, v))
      + 4 * B * K * M * (Dh + 1),
    ),
    interpret=interpret,
    name="decode",
  )(used_B, q, k, v, order_BxS[:, None], bounds_BxMx2)
  return mixed, log_sum[..., 0]


def _kernel(spec, S, used, q, k, v, order, bounds, mixed, log_sum, peak, total, sum_MxDh):
  b, j, J = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
  L = k.shape[1]

  @pl.when(j == 0)
  def _():
    peak[...] = jnp.full_like(peak, EMPTY)
    total[...] = jnp.zeros_like(total)
    sum_MxDh[...] = jnp.zeros_like(sum_MxDh)

  @pl.when(j < used[b])
  def _():
    exists = lambda shape, axis: j * L + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < S
    low_Mx1, high_Mx1 = bounds[:, :1], bounds[:, 1:]
    visible_MxL = (order[...] >= low_Mx1) & (order[...] < high_Mx1) & exists((1, L), 1)
    products = jnp.dot(q[...], k[...], preferred_element_type=jnp.float32)
    scores_MxL = jnp.where(visible_MxL, spec.scores(products), NEG_INF)
    new_peak = jnp.maximum(peak[...], scores_MxL.max(1, keepdims=True))
    shrink = jnp.exp(peak[...] - new_peak)
    weights_MxL = jnp.exp(scores_MxL - new_peak)
    # The last block may reach beyond the array, and what is read there may be NaN.
    values = v[...] if S % L == 0 else jnp.where(exists((L, 1), 0), v[...], 0)
    peak[...] = new_peak
    total[...] = total[...] * shrink + weights_MxL.sum(1, keepdims=True)
    mixed_MxDh = jnp.dot(weights_MxL.astype(v.dtype), values, preferred_element_type=jnp.float32)
    sum_MxDh[...] = sum_MxDh[...] * shrink + mixed_MxDh

  @pl.when(j == J - 1)
  def _():
    divisor = jnp.where(total[...] > 0, total[...], 1)
    mixed[...] = sum_MxDh[...] / divisor
    log_sum[...] = peak[...] + jnp.log(divisor)
