"""Per-token rewards, returns and generalised advantages: PPO with a critic.

Rows hold responses end to end, with anything between them. `continues`, [B, T] bool, is True where
token t + 1 follows token t in the same response; of one response a row with mask m it is
mₜ ∧ mₜ₊₁. It is False at a response's last token, after which the value is 0. Nothing crosses from
one response to another, not even NaN.
"""

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms import kl


def _discounted_sums(x: jax.Array, continues: jax.Array, discount: float | jax.Array) -> jax.Array:
  """yₜ = xₜ + discount · yₜ₊₁ where the response continues, else xₜ. All [B, T]."""

  def step(y_B, inputs):
    x_B, continues_B = inputs
    y_B = x_B + discount * jnp.where(continues_B, y_B, 0)
    return y_B, y_B

  _, y_TxB = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), (x.T, continues.T), reverse=True)
  return y_TxB.T


def gae(
  rewards: jax.Array,
  values: jax.Array,
  continues: jax.Array,
  *,
  gamma: float | jax.Array,
  lam: float | jax.Array,
) -> jax.Array:
  """Generalised advantage estimation (https://arxiv.org/abs/1506.02438, eqs. 11 to 16).

    δₜ = rₜ + γ Vₜ₊₁ - Vₜ
    Aₜ = δₜ + γλ Aₜ₊₁          Vₜ₊₁ = Aₜ₊₁ = 0 where the response does not continue

  λ = 0 is the TD error, λ = 1 the discounted return minus V. The reference's recursion has no
  ends: it runs on through padding, where V and r are 0. That is the same in a response, except
  that rewards whitened there are not 0 in padding, and leak into the response.

  Args:
    rewards: [B, T] float, rₜ for taking token t; see `token_rewards`.
    values: [B, T] float, Vₜ of the state before token t.
    continues: [B, T] bool, token t + 1 is of the same response.
    gamma: γ, the discount a token.
    lam: λ.

  Returns:
    Aₜ, [B, T] float; of no meaning outside responses.
  """
  chex.assert_rank(rewards, 2)
  chex.assert_equal_shape([rewards, values, continues])
  chex.assert_type([rewards, values, continues], [float, float, bool])
  next_values = jnp.where(continues, jnp.pad(values[:, 1:], ((0, 0), (0, 1))), 0)
  errors = rewards + gamma * next_values - values
  return _discounted_sums(errors, continues, gamma * lam)


def discounted_returns(
  rewards: jax.Array, continues: jax.Array, *, gamma: float | jax.Array
) -> jax.Array:
  """Gₜ = rₜ + γ Gₜ₊₁, the reference's target of the critic.

  PPO's usual target is the λ-return, A + V with A from `gae`. It is G for λ = 1, and leans on the
  critic's own values for λ < 1: less variance, more bias while the critic is wrong.

  Args:
    rewards: [B, T] float.
    continues: [B, T] bool, token t + 1 is of the same response.
    gamma: γ.

  Returns:
    Gₜ, [B, T] float; of no meaning outside responses.
  """
  chex.assert_rank(rewards, 2)
  chex.assert_equal_shape([rewards, continues])
  chex.assert_type([rewards, continues], [float, bool])
  return _discounted_sums(rewards, continues, gamma)


def token_rewards(
  scores: jax.Array,
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: float | jax.Array,
  estimator: str,
  clip_min: float | jax.Array,
  clip_max: float | jax.Array,
) -> jax.Array:
  """rₜ = scoreₜ - kl_coef · clip(kₜ, clip_min, clip_max): the KL to the reference in the reward.

  With the estimator "kl" this is https://arxiv.org/abs/1909.08593, eq. 2. The reference clips
  nothing here: infinite bounds. To whiten rewards as it does, use
  `masking.whiten(..., shift_mean=False, unbiased=False)`.

  Args:
    scores: [B, T] float, a response's reward at its last token, 0 elsewhere.
    logprobs: [B, T] float, log-probabilities under the behaviour policy.
    ref_logprobs: [B, T] float, under the reference policy.
    mask: [B, T] bool, the response tokens.
    kl_coef: weight of the KL, see `kl_control`.
    estimator: k, as in `kl.token_kl`.
    clip_min: lower bound on kₜ.
    clip_max: upper bound on kₜ.

  Returns:
    rₜ, [B, T] float, 0 outside the mask.

  Raises:
    ValueError: If estimator is unknown.
  """
  chex.assert_equal_shape([scores, mask])
  chex.assert_type(scores, float)
  divergence = kl.token_kl(
    logprobs, ref_logprobs, mask, estimator=estimator, clip_min=clip_min, clip_max=clip_max
  )
  return jnp.where(mask, scores, 0) - kl_coef * divergence
