"""From forests to one training batch: the packed forest.

A row is a forest written out depth first, so that a token shared by many leaves passes through the
model once. Two integers a token carry the structure: `prev`, the row index of the token it
continues, and `until`, the first row index past the subtree that hangs off it. Query q may attend
key k iff k <= q < until[k].

M micro-batches, B rows a micro-batch, T tokens a row, N query blocks a row, J key blocks of L
tokens a row, W key blocks that a query block may see.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spo_jax.errors import UserError
from spo_jax.forest import Forest


class PackedForest(NamedTuple):
  """A batch of packed rows; [M, B, T] arrays unless told otherwise.

  Those that only some losses read are None for the others.
  """

  tokens: np.ndarray  # int32
  positions: np.ndarray  # int32, distance from the root of the token's tree
  prev: np.ndarray  # int32, row index of the token that this one continues; -1 at roots and padding
  until: np.ndarray  # [M, B, J, L] int32, first row index past the subtree that hangs off the token
  loss_mask: np.ndarray  # bool, tokens of trained segments
  advantages: np.ndarray  # float32, of the token's segment
  old_logprobs: np.ndarray  # float32, under the sampling policy
  ref_logprobs: np.ndarray  # float32, under the reference policy; 0 until they are computed
  key_blocks: np.ndarray  # [M, B, N, W] int32, key blocks that a query block may see; -1 pads
  segments: np.ndarray  # [M] int32, trained segments
  weights: np.ndarray | None = None  # float32, of the token in the policy loss; None: all are 1
  sequence: np.ndarray | None = None  # int32, number in its micro-batch of a response in a pair; -1
  pairs: np.ndarray | None = None  # [M, P, 2] int32, sequences: chosen, rejected; -1 pads
  ref_hidden: np.ndarray | None = None  # [M, B, T, D], states of the reference policy at `prev`
  values: np.ndarray | None = None  # float32, of the critic, before the token
  returns: np.ndarray | None = None  # float32, the critic's targets


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """Shape of a packed batch."""

  row_length: int  # T
  rows: int  # B
  query_block: int  # T / N, queries of an attention block
  key_block: int  # L, keys of an attention block
  key_blocks: int = 0  # W; 0 takes what the batch needs
  min_micro_batches: int = 1  # M, so that its shape need not change; doubled until the batch fits

  def __post_init__(self):
    for whole, part in (("row_length", "query_block"), ("query_block", "key_block")):
      a, b = getattr(self, whole), getattr(self, part)
      if a % b:
        raise UserError(f"{whole} {a} must be a multiple of {part} {b}")


@dataclasses.dataclass
class _Piece:
  """Nodes of one tree that stay together in a row; the first so many are trained in another one."""

  nodes: list[int]
  context: int
  size: int  # tokens


def pack(
  forest: Forest,
  advantages: np.ndarray,
  trained: np.ndarray,
  cfg: PackConfig,
  *,
  weights: np.ndarray | None = None,
  pairs: np.ndarray | None = None,
  most_pairs: int = 0,
) -> tuple[PackedForest, dict[str, int]]:
  """Packs the trained segments of a forest, and the ancestors that they need, into rows.

  Trees are laid into rows best fit, the largest first. A tree longer than a row is cut into
  pieces, each with a copy of its ancestors, which are trained in one of the copies only.

  Args:
    forest: N nodes.
    advantages: [N] float32, of each node's segment.
    trained: [N] bool, segments that enter the loss.
    cfg: shape of the batch.
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
  pieces = _cut_into_pieces(forest, trained, cfg.row_length)
  rows = _fill_rows([piece.size for piece in pieces], cfg.row_length)
  micro_batches = -(-len(rows) // cfg.rows)
  room = cfg.min_micro_batches
  while room < micro_batches:  # of few shapes, since each is a compilation
    room *= 2
  shape = (room * cfg.rows, cfg.row_length)
  flat = np.arange(shape[0] * shape[1])
  batch = {
    "tokens": np.zeros(flat.shape, np.int32),
    "positions": np.zeros(flat.shape, np.int32),
    "prev": np.full(flat.shape, -1, np.int32),
    "until": (flat % cfg.row_length + 1).astype(np.int32),  # padding sees itself alone
    "loss_mask": np.zeros(flat.shape, bool),
    "advantages": np.zeros(flat.shape, np.float32),
    "old_logprobs": np.zeros(flat.shape, np.float32),
    "ref_logprobs": np.zeros(flat.shape, np.float32),
  }
  placed = _place(forest, pieces, rows, cfg.row_length)
  # Dealt out in turn: else the first micro-batches get the large trees, the last what is left.
  turn, micro_batch = np.divmod(placed["row"], max(micro_batches, 1))
  placed["row"] = micro_batch * cfg.rows + turn
  lengths = forest.lengths[placed["node"]]
  within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  spread = lambda name: np.repeat(placed[name], lengths)
  start = spread("start")
  target = spread("row") * cfg.row_length + start + within
  source = forest.offsets[spread("node")] + within
  batch["tokens"][target] = forest.tokens[source]
  batch["positions"][target] = spread("position") + within
  batch["prev"][target] = np.where(within == 0, spread("prev"), start + within - 1)
  batch["until"][target] = spread("until")
  batch["loss_mask"][target] = trained[spread("node")] & ~spread("context")
  batch["advantages"][target] = advantages[spread("node")]
  batch["old_logprobs"][target] = forest.logprobs[source]
  if weights is not None:
    batch["weights"] = np.zeros(flat.shape, np.float32)
    batch["weights"][target] = weights[spread("node")]
  if pairs is not None:
    sequence, table = _number_pairs(
      placed["row"] // cfg.rows, placed["node"], pairs, (room, most_pairs), len(forest.parent)
    )
    batch["sequence"] = np.full(flat.shape, -1, np.int32)
    batch["sequence"][target] = sequence[spread("node")]

  batch = {name: array.reshape(shape) for name, array in batch.items()}
  batch["key_blocks"] = visible_blocks(
    batch["until"], cfg.query_block, cfg.key_block, cfg.key_blocks
  )
  batch["until"] = batch["until"].reshape(shape[0], -1, cfg.key_block)
  batch = {name: x.reshape(-1, cfg.rows, *x.shape[1:]) for name, x in batch.items()}
  own = trained[placed["node"]] & ~placed["context"]
  batch["segments"] = np.bincount(
    placed["row"][own] // cfg.rows, minlength=len(batch["tokens"])
  ).astype(np.int32)
  if pairs is not None:
    batch["pairs"] = table
  counts = {
    "rows": len(rows),
    "micro_batches": micro_batches,
    "segments": int(trained.sum()),
    "tokens": int(batch["loss_mask"].sum()),
    "packed_tokens": int(lengths.sum()),
    "distinct_tokens": int(forest.lengths[np.unique(placed["node"])].sum()),
  }
  return PackedForest(**batch), counts


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


def visible_blocks(
  until_RxT: np.ndarray, query_block: int, key_block: int, width: int
) -> np.ndarray:
  """The key blocks that each query block may see, ascending.

  A key block is visible to a query block if it lies in it, or if it lies before it and one of its
  keys reaches into it: max(until of the keys) > first query.

  Args:
    until_RxT: [R, T] int32.
    query_block: T / N, queries of a block.
    key_block: T / J, keys of a block; divides query_block.
    width: W; 0 takes the most that any query block sees.

  Returns:
    [R, N, W] int32; -1 pads.

  Raises:
    UserError: if a query block sees more than `width` key blocks.
  """
  R, T = until_RxT.shape
  reach_Rx1xJ = until_RxT.reshape(R, 1, -1, key_block).max(-1)
  query_Nx1 = np.arange(0, T, query_block)[:, None]
  key_1xJ = np.arange(0, T, key_block)[None]
  inside = (key_1xJ >= query_Nx1) & (key_1xJ < query_Nx1 + query_block)
  visible = inside | ((key_1xJ < query_Nx1) & (reach_Rx1xJ > query_Nx1))
  needed = int(visible.sum(-1).max(initial=1))
  width = width or needed
  if needed > width:
    raise UserError(f"a query block sees {needed} key blocks, more than key_blocks {width}")
  order = np.argsort(~visible, axis=-1, kind="stable")[..., :width].astype(np.int32)
  kept = np.take_along_axis(visible, order, axis=-1)
  table = np.where(kept, order, -1).astype(np.int32)
  return np.pad(table, ((0, 0), (0, 0), (0, width - table.shape[-1])), constant_values=-1)


def key_blocks_bound(
  path_lengths: Sequence[int], query_block: int, key_block: int, row_length: int
) -> int:
  """Most key blocks that a query block can see in a packed row of trees with these longest
  segments, root first.

  What a block of queries sees, apart from its own tokens, are the ancestors of its first token:
  whatever begins later lies inside the block. A segment of s tokens touches at most
  ceil((s - 1) / key_block) + 1 key blocks.
  """
  touched = sum(-(-(length - 1) // key_block) + 1 for length in path_lengths)
  return min(row_length // key_block, query_block // key_block + touched)


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
  return dataclasses.replace(cfg, key_blocks=key_blocks, min_micro_batches=-(-rows // cfg.rows))


def _cut_into_pieces(forest: Forest, trained: np.ndarray, row_length: int) -> list[_Piece]:
  """Every tree depth first, in as few pieces as rows of this length allow: a piece ends where the
  next node does not fit, and the next one begins with that node's ancestors.
  """
  parents, lengths = forest.parent.tolist(), forest.lengths.tolist()
  needed = trained.tolist()
  children = [[] for _ in parents]  # those that are needed, the last first
  for node in range(len(parents) - 1, -1, -1):
    if needed[node] and parents[node] >= 0:
      needed[parents[node]] = True
      children[parents[node]].append(node)

  def ancestors(node):
    path = []
    while (node := parents[node]) >= 0:
      path.append(node)
    return path[::-1]

  pieces = []
  for root in np.flatnonzero((forest.parent < 0) & np.array(needed, bool)).tolist():
    piece, stack = None, [root]
    while stack:
      node = stack.pop()
      stack.extend(children[node])
      if piece is None or piece.size + lengths[node] > row_length:
        path = ancestors(node)
        piece = _Piece(path, len(path), sum(lengths[above] for above in path))
        pieces.append(piece)
      piece.nodes.append(node)
      piece.size += lengths[node]
      if piece.size > row_length:
        raise UserError(
          f"a path of {piece.size} tokens does not fit row_length {row_length}: make rows at least "
          "as long as the longest prompt and response together"
        )
  return pieces


def _fill_rows(sizes: list[int], capacity: int) -> list[list[int]]:
  """Best fit, decreasing: indices of the items of each row."""
  free: list[int] = []
  rows: list[list[int]] = []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    fitting = [r for r in range(len(rows)) if free[r] >= sizes[item]]
    if fitting:
      row = min(fitting, key=free.__getitem__)
    else:
      row = len(rows)
      rows.append([])
      free.append(capacity)
    rows[row].append(item)
    free[row] -= sizes[item]
  return rows


def _place(forest: Forest, pieces: list[_Piece], rows: list[list[int]], row_length: int):
  """Row, start, depth and links of every copy of a node, as arrays over the copies."""
  columns = {name: [] for name in ("node", "row", "start", "position", "prev", "until", "context")}
  parents, lengths = forest.parent.tolist(), forest.lengths.tolist()
  for row, members in enumerate(rows):
    cursor = 0
    for member in members:
      piece = pieces[member]
      first = len(columns["node"])
      index: dict[int, int] = {}  # node -> its copy in this piece
      for place, node in enumerate(piece.nodes):
        above = index.get(parents[node])
        index[node] = len(columns["node"])
        columns["node"].append(node)
        columns["row"].append(row)
        columns["start"].append(cursor)
        columns["context"].append(place < piece.context)
        columns["until"].append(cursor + lengths[node])
        if above is None:
          columns["position"].append(0)
          columns["prev"].append(-1)
        else:
          above_end = columns["start"][above] + lengths[parents[node]]
          columns["position"].append(columns["position"][above] + lengths[parents[node]])
          columns["prev"].append(above_end - 1)
        cursor += lengths[node]
      for copy in range(len(columns["node"]) - 1, first, -1):
        above = index[parents[columns["node"][copy]]]
        columns["until"][above] = max(columns["until"][above], columns["until"][copy])
  return {
    name: np.asarray(column, bool if name == "context" else np.int64)
    for name, column in columns.items()
  }
