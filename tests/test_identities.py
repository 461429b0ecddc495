"""Methods that are one in a special case give one gradient, by the code that a run takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dr_grpo, grpo, ppo, rloo, spo_chain, spo_tree, vineppo
from spo_jax.algorithms.partition import make_partition
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.forest import Forest
from spo_jax.infra.mesh import make_mesh
from spo_jax.learner import loss_config
from spo_jax.sampling import strategies, verbs
from spo_jax.training.estimate import estimate
from spo_jax.training.objective import with_value_head
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.prepare import prepare
from spo_jax.training.weights import segment_weights
from tests.tiny import VOCAB, tiny_config, tiny_params, tiny_prompts
from tests.training.forests import assert_trees_close, packed_gradient, tree_forest

MODEL = tiny_config(layers=1)
PARAMS = tiny_params(MODEL)
MICRO_BATCHES = 4


def method(module, **overrides) -> Config:
  """A method's config, without KL and probability mask, for a model of 32 tokens."""
  config = module.get_config()
  fields = {"loss.kl_coef": 0.0, "loss.use_probability_mask": False, "loss.scaling": "none"}
  fields |= {"rollout.max_response_tokens": 46, "packing.logprob_chunk": 32}
  fields |= {name.replace("__", "."): value for name, value in overrides.items()}
  config.update_from_flattened_dict(fields)
  return from_config_dict(config, Config)


PAPER_CHAIN = {
  "rollout__probes": 4,
  "advantage__kind": "difference",
  "advantage__train_probes": False,
  "advantage__pool_trajectory": False,
  "loss__segment_weights": "equal",
}


def gradient_of(config: Config, forest: Forest, rewards: np.ndarray):
  """(gradient, metrics, segments trained), as in an iteration of `train`."""
  estimated = estimate(forest, rewards, config.advantage, probed=config.rollout.strategy == "chain")
  batch, counts = pack(
    forest,
    estimated.advantages,
    estimated.trained,
    PackConfig(32, 1, 16, 8, key_blocks=4, min_micro_batches=MICRO_BATCHES),
    weights=segment_weights(forest, estimated.trained, config),
  )
  used = jnp.int32(counts["micro_batches"])
  loss = loss_config(config)
  critic = with_value_head(PARAMS, make_mesh(1, 1, 1)) if loss.critic else None
  batch = prepare(MODEL, loss, None, jax.tree.map(jnp.asarray, batch), used, critic_params=critic)
  grads, metrics = packed_gradient(MODEL, loss, PARAMS, batch, jnp.int32(0), used)
  return grads, metrics, counts["segments"]


GROUP = tree_forest(np.random.default_rng(4), (3,), (7,), prompts=(3, 2, 4, 3), ragged=True)
REWARDS = np.random.default_rng(8).random(len(GROUP.parent)).astype(np.float32)


@pytest.fixture(scope="module")
def rloo_gradient():
  grads, metrics, segments = gradient_of(method(rloo), GROUP, REWARDS)
  assert segments == 12 and metrics["tokens"] == GROUP.lengths[GROUP.depth > 0].sum()
  return grads, metrics


def scaled(grads, factor):
  return jax.tree.map(lambda x: x * float(factor), grads)


def test_a_tree_of_one_level_is_a_group(rloo_gradient):
  tree = method(
    spo_tree, advantage__kind="leave_one_out", rollout__branches=(8,), rollout__segment_tokens=()
  )
  group = method(rloo)
  assert (tree.branches, tree.budgets) == (group.branches, group.budgets)
  assert tree.longest_segments == group.longest_segments
  assert tree.longest_tree == group.longest_tree
  grads, *_ = gradient_of(tree, GROUP, REWARDS)
  assert_trees_close(grads, rloo_gradient[0], 1e-6)


def test_shares_of_one_level_change_nothing():
  equal = method(rloo, loss__normalization="sequence")
  share = method(rloo, loss__normalization="sequence", loss__segment_weights="share")
  want, *_ = gradient_of(equal, GROUP, REWARDS)
  assert_trees_close(gradient_of(share, GROUP, REWARDS)[0], want, 1e-5)


def test_dr_grpo_is_rloo_times_what_is_left_of_a_group_without_one(rloo_gradient):
  """Up to the divisor of the sum: responses times the longest one against tokens."""
  grads, metrics = rloo_gradient
  got, *_ = gradient_of(method(dr_grpo), GROUP, REWARDS)
  want = scaled(grads, 2 / 3 * metrics["tokens"] / (12 * 46))
  assert_trees_close(got, want, 1e-5)


