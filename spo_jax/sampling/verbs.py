"""The sampling verbs: prefill, decode (with refill), extend. Pure functions of arrays.

GRPO is `prefill; decode`. SPO-tree is `prefill; (decode; extend)*`. SPO-chain is `prefill; decode;
extend; decode` from every cutpoint. The KV cache of a prefix is stored once and shared by the n
continuations of its group; a continuation may start inside the prefix, where its view of the prefix
is just shorter.

A decode step feeds the token before the one that it draws, the first step of a continuation thus
the last prefix token that it sees. So a prefix is its tokens and their keys and values: no hidden
state is handed from verb to verb.

Axis letters: R prefixes, Q groups asked for, E slots (groups being decoded at a time), n
continuations of a group, P prefix tokens, S suffix tokens, K key-value heads, Dh head dimension, V
vocabulary.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.models.attention import DecodeContext, attend_decode, attend_prefill
from spo_jax.models.decoder import DecoderConfig, forward, token_logits
from spo_jax.sampling.token import SamplingConfig, sample_token

NO_GROUP = -1


class Prefix(NamedTuple):
  """Token sequences with their keys and values; right-padded."""

  tokens: jax.Array  # [R, P] int32
  lengths: jax.Array  # [R] int32
  cache: tuple  # per layer (keys, values) [R, K, P, Dh]; the last token's entry may be absent


class Groups(NamedTuple):
  """What to decode: Q groups of n continuations of one prefix each, the padding last."""

  row: jax.Array  # [Q] int32, index of the prefix; NO_GROUP pads
  starts: jax.Array  # [Q, n] int32, prefix tokens that the continuation sees, at least 1
  limits: jax.Array  # [Q, n] int32, most tokens to draw, at most S; 0: not wanted
  keys: jax.Array  # [Q, n] typed PRNG keys


class Segments(NamedTuple):
  """What was decoded. Tokens past the length are unspecified."""

  tokens: jax.Array  # [Q, n, S] int32, the end-of-sequence token included
  logprobs: jax.Array  # [Q, n, S] float32, under softmax(logits / temperature)
  lengths: jax.Array  # [Q, n] int32
  finished: jax.Array  # [Q, n] bool, ended by itself (end-of-sequence), not by its limit
  first: jax.Array  # [Q] int32, suffix slot of the group's first fed token: the slots are a ring
  cache: tuple  # per layer (keys, values) [Q, n, K, S, Dh] of the fed tokens; () unless asked for


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Static arguments of `decode`."""

  max_new_tokens: int  # S
  slots: int  # E, groups decoded at a time; more groups wait and enter as others finish
  refill_share: float  # waiting groups enter when this share of the slots is idle
  stop_ids: tuple[int, ...]  # tokens that end a continuation
  sampling: SamplingConfig
  keep_cache: bool  # return the suffixes' keys and values, for `extend`
  rows: NamedSharding | None = None  # how groups are split over a mesh; None leaves it open


def keep_rows_split(tree, rows: NamedSharding | None):
  """Pins the leading axis of arrays to its mesh axes; the compiler may otherwise gather it."""
  if rows is None:
    return tree

  def pin(x):
    spec = PartitionSpec(*rows.spec, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, spec))

  return jax.tree.map(pin, tree)


def _whole_on_each(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
  """Gathers the leading axis: every device can then take the rows that it needs."""
  if rows is None:
    return x
  spec = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, spec))


def _in_turn(move, *trees):
  """jax.tree.map(move, *trees), one leaf after the other.

  Rows move between devices. Left to itself the compiler moves the caches of all layers at once, and
  holds all of what it gathered.
  """
  first, *others = trees
  leaves, treedef = jax.tree.flatten(first)
  moved = []
  for arrays in zip(leaves, *map(treedef.flatten_up_to, others), strict=True):
    if moved:
      arrays, moved[-1] = jax.lax.optimization_barrier((arrays, moved[-1]))
    moved.append(move(*arrays))
  return treedef.unflatten(moved)


