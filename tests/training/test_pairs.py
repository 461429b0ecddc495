"""Pairs of responses, and how a packed batch numbers them."""

import numpy as np
import pytest

from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.pairs import match_pairs
from tests.training.forests import own_segments, tree_forest


def group_forest(prompts, samples, seed=0):
  return tree_forest(np.random.default_rng(seed), (samples,), (4,), prompts=prompts)


def rewards_of(forest, *groups):
  rewards = np.full(len(forest.parent), np.nan, np.float32)
  for tree, values in enumerate(groups):
    rewards[forest.leaf & (forest.tree == tree)] = values
  return rewards


def test_the_best_is_matched_with_the_worst_and_so_on_inwards():
  forest = group_forest((2, 2, 2), 5)
  rewards = rewards_of(forest, [0, 1, 0.5, 2, -1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 1])
  pairs = match_pairs(forest, rewards)
  # Nodes 0 to 2 are the prompts. A middle one stays alone, and so does who has no worse one.
  assert [tuple(pair) for pair in pairs[:2]] == [(6, 7), (4, 3)]
  assert len(pairs) == 3 and pairs[2, 1] == 14 and forest.tree[pairs[2, 0]] == 2
  assert rewards[pairs[2, 0]] == 1


def test_pairs_are_of_one_prompt_and_differ_and_no_response_is_in_two():
  rng = np.random.default_rng(1)
  forest = group_forest((2, 3, 2, 4), 6)
  for _ in range(20):
    rewards = rewards_of(forest, *rng.integers(0, 2, (4, 6)))
    pairs = match_pairs(forest, rewards)
    assert len(np.unique(pairs)) == pairs.size
    chosen, rejected = pairs.T
    assert (forest.tree[chosen] == forest.tree[rejected]).all()
    assert (rewards[chosen] > rewards[rejected]).all()
    right = np.bincount(forest.tree[forest.leaf], rewards[forest.leaf])
    np.testing.assert_array_equal(
      np.bincount(forest.tree[chosen], minlength=4), np.minimum(right, 6 - right)
    )


def test_without_a_difference_there_are_no_pairs():
  forest = group_forest((2, 3), 3)
  pairs = match_pairs(forest, rewards_of(forest, [1, 1, 1], [0, 0, 0]))
  assert pairs.shape == (0, 2)
  batch, counts = pack(
    forest,
    np.zeros(8, np.float32),
    np.zeros(8, bool),
    PackConfig(32, 2, 8, 8, min_micro_batches=2),
    pairs=pairs,
    most_pairs=3,
  )
  assert counts["micro_batches"] == 0
  assert batch.pairs.shape == (2, 3, 2) and (batch.pairs == -1).all()
  assert (batch.sequence == -1).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_packed_batch_numbers_the_pairs_of_each_micro_batch(rows):
  forest = group_forest((2, 3, 4, 2, 3), 4)
  forest = forest._replace(tokens=np.arange(1, len(forest.tokens) + 1, dtype=np.int32))
  pairs = match_pairs(
    forest,
    rewards_of(forest, [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]),
  )
  assert len(pairs) == 6
  trained = np.isin(np.arange(len(forest.parent)), pairs)
  cfg = PackConfig(24, rows, 8, 8, min_micro_batches=4)
  batch, counts = pack(
    forest, np.zeros(len(trained), np.float32), trained, cfg, pairs=pairs, most_pairs=8
  )
  micro_batches = {1: 3, 2: 2}[rows]  # two of the four trees fit one row
  assert counts["micro_batches"] == micro_batches and batch.tokens.shape[:2] == (4, rows)
  node_of = np.concatenate([[-1], np.repeat(np.arange(len(trained)), forest.lengths)])
  nodes = node_of[batch.tokens]
  np.testing.assert_array_equal(batch.sequence >= 0, batch.loss_mask)
  seen = []
  for micro in range(4):
    member = batch.sequence[micro] >= 0
    numbered = {}
    for number, node in zip(batch.sequence[micro][member], nodes[micro][member], strict=True):
      assert numbered.setdefault(int(number), int(node)) == node
    assert sorted(numbered) == list(range(len(numbered)))  # from 0, without gaps
    valid = batch.pairs[micro, :, 0] >= 0
    assert (batch.pairs[micro, ~valid] == -1).all()
    assert not valid.any() or valid[: valid.sum()].all()  # padding is last
    seen += [(numbered[a], numbered[b]) for a, b in batch.pairs[micro, valid].tolist()]
  assert sorted(seen) == sorted(map(tuple, pairs.tolist()))
  assert sum((batch.pairs[m, :, 0] >= 0).any() for m in range(4)) == micro_batches


def test_weights_land_on_their_tokens_and_copies_are_not_trained_again():
  rng = np.random.default_rng(1)
  forest = tree_forest(rng, (3, 3, 3), (6, 7, 8), prompts=(5,))
  forest = forest._replace(tokens=np.arange(1, len(forest.tokens) + 1, dtype=np.int32))
  trained = own_segments(forest)
  weights = rng.random(len(trained)).astype(np.float32) + 0.5
  batch, counts = pack(
    forest, np.zeros(len(trained), np.float32), trained, PackConfig(64, 2, 32, 16), weights=weights
  )
  assert counts["packed_tokens"] > counts["distinct_tokens"]
  node = np.repeat(np.arange(len(trained)), forest.lengths)
  filled = batch.tokens > 0
  np.testing.assert_array_equal(batch.weights[filled], weights[node[batch.tokens[filled] - 1]])
  assert not batch.weights[~filled].any() and batch.weights.dtype == np.float32
  total = batch.weights[batch.loss_mask].sum(dtype=np.float64)
  np.testing.assert_allclose(total, (weights * forest.lengths)[trained].sum(), rtol=1e-6)
  unweighted, _ = pack(
    forest, np.zeros(len(trained), np.float32), trained, PackConfig(64, 2, 32, 16)
  )
  assert (unweighted.weights, unweighted.pairs, unweighted.sequence) == (None, None, None)
