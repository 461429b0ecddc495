"""Advantages of whole forests against values worked out by hand, per kind of forest."""

import numpy as np
import pytest

from spo_jax.config import AdvantageConfig
from spo_jax.forest import Forest, ForestBuilder
from spo_jax.training.estimate import estimate
from tests.training.forests import chain_forest, path_forest, tree_forest

DIFFERENCE = AdvantageConfig()


def forest_of(rows) -> Forest:
  """A forest from (parent, finished, probe) rows, a token each."""
  builder = ForestBuilder()
  roots = sum(parent < 0 for parent, *_ in rows)
  builder.add_roots(np.ones((roots, 1), int), np.ones(roots, int))
  for parent, finished, probe in rows[roots:]:
    builder.add([parent], [2], [-1.0], [1], [finished], probe=probe)
  return builder.build()


def assert_estimate(got, *, values, advantages, trained):
  """None stands for an unknown value."""
  assert got.known.tolist() == [value is not None for value in values]
  np.testing.assert_allclose(
    got.values[got.known], [value for value in values if value is not None], atol=1e-6
  )
  np.testing.assert_allclose(got.advantages, advantages, atol=1e-6)
  assert np.flatnonzero(got.trained).tolist() == trained


ROOT, INNER, LEAF = (-1, False, False), False, True
TREE = forest_of(
  [
    ROOT,
    ROOT,  # a prompt whose answers are all right: no signal
    (0, INNER, False),
    (0, INNER, False),
    (0, LEAF, False),  # ended early, right
    (2, LEAF, False),  # right
    (2, LEAF, False),  # wrong
    (3, LEAF, False),  # wrong
    (3, LEAF, False),  # wrong
    (1, LEAF, False),
    (1, LEAF, False),
  ]
)
TREE_REWARDS = np.array([np.nan, np.nan, np.nan, np.nan, 1, 1, 0, 0, 0, 1, 1], np.float32)


def test_a_tree():
  got = estimate(TREE, TREE_REWARDS, DIFFERENCE, probed=False)
  assert_estimate(
    got,
    values=[0.5, 1, 0.5, 0, 1, 1, 0, 0, 0, 1, 1],
    advantages=[0, 0, 0, -0.5, 0.5, 0.5, -0.5, 0, 0, 0, 0],
    trained=[3, 4, 5, 6],
  )


@pytest.mark.parametrize(
  "kind, advantages, trained",
  [
    ("normalized", [0, 0, 0, -(1.5**0.5), 1.5**0.5, 1, -1, 0, 0, 0, 0], [3, 4, 5, 6]),
    ("leave_one_out", [0, 0, 0, -0.75, 0.75, 1, -1, 0, 0, 0, 0], [3, 4, 5, 6]),
  ],
)
def test_the_other_kinds_of_advantage(kind, advantages, trained):
  got = estimate(TREE, TREE_REWARDS, AdvantageConfig(kind=kind), probed=False)
  np.testing.assert_allclose(got.advantages, advantages, atol=1e-5)
  assert np.flatnonzero(got.trained).tolist() == trained


def test_a_group():
  forest = path_forest(np.random.default_rng(0), [2, 3], [4, 5])
  lone = estimate(forest, np.array([np.nan, np.nan, 1, 0], np.float32), DIFFERENCE, probed=False)
  assert_estimate(lone, values=[1, 0, 1, 0], advantages=[0] * 4, trained=[])
  group = forest_of([ROOT, *[(0, LEAF, False)] * 4])
  got = estimate(group, np.array([np.nan, 1, 0, 0, 0], np.float32), DIFFERENCE, probed=False)
  assert_estimate(
    got,
    values=[0.25, 1, 0, 0, 0],
    advantages=[0, 0.75, -0.25, -0.25, -0.25],
    trained=[1, 2, 3, 4],
  )


# A trajectory of three segments (2, 3, 4) and two probes at the prompt and at each of its cuts.
CHAIN = forest_of(
  [
    ROOT,
    ROOT,  # a prompt that is not probed
    (0, INNER, False),
    (2, INNER, False),
    (3, LEAF, False),  # the trajectory ends, right
    (1, INNER, False),
    (5, LEAF, False),  # the other trajectory ends, wrong
    *[(node, LEAF, True) for node in (0, 0, 2, 2, 3, 3, 5, 5)],
  ]
)
CHAIN_REWARDS = np.array([np.nan] * 4 + [1, np.nan, 0] + [1, 0, 0, 0, 1, 1, 1, 0], np.float32)


