"""From forests to one training batch: the packed forest.

A row is a forest written out depth first, so that a token shared by many leaves passes through the
model once. Two integers a token carry the structure: `prev`, the row index of the token it
continues, and `until`, the first row index past the subtree that hangs off it. Query q may attend
key k iff k <= q < until[k].

The loss may read few of the tokens, as with the probability mask. What belongs to it has R places a
row then, fewer than T: a tree is for the model, a list of tokens for the loss.

M micro-batches, B rows a micro-batch, T tokens a row, R of them that the loss may read, N query
blocks a row, J key blocks of L tokens a row, W key blocks that a query block may see.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spo_jax.errors import UserError
from spo_jax.forest import Forest
from spo_jax.training.key_blocks import key_blocks_bound, visible_blocks
from spo_jax.training.layout import Layout, lay_out


class PackedForest(NamedTuple):
  """A batch of packed rows; [M, B, R] arrays unless told otherwise.

  Where R = T every token has the place that it has in its row. Those that only some losses read are
  None for the others.
  """

  tokens: np.ndarray  # [M, B, T] int32
  positions: np.ndarray  # [M, B, T] int32, distance from the root of the token's tree
  until: np.ndarray  # [M, B, J, L] int32, first row index past the subtree that hangs off the token
  key_blocks: np.ndarray  # [M, B, N, W] int32, key blocks that a query block may see; -1 pads
  targets: np.ndarray  # int32, the token itself
  prev: np.ndarray  # int32, row index of the token that this one continues; -1 at roots and padding
  loss_mask: np.ndarray  # bool, tokens of trained segments
  advantages: np.ndarray  # float32, of the token's segment
  old_logprobs: np.ndarray  # float32, under the sampler; see `sampler_logprobs`
  ref_logprobs: np.ndarray  # float32, under the reference policy; 0 until they are computed
  episodes: np.ndarray  # [M] float32, of trained segments; see `weights.episode_shares`
  weights: np.ndarray | None = None  # float32, of the token in the policy loss; None: all are 1
  sequence: np.ndarray | None = None  # int32, number in its micro-batch of a response in a pair; -1
  pairs: np.ndarray | None = None  # [M, P, 2] int32, sequences: chosen, rejected; -1 pads
  ref_hidden: np.ndarray | None = None  # [M, B, R, D], states of the reference policy at `prev`
  values: np.ndarray | None = None  # float32, of the critic, before the token
  returns: np.ndarray | None = None  # float32, the critic's targets
  value_mask: np.ndarray | None = None  # bool, tokens that the critic learns from
  # float32, under the sampler, where `old_logprobs` are the policy's before the update; else None
  sampler_logprobs: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """Shape of a packed batch."""

  row_length: int  # T
  rows: int  # B
  query_block: int  # T / N, queries of an attention block
  key_block: int  # L, keys of an attention block
  key_blocks: int = 0  # W; 0 takes what the batch needs
  min_micro_batches: int = 1  # M, so that its shape need not change; doubled until the batch fits
  updates: int = 1  # rows are dealt to as many micro-batches at least, so that none is empty
  loss_length: int = 0  # R, where `pack` is told what the loss reads; 0: T

  def __post_init__(self):
    for whole, part in (("row_length", "query_block"), ("query_block", "key_block")):
      a, b = getattr(self, whole), getattr(self, part)
      if a % b:
        raise UserError(f"{whole} {a} must be a multiple of {part} {b}")


def pack(
  forest: Forest,
  advantages: np.ndarray,
  trained: np.ndarray,
  cfg: PackConfig,
  *,
  read: np.ndarray | None = None,
  episodes: np.ndarray | None = None,
  weights: np.ndarray | None = None,
  pairs: np.ndarray | None = None,
  most_pairs: int = 0,
) -> tuple[PackedForest, dict[str, int]]:
  """Packs the trained segments of a forest, and the ancestors that they need, into rows.

  A tree longer than a row is cut into pieces, each with a copy of its ancestors, which are trained
  in one of the copies only.

  Args:
    forest: N nodes.
    advantages: [N] float32, of each node's segment.
    trained: [N] bool, segments that enter the loss.
    cfg: shape of the batch.
    read: [tokens of the forest] bool, those of trained segments that the loss reads; None: all. If
      a segment has more than `cfg.loss_length`, R is doubled until it fits.
    episodes: [N] float, what each segment that an iteration trains is of an episode, 0 for others;
      those that are not in `trained`, for want of a token in the loss, are counted where these are,
      in equal shares. None: each of `trained` is one.
    weights: [N] float32, of each node's tokens in the policy loss; None: all are 1.
    pairs: [P, 2] node ids of trained responses, chosen and rejected, of one tree each, which fits a
      row; None if the loss has no pairs.
    most_pairs: P' of the batch's table, as many as a micro-batch's pairs can be.

  Returns:
    (batch, counts): counts has `rows`, `micro_batches` that hold them, `segments` and `tokens`
    trained, `packed_tokens`, and how many of these are `distinct_tokens`, no copies.

  Raises:
    UserError: if a path from root to leaf is longer than a row, or a query block sees more than
      `cfg.key_blocks`.
  """
  reads, loss_length = _places(forest, trained, read, cfg)
  layout = lay_out(forest, trained, cfg.row_length, reads, loss_length)
  micro_batches = max(-(-layout.rows // cfg.rows), min(cfg.updates, layout.rows))
  room = cfg.min_micro_batches
  while room < micro_batches:  # of few shapes, since each is a compilation
    room *= 2
  layout = layout.dealt(micro_batches, cfg.rows)
  own = trained[layout.node] & ~layout.context
  per_node = {
    "loss_mask": (own, False),
    "advantages": (advantages[layout.node], np.float32(0)),
  }
  if weights is not None:
    per_node["weights"] = (weights[layout.node], np.float32(0))
  if pairs is not None:
    home = layout.row // cfg.rows
    sequence, table = _number_pairs(home, layout.node, pairs, (room, most_pairs), len(trained))
    per_node["sequence"] = (sequence[layout.node], np.int32(-1))
  rows = room * cfg.rows
  chosen = None if reads is None else (own, read)
  batch = _write(forest, layout, (rows, cfg.row_length), (rows, loss_length), per_node, chosen)
  batch["key_blocks"] = visible_blocks(
    batch["until"], cfg.query_block, cfg.key_block, cfg.key_blocks
  )
  batch["until"] = batch["until"].reshape(room * cfg.rows, -1, cfg.key_block)
  batch = {name: x.reshape(room, cfg.rows, *x.shape[1:]) for name, x in batch.items()}
  counted = trained.astype(np.float64) if episodes is None else episodes
  packed = counted[layout.node[own]]
  share = counted.sum() / packed.sum() if own.any() else 1
  held = np.bincount(layout.row[own] // cfg.rows, weights=packed * share, minlength=room)
  batch["episodes"] = held.astype(np.float32)
  if pairs is not None:
    batch["pairs"] = table
  counts = {
    "rows": layout.rows,
    "micro_batches": micro_batches,
    "segments": int(trained.sum()),
    "tokens": int(batch["loss_mask"].sum()),
    "packed_tokens": int(forest.lengths[layout.node].sum()),
    "distinct_tokens": int(forest.lengths[np.unique(layout.node)].sum()),
  }
  return PackedForest(**batch), counts


def _places(
  forest: Forest, trained: np.ndarray, read: np.ndarray | None, cfg: PackConfig
) -> tuple[np.ndarray | None, int]:
  """([N] tokens of each trained segment that the loss reads, or None for all; R)."""
  if read is None or not cfg.loss_length:
    return None, cfg.row_length
  node = np.repeat(np.arange(len(trained)), forest.lengths)
  reads = np.where(trained, np.bincount(node[read], minlength=len(trained)), 0)
  length = cfg.loss_length
  while length < reads.max(initial=0):
    length *= 2
  return reads, length


def _write(
  forest: Forest,
  layout: Layout,
  shape: tuple[int, int],
  loss_shape: tuple[int, int],
  per_node: dict[str, tuple],
  chosen: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, np.ndarray]:
  """Rows of everything that a token has, for the model and for the loss.

  Args:
    forest: N nodes.
    layout: of C copies of them.
    shape: (rows, T).
    loss_shape: (rows, R).
    per_node: by name, what the tokens of each copy get, [C], and what padding gets; for the loss.
    chosen: what the loss reads, if not all: copies [C] bool, and tokens of the forest, bool.

  Returns:
    Arrays by name.
  """
  lengths = forest.lengths[layout.node]
  within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  spread = lambda column: np.repeat(column, lengths)
  column = spread(layout.start) + within
  row = spread(layout.row)
  source = forest.offsets[spread(layout.node)] + within

  def fill(values, padding, *, shape, place):
    rows = np.full(shape, padding, np.asarray(padding).dtype)
    rows[place] = values
    return rows

  for_model = functools.partial(fill, shape=shape, place=(row, column))
  alone = np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.int32), shape)
  batch = {
    "tokens": for_model(forest.tokens[source], np.int32(0)),
    "positions": for_model(spread(layout.position) + within, np.int32(0)),
    "until": alone.copy(),  # padding sees itself alone
  }
  batch["until"][row, column] = spread(layout.until)

  kept, place = slice(None), (row, column)
  if chosen is not None:
    copies, read = chosen
    kept = spread(copies) & read[source]
    place = (row[kept], _count_up(row[kept]))
  for_loss = functools.partial(fill, shape=loss_shape, place=place)
  none = np.float32(0)
  batch |= {
    "targets": for_loss(forest.tokens[source][kept], np.int32(0)),
    "prev": for_loss(np.where(within == 0, spread(layout.prev), column - 1)[kept], np.int32(-1)),
    "old_logprobs": for_loss(forest.logprobs[source][kept], none),
    "ref_logprobs": np.full(loss_shape, none),
  }
  return batch | {
    name: for_loss(spread(values)[kept], padding) for name, (values, padding) in per_node.items()
  }


def _count_up(rows: np.ndarray) -> np.ndarray:
  """0, 1, 2, ... along each run of equal numbers."""
  index = np.arange(len(rows))
  begins = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
  return index - np.maximum.accumulate(np.where(begins, index, 0))


def _number_pairs(micro_batches, copies, pairs: np.ndarray, shape: tuple[int, int], nodes: int):
  """Numbers the responses of each micro-batch's pairs.

  Args:
    micro_batches: [copies] of the copies of nodes.
    copies: [copies] node ids.
    pairs: [P, 2] node ids.
    shape: micro-batches, and pairs that each has room for.
    nodes: N.

  Returns:
    ([N] int32, a node's number in its micro-batch or -1; [*shape, 2] int32 pairs of numbers).
  """
  home = np.zeros(nodes, np.int64)
  home[copies] = micro_batches
  owner = home[pairs[:, 0]]
  table = np.full((*shape, 2), -1, np.int32)
  sequence = np.full(nodes, -1, np.int32)
  for micro_batch in np.unique(owner):
    own = pairs[owner == micro_batch]
    members, numbers = np.unique(own, return_inverse=True)
    sequence[members] = np.arange(len(members))
    table[micro_batch, : len(own)] = numbers.reshape(own.shape)
  return sequence, table


def with_room(
  cfg: PackConfig, path_lengths: Sequence[int], tree_tokens: int, trees: int
) -> PackConfig:
  """Sets `key_blocks` and `min_micro_batches` to what `trees` trees of at most `tree_tokens`
  tokens, with these longest segments from root to leaf, can need: so the shape of a batch never
  changes.

  With n of the largest trees to a row, rows hold at least n trees each but for the last; best fit
  also leaves at most one row less than half full. A tree longer than a row is cut into pieces,
  whose ancestors are written anew: room for twice its tokens is left, which is no bound (ancestors
  may fill most of a row).
  """
  in_row = cfg.row_length // tree_tokens
  half_full = -(-2 * trees * tree_tokens // cfg.row_length) + 1
  rows = min(-(-trees // in_row), half_full) if in_row else 2 * half_full
  key_blocks = key_blocks_bound(path_lengths, cfg.query_block, cfg.key_block, cfg.row_length)
  micro_batches = max(-(-rows // cfg.rows), cfg.updates)
  return dataclasses.replace(cfg, key_blocks=key_blocks, min_micro_batches=micro_batches)
