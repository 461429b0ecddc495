import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms.partition import PARTITIONS, make_partition
from spo_jax.sampling.sampler import Sampler, child_keys, draw_keys
from spo_jax.sampling.strategies import Prompts, grow_chain, grow_tree
from spo_jax.training.objective import forest_logprobs
from spo_jax.training.packing import PackConfig, pack
from tests.tiny import EOS, take_prompts, tiny_config, tiny_params, tiny_prompts, tiny_sampler

CFG = tiny_config(layers=1)
TEMPERATURE = 0.8
BRANCHES, BUDGETS = (3, 2, 2), (4, 3, 5)
SAMPLES, PROBES, LONGEST = 3, 2, 10
DELIMITERS = (5, 9, 17, 22)


@pytest.fixture(scope="module")
def params():
  return tiny_params(CFG)


@pytest.fixture(scope="module")
def prompts():
  return tiny_prompts(6)


def sampler(slots=64):
  return tiny_sampler(CFG, temperature=TEMPERATURE, slots=slots)


@pytest.fixture(scope="module")
def tree(params, prompts):
  return grow_tree(sampler(), params, prompts, branches=BRANCHES, budgets=BUDGETS)


def chain(params, prompts, kind="adaptive", threshold=0.3, interval=2, sampler_=None, probe=None):
  partition = make_partition(
    kind, threshold=threshold, interval=interval, length=3, parts=3, delimiter_ids=DELIMITERS
  )
  return grow_chain(
    sampler_ or sampler(),
    params,
    prompts,
    samples=SAMPLES,
    probes=PROBES,
    max_new_tokens=LONGEST,
    partition=partition,
    cuts_per_group=2,
    probe=probe,
  )


def starts_of(kind, tokens, logprobs, *, threshold=0.3, interval=2):
  """Where segments of one trajectory begin, by a loop."""
  low = [t for t, x in enumerate(logprobs) if x < np.log(threshold)]
  return {
    "adaptive": low[::interval],
    "fixed": list(range(0, len(tokens), 3)),
    "equal": [part[0] for part in np.array_split(range(len(tokens)), 3) if len(part)],
    "token": list(range(len(tokens))),
    "response": [0],
    "delimiter": [t for t in range(len(tokens)) if t == 0 or tokens[t - 1] in DELIMITERS],
  }[kind]


def assert_forest(forest, prompts):
  """What holds for every forest."""
  nodes = np.arange(len(forest.parent))
  roots, below = np.flatnonzero(forest.depth == 0), forest.depth > 0
  np.testing.assert_array_equal(roots, np.arange(len(prompts.lengths)))
  assert (forest.parent[roots] == -1).all() and (forest.parent < nodes).all()
  parent = forest.parent[below]
  np.testing.assert_array_equal(forest.depth[below], forest.depth[parent] + 1)
  np.testing.assert_array_equal(forest.tree[below], forest.tree[parent])
  assert (forest.lengths > 0).all() and forest.offsets[-1] == len(forest.tokens)
  assert not (forest.probe | forest.finished)[parent].any()
  for root in roots:
    np.testing.assert_array_equal(
      forest.node_tokens(root), prompts.tokens[root, : prompts.lengths[root]]
    )
  for node in np.flatnonzero(below):
    is_eos = forest.node_tokens(node) == EOS
    assert not is_eos[:-1].any() and is_eos[-1] == forest.finished[node]


def assert_same_tree(got, got_root, want, want_root, depth=9):
  """The trees of two prompts are equal, as far as `depth`."""

  def nodes_of(forest, root):
    nodes = np.flatnonzero((forest.tree == root) & (forest.depth <= depth))
    rank = {node: i for i, node in enumerate(nodes)} | {-1: -1}
    return nodes, [rank[parent] for parent in forest.parent[nodes]]

  (got_nodes, got_parents), (nodes, parents) = nodes_of(got, got_root), nodes_of(want, want_root)
  assert got_parents == parents
  for a, b in zip(got_nodes, nodes, strict=True):
    np.testing.assert_array_equal(got.node_tokens(a), want.node_tokens(b))
    logprobs = [f.logprobs[f.offsets[i] : f.offsets[i + 1]] for f, i in ((got, a), (want, b))]
    np.testing.assert_allclose(*logprobs, atol=1e-5)
    assert (got.finished[a], got.probe[a]) == (want.finished[b], want.probe[b])