class _Slots(NamedTuple):
  """State of the groups being decoded."""

  group: jax.Array  # [E] int32, index into the groups; NO_GROUP when idle
  prefix_cache: tuple  # per layer [E, K, P, Dh] pairs
  starts: jax.Array  # [E, n]
  limits: jax.Array  # [E, n]
  keys: jax.Array  # [E, n]
  fed: jax.Array  # [E, n] int32, the token that the next step feeds
  step: jax.Array  # [E] int32, steps that the group has taken
  segments: Segments  # with E in place of Q


def prefill(cfg: DecoderConfig, params, tokens_RxP: jax.Array, lengths_R: jax.Array) -> Prefix:
  """Runs prompts once.

  Args:
    cfg: decoder geometry.
    params: its parameters.
    tokens_RxP: [R, P] int32, right-padded.
    lengths_R: [R] int32, at least 1.

  Returns:
    The prompts as prefixes.
  """
  R, P = tokens_RxP.shape
  chex.assert_shape(lengths_R, (R,))
  positions_RxP = jnp.broadcast_to(jnp.arange(P), (R, P))
  _, cache = forward(cfg, attend_prefill, params, tokens_RxP, positions_RxP)
  return Prefix(tokens_RxP, lengths_R, cache)


def extend(
  prefix: Prefix,
  groups: Groups,
  segments: Segments,
  index_R: jax.Array,
  rows: NamedSharding | None = None,
) -> Prefix:
  """Makes prefixes of chosen continuations: what they saw of their prefix, and their suffix.

  Args:
    prefix: the prefixes that were decoded from, capacity P.
    groups: what was asked for.
    segments: what came back, with its cache.
    index_R: [R'] int32, continuations as `group * n + child`; NO_GROUP pads (a prefix of length 0).
    rows: how prefixes are split over a mesh; None leaves it open.

  Returns:
    R' prefixes of capacity P + S.
  """
  n, S = segments.tokens.shape[1:]
  P = prefix.tokens.shape[1]
  wanted_R = index_R >= 0
  group_R, child_R = jnp.divmod(jnp.maximum(index_R, 0), n)
  row_R = jnp.maximum(groups.row[group_R], 0)
  starts_R = groups.starts[group_R, child_R]
  lengths_R = jnp.where(wanted_R, starts_R + segments.lengths[group_R, child_R], 0)

  slot_1xC = jnp.arange(P + S)[None]
  in_prefix_RxC = slot_1xC < starts_R[:, None]
  from_prefix_RxC = jnp.broadcast_to(jnp.minimum(slot_1xC, P - 1), in_prefix_RxC.shape)
  from_suffix_RxC = jnp.clip(slot_1xC - starts_R[:, None], 0, S - 1)
  tokens_RxC = jnp.where(
    in_prefix_RxC,
    jnp.take_along_axis(prefix.tokens[row_R], from_prefix_RxC, axis=1),
    jnp.take_along_axis(segments.tokens[group_R, child_R], from_suffix_RxC, axis=1),
  )
  # The suffix cache begins with the last prefix token, one slot before the first new token.
  cached_RxC = (slot_1xC < starts_R[:, None] - 1)[:, None, :, None]
  step_RxC = jnp.clip(slot_1xC - (starts_R[:, None] - 1), 0, S - 1)
  ring_RxC = (segments.first[group_R][:, None] + step_RxC) % S
  take = lambda store, slots: jnp.take_along_axis(store, slots[:, None, :, None], axis=2)

  def merge(old, new):
    old, new = _whole_on_each(old, rows), _whole_on_each(new, rows)
    merged = jnp.where(
      cached_RxC, take(old[row_R], from_prefix_RxC), take(new[group_R, child_R], ring_RxC)
    )
    return keep_rows_split(merged, rows)

  cache = _in_turn(merge, prefix.cache, segments.cache)
  return Prefix(*keep_rows_split((tokens_RxC, lengths_R), rows), cache)


