import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import kl, masking, returns
from tests.algorithms import reference

SHAPE = (4, 14)
NO_CLIP = dict(clip_min=-np.inf, clip_max=np.inf)
_gae = jax.jit(returns.gae)
_discounted_returns = jax.jit(returns.discounted_returns)


@jax.jit
def _compute_advantages(values, rewards, mask, continues, *, gamma, lam, whiten_rewards):
  """The reference's `_compute_advantages`, up to the scaling that is asked for."""
  rewards = jnp.where(mask, rewards, 0)
  whitened = masking.whiten(rewards, mask, shift_mean=False, unbiased=False)
  rewards = jnp.where(whiten_rewards, whitened, rewards)
  raw = returns.gae(rewards, values, continues, gamma=gamma, lam=lam)
  scaled = {
    "none": raw,
    "whiten": masking.whiten(raw, mask, shift_mean=True, unbiased=True),
    "grayen": masking.rescale(raw, mask, unbiased=True),
  }
  return scaled, returns.discounted_returns(rewards, continues, gamma=gamma)


def test_advantages_and_returns_of_the_reference(fixture_arrays):
  data = fixture_arrays("gae")
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  for case in reference.load_json("gae"):
    given = {name: data[f"{case['case']}__{name}"] for name in (
      "values", "rewards", "action_mask", "advantages", "returns")}  # fmt: skip
    mask = given["action_mask"] > 0
    hyper = {name: case[name] for name in ("gamma", "lam", "whiten_rewards")}
    run = functools.partial(_compute_advantages, given["values"], given["rewards"], mask, **hyper)
    scaled, targets = run(np.ones(SHAPE, bool))  # the reference's recursion has no ends
    close(scaled[case["advantage_scaling"]], given["advantages"], err_msg=case["case"])
    close(targets, given["returns"], err_msg=case["case"])
    scaled, targets = run(reference.inner(mask))
    if case["whiten_rewards"]:
      assert np.abs(targets - given["returns"])[mask].max() > 0.1
    else:
      close(scaled[case["advantage_scaling"]][mask], given["advantages"][mask])
      close(targets[mask], given["returns"][mask])


