"""The critic on packed rows: its values, rewards and advantages response by response; its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import masking
from spo_jax.forest import ForestBuilder
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decoder import forward
from spo_jax.training.objective import VALUE_HEAD, CriticConfig, with_value_head
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.prepare import prepare
from spo_jax.training.step import critic_step, init_state, policy_gradient
from tests.tiny import VOCAB, loss_config, optimizer_config, tiny_config, tiny_params
from tests.training.forests import (
  assert_trees_close,
  causal,
  own_segments,
  packed_gradient,
  segment_rows,
  sequence_logprobs,
)

MODEL = tiny_config(layers=1)
PARAMS = tiny_params(MODEL)
REF_PARAMS = jax.tree.map(lambda x: x * 1.1, PARAMS)
HEAD = jnp.asarray(np.random.default_rng(7).normal(size=16) / 4, jnp.float32)
CRITIC_PARAMS = tiny_params(MODEL, seed=1) | {VALUE_HEAD: HEAD}
MICRO_BATCHES = 4
# The first prompt and four of its responses fill a row to the last token; the fifth stands in
# another row with both other trees.
PROMPTS = (4, 3, 2)
RESPONSES = ((7, 7, 7, 7, 7), (1, 4), (5, 2, 1))


def group_forest():
  rng = np.random.default_rng(5)
  builder = ForestBuilder()
  roots = builder.add_roots(rng.integers(2, VOCAB, (3, 4)), np.array(PROMPTS))
  for root, lengths in zip(roots, RESPONSES, strict=True):
    total = sum(lengths)
    builder.add(
      [root] * len(lengths),
      rng.integers(2, VOCAB, total),
      -np.log(VOCAB) + 0.3 * rng.standard_normal(total),
      lengths,
      [True] * len(lengths),
      probe=False,
    )
  return builder.build()


FOREST = group_forest()
REWARDS = np.random.default_rng(2).standard_normal(len(FOREST.parent)).astype(np.float32)


def packed(forest):
  cfg = PackConfig(32, 1, 16, 8, key_blocks=4, min_micro_batches=MICRO_BATCHES)
  batch, counts = pack(forest, REWARDS, own_segments(forest), cfg)
  assert counts["rows"] == 2 and counts["packed_tokens"] == counts["distinct_tokens"] + 4
  return jax.tree.map(jnp.asarray, batch)


BATCH = packed(FOREST)
# What each packed token is in the forest.
PLACE = np.asarray(
  packed(FOREST._replace(logprobs=np.arange(len(FOREST.tokens), dtype=np.float32))).old_logprobs
).astype(int)


def by_token(array):
  """[M, B, T] -> {index of a response's token in the forest: its entry}."""
  mask = np.asarray(BATCH.loss_mask)
  return dict(zip(PLACE[mask].tolist(), np.asarray(array)[mask].tolist(), strict=True))


def critic_config(**overrides):
  fields = dict(trunk="own", gamma=1.0, lam=1.0, target="lambda_return", coef=0.5)
  return CriticConfig(**fields | dict(whiten_rewards=False, value_clip=0.2) | overrides)


def config_of(critic, **overrides):
  fields = dict(use_probability_mask=False, scaling="none", kl_coef=0.0, critic=critic)
  return loss_config(**fields | overrides)


def plain_rows():
  """A row a response, as `segment_rows` writes them; every array one shorter than the tokens."""
  rows = segment_rows(FOREST, REWARDS, own_segments(FOREST), (10, 12))
  return rows["tokens"], rows["loss_mask"][:, 1:]


@jax.jit
def plain_values(params, tokens, weights):
  """Values [R, S - 1] before each token of plain rows, and the gradient of their weighted sum."""

  def total(params):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(MODEL, causal, params, tokens, positions)
    values = hidden[:, :-1] @ params[VALUE_HEAD]
    return jnp.sum(weights * values), values

  grads, values = jax.grad(total, has_aux=True)(params)
  return values, grads


def values_of_rows(params):
  tokens, mask = plain_rows()
  return np.asarray(plain_values(params, tokens, np.zeros(mask.shape, np.float32))[0])


def responses():
  """(node, indices of its tokens in the forest, its row's places of these) of each response."""
  _, mask = plain_rows()
  for row, node in enumerate(np.flatnonzero(own_segments(FOREST))):
    yield node, np.arange(*FOREST.offsets[node : node + 2]), np.flatnonzero(mask[row]) + row * 11


def assert_tokens(array, want, **tolerance):
  got = by_token(array)
  assert got.keys() == want.keys()
  keys = sorted(want)
  np.testing.assert_allclose([got[k] for k in keys], [want[k] for k in keys], **tolerance)


def test_a_fresh_critic_gives_every_token_the_reward_of_its_response():
  params = with_value_head(PARAMS, make_mesh(1, 1, 1))
  cfg = config_of(critic_config(target="return"))
  got = prepare(MODEL, cfg, None, BATCH, jnp.int32(MICRO_BATCHES), critic_params=params)
  want = {int(i): REWARDS[node] for node, indices, _ in responses() for i in indices}
  assert_tokens(got.advantages, want, rtol=1e-6)
  assert_tokens(got.returns, want, rtol=1e-6)
  assert not got.values.any()


def gae(rewards, values, gamma, lam):
  advantages, after, value_after = np.zeros(len(rewards)), 0.0, 0.0
  for t in reversed(range(len(rewards))):
    after = rewards[t] + gamma * value_after - values[t] + gamma * lam * after
    advantages[t], value_after = after, values[t]
  return advantages


def test_advantages_of_packed_responses_are_those_of_each_alone():
  """With the KL in the reward, of a weight that changes during the run."""
  critic = critic_config(gamma=0.9, lam=0.8)
  cfg = config_of(critic, kl_coef=9.0, kl_in="reward", kl_estimator="kl", kl_clip_max=1.0)
  got = prepare(
    MODEL,
    cfg,
    REF_PARAMS,
    BATCH,
    jnp.int32(MICRO_BATCHES),
    critic_params=CRITIC_PARAMS,
    kl_coef=jnp.float32(0.3),
  )
  tokens, _ = plain_rows()
  ref = np.asarray(jax.jit(sequence_logprobs, static_argnums=0)(MODEL, REF_PARAMS, tokens))
  values = values_of_rows(CRITIC_PARAMS).reshape(-1)
  want = {name: {} for name in ("advantages", "values", "returns")}
  clipped = 0
  for node, indices, places in responses():
    kl = FOREST.logprobs[indices] - ref.reshape(-1)[places]
    clipped += np.sum(np.abs(kl) > 1.0)
    rewards = -0.3 * np.clip(kl, -1, 1)
    rewards[-1] += REWARDS[node]
    advantages = gae(rewards, values[places], 0.9, 0.8)
    want["advantages"] |= dict(zip(indices.tolist(), advantages, strict=True))
    want["values"] |= dict(zip(indices.tolist(), values[places], strict=True))
    want["returns"] |= dict(zip(indices.tolist(), advantages + values[places], strict=True))
  assert 0 < clipped < len(want["values"])
  for name in want:
    assert_tokens(getattr(got, name), want[name], rtol=1e-4, atol=1e-5)


def test_with_importance_weights_the_kl_is_the_policys_and_the_mask_the_samplers():
  critic = critic_config(gamma=0.9, lam=0.8)
  fields = dict(kl_coef=9.0, kl_in="reward", use_probability_mask=True)
  complete = lambda batch, **cap: prepare(
    MODEL,
    config_of(critic, **fields, **cap),
    REF_PARAMS,
    batch,
    jnp.int32(MICRO_BATCHES),
    critic_params=CRITIC_PARAMS,
    params=PARAMS,
  )
  got = complete(BATCH, importance_cap=2.0)
  tokens, _ = plain_rows()
  policy = np.asarray(jax.jit(sequence_logprobs, static_argnums=0)(MODEL, PARAMS, tokens))
  of_policy = {
    int(i): policy.reshape(-1)[place]
    for _, indices, places in responses()
    for i, place in zip(indices, places, strict=True)
  }
  assert_tokens(got.old_logprobs, of_policy, atol=1e-5)
  np.testing.assert_array_equal(got.sampler_logprobs, BATCH.old_logprobs)
  np.testing.assert_array_equal(got.loss_mask, complete(BATCH).loss_mask)
  want = complete(BATCH._replace(old_logprobs=got.old_logprobs))
  assert (want.loss_mask != got.loss_mask).any()
  np.testing.assert_allclose(got.advantages, want.advantages, rtol=1e-5, atol=1e-6)
  assert not np.allclose(got.advantages, complete(BATCH).advantages, atol=0.1)


def test_whitened_rewards_discounted_targets_and_the_mask_after_gae():
  critic = critic_config(gamma=0.9, lam=0.8, target="return", whiten_rewards=True, value_clip=1e3)
  cfg = config_of(critic, use_probability_mask=True)
  got = prepare(MODEL, cfg, None, BATCH, jnp.int32(MICRO_BATCHES), critic_params=CRITIC_PARAMS)
  values = values_of_rows(CRITIC_PARAMS).reshape(-1)
  rewards = {int(i): 0.0 for _, indices, _ in responses() for i in indices}
  rewards |= {int(indices[-1]): REWARDS[node] for node, indices, _ in responses()}
  spread = np.sqrt(np.var(list(rewards.values())) + masking.VARIANCE_EPSILON)
  mean = np.mean(list(rewards.values()))
  advantages, targets = {}, {}
  for _, indices, places in responses():
    own = np.array([(rewards[int(i)] - mean) / spread + mean for i in indices])
    advantages |= dict(zip(indices.tolist(), gae(own, values[places], 0.9, 0.8), strict=True))
    targets |= dict(zip(indices.tolist(), gae(own, 0 * own, 0.9, 1.0), strict=True))
  assert_tokens(got.advantages, advantages, rtol=1e-4, atol=1e-5)
  assert_tokens(got.returns, targets, rtol=1e-4, atol=1e-5)
  unlikely = np.asarray(BATCH.loss_mask & (BATCH.old_logprobs < np.log(0.03)))
  np.testing.assert_array_equal(got.loss_mask, unlikely)
  assert 0 < unlikely.sum() < BATCH.loss_mask.sum()
  # The probability mask is the policy's: the critic learns the value of every response token.
  _, metrics = critic_step(
    MODEL, cfg, ADAM, fresh_critic(), got, jnp.int32(0), jnp.int32(MICRO_BATCHES)
  )
  want = np.mean(np.square(list(targets.values()))) / 2
  np.testing.assert_allclose(metrics["value_loss"], want, rtol=1e-4)


ADAM = optimizer_config(learning_rate=2e-2)
STEP_CONFIG = config_of(critic_config(value_clip=10.0))


def step_critic(state, batch, count=MICRO_BATCHES):
  return critic_step(MODEL, STEP_CONFIG, ADAM, state, batch, jnp.int32(0), jnp.int32(count))


def fresh_critic():
  params = with_value_head(jax.tree.map(jnp.copy, PARAMS), make_mesh(1, 1, 1))
  return init_state(params, ADAM)


@pytest.fixture(scope="module")
def fixed_batch():
  """Returns of the responses' rewards, whatever the values."""
  returns = BATCH.advantages
  values = jnp.zeros_like(returns)
  return BATCH._replace(values=values, returns=returns, value_mask=BATCH.loss_mask)


def test_a_critic_learns_the_returns(fixed_batch):
  state, explained = fresh_critic(), []
  for i in range(40):
    state, metrics = step_critic(state, fixed_batch)
    if i == 0:
      targets = np.array(list(by_token(fixed_batch.returns).values()))
      np.testing.assert_allclose(metrics["value_loss"], np.mean(targets**2) / 2, rtol=1e-5)
      assert metrics["value"] == 0 and metrics["value_grad_norm"] > 0
    explained.append(float(metrics["explained_variance"]))
  assert explained[0] <= 0 and explained[-1] > 0.7
  assert explained[0] < explained[10] < explained[20] < explained[-1]
  assert int(state.step) == 40


def test_a_critic_is_not_changed_by_nothing_nor_by_what_is_not_a_number(fixed_batch):
  state, _ = step_critic(fresh_critic(), fixed_batch)
  assert int(state.step) == 1
  want = jax.tree.map(np.array, state)  # a copy: the step donates
  empty = fixed_batch._replace(value_mask=jnp.zeros_like(fixed_batch.value_mask))
  nan = fixed_batch._replace(returns=fixed_batch.returns * jnp.nan)
  for batch, count in ((empty, MICRO_BATCHES), (fixed_batch, 0), (nan, MICRO_BATCHES)):
    state, _ = step_critic(state, batch, count)
    jax.tree.map(np.testing.assert_array_equal, state, want)


def test_a_shared_trunk_gets_both_gradients(fixed_batch):
  plain = loss_config(use_probability_mask=False, scaling="none", kl_coef=0.0)
  shared = config_of(critic_config(trunk="shared", value_clip=0.1, coef=0.7))
  span = (jnp.int32(0), jnp.int32(MICRO_BATCHES))
  params = PARAMS | {VALUE_HEAD: HEAD}
  policy, _ = packed_gradient(MODEL, plain, PARAMS, BATCH, *span)
  grads, metrics = packed_gradient(MODEL, shared, params, fixed_batch, *span)

  tokens, mask = plain_rows()
  targets = np.where(mask, REWARDS[own_segments(FOREST)][:, None], 0)

  def loss(values):
    error = jnp.maximum(
      jnp.square(values - targets), jnp.square(jnp.clip(values, -0.1, 0.1) - targets)
    )
    return jnp.where(mask, error, 0).sum() / 2 / mask.sum()

  values = values_of_rows(params)
  want, slope = jax.value_and_grad(loss)(values)
  _, critic = plain_values(params, tokens, slope)
  np.testing.assert_allclose(metrics["value_loss"], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["value"], values[mask].mean(), rtol=1e-5)
  both = jax.tree.map(lambda a, b: a + 0.7 * b, policy, {k: critic[k] for k in policy})
  assert_trees_close({k: grads[k] for k in policy}, both, 1e-5)
  assert_trees_close(grads[VALUE_HEAD], 0.7 * critic[VALUE_HEAD], 1e-5)

  # A probability mask is the policy's.
  few = jnp.asarray(fixed_batch.loss_mask).at[..., ::2].set(False)
  masked, _ = packed_gradient(MODEL, shared, params, fixed_batch._replace(loss_mask=few), *span)
  np.testing.assert_allclose(masked[VALUE_HEAD], grads[VALUE_HEAD], rtol=1e-5, atol=1e-7)

  # A critic of its own is none of the policy's business.
  own = jax.eval_shape(
    lambda: policy_gradient(MODEL, config_of(critic_config()), PARAMS, BATCH, *span)
  )
  assert jax.tree.structure(own[0]) == jax.tree.structure(PARAMS)
  assert "value_loss" not in own[1]
