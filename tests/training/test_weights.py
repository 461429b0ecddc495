"""Weights of segments against enumerated leaves, and against a gradient known in closed form."""

import collections
import itertools

import numpy as np
import pytest

from spo_jax.config import AdvantageConfig, Config, LossConfig, RolloutConfig
from spo_jax.forest import ForestBuilder
from spo_jax.training.estimate import estimate
from spo_jax.training.weights import episode_shares, segment_weights, sequences, shares
from tests.training.forests import chain_forest, node_path, own_segments, tree_forest


def forest_of(name):
  rng = np.random.default_rng(3)
  if name == "chain":
    return chain_forest(rng, prompts=(3, 4, 2), samples=3)
  if name == "one trajectory":
    return chain_forest(rng, prompts=(3, 4), samples=1)
  if name == "group":
    return tree_forest(rng, (4,), (5,), prompts=(2, 3), ragged=True)
  return tree_forest(rng, (3, 2, 3), (4, 5, 6), prompts=(2, 5, 3, 4), ragged=True)


FORESTS = ("ragged tree", "group", "chain", "one trajectory")


def children_of(forest, probes):
  """{node: those of its children that may be trained}."""
  children = collections.defaultdict(list)
  for node in np.flatnonzero((forest.depth > 0) & (~forest.probe | probes)).tolist():
    children[int(forest.parent[node])].append(node)
  return children


@pytest.mark.parametrize("probes", [False, True])
@pytest.mark.parametrize("name", FORESTS)
def test_shares_are_the_chances_of_a_walk_from_the_prompt_to_a_leaf(name, probes):
  forest = forest_of(name)
  children = children_of(forest, probes)
  want = np.zeros(len(forest.parent))
  for leaf in {n for below in children.values() for n in below} - children.keys():
    path = node_path(forest, leaf)
    chance = 1.0
    for above in path[:-1]:
      chance /= len(children[above])
    want[path] += chance  # a node has what the leaves under it have
  got = shares(forest, probes=probes)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  np.testing.assert_array_equal(got[forest.depth == 0], 1)
  assert (got[forest.probe] > 0).all() == (probes or not forest.probe.any())
  # The shares of a level add up to 1 a prompt, less those of the leaves above it.
  for tree in np.unique(forest.tree):
    ended = 0.0
    for depth in range(1, forest.depth[forest.tree == tree].max() + 1):
      level = [n for n in np.flatnonzero((forest.tree == tree) & (forest.depth == depth))]
      np.testing.assert_allclose(got[level].sum(), 1 - ended, rtol=1e-12)
      ended += sum(got[n] for n in level if n not in children)


@pytest.mark.parametrize("name", FORESTS)
def test_the_segments_of_a_cut_response_share_an_episode(name):
  forest = forest_of(name)
  chain = name in ("chain", "one trajectory")
  config = Config(rollout=RolloutConfig(strategy="chain" if chain else "tree"))
  trained = own_segments(forest) & (np.random.default_rng(0).random(len(forest.parent)) < 0.7)
  got = episode_shares(forest, trained, config)
  assert not got[~trained].any()
  if not chain:
    np.testing.assert_array_equal(got, trained)
    return
  segments = np.flatnonzero(trained)
  responses = collections.Counter(node_path(forest, node)[1] for node in segments)
  want = [1 / responses[node_path(forest, node)[1]] for node in segments]
  np.testing.assert_allclose(got[segments], want, rtol=1e-12)
  assert max(responses.values()) > 1


@pytest.mark.parametrize("name", FORESTS)
def test_a_sequence_ends_where_the_path_branches(name):
  forest = forest_of(name)
  children = children_of(forest, probes=False)
  got = sequences(forest)
  for node in range(len(forest.parent)):
    first = node
    while not forest.probe[first] and forest.depth[first] > 1:
      if len(children[int(forest.parent[first])]) > 1:
        break
      first = int(forest.parent[first])
    assert got[node] == first
  if name in ("chain", "one trajectory"):  # whole responses, and probes
    whole = {node_path(forest, leaf)[1] for leaf in np.flatnonzero(forest.leaf & ~forest.probe)}
    assert set(got[own_segments(forest)]) == whole and len(whole) == len(set(forest.tree)) * (
      3 if name == "chain" else 1
    )


