import numpy as np
import pytest

from spo_jax.algorithms import values
from spo_jax.rewards import shape_unfinished
from tests.algorithms import reference


def _random_forest(rng, *, num_trees, max_depth):
  """Ragged trees with uncounted nodes and childless inner nodes, shuffled, with padding."""
  nodes = []

  def grow(parent, depth):
    here = len(nodes)
    leaf = depth == max_depth or (depth > 0 and rng.random() < 0.3)
    reward = rng.normal() if leaf else np.nan
    nodes.append((parent, depth, reward, leaf, rng.random() < 0.7))
    for _ in range(0 if leaf else rng.integers(0, 4)):
      grow(here, depth + 1)

  for _ in range(num_trees):
    grow(-1, 0)
  nodes += [(-1, -1, np.nan, True, True)] * 5
  order = rng.permutation(len(nodes))
  place = np.argsort(order)
  forest = reference.make_forest([nodes[i] for i in order])
  return forest._replace(
    parent=np.where(forest.parent >= 0, place[forest.parent], -1).astype(np.int32)
  )


def _naive_value(forest, node):
  """(value, std, count, known, filled) of a node, by recursion."""
  if forest.depth[node] < 0:
    return 0.0, 0.0, 0, False, False
  if forest.leaf[node]:
    return forest.rewards[node], 0.0, 0, True, False
  children = np.flatnonzero(forest.parent == node)
  counted = [_naive_value(forest, c) for c in children[forest.counted[children]]]
  known = [value for value, _, _, is_known, _ in counted if is_known]
  if known:
    return np.mean(known), np.std(known), len(known), True, False
  after = [_naive_value(forest, c) for c in children[~forest.counted[children]]]
  if len(after) == 1 and any(after[0][3:]):
    return after[0][0], 0.0, 0, False, True
  return 0.0, 0.0, 0, False, False


def test_random_forests_against_recursion():
  forest, _ = reference.concatenate(
    [_random_forest(np.random.default_rng(seed), num_trees=6, max_depth=4) for seed in range(3)]
  )
  nodes, _ = reference.solve(forest, max_depth=4)
  expected = [_naive_value(forest, i) for i in range(len(forest.parent))]
  known, filled = (np.array(column) for column in list(zip(*expected, strict=True))[3:])
  own = forest.parent[filled]
  assert not known.all() and filled.sum() > 3 and (filled[own] | known[own]).any()
  for got, want in zip(nodes, zip(*expected, strict=True), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_chain_values_are_means_of_their_own_probes():
  """Neither the rest of the trajectory nor its reward enters the value of a cut."""
  probes = [[1.0, 0.0, 1.0], [], [0.0, 0.0, 1.0, 1.0], [1.0]]
  nodes, by_kind = reference.solve(reference.path_forest(probes, score=-3.0), max_depth=4)
  np.testing.assert_array_equal(nodes.known[:5], [True, False, True, True, True])
  np.testing.assert_array_equal(nodes.counts[:5], [3, 0, 4, 1, 0])
  # A state without probes is valued as the next one.
  np.testing.assert_allclose(nodes.values[:5], [2 / 3, 0.5, 0.5, 1, -3], rtol=1e-6)
  np.testing.assert_allclose(by_kind["difference"][:5], [0, -1 / 6, 0, 0.5, -4], rtol=1e-6)


def test_a_prompt_of_several_trajectories_is_valued_by_its_probes_alone():
  """Neither trajectory's value stands for the other's: both first segments get 0."""
  path = [(0, 1, np.nan, False, False), (1, 2, 1.0, True, False), (1, 2, 0.5, True, True)]
  other = [(p + 3 if p else 0, *rest) for p, *rest in path]
  forest = reference.make_forest([(-1, 0, np.nan, False, False), *path, *other])
  nodes, by_kind = reference.solve(forest, max_depth=2)
  assert not nodes.known[0] and not nodes.filled.any() and nodes.values[0] == 0
  np.testing.assert_array_equal(by_kind["difference"][[1, 4]], 0)
  np.testing.assert_array_equal(by_kind["difference"][[2, 5]], 0.5)


def test_monte_carlo_values_of_the_reference(fixture_arrays):
  data = fixture_arrays("mc_value")
  shaped = shape_unfinished(
    data["rollout_reward"], data["rollout_truncated"], data["unfinished_penalty"][:, None]
  )
  state = (-1, 0, np.nan, False, False)
  trees = [
    reference.make_forest([state, *[(0, 1, reward, True, True) for reward in rewards[:n]]])
    for rewards, n in zip(shaped, data["num_rollouts"], strict=True)
  ]
  forest, roots = reference.concatenate(trees)
  nodes, _ = reference.solve(forest, max_depth=1)
  none = data["num_rollouts"] == 0
  np.testing.assert_array_equal(nodes.counts[roots], data["num_rollouts"])
  np.testing.assert_array_equal(nodes.known[roots], ~none)
  np.testing.assert_allclose(nodes.values[roots], data["value"], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(
    nodes.stds[roots], np.where(none, 0, data["value_std"]), rtol=1e-6, atol=1e-7
  )
  np.testing.assert_array_equal(data["value_std"][none], -1)


@pytest.mark.parametrize("x64", [False, True])
def test_trees_of_the_reference(fixture_arrays, x64):
  forest, want = tree_fixture(fixture_arrays)
  nodes, _ = reference.solve(forest, max_depth=3, x64=x64)
  assert nodes.values.dtype == (np.float64 if x64 else np.float32)
  tolerance = dict(rtol=1e-12, atol=1e-15) if x64 else dict(rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(nodes.values, want["value"], **tolerance)
  inner = ~forest.leaf
  np.testing.assert_allclose(nodes.stds[inner], want["std"][inner], **tolerance)
  assert np.all(nodes.known)


def tree_fixture(fixture_arrays):
  """All trees of `trees.npz` as one forest, and their arrays one after the other."""
  data = fixture_arrays("trees")
  names = [
    "parent", "depth", "leaf", "leaf_reward", "value", "std", "adv_rloo", "keep_rloo",
    "adv_grpo", "keep_grpo", "prover_adv", "rounding_only",
  ]  # fmt: skip
  trees = [{name: data[f"{case}__{name}"] for name in names} for case in data["case_name"]]
  forest, _ = reference.concatenate(
    [
      reference.Forest(
        tree["parent"], tree["depth"], tree["leaf_reward"], tree["leaf"], tree["depth"] >= 0
      )
      for tree in trees
    ]
  )
  return forest, {name: np.concatenate([tree[name] for tree in trees]) for name in names}


def test_bad_shapes_raise():
  forest = reference.path_forest([[1.0]], score=0.0)
  with pytest.raises(AssertionError):
    values.forest_values(*forest._replace(leaf=forest.leaf[1:]), max_depth=1)
  with pytest.raises(AssertionError):
    values.forest_values(*forest._replace(counted=forest.rewards), max_depth=1)
