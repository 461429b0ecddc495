"""The packed forest equals (prefix, segment) rows, and its structure a naive reading."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from spo_jax.algorithms import losses
from spo_jax.errors import UserError
from spo_jax.training.key_blocks import key_blocks_bound, visible_blocks
from spo_jax.training.objective import forest_logprobs
from spo_jax.training.packing import PackConfig, PackedForest, pack, with_room
from tests.tiny import tiny_config, tiny_params
from tests.training.forests import (
  assert_trees_close,
  chain_forest,
  own_segments,
  path_forest,
  path_tokens,
  segment_rows,
  segment_rows_loss,
  tree_forest,
)

MODEL = tiny_config()


def one_micro_batch(batch: PackedForest) -> PackedForest:
  """All rows of a batch as one micro-batch."""
  flat = lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x.sum()
  return jax.tree.map(flat, batch)


@functools.partial(jax.jit, static_argnums=0)
def packed_loss(cfg, params, batch):
  """Sum of the clipped surrogate over a packed micro-batch, and its gradient."""

  def loss(params):
    logprobs = forest_logprobs(cfg, params, batch, temperature=1.0, chunk=48)
    return losses.ppo_clip(
      logprobs,
      batch.old_logprobs,
      batch.advantages,
      batch.loss_mask,
      epsilon_low=0.2,
      epsilon_high=0.2,
      log_ratio_bound=20.0,  # out of the way: the oracle has none
    ).loss

  return jax.value_and_grad(loss)(params)


def assert_equals_segment_rows(forest, trained, batch, rng_advantages, shape):
  params = tiny_params(MODEL)
  loss, grads = packed_loss(MODEL, params, one_micro_batch(batch))
  want_loss, want_grads = segment_rows_loss(
    MODEL, params, segment_rows(forest, rng_advantages, trained, shape)
  )
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  assert_trees_close(grads, want_grads, 1e-5)


def tree_2_3(rng):
  return tree_forest(rng, (2, 3), (4, 5), prompts=(3, 6))


def ragged(rng):
  return tree_forest(rng, (3, 3, 2), (4, 5, 6), prompts=(2, 5), ragged=True)


def paths(rng):
  return path_forest(rng, (2, 5, 3, 6, 4), (9, 1, 20, 7, 30))


def chain(rng):
  return chain_forest(rng, prompts=(3, 4, 2), samples=3)


def longer_than_a_row(rng):
  return tree_forest(rng, (3, 3, 3), (6, 7, 8), prompts=(5,))


FORESTS = {f.__name__: f for f in (tree_2_3, ragged, paths, chain, longer_than_a_row)}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", FORESTS)
def test_loss_and_gradients_equal_those_of_segment_rows(name, share):
  rng = np.random.default_rng(1)
  forest = FORESTS[name](rng)
  trained = own_segments(forest) & (rng.random(len(forest.parent)) < share)
  advantages = rng.standard_normal(len(trained)).astype(np.float32)
  cfg = PackConfig(64, 2, 32, 16, key_blocks=4, min_micro_batches=8)
  batch, counts = pack(forest, advantages, trained, cfg)
  assert counts["tokens"] == forest.lengths[trained].sum()
  assert_equals_segment_rows(forest, trained, batch, advantages, (40, 64))


@pytest.mark.parametrize("name", FORESTS)
def test_places_for_what_the_loss_reads_change_nothing_but_the_cost(name):
  rng = np.random.default_rng(1)
  forest = FORESTS[name](rng)
  trained, threshold = own_segments(forest), np.quantile(forest.logprobs, 0.3)
  advantages = rng.standard_normal(len(trained)).astype(np.float32)
  read = forest.logprobs < threshold
  cfg = PackConfig(64, 2, 32, 16, key_blocks=4, min_micro_batches=8)
  whole, _ = pack(forest, advantages, trained, cfg)
  whole = whole._replace(loss_mask=whole.loss_mask & (whole.old_logprobs < threshold))
  params = tiny_params(MODEL)
  want_loss, want_grads = packed_loss(MODEL, params, one_micro_batch(whole))
  few = dataclasses.replace(cfg, loss_length=16)
  batch, counts = pack(forest, advantages, trained, few, read=read)
  assert batch.targets.shape == batch.prev.shape == (*whole.tokens.shape[:2], 16)
  assert counts["tokens"] == (read & np.repeat(trained, forest.lengths)).sum() > 0
  loss, grads = packed_loss(MODEL, params, one_micro_batch(batch))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  assert_trees_close(grads, want_grads, 1e-5)


def test_rows_hold_no_more_than_the_loss_has_places_for():
  forest = distinct(path_forest(np.random.default_rng(0), (2, 2, 2, 2), (9, 9, 9, 9)))
  trained, read = own_segments(forest), np.ones(len(forest.tokens), bool)
  for places, width, rows in ((36, 36, 1), (20, 20, 2), (9, 9, 4), (5, 10, 4)):  # 5 is doubled
    cfg = PackConfig(64, 1, 8, 8, loss_length=places)
    batch, counts = pack(forest, np.ones(len(trained), np.float32), trained, cfg, read=read)
    assert (batch.targets.shape[-1], counts["rows"]) == (width, rows)
    assert_structure(forest, np.ones(len(trained), np.float32), trained, batch, read)
    # Without a word of what is read, all may be.
    batch, counts = pack(forest, np.ones(len(trained), np.float32), trained, cfg)
    assert (batch.targets.shape[-1], counts["rows"]) == (64, 1)


def test_a_full_tree_of_the_paper_equals_its_segment_rows_and_holds_every_token_once():
  rng = np.random.default_rng(2)
  forest = tree_forest(rng, (6, 6, 6), (2, 2, 2), prompts=(3,))
  trained, advantages = own_segments(forest), rng.standard_normal(259).astype(np.float32)
  batch, counts = pack(forest, advantages, trained, PackConfig(528, 1, 48, 24))
  assert counts == {
    "rows": 1,
    "micro_batches": 1,
    "segments": 258,
    "tokens": 2 * 258,
    "packed_tokens": len(forest.tokens),
    "distinct_tokens": len(forest.tokens),
  }
  assert np.count_nonzero(batch.tokens) == 3 + 2 * 258
  assert batch.key_blocks.shape[-1] < 22 // 3
  assert_equals_segment_rows(forest, trained, batch, advantages, (258, 9))


def distinct(forest):
  """The forest with tokens 1, 2, 3, ...; 0 is padding's."""
  return forest._replace(tokens=np.arange(1, len(forest.tokens) + 1, dtype=np.int32))