def test_rewards_of_the_reference(fixture_arrays):
  data = fixture_arrays("rewards")
  for case in reference.load_json("rewards"):
    given = {k: data.get(f"{case['case']}__{k}") for k in (
      "scores", "attention_mask", "action_mask", "actor_logprobs", "ref_logprobs", "rewards",
      "non_score_rewards", "kl")}  # fmt: skip
    mask, logprobs = given["action_mask"] > 0, given["actor_logprobs"]
    scores = reference.terminal_rewards(given["scores"], given["attention_mask"])
    in_reward = case["has_ref"] and case["kl_penalty_loss_type"] is None
    assert (given["kl"] is not None) == in_reward == case["kl_returned"]
    rewards = functools.partial(
      returns.token_rewards,
      logprobs=logprobs,
      ref_logprobs=given["ref_logprobs"] if case["has_ref"] else logprobs,
      mask=mask,
      kl_coef=case["kl_coef"] if in_reward else 0.0,
      estimator=case["kl_penalty"] or "kl",
      **NO_CLIP,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(rewards(scores), given["rewards"], err_msg=case["name"])
    close(rewards(np.zeros_like(scores)), given["non_score_rewards"], err_msg=case["name"])
    if in_reward:
      args = logprobs, given["ref_logprobs"], mask
      divergence = kl.token_kl(*args, estimator=case["kl_penalty"], **NO_CLIP)
      close(divergence, given["kl"], err_msg=case["name"])


def _ragged(seed=0):
  """Rows of responses of any length end to end, with gaps: rewards, values, mask, continues, ids.

  ids [B, T] are 1, 2, ... in a row's responses and 0 between them.
  """
  rng = np.random.default_rng(seed)
  ids = np.zeros(SHAPE, np.int32)
  for row in ids:
    at = rng.integers(0, 3)
    for response in range(1, 5):
      length = rng.integers(1, 6)
      row[at : at + length] = response
      at += length + (rng.random() < 0.5)
  mask = ids > 0
  continues = mask & np.pad(ids[:, :-1] == ids[:, 1:], ((0, 0), (0, 1)))
  rewards, values = rng.normal(size=(2, *SHAPE)).astype(np.float32)
  return rewards, values, mask, continues, ids


def _by_hand(rewards, values, ids, gamma, lam):
  """GAE by its definition, Aₜ = Σₗ (γλ)ˡ δₜ₊ₗ, and returns, in float64."""
  rewards, values = rewards.astype(np.float64), values.astype(np.float64)
  advantages, targets = np.zeros((2, *ids.shape))
  for b, t in zip(*np.nonzero(ids), strict=True):
    end = t
    while end < ids.shape[1] and ids[b, end] == ids[b, t]:
      end += 1
    for u in range(t, end):
      after = values[b, u + 1] if u + 1 < end else 0.0
      error = rewards[b, u] + gamma * after - values[b, u]
      advantages[b, t] += (gamma * lam) ** (u - t) * error
      targets[b, t] += gamma ** (u - t) * rewards[b, u]
  return advantages, targets


@pytest.mark.parametrize("gamma, lam", [(0.97, 0.9), (1.0, 0.5), (0.8, 1.0), (0.9, 0.0)])
def test_packed_rows_equal_the_definition(gamma, lam):
  rewards, values, mask, continues, ids = _ragged()
  assert max(len(set(row[row > 0])) for row in ids) >= 3 and continues.any(axis=1).all()
  want, want_returns = _by_hand(rewards, values, ids, gamma, lam)
  got = _gae(rewards, values, continues, gamma=gamma, lam=lam)
  np.testing.assert_allclose(got[mask], want[mask], rtol=1e-5, atol=1e-6)
  got = _discounted_returns(rewards, continues, gamma=gamma)
  np.testing.assert_allclose(got[mask], want_returns[mask], rtol=1e-5, atol=1e-6)
  with jax.enable_x64(True):
    wide = rewards.astype(np.float64), values.astype(np.float64)
    got = returns.gae(*wide, continues, gamma=gamma, lam=lam)
    np.testing.assert_allclose(got[mask], want[mask], rtol=1e-12, atol=1e-14)


def test_packed_rows_equal_separate_rows():
  """And nothing that stands between responses matters."""
  rewards, values, mask, continues, ids = _ragged(1)
  dirty = [np.where(mask, x, np.nan) for x in (rewards, values)]
  packed = _gae(*dirty, continues, gamma=0.97, lam=0.9)
  rows = np.arange(len(ids))[:, None]
  for row, response in {(row, ids[row, t]) for row, t in np.argwhere(mask)}:
    alone = (ids == response) & (rows == row)
    clean = [np.where(alone, x, 0) for x in (rewards, values)]
    separate = _gae(*clean, reference.inner(alone), gamma=0.97, lam=0.9)
    np.testing.assert_array_equal(packed[alone], separate[alone])


def test_special_cases_of_gae():
  rewards, values, mask, continues, _ = _ragged(2)
  close = lambda x, y: np.testing.assert_allclose(x[mask], y[mask], rtol=1e-5, atol=1e-6)
  gamma = 0.95
  targets = _discounted_returns(rewards, continues, gamma=gamma)
  close(_gae(rewards, np.zeros_like(values), continues, gamma=gamma, lam=1.0), targets)
  close(_gae(rewards, values, continues, gamma=gamma, lam=1.0), targets - values)
  close(
    _gae(rewards, values, continues, gamma=1.0, lam=1.0),
    _discounted_returns(rewards, continues, gamma=1.0) - values,
  )
  after = np.where(continues, np.roll(values, -1, axis=1), 0)
  close(_gae(rewards, values, continues, gamma=gamma, lam=0.0), rewards + gamma * after - values)
  # The λ-return Gλₜ = rₜ + γ((1 - λ) Vₜ₊₁ + λ Gλₜ₊₁) is A + V.
  lam = 0.7
  lambda_return = values + _gae(rewards, values, continues, gamma=gamma, lam=lam)
  later = np.where(continues, np.roll(lambda_return, -1, axis=1), 0)
  close(lambda_return, rewards + gamma * ((1 - lam) * after + lam * later))
  assert np.abs(lambda_return - targets)[mask].max() > 0.1


def test_token_rewards():
  """Bounds on a token's KL, a traced weight, and nothing outside the mask."""
  rng = np.random.default_rng(0)
  scores, logprobs, ref = rng.normal(size=(3, 2, 5)).astype(np.float32)
  mask = np.array([[False, True, True, True, False], [True] * 5])
  hyper = dict(estimator="kl", clip_min=-0.3, clip_max=0.5)
  want = np.where(mask, scores - 0.1 * np.clip(logprobs - ref, -0.3, 0.5), 0)
  run = jax.jit(
    functools.partial(returns.token_rewards, mask=mask, **hyper), static_argnames="estimator"
  )
  np.testing.assert_allclose(run(scores, logprobs, ref, kl_coef=0.1), want, rtol=1e-5, atol=1e-6)
  dirty = [np.where(mask, x, np.nan) for x in (scores, logprobs, ref)]
  np.testing.assert_allclose(run(*dirty, kl_coef=0.1), want, rtol=1e-5, atol=1e-6)
  # 0 lies outside these bounds: it must not be clipped to 0.2 where there is no token.
  hyper = dict(estimator="kl", kl_coef=1.0, clip_min=0.2, clip_max=0.5)
  assert (returns.token_rewards(scores, logprobs, ref, mask, **hyper)[~mask] == 0).all()
  with pytest.raises(ValueError, match="unknown KL estimator 'k9', one of"):
    run(scores, logprobs, ref, kl_coef=0.1, estimator="k9")


def test_bad_shapes_and_types_raise():
  rewards, values, mask, continues, _ = _ragged()
  hyper = dict(gamma=1.0, lam=1.0)
  kl_hyper = dict(kl_coef=0.1, estimator="kl", **NO_CLIP)
  for call in (
    lambda: returns.gae(rewards, values[:, 1:], continues, **hyper),
    lambda: returns.gae(rewards, values, continues.astype(np.float32), **hyper),
    lambda: returns.discounted_returns(rewards, continues[:2], gamma=1.0),
    lambda: returns.discounted_returns(rewards, continues.astype(np.float32), gamma=1.0),
    lambda: returns.token_rewards(rewards[:1], values, values, mask, **kl_hyper),
    lambda: returns.token_rewards(rewards.astype(np.int32), values, values, mask, **kl_hyper),
  ):
    with pytest.raises(AssertionError):
      call()
