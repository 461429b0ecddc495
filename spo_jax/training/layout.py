"""Where every segment of a packed batch lies: trees in pieces, pieces in rows.

C copies of nodes; an ancestor has one in each piece of its tree that needs it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from spo_jax.errors import UserError
from spo_jax.forest import Forest


class Layout(NamedTuple):
  """Copies of nodes and their places, [C] int64 unless told otherwise."""

  node: np.ndarray  # id
  row: np.ndarray
  start: np.ndarray  # row index of the first token
  position: np.ndarray  # of the first token, from the root of its tree
  prev: np.ndarray  # row index of the token before the first, the parent's last; -1 at roots
  until: np.ndarray  # first row index past the subtree
  context: np.ndarray  # bool, an ancestor that is trained in another copy
  rows: int  # used

  def dealt(self, micro_batches: int, rows: int) -> "Layout":
    """Rows dealt out to micro-batches of so many rows in turn.

    Else the first micro-batches get the large trees, and the last what is left.
    """
    turn, micro_batch = np.divmod(self.row, max(micro_batches, 1))
    return self._replace(row=micro_batch * rows + turn)


@dataclasses.dataclass
class _Piece:
  """Nodes of one tree that stay together in a row; the first so many are trained in another one."""

  nodes: list[int]
  context: int
  size: int  # tokens
  reads: int = 0  # of them, that the loss reads


def lay_out(
  forest: Forest,
  trained: np.ndarray,
  row_length: int,
  reads: np.ndarray | None = None,
  loss_length: int = 0,
) -> Layout:
  """Lays the trained segments and their ancestors into rows, best fit, the largest trees first.

  A tree too large for a row is cut into pieces, each with a copy of its ancestors.

  Args:
    forest: N nodes.
    trained: [N] bool, segments that enter the loss.
    row_length: tokens of a row.
    reads: [N] int, tokens of trained segments that the loss reads, 0 of the others; None: a row has
      room for all.
    loss_length: at least the largest of `reads`, such tokens of a row.

  Returns:
    The layout.

  Raises:
    UserError: if a path from root to leaf is longer than a row.
  """
  reads = np.zeros(len(trained), np.int64) if reads is None else reads
  pieces = _cut_into_pieces(forest, trained, row_length, reads, loss_length)
  sizes = [(piece.size, piece.reads) for piece in pieces]
  rows = _fill_rows(sizes, (row_length, loss_length))
  return _place(forest, pieces, rows)


def _cut_into_pieces(
  forest: Forest, trained: np.ndarray, row_length: int, reads: np.ndarray, loss_length: int
) -> list[_Piece]:
  """Every tree depth first, in as few pieces as rows of this length allow: a piece ends where the
  next node does not fit, and the next one begins with that node's ancestors.
  """
  parents, lengths = forest.parent.tolist(), forest.lengths.tolist()
  needed, read = trained.tolist(), reads.tolist()
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
      if (
        piece is None
        or piece.size + lengths[node] > row_length
        or piece.reads + read[node] > loss_length
      ):
        path = ancestors(node)
        piece = _Piece(path, len(path), sum(lengths[above] for above in path))
        pieces.append(piece)
      piece.nodes.append(node)
      piece.size += lengths[node]
      piece.reads += read[node]
      if piece.size > row_length:
        raise UserError(
          f"a path of {piece.size} tokens does not fit row_length {row_length}: make rows at least "
          "as long as the longest prompt and response together"
        )
  return pieces


def _fill_rows(sizes: list[tuple[int, int]], capacity: tuple[int, int]) -> list[list[int]]:
  """Best fit, decreasing, by the first of an item's two sizes: indices of the items of each row."""
  free: list[tuple[int, int]] = []
  rows: list[list[int]] = []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
    tokens, reads = sizes[item]
    fitting = [r for r, (room, places) in enumerate(free) if room >= tokens and places >= reads]
    if fitting:
      row = min(fitting, key=free.__getitem__)
    else:
      row = len(rows)
      rows.append([])
      free.append(capacity)
    rows[row].append(item)
    free[row] = (free[row][0] - tokens, free[row][1] - reads)
  return rows


def _place(forest: Forest, pieces: list[_Piece], rows: list[list[int]]) -> Layout:
  """The layout of pieces dealt to rows."""
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
  arrays = {
    name: np.asarray(column, bool if name == "context" else np.int64)
    for name, column in columns.items()
  }
  return Layout(rows=len(rows), **arrays)
