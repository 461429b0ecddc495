"""The attention of the uses of the decoder: packed forests, prefill, shared-prefix decode.

All softmaxes are in float32, so that the sampler's log-probs are the trainer's. All are called as
`attend(q, k, v, positions, context, cache, spec)`, positions being those of the queries.
`spec.backend` names who computes packed forests and whole prompts: "blocks", fast for short rows;
"flash", in memory linear in their length; "cudnn", kernels of NVIDIA GPUs for prefill, and "flash"
for forests; "pallas", what "flash" does by kernels for TPUs, and decode by one too. Prefill in
chunks has one implementation in XLA for all backends, and decode one for all others.
"""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from spo_jax.models.attention import blocks, cudnn, flash, pallas
from spo_jax.models.attention.chunks import attend_chunk
from spo_jax.models.attention.decode import (
  DecodeContext,
  LayerCache,
  attend_decode,
  stored,
  write_chunk,
)
from spo_jax.models.attention.spec import ATTENTION, NOWHERE, AttentionSpec

__all__ = [
  "ATTENTION",
  "BACKENDS",
  "NOWHERE",
  "AttentionSpec",
  "DecodeContext",
  "LayerCache",
  "PackedContext",
  "attend_chunk",
  "attend_decode",
  "attend_packed",
  "attend_prefill",
  "check_backend",
  "stored",
  "write_chunk",
]

# backend -> (attention of packed forests, causal attention)
_FUNCTIONS = {
  "blocks": (blocks.interval_attention, blocks.causal_attention),
  "flash": (flash.interval_attention, flash.causal_attention),
  "cudnn": (flash.interval_attention, cudnn.causal_attention),
  "pallas": (pallas.interval_attention, pallas.causal_attention),
}
BACKENDS = tuple(_FUNCTIONS)


class PackedContext(NamedTuple):
  """What `attend_packed` needs of a batch of packed forests."""

  until: jax.Array  # [B, J, L] int32
  key_blocks: jax.Array  # [B, N, W] int32


def attend_packed(q, k, v, positions, context: PackedContext, cache, spec: AttentionSpec):
  """Training: interval attention, no cache.

  Where the mesh splits rows over "sequence", each device has a part of the queries, and all keys.
  """
  attention, _ = _FUNCTIONS[spec.backend]
  listed = (positions, context.until, context.key_blocks)
  if spec.mesh is None or spec.mesh.shape["sequence"] == 1:
    return attention(q, k, v, *listed, spec), cache

  def part(q, k, v, *listed):
    return attention(q, k, v, *listed, spec, first=jax.lax.axis_index("sequence") * q.shape[1])

  parts, whole = PartitionSpec(None, "sequence"), PartitionSpec()
  attend = jax.shard_map(
    part,
    mesh=spec.mesh,
    in_specs=(parts, whole, whole, whole, whole, parts),
    out_specs=parts,
    axis_names={"sequence"},
    check_vma=False,
  )
  return attend(q, k, v, *listed), cache


def attend_prefill(q, k, v, positions, context, cache, spec: AttentionSpec):
  """Prefill: causal attention; the cache is (keys [B, K, Dh, T], values [B, K, T, Dh])."""
  del context, cache
  _, attention = _FUNCTIONS[spec.backend]
  return attention(q, k, v, positions, spec), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def check_backend(
  backend: str,
  device: jax.Device,
  *,
  dtype: str,
  head_dim: int,
  cap: float | None,
  group: int = 1,
  packed_blocks: tuple[int, int] | None = None,
) -> None:
  """Checks that a backend can compute a decoder's attention on a device.

  Args:
    backend: one of BACKENDS.
    device: where it would run.
    dtype: of activations.
    head_dim: size of a head.
    cap: soft cap of the scores.
    group: query heads of a key-value head.
    packed_blocks: queries and keys of a block of a packed row; None: no rows are packed.

  Raises:
    UserError: if it cannot.
  """
  if backend == "cudnn":
    cudnn.check(device, dtype=dtype, head_dim=head_dim, cap=cap)
  if backend == "pallas":
    pallas.check(device, head_dim=head_dim, group=group, packed_blocks=packed_blocks)