def assert_scored_alike(params, forest):
  """The sampler's log-probs are those that the trainer computes on the packed forest."""
  own = forest.depth > 0
  cfg = PackConfig(row_length=64, rows=4, query_block=32, key_block=16, key_blocks=4)
  batch, counts = pack(forest, np.zeros(len(own), np.float32), own, cfg)
  assert counts["tokens"] == forest.lengths[own].sum()
  score = functools.partial(jax.jit, static_argnames=("cfg", "temperature", "chunk"))(
    forest_logprobs
  )
  for i in range(counts["micro_batches"]):
    micro = jax.tree.map(lambda x, i=i: x[i], batch)
    logprobs = score(cfg=CFG, params=params, batch=micro, temperature=TEMPERATURE, chunk=64)
    np.testing.assert_allclose(
      logprobs[micro.loss_mask], micro.old_logprobs[micro.loss_mask], atol=1e-4
    )


def test_tree_has_the_shape_asked_for(tree, prompts):
  assert_forest(tree, prompts)
  children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree.parent))
  assert (tree.lengths[tree.depth > 0] <= np.array(BUDGETS)[tree.depth[tree.depth > 0] - 1]).all()
  for node, depth in enumerate(tree.depth):
    used_budget = depth == 0 or tree.lengths[node] == BUDGETS[depth - 1]
    assert used_budget or tree.finished[node]
    grows = depth < len(BRANCHES) and not tree.finished[node]
    assert children[node] == (BRANCHES[depth] if grows else 0)
  np.testing.assert_array_equal(tree.leaf, (children == 0) & (tree.depth > 0))
  assert not tree.probe.any()
  assert tree.finished[tree.depth == 1].any() and tree.finished[tree.depth == 2].any(), "too tame"


def test_tree_is_scored_by_the_trainer_as_by_the_sampler(tree, params):
  assert_scored_alike(params, tree)


def test_tree_of_a_prompt_does_not_depend_on_the_others(tree, params, prompts):
  order = np.random.default_rng(0).permutation(6)
  shuffled = grow_tree(
    sampler(), params, take_prompts(prompts, order), branches=BRANCHES, budgets=BUDGETS
  )
  for place, prompt in enumerate(order):
    assert_same_tree(shuffled, place, tree, prompt)


def test_tree_does_not_depend_on_slots_batch_or_depth(tree, params, prompts):
  """Two prompts, two levels, two slots."""
  few = grow_tree(
    sampler(slots=2),
    params,
    take_prompts(prompts, [4, 1]),
    branches=BRANCHES[:2],
    budgets=BUDGETS[:2],
  )
  for place, prompt in enumerate([4, 1]):
    assert_same_tree(few, place, tree, prompt, depth=2)


def test_other_keys_grow_another_tree(tree, params, prompts):
  keys = jax.random.split(jax.random.key(77), 6)
  other = grow_tree(
    sampler(),
    params,
    Prompts(prompts.tokens, prompts.lengths, keys),
    branches=BRANCHES,
    budgets=BUDGETS,
  )
  assert not np.array_equal(other.tokens, tree.tokens)


def test_tree_whose_nodes_all_end_at_once(params, prompts):
  """Every state points at `EOS`, so nothing survives the first level."""
  up = np.zeros_like(params["unembedding"])
  up[:, EOS] = 10.0
  ends = params | {"embedding": np.full_like(params["embedding"], 100.0), "unembedding": up}
  forest = grow_tree(sampler(), ends, prompts, branches=BRANCHES, budgets=BUDGETS)
  np.testing.assert_array_equal(np.bincount(forest.depth), [6, 6 * BRANCHES[0]])
  assert forest.leaf[6:].all() and (forest.lengths[6:] == 1).all()


@pytest.mark.parametrize("kind", sorted(PARTITIONS))
def test_chain_is_cut_where_the_partition_says(params, prompts, kind):
  forest = chain(params, prompts, kind)
  assert_forest(forest, prompts)
  trajectories = np.flatnonzero(forest.leaf & ~forest.probe)
  np.testing.assert_array_equal(np.bincount(forest.tree[trajectories]), [SAMPLES] * 6)
  probes_wanted = np.zeros(len(forest.parent), int)
  for leaf in trajectories:
    path = []
    node = leaf
    while forest.parent[node] >= 0:
      path.insert(0, node)
      node = forest.parent[node]
    tokens = forest.response(leaf)
    logprobs = np.concatenate(
      [forest.logprobs[forest.offsets[i] : forest.offsets[i + 1]] for i in path]
    )
    cuts = starts_of(kind, tokens, logprobs)
    np.testing.assert_array_equal(np.cumsum([0, *forest.lengths[path][:-1]]), sorted({0, *cuts}))
    assert len(tokens) <= LONGEST and (forest.finished[leaf] or len(tokens) == LONGEST)
    ends = np.cumsum(forest.lengths[path])
    for cut in cuts:
      # The prompt is probed once for all trajectories.
      above = path[np.flatnonzero(ends == cut)[0]] if cut else forest.tree[leaf]
      probes_wanted[above] = PROBES
  probes = np.flatnonzero(forest.probe)
  np.testing.assert_array_equal(
    np.bincount(forest.parent[probes], minlength=len(forest.parent)), probes_wanted
  )
  assert forest.leaf[probes].all()
  for probe in probes:
    length = len(forest.response(probe))
    assert length <= LONGEST and (forest.finished[probe] or length == LONGEST)
  if kind in ("adaptive", "token"):
    assert_scored_alike(params, forest)


