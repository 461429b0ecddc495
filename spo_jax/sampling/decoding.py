"""The verb decode: continuations of many prefixes, at static shapes, in one compiled program.

Groups are decoded E at a time, E the slots. Where all fit, or where they come in waves, the groups
of a wave begin together: their suffix is written chunk by chunk, and a step reads the chunks that
have begun, not those to come. Else a group that is done leaves and a waiting one enters: the suffix
is one ring of slots then, since groups are of all ages.

Axis letters, beside those of `verbs`: E groups being decoded, F slots refilled at a time.
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

  def round_(carry):
    slots, done, entered, time = carry
    slots, done = _leave(decode_cfg, idle_to_refill, slots, done)
    slots, entered = _admit(
      decode_cfg, idle_to_refill, prefix, groups, wanted, slots, entered, time
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
    return (entered < wanted) | (slots.group >= 0).any()

  zero = jnp.zeros((), jnp.int32)
  _, done, _, _ = jax.lax.while_loop(unfinished, round_, (slots, done, zero, zero))
  straight = (done.first[:, None, None] + jnp.arange(S)[None, None]) % S
  unroll = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(straight, x.shape), axis=2)
  return done._replace(tokens=unroll(done.tokens), logprobs=unroll(done.logprobs))


# Rows of slots move F at a time, as many as are waited for: it costs by their number, whoever is in
# them.
def _first(which_E: jax.Array, F: int) -> tuple[jax.Array, jax.Array]:
  """([F] slots, those of `which_E` before the others; [F] bool, whether they are of those)."""
  slot_F = jnp.argsort(~which_E)[:F]
  return slot_F, which_E[slot_F]


def _leave(
  decode_cfg: DecodeConfig, F: int, slots: _Slots, done: Segments
) -> tuple[_Slots, Segments]:
  """Puts what the groups that are done have drawn into `done`, and frees their slots."""
  E, Q = len(slots.group), len(done.lengths)
  idle_E = ~slots.state.running().any(-1)
  of_ring = tuple((chunk,) for chunk in slots.ring)
  drawn = segments_of(decode_cfg, slots.state, slots.first, of_ring)
  leaving = lambda group_E: idle_E & (group_E >= 0)

  def leave(carry):
    group_E, done = carry
    slot_F, leaves_F = _first(leaving(group_E), F)
    index_F = jnp.where(leaves_F, group_E[slot_F], Q)
    group_E = group_E.at[jnp.where(leaves_F, slot_F, E)].set(NO_GROUP, mode="drop")
    return group_E, _put(done, index_F, drawn, decode_cfg.rows, slot_F)

  group_E, done = jax.lax.while_loop(
    lambda carry: leaving(carry[0]).any(), leave, (slots.group, done)
  )
  return slots._replace(group=group_E), done


def _admit(
  decode_cfg: DecodeConfig,
  F: int,
  prefix: Prefix,
  groups: Groups,
  wanted: jax.Array,
  slots: _Slots,
  entered: jax.Array,
  time: jax.Array,
) -> tuple[_Slots, jax.Array]:
  """Puts the groups that wait, of the first `wanted`, into free slots at a time of the ring.

  Returns:
    (slots, how many groups have entered by now).
  """
  E, rows = len(slots.group), decode_cfg.rows
  free = lambda slots, entered: (slots.group < 0) & (entered < wanted)

  def admit(carry):
    slots, entered = carry
    slot_F, is_free_F = _first(free(slots, entered), F)
    index_F = entered + jnp.arange(F)
    enters_F = is_free_F & (index_F < wanted)
    index_F = jnp.where(enters_F, index_F, 0)
    into_F = jnp.where(enters_F, slot_F, E)
    entering = _take(groups, index_F)
    put = lambda new, old: keep_rows_split(old.at[into_F].set(new, mode="drop"), rows)
    move = lambda pair: jax.tree.map(lambda new, old: put(new[entering.row], old), *pair)
    cache = in_turn(move, list(zip(prefix.cache, slots.prefix.cache, strict=True)))
    slots = _Slots(
      group=put(index_F, slots.group),
      first=put(jnp.full_like(slot_F, time % decode_cfg.max_new_tokens), slots.first),
      prefix=Prefix(move((prefix.positions, slots.prefix.positions)), tuple(cache)),
      state=jax.tree.map(put, enter(decode_cfg, entering), slots.state),
      ring=slots.ring,
    )
    return slots, entered + enters_F.sum()

  return jax.lax.while_loop(lambda carry: free(*carry).any(), admit, (slots, entered))


def _wanted(groups: Groups) -> jax.Array:
  """Number of groups up to the last that wants anything."""
  number = jnp.arange(1, len(groups.limits) + 1)
  return jnp.max(jnp.where((groups.limits > 0).any(-1), number, 0))


def _take(groups: Groups, index_E: jax.Array) -> Groups:
  """Some of the groups, each with the row of its prefix."""
  taken = jax.tree.map(lambda x: x[index_E], groups)
  return taken._replace(row=index_E) if groups.row is None else taken


def _rows_of(prefix: Prefix, groups: Groups, rows: NamedSharding | None) -> Prefix:
  """The prefix of each group."""
  if groups.row is None:
    return prefix
  row_E = jnp.maximum(groups.row, 0)
  move = lambda pair: jax.tree.map(lambda x: keep_rows_split(x[row_E], rows), pair)
  return Prefix(move(prefix.positions), tuple(in_turn(move, prefix.cache)))


def _put(
  done: Segments, index_F, new: Segments, rows: NamedSharding | None, slot_F=None
) -> Segments:
  """`done` with the segments of F groups; those out of its range are dropped.

  Args:
    done: of Q groups.
    index_F: [F], which of the Q each of them is.
    new: of F groups, or of any number of which `slot_F` [F] tells those that are put.
    rows: how groups are split over a mesh.
    slot_F: None: all of `new` are put.
  """
  Q, E = len(done.lengths), len(new.lengths)

  def put(pair):
    store, new = pair  # the leading axis is Q or Q * n, of the new ones E or E * n
    by_group = lambda x, groups: x.reshape(groups, -1, *x.shape[1:])
    new_F = by_group(new, E) if slot_F is None else by_group(new, E)[slot_F]
    put_in = by_group(store, Q).at[index_F].set(new_F, mode="drop")
    return keep_rows_split(put_in.reshape(store.shape), rows)

  leaves, treedef = jax.tree.flatten(done)
  return treedef.unflatten(in_turn(put, list(zip(leaves, jax.tree.leaves(new), strict=True))))