def test_a_chain_takes_values_from_its_probes_alone():
  got = estimate(CHAIN, CHAIN_REWARDS, DIFFERENCE, probed=True)
  assert_estimate(
    got,
    values=[0.5, None, 0, 1, 1, 0.5, 0, 1, 0, 0, 0, 1, 1, 1, 0],
    # The first segment of the prompt that is not probed has no value to start from.
    advantages=[0, 0, -0.5, 1, 0, 0, -0.5, *got.advantages[7:]],
    trained=[2, 3, 6],
  )


def test_probes_and_prompts_are_never_trained():
  rng = np.random.default_rng(1)
  for forest, probed in (
    (chain_forest(rng), True),
    (chain_forest(rng), False),
    (tree_forest(rng, (3, 2), (4, 4), ragged=True), False),
  ):
    rewards = rng.integers(0, 2, len(forest.parent)).astype(np.float32)
    got = estimate(forest, rewards, DIFFERENCE, probed=probed)
    assert got.trained.any()
    assert not (got.trained & (forest.probe | (forest.depth == 0))).any()
    np.testing.assert_array_equal(
      got.trained, (np.abs(got.advantages) > 1e-6) & ~forest.probe & (forest.depth > 0)
    )


def test_the_size_of_the_padding_does_not_matter():
  """A forest of 15 nodes, and the same with a tree beside it that doubles the padded size."""
  alone = estimate(CHAIN, CHAIN_REWARDS, DIFFERENCE, probed=True)
  n = len(CHAIN.parent)
  both = Forest(
    tree=np.r_[CHAIN.tree, CHAIN.tree + 2],
    parent=np.r_[CHAIN.parent, np.where(CHAIN.parent < 0, -1, CHAIN.parent + n)].astype(np.int32),
    depth=np.tile(CHAIN.depth, 2),
    finished=np.tile(CHAIN.finished, 2),
    probe=np.tile(CHAIN.probe, 2),
    offsets=np.arange(2 * n + 1),
    tokens=np.tile(CHAIN.tokens, 2),
    logprobs=np.tile(CHAIN.logprobs, 2),
  )
  together = estimate(both, np.tile(CHAIN_REWARDS, 2), DIFFERENCE, probed=True)
  for got, want in zip(together, alone, strict=True):
    assert len(want) == n
    np.testing.assert_allclose(got, np.tile(want, 2), atol=1e-6)


def test_tolerance():
  group = forest_of([ROOT, (0, LEAF, False), (0, LEAF, False)])
  rewards = np.array([np.nan, 0.5, 0.4], np.float32)
  for tolerance, trained in ((0.06, []), (0.04, [1, 2])):
    got = estimate(group, rewards, AdvantageConfig(tolerance=tolerance), probed=False)
    assert np.flatnonzero(got.trained).tolist() == trained


def test_segments_without_an_advantage_are_trained_if_asked_for():
  got = estimate(TREE, TREE_REWARDS, AdvantageConfig(train_zero=True), probed=False)
  assert np.flatnonzero(got.trained).tolist() == [*range(2, 11)]


def test_probes_are_trained_and_the_trajectory_counts_if_asked_for():
  """A prompt with a trajectory of two segments, and two probes from each state."""
  rows = [ROOT, (0, INNER, False), (1, LEAF, False)]
  rows += [(parent, LEAF, True) for parent in (0, 0, 1, 1)]
  rewards = np.array([np.nan, np.nan, 1, 0, 1, 1, 0.5], np.float32)
  got = estimate(forest_of(rows), rewards, AdvantageConfig(train_probes=True), probed=True)
  assert_estimate(
    got,
    values=[0.5, 0.75, 1, 0, 1, 1, 0.5],
    advantages=[0, 0.25, 0.25, -0.5, 0.5, 0.25, -0.25],
    trained=[1, 2, 3, 4, 5, 6],
  )
  cfg = AdvantageConfig(pool_trajectory=True)
  got = estimate(forest_of(rows), rewards, cfg, probed=True)
  after = 2.5 / 3  # of the trajectory's own end and the probes'
  prompt = (1 + after) / 3
  assert_estimate(
    got,
    values=[prompt, after, 1, 0, 1, 1, 0.5],
    advantages=[
      0,
      *np.subtract([after, 1, 0, 1, 1, 0.5], [prompt, after, prompt, prompt, after, after]),
    ],
    trained=[1, 2],
  )