def empty_segments(cfg: DecoderConfig, decode_cfg: DecodeConfig, groups: int, n: int) -> Segments:
  """Segments [groups, n] of no tokens, with their cache."""
  S = decode_cfg.max_new_tokens
  shape = (groups, n, cfg.kv_heads, S, cfg.head_dim)
  pair = lambda: (jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
  return Segments(
    tokens=jnp.zeros((groups, n, S), jnp.int32),
    logprobs=jnp.zeros((groups, n, S), jnp.float32),
    lengths=jnp.zeros((groups, n), jnp.int32),
    finished=jnp.zeros((groups, n), bool),
    first=jnp.zeros((groups,), jnp.int32),
    cache=tuple(pair() for _ in range(cfg.layers)),
  )


def _admit(
  prefix: Prefix,
  groups: Groups,
  slots: _Slots,
  entering_E: jax.Array,
  time: jax.Array,
  rows: NamedSharding | None,
) -> _Slots:
  """Puts the groups `entering_E` (NO_GROUP: none) into their slots at ring time `time`."""
  enters_E = entering_E >= 0
  group_E = jnp.maximum(entering_E, 0)
  row_E = groups.row[group_E]
  starts_Exn = groups.starts[group_E]
  last_Exn = jnp.take_along_axis(prefix.tokens[row_E], jnp.maximum(starts_Exn - 1, 0), axis=1)

  def choose(new, old):
    mask = enters_E.reshape((-1,) + (1,) * (new.ndim - 1))
    return jnp.where(mask, new, old)

  segments = slots.segments
  zeros = jnp.zeros_like(segments.lengths)
  return _Slots(
    group=jnp.where(enters_E, entering_E, slots.group),
    prefix_cache=_in_turn(
      lambda new, old: keep_rows_split(choose(new[row_E], old), rows),
      prefix.cache,
      slots.prefix_cache,
    ),
    starts=choose(starts_Exn, slots.starts),
    limits=choose(groups.limits[group_E], slots.limits),
    keys=choose(groups.keys[group_E], slots.keys),
    fed=choose(last_Exn, slots.fed),
    step=choose(jnp.zeros_like(slots.step), slots.step),
    segments=segments._replace(
      lengths=choose(zeros, segments.lengths),
      finished=choose(zeros.astype(bool), segments.finished),
      first=choose(jnp.full_like(segments.first, time), segments.first),
    ),
  )


def _running(slots: _Slots) -> jax.Array:
  """[E, n] bool, continuations that still draw."""
  return ~slots.segments.finished & (slots.segments.lengths < slots.limits)


def _step(cfg: DecoderConfig, decode_cfg: DecodeConfig, params, slots: _Slots, time) -> _Slots:
  """One token for every running continuation."""
  S = decode_cfg.max_new_tokens
  E, n = slots.fed.shape
  old = slots.segments
  running_Exn = _running(slots)
  slot = time % S
  age_1xS = (slot - jnp.arange(S)[None]) % S
  context = DecodeContext(
    visible=slots.starts - 1,
    suffix_mask=age_1xS <= slots.step[:, None],
    slot=slot,
    writes=slots.step < S,
  )
  caches = tuple(p + s for p, s in zip(slots.prefix_cache, old.cache, strict=True))
  positions_Exn = slots.starts - 1 + slots.step[:, None]
  hidden, cache = forward(
    cfg,
    attend_decode,
    params,
    slots.fed.reshape(-1, 1),
    positions_Exn.reshape(-1, 1),
    context,
    caches,
  )
  logits = token_logits(cfg, params, hidden[:, 0])
  keys = jax.vmap(jax.random.fold_in)(slots.keys.reshape(-1), jnp.repeat(slots.step, n))
  tokens, logprobs = sample_token(keys, logits, decode_cfg.sampling)
  tokens_Exn, logprobs_Exn = tokens.reshape(E, n), logprobs.reshape(E, n)
  stops_Exn = jnp.isin(tokens_Exn, jnp.array(decode_cfg.stop_ids))
  here_Ex1xS = jnp.arange(S)[None, None] == slots.step[:, None, None]
  return slots._replace(
    fed=tokens_Exn,
    step=slots.step + 1,
    segments=Segments(
      tokens=jnp.where(here_Ex1xS, tokens_Exn[..., None], old.tokens),
      logprobs=jnp.where(here_Ex1xS, logprobs_Exn[..., None], old.logprobs),
      lengths=old.lengths + running_Exn,
      finished=old.finished | (running_Exn & stops_Exn),
      first=old.first,
      cache=cache,
    ),
  )


def decode(
  cfg: DecoderConfig, decode_cfg: DecodeConfig, params, prefix: Prefix, groups: Groups
) -> Segments:
  """Draws the continuations of all groups, `decode_cfg.slots` groups at a time, at static shapes.

  A group leaves when its last continuation ends, and a waiting one enters: continuous batching by
  prefix group, inside one compiled program. All groups write the same ring slot at a step, whenever
  they began; keys carry their rotary position, so the order of the ring does not matter to
  attention. Every draw depends on the continuation's own key and step, so a result does not depend
  on the order, the number or the placement of the groups.

  Args:
    cfg: decoder geometry.
    decode_cfg: budget, slots, sampling.
    params: parameters of the decoder.
    prefix: R prefixes.
    groups: Q groups.

  Returns:
    Segments of the Q groups, in their order.
  """
  # A step has few tokens, and they are cheaper to send than the weights: those stay.
  cfg = dataclasses.replace(cfg, gather=None)
  Q, n = groups.starts.shape
  E = min(decode_cfg.slots, Q)
  idle_to_refill = max(1, round(decode_cfg.refill_share * E))
  wanted = (groups.row >= 0).sum()
  drop = lambda segments: segments._replace(cache=segments.cache if decode_cfg.keep_cache else ())
  slots = _Slots(
    group=jnp.full((E,), NO_GROUP, jnp.int32),
    prefix_cache=jax.tree.map(lambda x: jnp.zeros((E, *x.shape[1:]), x.dtype), prefix.cache),
    starts=jnp.ones((E, n), jnp.int32),
    limits=jnp.zeros((E, n), jnp.int32),
    keys=groups.keys[:E],
    fed=jnp.zeros((E, n), jnp.int32),
    step=jnp.zeros((E,), jnp.int32),
    segments=empty_segments(cfg, decode_cfg, E, n),
  )
  done = drop(empty_segments(cfg, decode_cfg, Q, n))

  def refill(state):
    slots, done, entered, time = state
    idle_E = ~_running(slots).any(-1)
    leaving_E = jnp.where(idle_E & (slots.group >= 0), slots.group, Q)
    leave = lambda store, new: keep_rows_split(
      store.at[leaving_E].set(new, mode="drop"), decode_cfg.rows
    )
    done = _in_turn(leave, done, drop(slots.segments))
    entering_E = entered + jnp.cumsum(idle_E) - 1
    entering_E = jnp.where(idle_E & (entering_E < wanted), entering_E, NO_GROUP)
    slots = slots._replace(group=jnp.where(idle_E, NO_GROUP, slots.group))
    entering_E = entering_E.astype(jnp.int32)
    slots = _admit(prefix, groups, slots, entering_E, time, decode_cfg.rows)
    slots, done = keep_rows_split((slots, done), decode_cfg.rows)
    return slots, done, entered + (entering_E >= 0).sum(), time

  def keep_stepping(entered):
    def condition(state):
      slots, _ = state
      running_E = _running(slots).any(-1)
      enough_idle = (entered < wanted) & ((~running_E).sum() >= idle_to_refill)
      return running_E.any() & ~enough_idle

    return condition

  def round_(state):
    slots, done, entered, time = refill(state)
    advance = lambda s: (_step(cfg, decode_cfg, params, *s), s[1] + 1)
    slots, time = jax.lax.while_loop(keep_stepping(entered), advance, (slots, time))
    return slots, done, entered, time

  def unfinished(state):
    slots, _, entered, _ = state
    return (entered < wanted) | (slots.group >= 0).any()

  time = entered = jnp.zeros((), jnp.int32)
  if E == Q:
    slots, _, _, _ = round_((slots, done, entered, time))
    return drop(slots.segments)
  _, done, _, _ = jax.lax.while_loop(unfinished, round_, (slots, done, entered, time))
  return done
