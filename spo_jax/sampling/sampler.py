"""The verbs, compiled: a thin shell that keeps shapes static and arrays on the mesh."""

import dataclasses
import functools

import jax
import numpy as np

from spo_jax.errors import UserError
from spo_jax.infra.mesh import row_sharding, row_shards, shard_rows
from spo_jax.models.decoder import DecoderConfig
from spo_jax.sampling import decoding, stepping, verbs
from spo_jax.sampling.token import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Runs the sampling verbs for one model on one mesh. Results of `decode` are on the host."""

  cfg: DecoderConfig
  mesh: jax.sharding.Mesh
  stop_ids: tuple[int, ...]  # tokens that end a continuation
  sampling: SamplingConfig
  slots: int  # most groups decoded at a time
  refill_share: float
  suffix_chunks: int
  prefill_chunk: int  # tokens of prompts that are prefilled at a time; 0: all
  weights: str = "full"  # what steps of decode multiply, of `quantised.KINDS`
  cache: str = "full"  # keys and values, likewise

  def prefill(self, params, tokens_RxP: np.ndarray, lengths_R: np.ndarray) -> verbs.Prefix:
    """See `verbs.prefill`."""
    prompts = shard_rows(self.mesh, (tokens_RxP, lengths_R))
    static = (self.cfg, row_sharding(self.mesh), self.prefill_chunk, self.cache)
    return jit_prefill(*static, params, *prompts)

  def decode(
    self, params, prefix, groups: verbs.Groups, *, max_new_tokens: int, keep_cache: bool
  ) -> verbs.Segments:
    """See `decoding.decode`.

    Raises:
      ValueError: if a group asks for more than `max_new_tokens`, or begins before its prefix.
      UserError: if not all groups fit the slots, and the mesh cannot divide the slots.
    """
    if np.max(groups.limits) > max_new_tokens or np.min(groups.starts) < 1:
      raise ValueError("limits must be at most max_new_tokens, and starts at least 1")
    if self.slots < len(groups.starts) and self.slots % row_shards(self.mesh):
      raise UserError(
        f"config.rollout.slots {self.slots} must be a multiple of {row_shards(self.mesh)}, "
        "the data x fsdp axes of the mesh"
      )
    decode_cfg = self.decode_config(max_new_tokens, keep_cache)
    return jit_decode(self.cfg, decode_cfg, params, prefix, shard_rows(self.mesh, groups))

  def decode_config(self, max_new_tokens: int, keep_cache: bool) -> stepping.DecodeConfig:
    """Static arguments of `decoding.decode`."""
    return stepping.DecodeConfig(
      max_new_tokens=max_new_tokens,
      slots=self.slots,
      refill_share=self.refill_share,
      suffix_chunks=self.suffix_chunks,
      stop_ids=self.stop_ids,
      sampling=self.sampling,
      keep_cache=keep_cache,
      rows=row_sharding(self.mesh),
      weights=self.weights,
      cache=self.cache,
    )

  def extend(self, prefix, groups, segments, index_R: np.ndarray) -> verbs.Prefix:
    """See `verbs.extend`."""
    groups, index_R = shard_rows(self.mesh, (groups, index_R))
    return jit_extend(row_sharding(self.mesh), prefix, groups, segments, index_R)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def jit_prefill(cfg, rows, chunk, kind, params, tokens_RxP, lengths_R):
  """`verbs.prefill`, compiled; prefixes are split by rows."""
  return verbs.prefill(cfg, params, tokens_RxP, lengths_R, chunk=chunk, kind=kind, rows=rows)


jit_decode = functools.partial(jax.jit, static_argnums=(0, 1))(decoding.decode)


@functools.partial(jax.jit, static_argnums=0)
def jit_extend(rows, prefix, groups, segments, index_R):
  """`verbs.extend`, compiled; prefixes are split by rows."""
  return verbs.extend(prefix, groups, segments, index_R, rows)


def compiled_programs() -> int:
  """Number of programs that the verbs have been compiled to so far in this process."""
  return sum(verb._cache_size() for verb in (jit_prefill, jit_decode, jit_extend))


@jax.jit
def child_keys(keys_R: jax.Array, children_RxC: jax.Array) -> jax.Array:
  """[R, C] keys of each node's children: functions of the prompt and the path of children alone."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
  # A node's own key seeds its children with odd data and its token draws with even data.
  return fold(keys_R, 2 * children_RxC + 1)


@jax.jit
def draw_keys(keys: jax.Array) -> jax.Array:
  """Keys of the token draws of nodes, apart from those of their children; any shape."""
  flat = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys.reshape(-1), 0)
  return flat.reshape(keys.shape)
