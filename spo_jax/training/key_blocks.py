"""Which blocks of keys a block of queries of a packed row may see: all else is never multiplied.

R rows, T tokens a row, N query blocks, J key blocks, W key blocks that a query block may see.
"""

from collections.abc import Sequence

import numpy as np

from spo_jax.errors import UserError


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
