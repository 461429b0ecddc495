"""The sampling verbs: prefill, extend, and what `decoding.decode` takes and gives. Pure functions.

GRPO is `prefill; decode`. SPO-tree is `prefill; (decode; extend)*`. SPO-chain is `prefill; decode;
extend; decode` from every cutpoint. The KV cache of a prefix is stored once and shared by the n
continuations of its group; a continuation may start inside the prefix, where its view of the prefix
is just shorter.

A decode step feeds the token before the one that it draws, the first step of a continuation thus
the last prefix token that it sees. So a prefix is keys and values: no hidden state is handed from
verb to verb. Its slots tell the positions of their tokens, and need not lie in order: to extend a
prefix is to put slots behind it, and nothing is shifted.

Axis letters: R prefixes, Q groups asked for, n continuations of a group, P prefix slots, S suffix
slots, K key-value heads, Dh head dimension.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from spo_jax.infra.mesh import in_turn, keep_rows_split, whole_on_each
from spo_jax.models.attention import NOWHERE, attend_chunk, attend_prefill, stored
from spo_jax.models.decoder import DecoderConfig, cast_weights, forward

NO_GROUP = -1


class Prefix(NamedTuple):
  """Token sequences as keys and values."""

  positions: jax.Array  # [R, P] int32, of the slots' tokens in their sequences; NOWHERE: none
  cache: tuple  # per layer (keys [R, K, Dh, P], values [R, K, P, Dh]), as `attention.stored`


class Groups(NamedTuple):
  """What to decode: Q groups of n continuations of one prefix each, the padding last."""

  row: jax.Array | None  # [Q] int32, index of the prefix; None: group i continues prefix i
  starts: jax.Array  # [Q, n] int32, prefix tokens that the continuation sees, at least 1
  limits: jax.Array  # [Q, n] int32, most tokens to draw, at most S; 0: not wanted
  fed: jax.Array  # [Q, n] int32, the last of the tokens that the continuation sees
  keys: jax.Array  # [Q, n] typed PRNG keys


class Segments(NamedTuple):
  """What was decoded. Tokens past the length are unspecified."""

  tokens: jax.Array  # [Q, n, S] int32, the end-of-sequence token included
  logprobs: jax.Array  # [Q, n, S] float32, under softmax(logits / temperature)
  lengths: jax.Array  # [Q, n] int32
  finished: jax.Array  # [Q, n] bool, ended by itself (end-of-sequence), not by its limit
  first: jax.Array  # [Q] int32, slot of the group's first fed token: the slots are a ring
  # Of the fed tokens, () unless asked for. Per layer, a tuple of chunks of the S slots:
  # (keys [Q * n, K, Dh, slots], values [Q * n, K, slots, Dh]), as `attention.stored`.
  cache: tuple


def prefill(
  cfg: DecoderConfig,
  params,
  tokens_RxP: jax.Array,
  lengths_R: jax.Array,
  *,
  chunk: int = 0,
  kind: str = "full",
  rows: NamedSharding | None = None,
) -> Prefix:
  """Runs prompts once.

  Args:
    cfg: decoder geometry.
    params: its parameters.
    tokens_RxP: [R, P] int32, right-padded.
    lengths_R: [R] int32, at least 1.
    chunk: tokens of each prompt that are run at a time; 0, or P and more: all.
    kind: of the cache, of `quantised.KINDS`.
    rows: how prefixes are split over a mesh; None leaves it open.

  Returns:
    The prompts as prefixes.
  """
  R, P = tokens_RxP.shape
  chex.assert_shape(lengths_R, (R,))
  positions_RxP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (R, P))
  if 0 < chunk < P:
    cache = _prefill_in_chunks(cfg, params, tokens_RxP, lengths_R, chunk, rows)
  else:
    _, cache = forward(cfg, attend_prefill, params, tokens_RxP, positions_RxP)
  cache = tuple(stored(kind, *layer) for layer in cache)
  prefix = Prefix(jnp.where(positions_RxP < lengths_R[:, None], positions_RxP, NOWHERE), cache)
  # Else the compiler splits by width over fsdp, and each of its devices holds the whole cache.
  return keep_rows_split(prefix, rows)


def _prefill_in_chunks(cfg: DecoderConfig, params, tokens_RxP, lengths_R, chunk: int, rows):
  """The cache of prompts, whose slots behind the longest of them may be empty."""
  R, P = tokens_RxP.shape
  params = cast_weights(cfg, params)
  keys = jnp.zeros((R, cfg.kv_heads, cfg.head_dim, P), cfg.dtype)
  cache = keep_rows_split(((keys, keys.swapaxes(2, 3)),) * cfg.layers, rows)

  def run(i, cache):
    # The last chunk ends with the row: what it has of the chunk before it is computed again.
    start = jnp.minimum(i * chunk, P - chunk)
    tokens_RxC = jax.lax.dynamic_slice_in_dim(tokens_RxP, start, chunk, axis=1)
    at_RxC = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (R, chunk))
    _, cache = forward(cfg, attend_chunk, params, tokens_RxC, at_RxC, start, cache, longest=P)
    return keep_rows_split(cache, rows)

  return jax.lax.fori_loop(0, -(-jnp.max(lengths_R) // chunk), run, cache)


def extend(
  prefix: Prefix,
  groups: Groups,
  segments: Segments,
  index_R: jax.Array,
  rows: NamedSharding | None = None,
) -> Prefix:
  """Makes prefixes of chosen continuations: what they saw of their prefix, and their suffix.

  Args:
    prefix: the prefixes that were decoded from, P slots.
    groups: what was asked for.
    segments: what came back, with its cache.
    index_R: [R'] int32, continuations as `group * n + child`; NO_GROUP pads (an empty prefix).
    rows: how prefixes are split over a mesh; None leaves it open.

  Returns:
    R' prefixes of P + S slots. The last token of each is not among them: it is fed next.
  """
  n, S = segments.tokens.shape[1:]
  chosen_R = jnp.maximum(index_R, 0)
  group_R, child_R = jnp.divmod(chosen_R, n)
  row_R = group_R if groups.row is None else jnp.maximum(groups.row[group_R], 0)
  starts_Rx1 = groups.starts[group_R, child_R][:, None]
  lengths_Rx1 = jnp.where(index_R >= 0, segments.lengths[group_R, child_R], 0)[:, None]

  # The suffix begins with the last prefix token, which was fed.
  old_RxP = prefix.positions[row_R]
  old_RxP = jnp.where((old_RxP < starts_Rx1 - 1) & (lengths_Rx1 > 0), old_RxP, NOWHERE)
  step_RxS = (jnp.arange(S)[None] - segments.first[group_R][:, None]) % S
  new_RxS = jnp.where(step_RxS < lengths_Rx1, starts_Rx1 - 1 + step_RxS, NOWHERE)
  positions_RxC = jnp.concatenate([old_RxP, new_RxS], axis=1)

  def join(layer):
    """Keys and values of a layer."""
    old, chunks = layer

    def along(axis):
      return lambda old, *chunks: keep_rows_split(
        jnp.concatenate(
          [
            whole_on_each(old, rows)[row_R],
            *(whole_on_each(chunk, rows)[chosen_R] for chunk in chunks),
          ],
          axis=axis,
        ),
        rows,
      )

    return tuple(
      jax.tree.map(along(axis), old[which], *(chunk[which] for chunk in chunks))
      for which, axis in ((0, -1), (1, -2))
    )

  layers = list(zip(prefix.cache, segments.cache, strict=True))
  return Prefix(keep_rows_split(positions_RxC, rows), tuple(in_turn(join, layers)))
