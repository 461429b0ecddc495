import numpy as np
import pytest

from spo_jax.forest import Forest, ForestBuilder, concatenate, interleave, prune
from tests.training.forests import chain_forest, path_tokens, tree_forest


@pytest.fixture
def builder():
  """Two prompts: under the first a path of two segments and a sibling, under the other one."""
  builder = ForestBuilder()
  roots = builder.add_roots(np.array([[5, 6, 0], [7, 8, 9]]), np.array([2, 3]))
  assert list(roots) == [0, 1] and builder.next_id == 2
  # Node 3 hangs off node 2, of the same block.
  ids = builder.add(
    [0, 2, 0, 1],
    [10, 11, 12, 13, 14, 15],
    [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6],
    [2, 1, 1, 2],
    [False, True, True, False],
    probe=False,
  )
  assert list(ids) == [2, 3, 4, 5]
  return builder


def test_nodes_in_flat_arrays(builder):
  forest = builder.build()
  np.testing.assert_array_equal(forest.tree, [0, 1, 0, 0, 0, 1])
  np.testing.assert_array_equal(forest.parent, [-1, -1, 0, 2, 0, 1])
  np.testing.assert_array_equal(forest.depth, [0, 0, 1, 2, 1, 1])
  np.testing.assert_array_equal(forest.lengths, [2, 3, 2, 1, 1, 2])
  np.testing.assert_array_equal(forest.tokens, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
  np.testing.assert_allclose(forest.logprobs[:5], 0)
  np.testing.assert_allclose(forest.logprobs[5:], -0.1 * np.arange(1, 7), rtol=1e-6)
  np.testing.assert_array_equal(forest.finished, [0, 0, 0, 1, 1, 0])
  assert not forest.probe.any()
  np.testing.assert_array_equal(forest.node_tokens(2), [10, 11])
  np.testing.assert_array_equal(forest.node_tokens(1), [7, 8, 9])


def test_responses_leave_the_prompt_out(builder):
  forest = builder.build()
  responses = [list(forest.response(node)) for node in range(6)]
  assert responses == [[], [], [10, 11], [10, 11, 12], [13], [14, 15]]


def test_leaves_are_what_nothing_but_probes_continues(builder):
  np.testing.assert_array_equal(builder.build().leaf, [0, 0, 0, 1, 1, 1])
  probes = builder.add([0, 2, 4], [20, 21, 22], [0, 0, 0], [1, 1, 1], [True] * 3, probe=True)
  forest = builder.build()
  np.testing.assert_array_equal(forest.leaf, [0, 0, 0, 1, 1, 1, 1, 1, 1])
  np.testing.assert_array_equal(forest.probe, [0, 0, 0, 0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(forest.depth[probes], [1, 2, 2])
  np.testing.assert_array_equal(forest.tree[probes], [0, 0, 0])


def test_prompts_alone_have_no_leaves():
  builder = ForestBuilder()
  builder.add_roots(np.array([[5], [6]]), np.array([1, 1]))
  empty = builder.add([], [], [], [], [], probe=False)
  forest = builder.build()
  assert len(empty) == 0 and not forest.leaf.any() and len(forest.parent) == 2
  assert forest.depth.dtype == forest.parent.dtype == np.int32


def test_a_segment_without_tokens_is_rejected(builder):
  with pytest.raises(ValueError, match="at least one token"):
    builder.add([0, 0], [1], [0.0], [1, 0], [False, False], probe=False)


def equal(a: Forest, b: Forest) -> bool:
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def nothing() -> Forest:
  builder = ForestBuilder()
  builder.add_roots(np.zeros((0, 0), int), np.zeros(0, int))
  return builder.build()


def test_forests_end_to_end(builder):
  forest = builder.build()
  other = ForestBuilder()
  other.add_roots(np.array([[30]]), np.array([1]))
  other.add([0, 1], [31, 32, 33], [-1, -2, -3], [2, 1], [False, True], probe=True)
  both = concatenate([forest, other.build(), forest])
  np.testing.assert_array_equal(both.tree, [0, 1, 0, 0, 0, 1, 2, 2, 2, 3, 4, 3, 3, 3, 4])
  np.testing.assert_array_equal(both.parent, [-1, -1, 0, 2, 0, 1, -1, 6, 7, -1, -1, 9, 11, 9, 10])
  np.testing.assert_array_equal(both.depth[6:9], [0, 1, 2])
  np.testing.assert_array_equal(both.probe, [0] * 7 + [1, 1] + [0] * 6)
  np.testing.assert_array_equal(both.finished, [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0])
  np.testing.assert_array_equal(both.node_tokens(7), [31, 32])
  np.testing.assert_array_equal(both.response(12), [10, 11, 12])
  np.testing.assert_array_equal(both.logprobs[11:15], [0, -1, -2, -3])
  assert equal(concatenate([forest]), forest)
  assert equal(concatenate([nothing(), forest, nothing()]), forest)
  assert equal(concatenate([nothing(), nothing()]), nothing())


def test_pruning_keeps_the_ancestors(builder):
  forest = builder.build()
  pruned, index = prune(forest, np.array([0, 0, 0, 1, 0, 0], bool))
  np.testing.assert_array_equal(index, [0, 2, 3])
  np.testing.assert_array_equal(pruned.parent, [-1, 0, 1])
  np.testing.assert_array_equal(pruned.response(2), [10, 11, 12])
  pruned, index = prune(forest, np.array([0, 0, 0, 0, 0, 1], bool))
  np.testing.assert_array_equal(index, [1, 5])
  np.testing.assert_array_equal(pruned.tree, [0, 0])
  np.testing.assert_array_equal(pruned.offsets, [0, 3, 5])
  np.testing.assert_array_equal(pruned.tokens, [7, 8, 9, 14, 15])


@pytest.mark.parametrize("seed", range(10))
def test_pruned_nodes_are_what_they_were(seed):
  rng = np.random.default_rng(seed)
  forest = concatenate(
    [
      chain_forest(rng, prompts=(3, 2), segments=5),
      tree_forest(rng, (2, 3, 2), (3, 4, 2), prompts=(2, 1, 4), ragged=True),
    ]
  )
  keep = rng.random(len(forest.parent)) < rng.choice([0.03, 0.2, 0.7])
  before = keep.copy()
  pruned, index = prune(forest, keep)
  np.testing.assert_array_equal(keep, before)
  needed = set()
  for node in np.flatnonzero(keep):
    while node >= 0:
      needed.add(int(node))
      node = forest.parent[node]
  assert index.tolist() == sorted(needed)
  for new, old in enumerate(index):
    for name in ("tokens", "logprobs"):
      a, b = getattr(pruned, name), getattr(forest, name)
      np.testing.assert_array_equal(a[path_tokens(pruned, new)], b[path_tokens(forest, old)])
    for name in ("depth", "finished", "probe"):
      assert getattr(pruned, name)[new] == getattr(forest, name)[old]
  trees = forest.tree[index]
  np.testing.assert_array_equal(pruned.tree, np.searchsorted(np.unique(trees), trees))


def test_pruning_all_or_nothing(builder):
  forest = builder.build()
  everything = np.ones(6, bool)
  pruned, index = prune(forest, everything)
  assert equal(pruned, forest) and index.tolist() == list(range(6))
  pruned, index = prune(forest, ~everything)
  assert equal(pruned, nothing()) and len(index) == 0
  assert equal(prune(nothing(), np.zeros(0, bool))[0], nothing())


def parts_of(forest, trees):
  """The forest's trees in so many forests, each with the indices of its trees."""
  return [prune(forest, np.isin(forest.tree, part))[0] for part in trees]


PARTS = ([0, 3, 4], [1, 5], [2])


def test_trees_in_parts_lie_as_they_did():
  rng = np.random.default_rng(0)
  prompts = (2, 1, 4, 3, 2, 2)
  forest = tree_forest(rng, (2, 3, 2), (3, 4, 2), prompts=prompts, ragged=True)
  joined, order = interleave(parts_of(forest, PARTS), PARTS, by_level=True)
  assert equal(joined, forest)
  assert equal(interleave([forest], [range(6)], by_level=True)[0], forest)
  ends = concatenate(parts_of(forest, PARTS))
  np.testing.assert_array_equal(ends.lengths[order], forest.lengths)
  np.testing.assert_array_equal(ends.depth[order], forest.depth)


def test_chains_in_parts_lie_as_they_did_but_for_probes():
  forest = chain_forest(np.random.default_rng(1), prompts=(3, 1, 2, 4, 2, 5), segments=3)
  joined, _ = interleave(parts_of(forest, PARTS), PARTS, by_level=False)
  ordered, order = interleave([forest], [range(6)], by_level=False)
  assert equal(joined, ordered)
  paths = int((~forest.probe).sum())
  np.testing.assert_array_equal(order[:paths], np.arange(paths))
  np.testing.assert_array_equal(np.diff(forest.tree[order[paths:]]) >= 0, True)
  np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
  assert (joined.parent < np.arange(len(order))).all()
  for new, old in enumerate(order):
    np.testing.assert_array_equal(joined.response(new), forest.response(old))
