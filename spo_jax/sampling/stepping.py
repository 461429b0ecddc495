"""One step of the verb decode, and what it works on: the state of groups being decoded.

Every draw depends on the continuation's own key and step, so a result does not depend on the order,
the number or the placement of the groups.

Axis letters, beside those of `verbs`: E groups being decoded, V vocabulary.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from spo_jax.infra.mesh import keep_rows_split
from spo_jax.models.attention import DecodeContext, LayerCache, attend_decode, stored
from spo_jax.models.decoder import DecoderConfig, forward, token_logits
from spo_jax.sampling.token import SamplingConfig, sample_token
from spo_jax.sampling.verbs import Groups, Prefix, Segments


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static arguments of `decode`."""

  max_new_tokens: int  # S
  slots: int  # E, groups decoded at a time; more groups wait
  refill_share: float  # of the slots, which are idle when as many groups enter; 1: in waves
  suffix_chunks: int  # chunks that the suffix of a wave is written in, each a loop to compile
  stop_ids: tuple[int, ...]  # tokens that end a continuation
  sampling: SamplingConfig
  keep_cache: bool  # return the suffixes' keys and values, for `extend`
  rows: NamedSharding | None = None  # how groups are split over a mesh; None leaves it open
  weights: str = "full"  # what steps multiply, of `quantised.KINDS`
  cache: str = "full"  # keys and values, likewise; the prefix is of the same kind

  def chunks(self) -> list[int]:
    """Slots of each chunk of a suffix; they add up to S."""
    size = -(-self.max_new_tokens // self.suffix_chunks)
    whole, rest = divmod(self.max_new_tokens, size)
    return [size] * whole + [rest] * (rest > 0)


class State(NamedTuple):
  """Groups being decoded, without their keys and values."""

  starts: jax.Array  # [E, n]
  limits: jax.Array  # [E, n]
  keys: jax.Array  # [E, n]
  fed: jax.Array  # [E, n] int32, the token that the next step feeds
  steps: jax.Array  # [E] int32, steps that the group has taken
  lengths: jax.Array  # [E, n] int32
  finished: jax.Array  # [E, n] bool
  tokens: jax.Array  # [E, n, S] int32, a ring as the keys and values are
  logprobs: jax.Array  # [E, n, S] float32

  def running(self) -> jax.Array:
    """[E, n] bool, continuations that still draw."""
    return ~self.finished & (self.lengths < self.limits)


def enter(decode_cfg: DecodeConfig, groups: Groups) -> State:
  """Groups at their beginning."""
  E, n = groups.starts.shape
  shape = (E, n, decode_cfg.max_new_tokens)
  return State(
    starts=groups.starts,
    limits=groups.limits,
    keys=groups.keys,
    fed=groups.fed,
    steps=jnp.zeros((E,), jnp.int32),
    lengths=jnp.zeros((E, n), jnp.int32),
    finished=jnp.zeros((E, n), bool),
    tokens=jnp.zeros(shape, jnp.int32),
    logprobs=jnp.zeros(shape, jnp.float32),
  )


def decode_step(
  cfg: DecoderConfig,
  decode_cfg: DecodeConfig,
  params,
  prefix: Prefix,
  state: State,
  full: tuple,
  last: tuple,
  time: jax.Array,
  *,
  ring: bool,
) -> tuple[State, tuple]:
  """One token for every continuation; those that are done draw what nobody reads.

  Args:
    cfg: decoder geometry.
    decode_cfg: static arguments.
    params: parameters.
    prefix: of the E groups.
    state: of the E groups.
    full: per layer, the chunks of the suffix that are full.
    last: per layer, the chunk that this step writes.
    time: scalar, steps since the first group began.
    ring: whether groups begin at different times, so that slots are written again.

  Returns:
    (state, the last chunks).
  """
  if "int8" in (decode_cfg.weights, decode_cfg.cache):
    # Else the compiler turns what no step changes into floats before the loop; steps read those.
    params, prefix, full, time = jax.lax.optimization_barrier((params, prefix, full, time))
  S = decode_cfg.max_new_tokens
  E, n = state.fed.shape
  context = decode_context(decode_cfg, prefix, state, full, last, time, ring=ring)
  caches = tuple(map(LayerCache, prefix.cache, full, last))
  positions_Exn = state.starts - 1 + state.steps[:, None]
  hidden, last = forward(
    cfg,
    attend_decode,
    params,
    state.fed.reshape(-1, 1),
    positions_Exn.reshape(-1, 1),
    context,
    caches,
    longest=prefix.positions.shape[1] + S,
  )
  logits = token_logits(cfg, params, hidden[:, 0])
  tokens, logprobs = sample_token(step_keys(state), logits, decode_cfg.sampling)
  tokens_Exn, logprobs_Exn = tokens.reshape(E, n), logprobs.reshape(E, n)

  slot = time % S

  def put(store_ExnxS, new_Exn):
    new_Exnx1 = new_Exn[..., None]
    if context.writes is not None:
      old = jax.lax.dynamic_slice_in_dim(store_ExnxS, slot, 1, axis=2)
      new_Exnx1 = jnp.where(context.writes[:, None, None], new_Exnx1, old)
    return jax.lax.dynamic_update_slice_in_dim(store_ExnxS, new_Exnx1, slot, axis=2)

  running_Exn = state.running()
  stops_Exn = jnp.isin(tokens_Exn, jnp.array(decode_cfg.stop_ids))
  state = state._replace(
    fed=tokens_Exn,
    steps=state.steps + 1,
    lengths=state.lengths + running_Exn,
    finished=state.finished | (running_Exn & stops_Exn),
    tokens=put(state.tokens, tokens_Exn),
    logprobs=put(state.logprobs, logprobs_Exn),
  )
  return state, last


def step_keys(state: State) -> jax.Array:
  """[E * n] keys of the draws of a step."""
  n = state.fed.shape[1]
  return jax.vmap(jax.random.fold_in)(state.keys.reshape(-1), jnp.repeat(state.steps, n))


def decode_context(
  decode_cfg: DecodeConfig,
  prefix: Prefix,
  state: State,
  full: tuple,
  last: tuple,
  time: jax.Array,
  *,
  ring: bool,
) -> DecodeContext:
  """What attention needs at a step; the arguments are those of `decode_step`."""
  S = decode_cfg.max_new_tokens
  slot = time % S
  sizes = [jax.tree.leaves(values)[0].shape[2] for _, values in (*full[0], last[0])]
  begins = [0, *itertools.accumulate(sizes[:-1])]
  return DecodeContext(
    visible=state.starts - 1,
    prefix_positions=prefix.positions,
    ages=tuple(
      (slot - begin - jnp.arange(size)) % S for begin, size in zip(begins, sizes, strict=True)
    ),
    steps=state.steps,
    slot=slot - begins[-1],
    writes=state.steps < S if ring else None,  # a group that is done keeps its suffix
  )


def empty_segments(cfg: DecoderConfig, decode_cfg: DecodeConfig, groups: int, n: int) -> Segments:
  """Segments [groups, n] of no tokens, with their cache if that is kept."""
  shape = (groups, n, decode_cfg.max_new_tokens)
  chunks = [empty_chunks(cfg, decode_cfg, groups, n, size) for size in decode_cfg.chunks()]
  return Segments(
    tokens=jnp.zeros(shape, jnp.int32),
    logprobs=jnp.zeros(shape, jnp.float32),
    lengths=jnp.zeros(shape[:2], jnp.int32),
    finished=jnp.zeros(shape[:2], bool),
    first=jnp.zeros(shape[:1], jnp.int32),
    cache=tuple(zip(*chunks, strict=True)) if decode_cfg.keep_cache else (),
  )


def empty_chunks(cfg: DecoderConfig, decode_cfg: DecodeConfig, groups: int, n: int, size: int):
  """Per layer, keys and values of a chunk."""
  shape = (groups * n, cfg.kv_heads)
  pair = lambda: stored(
    decode_cfg.cache,
    jnp.zeros((*shape, cfg.head_dim, size), cfg.dtype),
    jnp.zeros((*shape, size, cfg.head_dim), cfg.dtype),
  )
  return keep_rows_split(tuple(pair() for _ in range(cfg.layers)), decode_cfg.rows)


def segments_of(decode_cfg: DecodeConfig, state: State, first, chunks: tuple) -> Segments:
  """What groups have drawn."""
  return Segments(
    tokens=state.tokens,
    logprobs=state.logprobs,
    lengths=state.lengths,
    finished=state.finished,
    first=first,
    cache=chunks if decode_cfg.keep_cache else (),
  )
