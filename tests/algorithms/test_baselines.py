"""The baseline of the whole forest, against the best linear guess by the leaves' covariance."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import baselines, values
from tests.algorithms import reference

BRANCHES = (3, 2, 2)
VARIANCES = (0.5, 0.2, 0.3, 0.4)  # of the prompts, then of what each level's segments add
PROMPTS = 3


def balanced(rng):
  """A forest of full trees with random rewards, and the path of each node."""
  nodes, paths = [], []

  def grow(parent, path):
    paths.append(path)
    here, depth = len(nodes), len(path) - 1
    leaf = depth == len(BRANCHES)
    nodes.append((parent, depth, rng.normal() if leaf else np.nan, leaf, depth > 0))
    for child in range(0 if leaf else BRANCHES[depth]):
      grow(here, (*path, child))

  for prompt in range(PROMPTS):
    grow(-1, (prompt,))
  return reference.make_forest(nodes), paths


def solve(forest, rewards=None):
  """(ForestValues, keyword arguments that say the shape)."""
  rewards = forest.rewards if rewards is None else rewards
  nodes = values.forest_values(*forest._replace(rewards=jnp.asarray(rewards)), max_depth=3)
  return nodes, dict(parent=forest.parent, depth=forest.depth, counted=forest.counted)


def exact_spread():
  """What `sibling_spread` estimates, from the variances themselves."""
  true, observed = np.array(VARIANCES), np.array(VARIANCES)
  for level in range(len(BRANCHES) - 1, -1, -1):
    observed[level] = true[level] + observed[level + 1] / BRANCHES[level]
  return baselines.Spread(jnp.asarray(observed, jnp.float32), jnp.asarray(true, jnp.float32))


def covariance(a, b):
  """Of the values of two states: the variances of the parts that they share."""
  shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
  return sum(VARIANCES[: len(list(shared))])


@pytest.fixture(scope="module")
def case():
  forest, paths = balanced(np.random.default_rng(0))
  nodes, shape = solve(forest)
  return forest, paths, np.asarray(baselines.forest_baseline(nodes, spread=exact_spread(), **shape))


def test_it_is_the_best_linear_guess_from_the_other_leaves(case):
  forest, paths, found = case
  rewards = np.asarray(forest.rewards)
  for node, path in enumerate(paths):
    if len(path) == 1:
      continue
    others = [i for i in np.flatnonzero(forest.leaf) if paths[i][: len(path)] != path]
    # Best linear unbiased: the mean of all prompts is unknown, as it is to other prompts' leaves.
    inner = np.array([[covariance(paths[i], paths[j]) for j in others] for i in others])
    across = np.array([covariance(paths[i], path[:-1]) for i in others])
    elsewhere = [k for k, i in enumerate(others) if paths[i][0] != path[0]]
    mean = rewards[[others[k] for k in elsewhere]].mean()
    own = [k for k, i in enumerate(others) if paths[i][0] == path[0]]
    weights = np.linalg.solve(inner[np.ix_(own, own)], across[own]) if own else np.zeros(0)
    guess = mean + weights @ (rewards[[others[k] for k in own]] - mean)
    np.testing.assert_allclose(found[node], guess, atol=1e-5, err_msg=str(path))


def test_it_does_not_depend_on_what_the_segment_led_to(case):
  forest, paths, found = case
  for path in ((0, 1), (1, 2, 0), (2, 0, 1, 1)):
    under = np.array([p[: len(path)] == path for p in paths])
    nodes, shape = solve(forest, np.where(under, 9.0, np.asarray(forest.rewards)))
    changed = np.asarray(baselines.forest_baseline(nodes, spread=exact_spread(), **shape))
    node = paths.index(path)
    np.testing.assert_allclose(changed[node], found[node], atol=1e-6)
    sibling = paths.index((*path[:-1], (path[-1] + 1) % 2))
    assert abs(changed[sibling] - found[sibling]) > 0.1


def test_the_spread_of_a_large_forest_is_that_of_its_parts():
  rng = np.random.default_rng(1)
  size = (20000, *BRANCHES)
  total = sum(
    rng.normal(size=(*size[: i + 1], *[1] * (3 - i))) * VARIANCES[i] ** 0.5 for i in range(4)
  ).astype(np.float32)
  levels = [total.mean((1, 2, 3)), total.mean((2, 3)), total.mean(3), total]
  counts = np.cumprod([1, *BRANCHES])
  first = np.cumsum([0, *[len(x.reshape(-1)) for x in levels]])
  nodes = []
  for depth, level in enumerate(levels):
    count = level.size
    parent = (
      first[depth - 1] + np.arange(count) // BRANCHES[depth - 1] if depth else np.full(count, -1)
    )
    nodes.append((parent, np.full(count, depth), level.reshape(-1)))
  parent, depth, rewards = (np.concatenate(x) for x in zip(*nodes, strict=True))
  leaf = depth == 3
  shape = dict(parent=jnp.asarray(parent, jnp.int32), depth=jnp.asarray(depth, jnp.int32))
  counted = jnp.asarray(depth > 0)
  found = values.forest_values(
    rewards=jnp.asarray(rewards), leaf=jnp.asarray(leaf), counted=counted, max_depth=3, **shape
  )
  spread = baselines.sibling_spread(found, counted=counted, max_depth=3, **shape)
  np.testing.assert_allclose(spread.observed, exact_spread().observed, rtol=0.03)
  np.testing.assert_allclose(spread.true, VARIANCES, rtol=0.05)
  assert counts[-1] * 20000 == len(levels[-1].reshape(-1))


def shrunk(nodes, *, max_depth):
  """(advantages by kind, forest) of a forest given by its nodes."""
  forest = reference.make_forest(nodes)
  return reference.solve(forest, max_depth=max_depth)[1], forest


def test_one_prompt_of_one_level_has_its_siblings_alone():
  nodes = [(-1, 0, np.nan, False, True)] + [(0, 1, r, True, True) for r in (1.0, 0.0, 0.0, 1.0)]
  by_kind, _ = shrunk(nodes, max_depth=1)
  np.testing.assert_allclose(by_kind["shrinkage"], by_kind["leave_one_out"], atol=1e-6)


def test_prompts_that_differ_by_noise_alone_share_their_mean():
  rewards = ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0))  # the same mean: nothing true lies between them
  nodes = [(-1, 0, np.nan, False, True)] * 3
  nodes += [(prompt, 1, r, True, True) for prompt, pair in enumerate(rewards) for r in pair]
  by_kind, forest = shrunk(nodes, max_depth=1)
  leaf = np.asarray(forest.leaf)
  np.testing.assert_allclose(
    by_kind["shrinkage"][leaf], np.asarray(forest.rewards)[leaf] - 0.5, atol=1e-6
  )


def test_an_only_child_has_the_other_prompts():
  rewards = (1.0, 0.0, 0.5)
  nodes = [(-1, 0, np.nan, False, True)] * 3
  nodes += [(prompt, 1, r, True, True) for prompt, r in enumerate(rewards)]
  by_kind, _ = shrunk(nodes, max_depth=1)
  np.testing.assert_allclose(by_kind["shrinkage"][3:], [0.75, -0.75, 0], atol=1e-6)


@pytest.mark.parametrize("known, guess", [((0.75, 1.0), 0.875), ((0.75,), 0.75)])
def test_a_prompt_without_a_value_has_the_others(known, guess):
  nodes = [(-1, 0, np.nan, False, True)] * (len(known) + 1)
  nodes += [(prompt, 1, r, True, True) for prompt, r in enumerate(known)]
  nodes += [(len(known), 1, r, True, False) for r in (1.0, 0.0)]  # not counted: no probes
  by_kind, _ = shrunk(nodes, max_depth=1)
  np.testing.assert_allclose(by_kind["shrinkage"][-2:], [1 - guess, -guess], atol=1e-6)


def test_one_other_prompt_tells_less_than_siblings_do():
  nodes = [(-1, 0, np.nan, False, True)] * 2 + [(0, 1, 0.75, True, True)]
  nodes += [(1, 1, np.nan, False, False)] + [(3, 2, r, True, True) for r in (1.0, 0.0)]
  by_kind, _ = shrunk(nodes, max_depth=2)
  np.testing.assert_allclose(by_kind["shrinkage"][-2:], [1, -1], atol=1e-6)


def test_prompts_whose_responses_agree_have_no_noise_to_share():
  nodes = [(-1, 0, np.nan, False, True)] * 2
  nodes += [(prompt, 1, float(prompt), True, True) for prompt in (0, 1) for _ in range(2)]
  by_kind, _ = shrunk(nodes, max_depth=1)
  np.testing.assert_allclose(by_kind["shrinkage"], 0, atol=1e-6)


def test_a_chains_trajectory_is_measured_by_its_probes():
  # Two prompts of equal value, each a trajectory of two segments with two probes from the middle.
  nodes = []
  for first in (0, 6):
    nodes += [
      (-1, 0, np.nan, False, True),
      (first, 1, np.nan, False, False),
      (first + 1, 2, 1.0, True, False),
      (first + 1, 2, 1.0, True, True),
      (first + 1, 2, 0.0, True, True),
      (first, 1, 0.5, True, True),
    ]
  by_kind, _ = shrunk(nodes, max_depth=2)
  last = by_kind["shrinkage"][[2, 8]]
  np.testing.assert_allclose(last, 0.5, atol=1e-6)
