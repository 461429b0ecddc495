"""Estimators of KL(policy, reference) from log-probabilities of sampled tokens.

d = log π - log π_ref. k1, k2 and k3 are the names of http://joschu.net/blog/kl-approx.html.
Gradients flow into both arguments.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

# Bound on the log-ratio inside the exponential of `control_variate`: e^10 is about 22,000.
LOG_RATIO_BOUND = 10.0


def clip(x: jax.Array, minimum: float | jax.Array, maximum: float | jax.Array) -> jax.Array:
  """x within [minimum, maximum], with gradient 1 on the closed interval and 0 outside.

  `jnp.clip` halves the gradient at the bounds, and d = 0 lies on one when a KL is clipped at 0.
  """
  outside = (x < minimum) | (x > maximum)
  return jnp.where(outside, jax.lax.stop_gradient(jnp.clip(x, minimum, maximum)), x)


def kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """k1 = d: unbiased, of either sign. [B, T], [B, T] -> [B, T]."""
  chex.assert_equal_shape([logprobs, ref_logprobs])
  return logprobs - ref_logprobs


def absolute(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """|d|, with gradient 0 at d = 0, where that of `jnp.abs` is 1. [B, T], [B, T] -> [B, T]."""
  d = kl(logprobs, ref_logprobs)
  return d * jnp.sign(d)


def mse(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """k2 = d²/2. [B, T], [B, T] -> [B, T]."""
  return jnp.square(kl(logprobs, ref_logprobs)) / 2


def control_variate(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """k3 = eˣ - x - 1, x = clip(-d, -10, 10): unbiased inside the clip, never negative.

  [B, T], [B, T] -> [B, T].
  """
  x = clip(-kl(logprobs, ref_logprobs), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
  return jnp.exp(x) - x - 1


def seq_control_variate(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """exp(Σₜ -dₜ) + d - 1, the ratio of the whole row in place of the token's; no clip.

  A row must be one sequence, and d = 0 at its padding. [B, T], [B, T] -> [B, T].
  """
  d = kl(logprobs, ref_logprobs)
  return jnp.exp(-jnp.sum(d, axis=-1, keepdims=True)) + d - 1


def full(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Σᵥ πᵥ dᵥ, the exact divergence of whole distributions. [B, T, V], [B, T, V] -> [B, T]."""
  return jnp.sum(jnp.exp(logprobs) * kl(logprobs, ref_logprobs), axis=-1)


KL_ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "kl": kl,
  "abs": absolute,
  "mse": mse,
  "control_variate": control_variate,
  "seq_control_variate": seq_control_variate,
  "full": full,
}


def token_kl(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  estimator: str,
  clip_min: float | jax.Array,
  clip_max: float | jax.Array,
) -> jax.Array:
  """clip(kₜ, clip_min, clip_max) in the mask and 0 outside it, k an estimator.

  Whatever stands outside the mask (-1e9, NaN) reaches neither a value nor a gradient.

  Args:
    logprobs: [B, T] float, log-probabilities under the policy.
    ref_logprobs: [B, T] float, under the reference policy.
    mask: [B, T] bool; one response a row for "seq_control_variate".
    estimator: a key of `KL_ESTIMATORS` other than "full".
    clip_min: lower bound; 0 makes the estimator "kl" one-sided.
    clip_max: upper bound.

  Returns:
    [B, T] float.

  Raises:
    ValueError: If estimator is unknown.
  """
  chex.assert_rank(logprobs, 2)
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  chex.assert_type([logprobs, ref_logprobs, mask], [float, float, bool])
  per_token = sorted(KL_ESTIMATORS.keys() - {"full"})
  if estimator not in per_token:
    raise ValueError(f"unknown KL estimator {estimator!r}, one of {per_token}")
  keep = lambda x: jnp.where(mask, x, 0)
  divergence = KL_ESTIMATORS[estimator](keep(logprobs), keep(ref_logprobs))
  return keep(clip(divergence, clip_min, clip_max))
