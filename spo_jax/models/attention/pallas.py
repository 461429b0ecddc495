"""Interval attention by kernels for TPUs, `pallas_kernels.py`: arrays laid out for them, on a mesh.

Axis letters, beside those of `blocks.interval_attention`: N query blocks of C queries, J key blocks
of L keys, G queries of a key-value head.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from spo_jax.errors import UserError
from spo_jax.infra.mesh import ROWS, row_shards
from spo_jax.models.attention.blocks import causal_in_blocks
from spo_jax.models.attention.pallas_kernels import MOST_NUMBERS, attention
from spo_jax.models.attention.spec import AttentionSpec

LANES = 128  # numbers that a TPU works on at once, and the smallest block of keys
CAUSAL_BLOCK = 256  # most queries, and keys, of a block of a causal row


def interval_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  until_BxJxL: jax.Array,
  key_blocks_BxNxW: jax.Array,
  spec: AttentionSpec,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `flash.interval_attention`, of the same arguments; the key blocks of a query block ascend.

  C must be a multiple of 128, and L too. On `spec.mesh` the rows and heads are split over its axes:
  the compiler cannot split a kernel, so each device is told to run it on its part. `interpret` runs
  the kernels as ordinary operations, on any device and in blocks of any size.
  """
  B, T = k_BxTxKxDh.shape[:2]
  J, N = until_BxJxL.shape[1], key_blocks_BxNxW.shape[1]
  chex.assert_shape(until_BxJxL, (B, J, T // J))
  chex.assert_is_divisible(T, J)
  chex.assert_is_divisible(T, N)
  attend = functools.partial(_on_one_device, spec, interpret)
  qkv, listed = (q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh), (positions_BxT, until_BxJxL, key_blocks_BxNxW)
  mesh = spec.mesh
  if mesh is None or mesh.size == 1:
    return attend(*qkv, *listed)
  rows = ROWS if B % row_shards(mesh) == 0 else None
  heads, qkv = _split_heads(mesh, *qkv)
  of_heads, of_rows = PartitionSpec(rows, None, heads), PartitionSpec(rows)
  in_specs = (of_heads,) * 3 + (of_rows,) * 3
  on_mesh = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=of_heads, check_vma=False)
  return on_mesh(*qkv, *listed)


def causal_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  spec: AttentionSpec,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `flash.causal_attention`; `interpret` as above."""
  block = min(CAUSAL_BLOCK, -(-q_BxTxHxDh.shape[1] // LANES) * LANES)
  attend = functools.partial(interval_attention, interpret=interpret)
  return causal_in_blocks(attend, q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, positions_BxT, spec, block)


def check(
  device: jax.Device, *, head_dim: int, group: int, packed_blocks: tuple[int, int] | None
) -> None:
  """Checks that the kernels can compute a decoder's attention on a device.

  Args:
    device: where it would run.
    head_dim: size of a head, any.
    group: query heads of a key-value head.
    packed_blocks: queries and keys of a block of a packed row; None: no rows are packed.

  Raises:
    UserError: naming what they do not have.
  """
  if device.platform != "tpu":
    raise UserError(f"attention 'pallas' needs a TPU, the device is a {device.platform}")
  blocks = [(CAUSAL_BLOCK, CAUSAL_BLOCK)]
  if packed_blocks is not None:
    blocks.append(packed_blocks)
  for queries, keys in blocks:
    if keys % LANES:
      raise UserError(
        f"attention 'pallas' needs a config.packing.key_block that is a multiple of {LANES}, it is "
        f"{keys}"
      )
    numbers = group * queries * max(keys, head_dim)
    if numbers > MOST_NUMBERS:
      raise UserError(
        f"attention 'pallas' has no memory for blocks of {queries} queries, {keys} keys and "
        f"{group} heads of {head_dim} that share keys: {numbers} numbers, of {MOST_NUMBERS}. Use a "
        "smaller config.packing.query_block, or 'flash' (config.compute.attention)"
      )


def _split_heads(mesh: Mesh, q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh):
  """(mesh axis of the heads or None, (q, k, v)), with heads that the axis divides.

  Key-value heads fewer than devices are repeated, if queries can then be split: each device has
  those of its own queries.
  """
  H, K, devices = q_BxTxHxDh.shape[2], k_BxTxKxDh.shape[2], mesh.shape["tensor"]
  repeats = math.lcm(K, devices) // K
  if H % (K * repeats):
    return None, (q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh)
  k_BxTxKxDh, v_BxTxKxDh = (jnp.repeat(x, repeats, axis=2) for x in (k_BxTxKxDh, v_BxTxKxDh))
  return "tensor", (q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh)


def _on_one_device(
  spec, interpret, q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, positions_BxT, until_BxJxL, key_blocks_BxNxW
):
  """Puts the queries of a block that share a key-value head into one matrix, head by head."""
  B, T, H, Dh = q_BxTxHxDh.shape
  K, J, N = k_BxTxKxDh.shape[2], until_BxJxL.shape[1], key_blocks_BxNxW.shape[1]
  C, G, L = T // N, H // K, T // J
  q = q_BxTxHxDh.reshape(B, N, C, K, G, Dh).transpose(0, 3, 1, 4, 2, 5).reshape(B, K, N, G * C, Dh)
  k, v = (x.reshape(B, J, L, K, Dh).transpose(0, 3, 1, 2, 4) for x in (k_BxTxKxDh, v_BxTxKxDh))
  facts_Bx2xT = jnp.stack([until_BxJxL.reshape(B, T), positions_BxT], axis=1)
  mixed = attention(spec, interpret, q, k, v, facts_Bx2xT, key_blocks_BxNxW)
  return mixed.reshape(B, K, N, G, C, Dh).transpose(0, 2, 4, 1, 3, 5).reshape(B, T, H, Dh)