def test_chain_without_cuts(params, prompts):
  """In one trajectory, and in all."""
  whole = chain(params, prompts, threshold=1e-9)
  np.testing.assert_array_equal(np.bincount(whole.depth), [6, 6 * SAMPLES])
  assert not whole.probe.any() and whole.leaf[6:].all()
  few = chain(params, prompts, threshold=0.02)
  segments = np.bincount(few.parent[few.parent >= 0], minlength=len(few.parent))
  uncut = (few.depth == 1) & (segments == 0) & ~few.probe
  assert uncut.any() and few.probe.any()


def test_chain_of_a_prompt_does_not_depend_on_the_others(params, prompts):
  forest = chain(params, prompts)
  order = np.random.default_rng(1).permutation(6)
  shuffled = chain(params, take_prompts(prompts, order))
  for place, prompt in enumerate(order):
    assert_same_tree(shuffled, place, forest, prompt)


def test_prompts_are_probed_where_asked_and_the_rest_is_as_it_was(params, prompts):
  every = chain(params, prompts, "fixed")
  seen = []

  def odd_ones(trajectories):
    seen.append(trajectories)
    return np.arange(len(prompts.lengths)) % 2 == 1

  some = chain(params, prompts, "fixed", probe=odd_ones)
  (trajectories,) = seen
  assert not trajectories.probe.any()
  paths = ~every.probe
  np.testing.assert_array_equal(trajectories.parent, every.parent[paths])
  np.testing.assert_array_equal(trajectories.tokens, every.tokens[np.repeat(paths, every.lengths)])
  kept = paths | (every.tree % 2 == 1)
  assert 0 < kept.sum() < len(kept)
  for name in ("tree", "parent", "finished", "probe"):
    np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[kept], err_msg=name)
  np.testing.assert_array_equal(some.tokens, every.tokens[np.repeat(kept, every.lengths)])


def test_probes_of_a_state_differ(params, prompts):
  """Siblings draw from keys of their own, so some differ already in their first token."""
  forest = chain(params, prompts, "token")
  probes = np.flatnonzero(forest.probe)
  first = forest.tokens[forest.offsets[probes]].reshape(-1, PROBES)
  assert 0.3 < (first[:, 0] != first[:, 1]).mean() < 1


def test_no_continuation_shares_its_key(params, prompts):
  """All that one call decodes, at any level or cut."""
  used = []

  class Recording(Sampler):
    def decode(self, params, prefix, groups, **options):
      used.append(np.asarray(jax.random.key_data(groups.keys))[groups.limits > 0])
      return super().decode(params, prefix, groups, **options)

  recording = Recording(**vars(sampler()))
  grow_tree(recording, params, prompts, branches=BRANCHES, budgets=BUDGETS)
  tree_keys = np.concatenate(used)
  assert len(np.unique(tree_keys, axis=0)) == len(tree_keys) > 50
  used.clear()
  chain(params, prompts, "token", sampler_=recording)
  chain_keys = np.concatenate(used)
  assert len(np.unique(chain_keys, axis=0)) == len(chain_keys) > 150


def test_no_key_is_used_twice():
  """Along a tree, a chain and its probes, steps of a draw included."""

  @jax.jit
  def all_keys():
    spread = lambda keys, n: child_keys(keys, np.tile(np.arange(n), (keys.size, 1))).reshape(-1)
    children = spread(jax.random.split(jax.random.key(0), 3), 4)
    grandchildren = spread(children, 5)  # or the cuts of a trajectory
    nodes = jnp.concatenate([children, grandchildren, spread(grandchildren, 3)])
    draws = draw_keys(nodes)
    steps = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(draws, jnp.arange(6))
    return jax.random.key_data(jnp.concatenate([nodes, draws, steps.reshape(-1)]))

  keys = np.asarray(all_keys())
  assert len(np.unique(keys, axis=0)) == len(keys) == 252 * 8
