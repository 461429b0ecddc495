import numpy as np
import pytest

from spo_jax.forest import ForestBuilder


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