def test_ppo_of_a_critic_that_knows_nothing_is_reinforce():
  critic = method(ppo, critic__lam=1.0, critic__gamma=1.0)
  assert critic.critic.trunk == "own"
  reinforce = dataclasses.replace(critic, critic=Config().critic)
  want, *_ = gradient_of(reinforce, GROUP, REWARDS)
  assert_trees_close(gradient_of(critic, GROUP, REWARDS)[0], want, 1e-6)


def test_grpo_is_dr_grpo_over_the_groups_deviation():
  """Of one group, so that the deviation is a factor."""
  rewards = np.where(GROUP.tree == 0, REWARDS, 0.5).astype(np.float32)
  deviation = rewards[GROUP.leaf & (GROUP.tree == 0)].std()
  want, metrics, segments = gradient_of(method(rloo), GROUP, rewards)
  assert segments == 3
  got, _, same = gradient_of(method(grpo), GROUP, rewards)
  assert same == 3
  assert_trees_close(got, scaled(want, 2 / 3 / deviation), 1e-4)


def uncut_chain():
  """A trajectory and two probes from each prompt, and the group with these as its responses."""
  probe = np.zeros(len(GROUP.parent), bool)
  for tree in range(4):
    probe[np.flatnonzero((GROUP.depth > 0) & (GROUP.tree == tree))[1:]] = True
  return GROUP._replace(probe=probe)


def test_a_chain_without_a_cut_is_rloo_with_the_probes_as_the_group(rloo_gradient):
  chain = uncut_chain()
  cut = method(spo_chain, partition__kind="response", **PAPER_CHAIN)
  own = estimate(chain, REWARDS, cut.advantage, probed=True)
  rloo_own = estimate(GROUP, REWARDS, method(rloo).advantage, probed=False)
  trajectories = np.flatnonzero((chain.depth > 0) & ~chain.probe)
  np.testing.assert_array_equal(np.flatnonzero(own.trained), trajectories)
  np.testing.assert_allclose(
    own.advantages[trajectories], rloo_own.advantages[trajectories], rtol=1e-5
  )

  # Where the probes are trained, and count for each other, nothing is left of the difference.
  pooled = method(
    spo_chain,
    partition__kind="response",
    advantage__kind="leave_one_out",
    advantage__train_probes=True,
    advantage__pool_trajectory=True,
  )
  assert_trees_close(gradient_of(pooled, chain, REWARDS)[0], rloo_gradient[0], 1e-5)


class ScriptedSampler:
  """Draws tokens that tell their place: the third, sixth, ... of a response is `DELIMITER`."""

  DELIMITER = VOCAB - 1

  def prefill(self, params, tokens, lengths):
    return lengths

  def extend(self, prefix, groups, segments, index):
    return prefix

  def decode(self, params, prefix, groups, *, max_new_tokens, keep_cache):
    limits = np.asarray(groups.limits)
    drawn = max_new_tokens - limits  # of the response, before the cut
    place = drawn[..., None] + np.arange(max_new_tokens)
    tokens = np.where(place % 3 == 2, self.DELIMITER, 2 + place % 7).astype(np.int32)
    logprobs = -np.ones(tokens.shape, np.float32)
    return verbs.Segments(tokens, logprobs, limits, limits < 0, limits[:, 0], ())


def grown(config, *, delimiter_ids=()):
  partition = config.partition
  return strategies.grow_chain(
    ScriptedSampler(),
    None,
    tiny_prompts(3),
    samples=2,
    probes=config.rollout.probes,
    max_new_tokens=8,
    partition=make_partition(
      partition.kind,
      threshold=config.probability_threshold,
      interval=partition.interval,
      length=partition.length,
      parts=partition.parts,
      delimiter_ids=delimiter_ids,
    ),
    cuts_per_group=config.rollout.cuts_per_group,
  )


def test_vineppo_is_a_chain_whose_cuts_are_delimiters():
  steps = grown(method(vineppo), delimiter_ids=(ScriptedSampler.DELIMITER,))
  chain = method(spo_chain, **PAPER_CHAIN)
  cut_at = lambda length: method(
    spo_chain, **PAPER_CHAIN, partition__kind="fixed", partition__length=length
  )
  thirds = grown(cut_at(3))
  for name in Forest._fields:
    np.testing.assert_array_equal(getattr(steps, name), getattr(thirds, name), err_msg=name)
  assert (steps.depth[~steps.probe].max(), steps.probe.sum()) == (3, 3 * (1 + 2 * 2) * 4)
  others = grown(cut_at(2))
  assert others.depth.max() > steps.depth.max()

  rewards = np.random.default_rng(1).random(len(steps.parent)).astype(np.float32)
  assert estimate(steps, rewards, chain.advantage, probed=True).trained.sum() == 3 * 2 * 3
  grads, *_ = gradient_of(method(vineppo), steps, rewards)
  assert_trees_close(gradient_of(chain, thirds, rewards)[0], grads, 1e-7)