def random_forest(rng):
  depth = rng.integers(1, 4)
  branches, longest = rng.integers(1, 4, depth), rng.integers(1, 9, depth)
  prompts = rng.integers(1, 9, rng.integers(1, 5))
  if rng.random() < 0.3:
    return chain_forest(rng, prompts=prompts, samples=int(rng.integers(1, 4)))
  return tree_forest(rng, branches, longest, prompts=prompts, ragged=rng.random() < 0.5)


def longest_segments(forest) -> list[int]:
  return [int(forest.lengths[forest.depth == d].max()) for d in range(forest.depth.max() + 1)]


def assert_structure(forest, advantages, trained, batch: PackedForest, read=None):
  """Every row of a batch of a forest with distinct tokens, token by token."""
  owner = np.repeat(np.arange(len(forest.parent)), forest.lengths)
  trained_tokens = collections.Counter()
  rows = [x.reshape(-1, *x.shape[2:]) for x in jax.tree.leaves(batch._replace(episodes=None))]
  for tokens, positions, until, key_blocks, targets, *of_loss in zip(*rows, strict=True):
    T, Q, L = len(tokens), len(tokens) // len(key_blocks), until.shape[-1]
    until = until.reshape(-1)
    visible = [{j for j in range(i + 1) if i < until[j]} for i in range(T)]
    for i, token in enumerate(tokens):
      if token == 0:
        assert until[i] == i + 1
        continue
      before = tokens_up_to(forest, owner, token - 1)
      assert [tokens[j] - 1 for j in sorted(visible[i])] == before
      assert positions[i] == len(before) - 1
    for place, (target, prev, mask, adv, old, ref) in enumerate(
      zip(targets, *of_loss, strict=True)
    ):
      if target == 0:
        assert (prev, mask) == (-1, False)
        continue
      index = int(target - 1)
      assert mask if read is not None else tokens[place] == target
      before = tokens_up_to(forest, owner, index)[:-1]
      assert [tokens[j] - 1 for j in sorted(visible[prev])] == before if before else prev == -1
      assert (adv, old, ref) == (advantages[owner[index]], forest.logprobs[index], 0)
      if mask:
        trained_tokens[index] += 1
    for n, listed in enumerate(key_blocks):
      queries = range(n * Q, (n + 1) * Q)
      seen = {j for i in queries for j in visible[i]}
      want = sorted({j // L for j in seen.union(queries)})
      assert listed[: len(want)].tolist() == want
      assert (listed[len(want) :] == -1).all()
  wanted = trained[owner] if read is None else trained[owner] & read
  assert trained_tokens == dict.fromkeys(np.flatnonzero(wanted).tolist(), 1)


def tokens_up_to(forest, owner, index) -> list[int]:
  """The tokens of its path up to a token, by index."""
  path = path_tokens(forest, owner[index])
  return path[: path.index(index) + 1]


@pytest.mark.parametrize("seed", range(25))
def test_structure_of_random_forests(seed):
  rng = np.random.default_rng(seed)
  forest = distinct(random_forest(rng))
  trained = own_segments(forest) & (rng.random(len(forest.parent)) < rng.choice([0.2, 0.6, 1]))
  advantages = rng.standard_normal(len(trained)).astype(np.float32)
  key_block = int(rng.choice([1, 4, 8]))
  query_block = key_block * int(rng.choice([1, 2, 3]))
  longest_path = max(len(path_tokens(forest, node)) for node in range(len(trained)))
  row_length = -(-int(longest_path * rng.choice([1, 1.5, 4])) // query_block) * query_block
  bound = key_blocks_bound(longest_segments(forest), query_block, key_block, row_length)
  rows, read, loss_length = int(rng.integers(1, 4)), None, 0
  if seed % 2:  # the first token of every segment, and others
    read = rng.random(len(forest.tokens)) < rng.choice([0, 0.3, 0.9])
    read[forest.offsets[:-1]] = True
    loss_length = int(rng.integers(1, row_length + 1))
  shape = PackConfig(
    row_length, rows, query_block, key_block, key_blocks=bound, loss_length=loss_length
  )
  batch, counts = pack(forest, advantages, trained, shape, read=read)
  assert batch.key_blocks.shape[-1] == bound
  assert_structure(forest, advantages, trained, batch, read)
  micro_batch = np.repeat(np.arange(len(batch.tokens)), rows * batch.targets.shape[-1])
  own = batch.loss_mask.reshape(-1)
  node = np.repeat(np.arange(len(trained)), forest.lengths)[batch.targets.reshape(-1)[own] - 1]
  pairs = np.unique(np.stack([micro_batch[own], node]), axis=1)
  want = np.bincount(pairs[0], minlength=len(batch.tokens))
  np.testing.assert_array_equal(batch.episodes, want)
  assert counts["segments"] == trained.sum() == batch.episodes.sum()
  assert counts["packed_tokens"] == np.count_nonzero(batch.tokens)
  assert counts["micro_batches"] == -(-counts["rows"] // rows) <= len(batch.tokens)


def test_a_tree_longer_than_a_row_is_cut_and_each_segment_trained_once():
  rng = np.random.default_rng(5)
  forest = distinct(tree_forest(rng, (3, 4, 3), (5, 3, 7), prompts=(6,)))
  advantages, trained = np.ones(len(forest.parent), np.float32), own_segments(forest)
  batch, counts = pack(forest, advantages, trained, PackConfig(48, 2, 8, 8))
  assert counts["packed_tokens"] > len(forest.tokens) == counts["distinct_tokens"]
  assert counts["rows"] > len(forest.tokens) / 48
  assert_structure(forest, advantages, trained, batch)


def test_probes_and_branches_without_a_signal_are_not_packed():
  rng = np.random.default_rng(3)
  forest = distinct(chain_forest(rng, prompts=(3, 4), samples=2, segments=3))
  trained = np.zeros(len(forest.parent), bool)
  (second,) = np.flatnonzero((forest.depth == 2) & ~forest.probe)[:1]
  trained[second] = True
  batch, counts = pack(forest, np.ones(len(trained)), trained, PackConfig(32, 1, 8, 8))
  want = np.asarray(path_tokens(forest, second)) + 1
  assert sorted(batch.tokens[batch.tokens > 0]) == sorted(want)
  assert counts["rows"] == 1
  assert counts["packed_tokens"] == counts["distinct_tokens"] == len(want)


@pytest.mark.parametrize("queries, block", [(4, 4), (8, 8), (16, 8)])
def test_key_blocks_bound_holds_at_every_offset_and_is_reached(queries, block):
  """Segments that touch as many blocks as they can, behind trees of every length."""
  rng = np.random.default_rng(4)
  lengths = [2, block + 2, 1, block + 1]
  path = sum(lengths)
  row_length = block * 16
  most = 0
  for offset in range(path, path + block):
    first = tree_forest(rng, (1,), (offset - 1,), prompts=(1,))
    path_below = tree_forest(rng, (1, 1, 1), lengths[1:], prompts=(lengths[0],))
    both = join(first, path_below)
    cfg = PackConfig(row_length, 1, queries, block)
    batch, counts = pack(both, np.ones(len(both.parent)), own_segments(both), cfg)
    assert counts["rows"] == 1
    own = batch.key_blocks[0, 0, offset // queries + 1 :]
    most = max(most, int((own >= 0).sum(-1).max()))
  assert most <= key_blocks_bound(lengths, queries, block, row_length)
  assert key_blocks_bound([block + 2], queries, block, row_length) == queries // block + 3
  assert key_blocks_bound([10 * block] * 3, queries, block, row_length) == 16


def join(a, b):
  """Two forests as one."""
  return a._replace(
    tree=np.concatenate([a.tree, b.tree + a.tree.max() + 1]),
    parent=np.concatenate([a.parent, np.where(b.parent < 0, -1, b.parent + len(a.parent))]),
    offsets=np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]]),
    **{
      name: np.concatenate([getattr(a, name), getattr(b, name)])
      for name in ("depth", "finished", "probe", "tokens", "logprobs")
    },
  )


def test_more_visible_blocks_than_allowed_is_an_error():
  until = np.full((1, 32), 32)
  assert visible_blocks(until, 8, 8, 0).tolist() == [
    [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3]]
  ]
  with pytest.raises(UserError, match="sees 4 key blocks, more than key_blocks 3"):
    visible_blocks(until, 8, 8, 3)


def test_key_blocks_are_listed_for_blocks_of_several_times_as_many_queries():
  """A root of 4 tokens, children of 10 and 2: the second child starts the second query block."""
  until = np.array([[16] * 4 + [14] * 10 + [16] * 2])
  assert visible_blocks(until, 8, 4, 0).tolist() == [[[0, 1, -1, -1], [0, 1, 2, 3]]]
  until[0, 4:] = [8] * 4 + [12] * 4 + [16] * 4
  assert visible_blocks(until, 8, 4, 0).tolist() == [[[0, 1, -1], [0, 2, 3]]]
  assert visible_blocks(until, 4, 2, 0)[0, 3].tolist() == [0, 1, 6, 7]


def packed_paths(sizes, cfg):
  """Rows and batch of paths of these sizes: the prompt is one token."""
  rng = np.random.default_rng(0)
  forest = distinct(path_forest(rng, np.ones(len(sizes), int), np.asarray(sizes) - 1))
  return pack(forest, np.ones(len(forest.parent)), own_segments(forest), cfg)


def test_rows_are_filled_best_fit():
  # First fit would put the last path into the first row.
  batch, counts = packed_paths([12, 9, 9, 2], PackConfig(20, 1, 5, 5))
  assert counts["rows"] == 2
  filled = [np.count_nonzero(row) for row in batch.tokens[:, 0]]
  assert filled == [12, 9 + 9 + 2]


@pytest.mark.parametrize("longest", [8, 11, 16, 17, 30, 31, 48, 64])
def test_with_room_is_enough_for_trees_that_fit_a_row(longest):
  rng = np.random.default_rng(longest)
  shape = PackConfig(64, 1, 64, 64)
  for trees in (1, 3, 7, 20):
    room = with_room(shape, [longest], longest, trees).min_micro_batches
    in_row = 64 // longest
    least = 64 // (in_row + 1) + 1  # in_row of these fill a row
    cases = [
      np.full(trees, longest),
      np.full(trees, max(2, min(least, longest))),
      np.r_[np.full(trees // 2, longest), np.full(trees - trees // 2, 2)],
      *(rng.integers(2, longest + 1, trees) for _ in range(10)),
    ]
    for sizes in cases:
      batch, counts = packed_paths(sizes, shape)
      assert counts["rows"] <= room, (longest, trees, sizes)
      batch, _ = packed_paths(sizes, with_room(shape, [longest], longest, trees))
      assert len(batch.tokens) == room


def test_micro_batches_hold_the_rows():
  room = with_room(PackConfig(64, 4, 16, 8), [30, 3], 64, 9)
  assert (room.min_micro_batches, room.key_blocks) == (3, key_blocks_bound([30, 3], 16, 8, 64))
  batch, counts = packed_paths([64] * 9, PackConfig(64, 4, 8, 8, min_micro_batches=5))
  assert (counts["micro_batches"], batch.tokens.shape) == (3, (5, 4, 64))
  assert not batch.loss_mask[3:].any()
  assert batch.episodes.tolist() == [3, 3, 3, 0, 0]


def test_rows_are_dealt_to_all_updates_and_no_update_is_empty():
  rng = np.random.default_rng(0)
  forest = path_forest(rng, [10] * 5, [20] * 5)
  advantages, trained = np.ones(len(forest.parent), np.float32), own_segments(forest)
  for updates, used in ((1, 2), (3, 3), (9, 5)):  # five rows, four to a micro-batch
    cfg = PackConfig(32, 4, 16, 8, updates=updates)
    batch, counts = pack(forest, advantages, trained, cfg)
    assert counts["micro_batches"] == used
    assert (batch.episodes[:used] > 0).all() and batch.episodes.sum() == 5
    roomy = with_room(cfg, [10, 20], 30, 5)
    batch, _ = pack(forest, advantages, trained, roomy)
    assert len(batch.tokens) == roomy.min_micro_batches >= updates


def test_more_micro_batches_than_there_is_room_for_come_in_few_shapes():
  """A root of 24 tokens, 40 leaves of 5: each row of 32 holds a copy of the root and one leaf."""
  forest = tree_forest(np.random.default_rng(0), (40,), (5,), prompts=(24,))
  cfg = with_room(PackConfig(32, 1, 8, 8), [24, 5], len(forest.tokens), 1)
  batch, counts = pack(forest, np.ones(41), own_segments(forest), cfg)
  assert counts["rows"] == 40 > cfg.min_micro_batches
  assert len(batch.tokens) == 2 * cfg.min_micro_batches


def test_a_path_longer_than_a_row_is_an_error_with_both_numbers():
  rng = np.random.default_rng(0)
  for forest in (path_forest(rng, [3], [14]), tree_forest(rng, (2, 2), (6, 8), prompts=(3,))):
    with pytest.raises(UserError, match="17 tokens does not fit row_length 16"):
      pack(forest, np.ones(len(forest.parent)), own_segments(forest), PackConfig(16, 1, 8, 8))
  with pytest.raises(UserError, match="row_length 20 must be a multiple of query_block 8"):
    PackConfig(20, 1, 8, 8)
  with pytest.raises(UserError, match="query_block 8 must be a multiple of key_block 3"):
    PackConfig(16, 1, 8, 3)


def test_nothing_trained_gives_an_empty_batch():
  forest = tree_forest(np.random.default_rng(0), (2, 2), (3, 3))
  nothing = np.zeros(len(forest.parent), bool)
  batch, counts = pack(forest, np.ones(len(nothing)), nothing, PackConfig(16, 2, 8, 8))
  assert set(counts.values()) == {0}
  assert batch.tokens.shape == (1, 2, 16)
  assert not batch.loss_mask.any() and batch.episodes.tolist() == [0]


def test_packing_is_deterministic_and_of_the_promised_types():
  rng = np.random.default_rng(6)
  forest = tree_forest(rng, (3, 2), (4, 5), prompts=(3, 4, 4, 2), ragged=True)
  pack_again = lambda: pack(
    forest, np.ones(len(forest.parent)), own_segments(forest), PackConfig(32, 2, 8, 8)
  )
  (a, _), (b, _) = pack_again(), pack_again()
  asked = {name for name, x in a._asdict().items() if x is not None}
  assert set(PackedForest._fields) - asked == set(PackedForest._field_defaults)
  for name, x, y in zip(PackedForest._fields, a, b, strict=True):
    if name not in asked:
      continue
    np.testing.assert_array_equal(x, y, err_msg=name)
    kind = {"loss_mask": bool, "advantages": np.float32, "episodes": np.float32}.get(name)
    kind = kind or (np.float32 if name.endswith("logprobs") else np.int32)
    assert x.dtype == kind, name
