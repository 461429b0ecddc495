"""Packing what the loss reads alone leaves the gradient as it was."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs import grpo, ppo, spo_chain, spo_tree
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.forest import Forest
from spo_jax.learner import loss_config
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.prepare import prepare
from spo_jax.training.trimming import loss_lengths, reads_unlikely_alone, trim
from spo_jax.training.weights import episode_shares, segment_weights
from tests.tiny import tiny_config, tiny_params
from tests.training.forests import (
  assert_trees_close,
  chain_forest,
  own_segments,
  packed_gradient,
  tree_forest,
)

MODEL = tiny_config(layers=1)
PARAMS = tiny_params(MODEL)
REFERENCE = tiny_params(MODEL, seed=1)


def config_of(module, **overrides) -> Config:
  config = module.get_config()
  fields = {"packing.logprob_chunk": 64, "loss.kl_coef": 0.0}
  fields |= {name.replace("__", "."): value for name, value in overrides.items()}
  config.update_from_flattened_dict(fields)
  return from_config_dict(config, Config)


def mostly_likely(forest: Forest, rng) -> Forest:
  """One token in five unlikely."""
  unlikely = rng.random(len(forest.tokens)) < 0.2
  return forest._replace(logprobs=np.where(unlikely, -1.0, -0.01).astype(np.float32))


def gradient(config, forest, advantages, trained, weights, episodes):
  cfg = PackConfig(64, 1, 16, 8, key_blocks=8, min_micro_batches=8)
  batch, counts = pack(forest, advantages, trained, cfg, episodes=episodes, weights=weights)
  np.testing.assert_allclose(batch.episodes.sum(), episodes.sum(), rtol=1e-6)
  count = jnp.int32(counts["micro_batches"])
  batch = prepare(MODEL, loss_config(config), REFERENCE, batch, count)
  grads, metrics = packed_gradient(MODEL, loss_config(config), PARAMS, batch, jnp.int32(0), count)
  return grads, metrics, counts


@pytest.mark.parametrize(
  ("module", "forest"),
  [
    (spo_tree, tree_forest(np.random.default_rng(0), (2, 2, 2), (4, 4, 6), ragged=True)),
    (spo_chain, chain_forest(np.random.default_rng(1), longest=6)),
  ],
)
def test_the_gradient_stays(module, forest):
  rng = np.random.default_rng(2)
  config = config_of(module, loss__scaling="whiten", loss__kl_coef=0.5)
  forest = mostly_likely(forest, rng)
  trained = own_segments(forest) | (forest.probe & config.advantage.train_probes)
  advantages = rng.normal(size=len(trained)).astype(np.float32)
  weights = segment_weights(forest, trained, config)
  episodes = episode_shares(forest, trained, config)
  whole = gradient(config, forest, advantages, trained, weights, episodes)
  short, in_loss = trim(forest, trained, config)
  trimmed = gradient(config, short, advantages, in_loss, weights, episodes)
  assert_trees_close(whole[0], trimmed[0], 1e-5)
  assert trimmed[1]["tokens"] == whole[1]["tokens"] > 0
  assert trimmed[2]["segments"] == in_loss.sum() < whole[2]["segments"]
  assert trimmed[2]["packed_tokens"] < 0.7 * whole[2]["packed_tokens"]


def path(lengths, logprobs) -> Forest:
  """A prompt of 2 tokens, and segments one after the other."""
  count = len(lengths) + 1
  return Forest(
    tree=np.zeros(count, np.int32),
    parent=np.arange(-1, count - 1, dtype=np.int32),
    depth=np.arange(count, dtype=np.int32),
    finished=np.zeros(count, bool),
    probe=np.zeros(count, bool),
    offsets=np.cumsum([0, 2, *lengths]),
    tokens=np.arange(2 + sum(lengths), dtype=np.int32),
    logprobs=np.array([0, 0, *logprobs], np.float32),
  )


def test_a_segment_is_cut_after_its_last_unlikely_token_unless_it_goes_on():
  forest = path((3, 4, 2), (-1, 0, 0, 0, -1, 0, 0, 0, 0))
  trained = np.array([False, True, True, True])
  config = config_of(spo_tree)
  np.testing.assert_array_equal(loss_lengths(forest, trained, config), [0, 1, 2, 0])
  short, in_loss = trim(forest, trained, config)
  np.testing.assert_array_equal(short.lengths, [2, 3, 2, 0])
  np.testing.assert_array_equal(short.tokens, [0, 1, 2, 3, 4, 5, 6])
  np.testing.assert_array_equal(in_loss, [False, True, True, False])


def test_nothing_is_cut_off_that_a_loss_reads():
  for module, overrides in (
    (grpo, {}),
    (ppo, {"loss__use_probability_mask": True}),
    (spo_tree, {"loss__scaling": "rescale"}),
    (spo_tree, {"loss__use_probability_mask": False}),
  ):
    config = config_of(module, **overrides)
    assert not reads_unlikely_alone(config)
  preference = dataclasses.replace(config_of(spo_tree).loss, kind="dpo_positive")
  assert not reads_unlikely_alone(dataclasses.replace(config_of(spo_tree), loss=preference))
  forest = path((3, 4), (-1,) + (0,) * 6)
  same, trained = trim(forest, np.array([False, True, True]), config_of(grpo))
  assert same is forest
  assert trained.all() == np.False_ and trained[1:].all()
