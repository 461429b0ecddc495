"""Every loss on packed micro-batches against its formula on plain rows, one a segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import preference
from spo_jax.config import Config, LossConfig
from spo_jax.forest import Forest
from spo_jax.models.decoder import forward, token_logits
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.pairs import match_pairs
from spo_jax.training.prepare import prepare
from spo_jax.training.step import init_state, supervised_step
from spo_jax.training.weights import segment_weights
from tests.tiny import SGD, loss_config, tiny_config, tiny_params
from tests.training.forests import (
  assert_trees_close,
  causal,
  chain_forest,
  node_path,
  own_segments,
  packed_gradient,
  segment_rows,
  sequence_logprobs,
  tree_forest,
)

MODEL = tiny_config(layers=1)
PARAMS = tiny_params(MODEL)
REF_PARAMS = jax.tree.map(lambda x: x * 1.1, PARAMS)
MICRO_BATCHES = 4
PLAIN = dict(kl_coef=0.0, use_probability_mask=False, scaling="none")
GROUP, CHAIN, TREE = "group", "chain", "tree"


def forest_of(name) -> Forest:
  rng = np.random.default_rng(4)
  if name == CHAIN:
    return chain_forest(rng, prompts=(3, 4))
  if name == TREE:
    return tree_forest(rng, (2, 3), (4, 3), prompts=(3,) * 4, ragged=True)
  return tree_forest(rng, (3,), (7,), prompts=(3, 2, 4, 3), ragged=True)


def batch_of(name, normalization="token", *, advantages=None, pairs=None):
  """(forest, advantages, batch): micro-batches of a row each."""
  forest = forest_of(name)
  if advantages is None:
    advantages = np.random.default_rng(0).standard_normal(len(forest.parent))
  advantages = np.asarray(advantages, np.float32)
  trained = own_segments(forest)
  config = Config(loss=LossConfig(normalization=normalization, use_probability_mask=False))
  batch, _ = pack(
    forest,
    advantages,
    trained,
    PackConfig(32, 1, 16, 8, key_blocks=4, min_micro_batches=MICRO_BATCHES),
    weights=segment_weights(forest, trained, config),
    pairs=pairs,
    most_pairs=4,
  )
  assert batch.tokens.shape[0] == MICRO_BATCHES
  return forest, advantages, jax.tree.map(jnp.asarray, batch)


def loss_and_gradient(cfg, batch, kl_coef=None, ref_params=None, span=(0, MICRO_BATCHES)):
  grads, metrics = packed_gradient(
    MODEL, cfg, PARAMS, batch, *(jnp.int32(i) for i in span), kl_coef, ref_params
  )
  return metrics["loss"], grads, metrics


@jax.jit
def plain(params, tokens, weights):
  """Log-probs [R, S - 1] of plain rows, and the gradient of their weighted sum."""

  def total(params):
    logprobs = sequence_logprobs(MODEL, params, tokens)
    return jnp.sum(weights * logprobs), logprobs

  grads, logprobs = jax.grad(total, has_aux=True)(params)
  return logprobs, grads


def plain_rows(forest, advantages):
  """{name: [R, S - 1]} of the segments' rows, each in the place of the token that it is of."""
  rows = segment_rows(forest, advantages, own_segments(forest), (32, 16))
  return rows["tokens"], {name: x[:, 1:] for name, x in rows.items()}


def assert_is(batch, cfg, forest, advantages, formula):
  """The packed loss and its gradient are those of formula(log-probs, rows) on plain rows."""
  tokens, rows = plain_rows(forest, advantages)
  logprobs, _ = plain(PARAMS, tokens, np.zeros(rows["tokens"].shape, np.float32))
  want, slope = jax.value_and_grad(formula)(logprobs, rows)
  _, want_grads = plain(PARAMS, tokens, slope)
  loss, grads, _ = loss_and_gradient(cfg, batch)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  assert_trees_close(grads, want_grads, 2e-5)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want_grads)) > 1e-4


def surrogate(logprobs, rows):
  ratio = jnp.exp(logprobs - rows["old_logprobs"])
  clipped = jnp.clip(ratio, 0.8, 1.2)
  loss = -jnp.minimum(ratio * rows["advantages"], clipped * rows["advantages"])
  return jnp.where(rows["loss_mask"], loss, 0)


def by_token(logprobs, rows):
  return surrogate(logprobs, rows).sum() / rows["loss_mask"].sum()


def by_response(logprobs, rows):
  lengths = np.maximum(rows["loss_mask"].sum(1), 1)
  return (surrogate(logprobs, rows).sum(1) / lengths).sum() / rows["loss_mask"].any(1).sum()


def by_constant(logprobs, rows):
  return surrogate(logprobs, rows).sum() / (7 * rows["loss_mask"].any(1).sum())


