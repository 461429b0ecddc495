"""The verb decode: continuations of many prefixes, at static shapes, in one compiled program.

Groups are decoded E at a time, E the slots. Where all fit, or where they come in waves, the groups
of a wave begin together: their suffix is written chunk by chunk, and a step reads the chunks that
have begun, not those to come. Else a group that is done leaves and a waiting one enters: the suffix
is one ring of slots then, since groups are of all ages.

Axis letters, beside those of `verbs`: E groups being decoded.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from spo_jax.infra.mesh import in_turn, keep_rows_split
from spo_jax.models.decode_weights import decode_weights
from spo_jax.models.decoder import DecoderConfig
from spo_jax.sampling.stepping import (
  DecodeConfig,
  State,
  decode_step,
  empty_chunks,
  empty_segments,
  enter,
  segments_of,
)
from spo_jax.sampling.verbs import NO_GROUP, Groups, Prefix, Segments


def decode(
  cfg: DecoderConfig, decode_cfg: DecodeConfig, params, prefix: Prefix, groups: Groups
) -> Segments:
  """Draws the continuations of all groups.

  Args:
    cfg: decoder geometry.
    decode_cfg: budget, slots, sampling.
    params: parameters of the decoder.
    prefix: R prefixes.
    groups: Q groups.

  Returns:
    Segments of the Q groups, in their order.
  """
  cfg = cfg.for_decode()
  params = decode_weights(cfg, params, decode_cfg.weights)
  Q = len(groups.starts)
  if decode_cfg.slots >= Q:
    return _wave(cfg, decode_cfg, params, _rows_of(prefix, groups, decode_cfg.rows), groups)
  if decode_cfg.refill_share == 1:
    return _in_waves(cfg, decode_cfg, params, prefix, groups)
  return _refilled(cfg, decode_cfg, params, prefix, groups)


def _wave(
  cfg: DecoderConfig, decode_cfg: DecodeConfig, params, prefix: Prefix, groups: Groups
) -> Segments:
  """Groups that begin together, each at its own prefix."""
  E, n = groups.starts.shape
  state = enter(decode_cfg, groups)
  full = ((),) * cfg.layers
  time, end = jnp.zeros((), jnp.int32), 0
  for size in decode_cfg.chunks():
    end += size

    def more(carry, end=end):
      state, _, time = carry
      return state.running().any() & (time < end)

    def step(carry, full=full):
      state, last, time = carry
      state, last = decode_step(
        cfg, decode_cfg, params, prefix, state, full, last, time, ring=False
      )
      return state, last, time + 1

    last = empty_chunks(cfg, decode_cfg, E, n, size)
    state, last, time = jax.lax.while_loop(more, step, (state, last, time))
    full = tuple((*chunks, chunk) for chunks, chunk in zip(full, last, strict=True))
  first = jnp.zeros((E,), jnp.int32)
  return segments_of(decode_cfg, state, first, full)


def _in_waves(
  cfg: DecoderConfig, decode_cfg: DecodeConfig, params, prefix: Prefix, groups: Groups
) -> Segments:
  """E groups after the other E: as many waves as there are groups that want anything."""
  Q, n = groups.starts.shape
  E = decode_cfg.slots

  def wave(carry):
    number, done = carry
    index_E = number * E + jnp.arange(E)
    entering = _take(groups, jnp.minimum(index_E, Q - 1))
    if groups.row is None:
      entering = entering._replace(row=jnp.minimum(index_E, Q - 1))
    rows = _rows_of(prefix, entering, decode_cfg.rows)
    segments = _wave(cfg, decode_cfg, params, rows, entering)
    return number + 1, _put(done, index_E, segments, decode_cfg.rows)

  waves = -(-_wanted(groups) // E)
  done = empty_segments(cfg, decode_cfg, Q, n)
  start = (jnp.zeros((), jnp.int32), done)
  return jax.lax.while_loop(lambda carry: carry[0] < waves, wave, start)[1]


class _Slots(NamedTuple):
  """E groups of all ages."""

  group: jax.Array  # [E] int32, index into the groups; NO_GROUP when idle
  first: jax.Array  # [E] int32, slot of the ring that the group's first fed token has
  prefix: Prefix  # of E rows
  state: State
  ring: tuple  # per layer (keys, values), a chunk of S slots


def _refilled(
  cfg: DecoderConfig, decode_cfg: DecodeConfig, params, prefix: Prefix, groups: Groups
) -> Segments:
  """A group leaves when its last continuation ends, and a waiting one enters.

  All groups write the same slot of the ring at a step, whenever they began; keys carry their rotary
  position, so the order of the ring does not matter to attention.
  """
  Q, n = groups.starts.shape
  E, S = decode_cfg.slots, decode_cfg.max_new_tokens
  idle_to_refill = max(1, round(decode_cfg.refill_share * E))
  wanted = _wanted(groups)
  nobody = _take(groups, jnp.arange(E))._replace(limits=jnp.zeros((E, n), jnp.int32))
  slots = _Slots(
    group=jnp.full((E,), NO_GROUP, jnp.int32),
    first=jnp.zeros((E,), jnp.int32),
    prefix=jax.tree.map(lambda x: jnp.zeros((E, *x.shape[1:]), x.dtype), prefix),
    state=enter(decode_cfg, nobody),
    ring=empty_chunks(cfg, decode_cfg, E, n, S),
  )
  done = empty_segments(cfg, dataclasses.replace(decode_cfg, suffix_chunks=1), Q, n)

  def refill(slots: _Slots, done: Segments, entered, time):
    idle_E = ~slots.state.running().any(-1)
    leaving_E = jnp.where(idle_E & (slots.group >= 0), slots.group, Q)
    of_ring = tuple((chunk,) for chunk in slots.ring)
    leaving = segments_of(decode_cfg, slots.state, slots.first, of_ring)
    done = _put(done, leaving_E, leaving, decode_cfg.rows)
    entering_E = entered + jnp.cumsum(idle_E) - 1
    entering_E = jnp.where(idle_E & (entering_E < wanted), entering_E, NO_GROUP).astype(jnp.int32)
    slots = _admit(decode_cfg, prefix, groups, slots, entering_E, time)
    slots = slots._replace(group=jnp.where(idle_E, entering_E, slots.group))
    return slots, done, entered + (entering_E >= 0).sum()

  def round_(carry):
    slots, done, entered, time = carry
    slots, done, entered = refill(slots, done, entered, time)

    def more(carry):
      running_E = carry[0].running().any(-1)
      enough_idle = (entered < wanted) & ((~running_E).sum() >= idle_to_refill)
      return running_E.any() & ~enough_idle

    def step(carry):
      state, ring, time = carry
      none = ((),) * cfg.layers
      state, ring = decode_step(
        cfg, decode_cfg, params, slots.prefix, state, none, ring, time, ring=True
      )
      return state, ring, time + 1

    state, ring, time = jax.lax.while_loop(more, step, (slots.state, slots.ring, time))
    return slots._replace(state=state, ring=ring), done, entered, time

  def unfinished(carry):
    slots, _, entered, _ = carry
    return (entered < wanted) | (slots.group >= 0).any()

  zero = jnp.zeros((), jnp.int32)
  _, done, _, _ = jax.lax.while_loop(unfinished, round_, (slots, done, zero, zero))
  straight = (done.first[:, None, None] + jnp.arange(S)[None, None]) % S
  unroll = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(straight, x.shape), axis=2)
  return done._replace(tokens=unroll(done.tokens), logprobs=unroll(done.logprobs))


def _admit(
  decode_cfg: DecodeConfig, prefix: Prefix, groups: Groups, slots: _Slots, entering_E, time
) -> _Slots:
  """Puts the groups `entering_E` (NO_GROUP: none) into their slots at ring time `time`."""
  enters_E = entering_E >= 0
  entering = _take(groups, jnp.maximum(entering_E, 0))
  if groups.row is None:
    entering = entering._replace(row=jnp.maximum(entering_E, 0))

  def choose(new, old):
    return jnp.where(enters_E.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

  move = lambda pair: jax.tree.map(
    lambda new, old: keep_rows_split(choose(new[entering.row], old), decode_cfg.rows), *pair
  )
  cache = in_turn(move, list(zip(prefix.cache, slots.prefix.cache, strict=True)))
  positions = choose(prefix.positions[entering.row], slots.prefix.positions)
  slots = slots._replace(
    first=choose(jnp.full_like(slots.first, time % decode_cfg.max_new_tokens), slots.first),
    prefix=Prefix(positions, tuple(cache)),
    state=jax.tree.map(choose, enter(decode_cfg, entering), slots.state),
  )
  return keep_rows_split(slots, decode_cfg.rows)


def _wanted(groups: Groups) -> jax.Array:
  """Number of groups up to the last that wants anything."""
  number = jnp.arange(1, len(groups.limits) + 1)
  return jnp.max(jnp.where((groups.limits > 0).any(-1), number, 0))


def _take(groups: Groups, index_E: jax.Array) -> Groups:
  """Some of the groups."""
  return jax.tree.map(lambda x: x[index_E], groups)


def _rows_of(prefix: Prefix, groups: Groups, rows: NamedSharding | None) -> Prefix:
  """The prefix of each group."""
  if groups.row is None:
    return prefix
  row_E = jnp.maximum(groups.row, 0)
  move = lambda pair: jax.tree.map(lambda x: keep_rows_split(x[row_E], rows), pair)
  return Prefix(move(prefix.positions), tuple(in_turn(move, prefix.cache)))


def _put(done: Segments, index_E, new: Segments, rows: NamedSharding | None) -> Segments:
  """`done` with the segments of some groups; those out of its range are dropped."""

  Q = len(done.lengths)

  def put(pair):
    store, new = pair  # the leading axis is Q, or Q * n
    by_group = lambda x, groups: x.reshape(groups, -1, *x.shape[1:])
    put_in = by_group(store, Q).at[index_E].set(by_group(new, len(index_E)), mode="drop")
    return keep_rows_split(put_in.reshape(store.shape), rows)

  leaves, treedef = jax.tree.flatten(done)
  return treedef.unflatten(in_turn(put, list(zip(leaves, jax.tree.leaves(new), strict=True))))
