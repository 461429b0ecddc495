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