@pytest.mark.parametrize(
  ("forest", "normalization", "formula"),
  [
    (GROUP, "token", by_token),  # DAPO
    (GROUP, "sequence", by_response),  # GRPO
    (GROUP, "constant", by_constant),  # Dr. GRPO
    (TREE, "sequence", by_response),  # segments with siblings are sequences
  ],
)
def test_normalizations_are_those_of_the_papers(forest, normalization, formula):
  forest, advantages, batch = batch_of(forest, normalization)
  cfg = loss_config(**PLAIN, normalization=normalization)
  assert_is(batch, cfg, forest, advantages, formula)

  # An update on a share of the micro-batches is a mean over that share.
  total, _, _ = loss_and_gradient(cfg, batch)
  units = {
    "token": batch.loss_mask.sum(axis=(1, 2)),
    "sequence": batch.episodes,
    "constant": 7 * batch.episodes,
  }[normalization]
  parts = [loss_and_gradient(cfg, batch, span=(i, 1))[0] for i in range(MICRO_BATCHES)]
  np.testing.assert_allclose(jnp.dot(jnp.stack(parts), units) / units.sum(), total, rtol=1e-4)


def test_a_cut_trajectory_is_one_sequence():
  forest, advantages, batch = batch_of(CHAIN, "sequence")
  segments = np.flatnonzero(own_segments(forest))
  response = np.array([node_path(forest, node)[1] for node in segments])
  tokens = {r: forest.lengths[segments[response == r]].sum() for r in set(response.tolist())}
  assert len(tokens) == 4 < len(segments)
  length = np.ones((32, 1))
  length[: len(segments), 0] = [tokens[r] for r in response.tolist()]

  def formula(logprobs, rows):
    return (surrogate(logprobs, rows) / jnp.asarray(length, jnp.float32)).sum() / len(tokens)

  cfg = loss_config(**PLAIN, normalization="sequence")
  assert_is(batch, cfg, forest, advantages, formula)


def test_the_likelihood_of_equal_advantages_is_the_supervised_loss():
  forest, _, batch = batch_of(GROUP, advantages=np.ones(len(forest_of(GROUP).parent)))
  loss, grads, _ = loss_and_gradient(loss_config(**PLAIN, kind="likelihood"), batch)
  state = init_state(jax.tree.map(jnp.copy, PARAMS), SGD)
  state, want = supervised_step(MODEL, 12, SGD, state, batch, jnp.int32(MICRO_BATCHES))
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  change = jax.tree.map(lambda new, old: old - new, state.params, PARAMS)
  assert_trees_close(change, grads, 1e-5)


def test_likelihood_is_weighted_by_advantage_and_does_not_read_the_sampling_policy():
  forest, advantages, batch = batch_of(GROUP, "sequence")
  cfg = loss_config(**PLAIN, kind="likelihood", normalization="sequence")

  def formula(logprobs, rows):
    own = jnp.where(rows["loss_mask"], rows["advantages"] * logprobs, 0)
    lengths = np.maximum(rows["loss_mask"].sum(1), 1)
    return -(own.sum(1) / lengths).sum() / rows["loss_mask"].any(1).sum()

  assert_is(batch._replace(old_logprobs=batch.old_logprobs - 9), cfg, forest, advantages, formula)


OLD_PARAMS = jax.tree.map(lambda x: x * 1.1, PARAMS)
CORRECTED = PLAIN | {"importance_cap": 1.3}


@pytest.mark.parametrize(
  ("forest", "normalization"), [(TREE, "token"), (GROUP, "sequence")], ids=["plain", "weighted"]
)
def test_tokens_of_another_sampler_are_weighed_by_capped_ratios(forest, normalization):
  forest, advantages, batch = batch_of(forest, normalization)
  cfg = loss_config(**CORRECTED, normalization=normalization)
  tokens, rows = plain_rows(forest, advantages)
  old, _ = plain(OLD_PARAMS, tokens, np.zeros(rows["tokens"].shape, np.float32))
  lengths = np.maximum(rows["loss_mask"].sum(1), 1)
  mask, count = rows["loss_mask"], rows["loss_mask"].sum()
  weights = np.where(mask, np.minimum(np.exp(old - rows["old_logprobs"]), 1.3), 0)
  assert 0 < (weights == np.float32(1.3)).sum() < 0.9 * count

  def formula(logprobs, rows):
    losses = weights * surrogate(logprobs, rows | {"old_logprobs": old})
    per_row = losses.sum(1) if normalization == "token" else losses.sum(1) / lengths
    return per_row.sum() / (count if normalization == "token" else mask.any(1).sum())

  batch = prepare(MODEL, cfg, None, batch, jnp.int32(MICRO_BATCHES), params=OLD_PARAMS)
  assert_is(batch, cfg, forest, advantages, formula)
  _, _, metrics = loss_and_gradient(cfg, batch)
  gap = np.abs(np.asarray(old) - rows["old_logprobs"])[mask]
  np.testing.assert_allclose(metrics["logprob_gap"], gap.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["importance_weight"], weights.sum() / count, rtol=1e-5)