def config_of(weights, normalization, *, mask=False, probes=False):
  return Config(
    probability_threshold=0.03,  # about half of the tokens of these forests are below it
    advantage=AdvantageConfig(train_probes=probes),
    loss=LossConfig(
      segment_weights=weights, normalization=normalization, use_probability_mask=mask
    ),
  )


@pytest.mark.parametrize("normalization", ["token", "constant"])
def test_weights_without_sequences_are_the_shares_or_none(normalization):
  forest = forest_of("chain")
  trained = own_segments(forest)
  assert segment_weights(forest, trained, config_of("equal", normalization)) is None
  for probes in (False, True):
    got = segment_weights(forest, trained, config_of("share", normalization, probes=probes))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, shares(forest, probes=probes), rtol=1e-6)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", FORESTS)
def test_a_sequence_weighs_one_whatever_its_trained_tokens(name, mask):
  forest = forest_of(name)
  rng = np.random.default_rng(0)
  trained = own_segments(forest) & (rng.random(len(forest.parent)) < 0.7)
  node = np.repeat(np.arange(len(trained)), forest.lengths)
  tokens = trained[node] & ((forest.logprobs < np.log(0.03)) | (not mask))
  assert 0 < tokens.sum() < trained[node].sum() or not mask
  owner = sequences(forest)[node]
  have_tokens = np.unique(owner[tokens])
  got = segment_weights(forest, trained, config_of("equal", "sequence", mask=mask))
  assert got.dtype == np.float32
  totals = np.bincount(owner[tokens], got[node][tokens], minlength=len(trained))
  np.testing.assert_allclose(totals[have_tokens], 1, rtol=1e-5)
  assert not got[~trained & own_segments(forest)].any()

  got = segment_weights(forest, trained, config_of("share", "sequence", mask=mask))
  totals = np.bincount(owner[tokens], got[node][tokens], minlength=len(trained))
  np.testing.assert_allclose(
    totals[have_tokens], shares(forest, probes=False)[have_tokens], rtol=1e-5
  )


# A policy of two parameters: a first token, "go on" with chance p or "stop" with 1 - p, and after
# "go on" a second one, "a" with chance q or "b" with 1 - q.
P, Q = 0.3, 0.6
REWARDS = {"stop": 0.2, "a": 1.0, "b": -0.5}
GRADIENT = np.array(
  [Q * REWARDS["a"] + (1 - Q) * REWARDS["b"] - REWARDS["stop"], P * (REWARDS["a"] - REWARDS["b"])]
)
CHANCE = {"go": P, "stop": 1 - P, "a": Q, "b": 1 - Q}
SCORE = {"go": (1 / P, 0), "stop": (-1 / (1 - P), 0), "a": (0, 1 / Q), "b": (0, -1 / (1 - Q))}


def enumerated_trees():
  """(chance, words of the nodes, forest) of every tree 2-2 that the policy may grow."""
  for first in itertools.product(("go", "stop"), repeat=2):
    for second in itertools.product(("a", "b"), repeat=2 * first.count("go")):
      words = [*first, *second]
      builder = ForestBuilder()
      builder.add_roots(np.ones((1, 1), int), np.ones(1, int))
      ends = np.array([word != "go" for word in words])
      parents = [0, 0, *np.repeat(1 + np.flatnonzero(~ends[:2]), 2)]
      ones = np.ones(len(words), int)
      builder.add(parents, ones, -1.0 * ones, ones, ends, probe=False)
      yield np.prod([CHANCE[word] for word in words]), words, builder.build()


def test_with_shares_and_leave_one_out_a_tree_gives_the_policy_gradient():
  cfg = AdvantageConfig(kind="leave_one_out")
  by_share, by_equal, total = np.zeros(2), np.zeros(2), 0.0
  for chance, words, forest in enumerated_trees():
    rewards = np.array([np.nan, *(REWARDS.get(word, np.nan) for word in words)], np.float32)
    advantages = estimate(forest, rewards, cfg, probed=False).advantages[1:, None]
    scores = np.array([SCORE[word] for word in words])
    weights = shares(forest, probes=False)[1:, None]
    by_share += chance * (weights * advantages * scores).sum(0)
    by_equal += chance * (advantages * scores).sum(0)
    total += chance
  np.testing.assert_allclose(total, 1)
  np.testing.assert_allclose(by_share, GRADIENT, rtol=1e-5)
  # With equal weights the deeper level counts double.
  np.testing.assert_allclose(by_equal / GRADIENT, [2, 4], rtol=1e-5)
