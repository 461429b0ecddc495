"""The verb decode: continuations of many prefixes, at static shapes, in one compiled program.

Groups are decoded E at a time, E the slots. Where all fit, or where they come in waves, the groups
of a wave begin together: their suffix is written chunk by chunk, and a step reads the chunks that
have begun, not those to come. Else a group that is done leaves and a waiting one enters: the suffix
is one ring of slots then, since groups are of all ages.

Axis letters, beside those of `verbs`: E groups being decoded, K slots refilled at a time.
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

  def due(slots: _Slots, entered):
    """[E] bool, slots that a group leaves or enters."""
    return ~slots.state.running().any(-1) & ((slots.group >= 0) | (entered < wanted))

  def refill(carry, time):
    # Of as many slots as are waited for: to move rows costs by their number, whoever is in them.
    slots, done, entered = carry
    due_E = due(slots, entered)
    slot_K = jnp.argsort(~due_E)[:idle_to_refill]
    is_due_K = due_E[slot_K]
    done = _leave(decode_cfg, slots, done, slot_K)
    entering_K = entered + jnp.arange(idle_to_refill)
    entering_K = jnp.where(is_due_K & (entering_K < wanted), entering_K, NO_GROUP)
    slots = _admit(decode_cfg, prefix, groups, slots, slot_K, entering_K, time)
    group = slots.group.at[jnp.where(is_due_K, slot_K, E)].set(entering_K, mode="drop")
    return slots._replace(group=group), done, entered + (entering_K >= 0).sum()

  def round_(carry):
    slots, done, entered, time = carry
    slots, done, entered = jax.lax.while_loop(
      lambda carry: due(carry[0], carry[2]).any(),
      lambda carry: refill(carry, time),
      (slots, done, entered),
    )

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
    return due(slots, entered).any()

  zero = jnp.zeros((), jnp.int32)
  _, done, _, _ = jax.lax.while_loop(unfinished, round_, (slots, done, zero, zero))
  straight = (done.first[:, None, None] + jnp.arange(S)[None, None]) % S
  unroll = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(straight, x.shape), axis=2)
  return done._replace(tokens=unroll(done.tokens), logprobs=unroll(done.logprobs))


def _leave(decode_cfg: DecodeConfig, slots: _Slots, done: Segments, slot_K) -> Segments:
  """`done` with what the groups in the slots `slot_K` have drawn so far."""
  group_K = slots.group[slot_K]
  index_K = jnp.where(group_K >= 0, group_K, len(done.lengths))
  of_ring = tuple((chunk,) for chunk in slots.ring)
  drawn = segments_of(decode_cfg, slots.state, slots.first, of_ring)
  return _put(done, index_K, drawn, decode_cfg.rows, slot_K)


def _admit(
  decode_cfg: DecodeConfig,
  prefix: Prefix,
  groups: Groups,
  slots: _Slots,
  slot_K,
  entering_K,
  time,
) -> _Slots:
  """Puts the groups `entering_K` (NO_GROUP: none) into the slots `slot_K` at ring time `time`."""
  into_K = jnp.where(entering_K >= 0, slot_K, len(slots.group))
  entering = _take(groups, jnp.maximum(entering_K, 0))
  if groups.row is None:
    entering = entering._replace(row=jnp.maximum(entering_K, 0))
  put = lambda new, old: keep_rows_split(old.at[into_K].set(new, mode="drop"), decode_cfg.rows)
  move = lambda pair: jax.tree.map(lambda new, old: put(new[entering.row], old), *pair)
  cache = in_turn(move, list(zip(prefix.cache, slots.prefix.cache, strict=True)))
  return slots._replace(
    first=put(jnp.full_like(slot_K, time % decode_cfg.max_new_tokens), slots.first),
    prefix=Prefix(move((prefix.positions, slots.prefix.positions)), tuple(cache)),
    state=jax.tree.map(put, enter(decode_cfg, entering), slots.state),
  )


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


def _put(
  done: Segments, index_K, new: Segments, rows: NamedSharding | None, slot_K=None
) -> Segments:
  """`done` with the segments of K groups; those out of its range are dropped.

  Args:
    done: of Q groups.
    index_K: [K], which of the Q each of them is.
    new: of K groups, or of any number of which `slot_K` [K] tells those that are put.
    rows: how groups are split over a mesh.
    slot_K: None: all of `new` are put.
  """
  Q, E = len(done.lengths), len(new.lengths)

  def put(pair):
    store, new = pair  # the leading axis is Q or Q * n, of the new ones E or E * n
    by_group = lambda x, groups: x.reshape(groups, -1, *x.shape[1:])
    new_K = by_group(new, E) if slot_K is None else by_group(new, E)[slot_K]
    put_in = by_group(store, Q).at[index_K].set(new_K, mode="drop")
    return keep_rows_split(put_in.reshape(store.shape), rows)

  leaves, treedef = jax.tree.flatten(done)
  return treedef.unflatten(in_turn(put, list(zip(leaves, jax.tree.leaves(new), strict=True))))