def test_tokens_of_the_policy_itself_weigh_one():
  _, _, batch = batch_of(GROUP, "sequence")
  cfg = loss_config(**CORRECTED, normalization="sequence")
  score = lambda batch: prepare(
    MODEL, cfg, None, batch, jnp.int32(MICRO_BATCHES), params=OLD_PARAMS
  )
  exact = batch._replace(old_logprobs=score(batch).old_logprobs)
  loss, grads, metrics = loss_and_gradient(cfg, score(exact))
  want, want_grads, _ = loss_and_gradient(loss_config(**PLAIN, normalization="sequence"), exact)
  assert metrics["importance_weight"] == 1 and metrics["logprob_gap"] == 0
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert_trees_close(grads, want_grads, 1e-6)


def test_dpo_positive_compares_whole_responses():
  forest = forest_of(GROUP)
  rewards = np.arange(len(forest.parent), dtype=np.float32)
  pairs = match_pairs(forest, rewards)
  assert pairs.shape == (4, 2)
  forest, advantages, batch = batch_of(GROUP, pairs=pairs)
  cfg = loss_config(**PLAIN, kind="dpo_positive", dpo_beta=0.3, dpo_penalty=5.0)
  batch = prepare(MODEL, cfg, REF_PARAMS, batch, jnp.int32(MICRO_BATCHES))
  tokens, rows = plain_rows(forest, advantages)
  ref, _ = plain(REF_PARAMS, tokens, np.zeros(rows["tokens"].shape, np.float32))
  row_of = {node: row for row, node in enumerate(np.flatnonzero(own_segments(forest)))}
  chosen, rejected = np.vectorize(row_of.get)(pairs).T

  def sums(logprobs, rows):
    return jnp.where(rows["loss_mask"], logprobs, 0).sum(1)

  def formula(logprobs, rows):
    new, old = sums(logprobs, rows), sums(ref, rows)
    both = preference.dpo_positive(
      new[chosen],
      new[rejected],
      old[chosen],
      old[rejected],
      jnp.ones(4, bool),
      beta=0.3,
      penalty=5.0,
    )
    return both.loss / 4

  assert_is(batch, cfg, forest, advantages, formula)
  _, _, metrics = loss_and_gradient(cfg, batch)
  logprobs, _ = plain(PARAMS, tokens, np.zeros(rows["tokens"].shape, np.float32))
  gain = np.asarray(sums(logprobs, rows) - sums(ref, rows))
  assert metrics["pairs_ordered"] == np.mean(gain[chosen] > gain[rejected])
  assert metrics["pairs_lowered"] == np.mean(gain[chosen] < 0)


def test_forward_kl_is_that_of_the_whole_distributions():
  forest, advantages, batch = batch_of(GROUP)
  cfg = loss_config(**PLAIN, forward_kl_coef=0.7)
  batch = prepare(MODEL, cfg, REF_PARAMS, batch, jnp.int32(MICRO_BATCHES))
  tokens, rows = plain_rows(forest, advantages)
  mask = rows["loss_mask"]

  def distributions(params):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(MODEL, causal, params, jnp.asarray(tokens), positions)
    return jax.nn.log_softmax(token_logits(MODEL, params, hidden[:, :-1]))

  @jax.jit
  @jax.value_and_grad
  def divergence(params):
    ref, new = distributions(REF_PARAMS), distributions(params)
    return jnp.where(mask, jnp.sum(jnp.exp(ref) * (ref - new), axis=-1), 0).sum() / mask.sum()

  want, want_grads = divergence(PARAMS)
  loss, grads, metrics = loss_and_gradient(cfg, batch, ref_params=REF_PARAMS)
  without, without_grads, _ = loss_and_gradient(
    loss_config(**PLAIN), batch._replace(ref_hidden=None)
  )
  np.testing.assert_allclose(metrics["forward_kl"], want, rtol=1e-5)
  np.testing.assert_allclose(loss - without, 0.7 * want, rtol=1e-4)
  own = jax.tree.map(lambda a, b: (a - b) / 0.7, grads, without_grads)
  assert_trees_close(own, want_grads, 1e-4)


def test_where_and_how_much_the_kl_counts():
  _, _, batch = batch_of(GROUP)
  cfg = functools.partial(loss_config, use_probability_mask=False, scaling="none")
  batch = prepare(MODEL, cfg(), REF_PARAMS, batch, jnp.int32(MICRO_BATCHES))
  without, without_grads, metrics = loss_and_gradient(cfg(kl_coef=0.0), batch)
  assert metrics["kl"] == 0
  # A weight that changes during a run takes the place of the config's.
  loss, _, metrics = loss_and_gradient(cfg(kl_coef=3.0), batch, jnp.float32(0.5))
  per_episode = metrics["kl"] * metrics["tokens"] / batch.episodes.sum()
  assert metrics["kl"] > 0.001
  np.testing.assert_allclose(loss - without, 0.5 * per_episode, rtol=1e-4)

  # A KL that is in the reward already is reported, and in no loss.
  in_reward, in_reward_grads, reported = loss_and_gradient(cfg(kl_coef=0.5, kl_in="reward"), batch)
  np.testing.assert_allclose(in_reward, without, rtol=1e-6)
  assert_trees_close(in_reward_grads, without_grads, 1e-6)
  np.testing.assert_allclose(reported["kl"], metrics["kl"], rtol=1e-6)
