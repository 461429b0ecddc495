"""Masks over tokens, and means, variances and whitening over them.

Masks are bool, True = keep. Statistics run over the whole arrays given, so the caller passes the
whole batch; sums and counts are float32, exact up to 2**24 tokens.
"""

import math

import chex
import jax
import jax.numpy as jnp

# Added to the variance inside the square root, as the reference does.
VARIANCE_EPSILON = 1e-8


def probability_mask(old_logprobs: jax.Array, mask: jax.Array, *, threshold: float) -> jax.Array:
  """The paper's probability mask: tokens that the behaviour policy found unlikely, pᵢ < ρ.

  Cutpoints and this mask share the test. It is done on log-probabilities, log pᵢ < log ρ, since
  float32 resolves those eight times finer near ρ = 0.9: it decides as float64 probabilities do,
  up to one float32 spacing. The reference exponentiates (in float64 for cutpoints, in float32 for
  this mask), so its mask may differ for probabilities within 6e-8 of ρ.

  Args:
    old_logprobs: [B, T] float, log-probabilities under the behaviour policy.
    mask: [B, T] bool, the response tokens.
    threshold: ρ > 0, a Python float; values above 1 keep the whole mask.

  Returns:
    [B, T] bool.

  Raises:
    ValueError: If threshold is not positive.
  """
  chex.assert_rank(old_logprobs, 2)
  chex.assert_equal_shape([old_logprobs, mask])
  chex.assert_type([old_logprobs, mask], [float, bool])
  if threshold <= 0:
    raise ValueError(f"threshold must be positive, got {threshold}")
  return mask & (old_logprobs < math.log(threshold))


def masked_sum_count(
  x: jax.Array, mask: jax.Array, *, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Sum of x over the mask, and the number of tokens in it.

  Sums and counts of parts of a batch add up, means do not; x may be anything (NaN too) outside
  the mask.

  Args:
    x: [B, T] float.
    mask: [B, T] bool.
    axis: sum over this axis only; None sums over everything.

  Returns:
    (sum, count), both float32, scalars or [B] or [T].
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type([x, mask], [float, bool])
  total = jnp.sum(jnp.where(mask, x, 0), axis=axis, dtype=jnp.float32)
  return total, jnp.sum(mask, axis=axis, dtype=jnp.float32)


def masked_mean(x: jax.Array, mask: jax.Array, *, axis: int | None = None) -> jax.Array:
  """Mean Σxm / Σm. An empty mask gives 0, where the reference gives NaN.

  Args:
    x: [B, T] float.
    mask: [B, T] bool.
    axis: as in `masked_sum_count`.

  Returns:
    float32, scalar or [B] or [T].
  """
  total, count = masked_sum_count(x, mask, axis=axis)
  return total / jnp.maximum(count, 1)


def masked_var(x: jax.Array, mask: jax.Array, *, unbiased: bool) -> jax.Array:
  """Variance Σ(x - mean)²m / n, or with divisor n - 1 if unbiased; n = Σm.

  An empty mask, and a single token under the unbiased divisor, give 0; the reference gives NaN
  or raises.

  Args:
    x: [B, T] float.
    mask: [B, T] bool.
    unbiased: whether the divisor is n - 1.

  Returns:
    float32 scalar.
  """
  squares, count = masked_sum_count(jnp.square(x - masked_mean(x, mask)), mask)
  return squares / jnp.maximum(count - unbiased, 1)


def _inverse_std(x: jax.Array, mask: jax.Array, *, unbiased: bool) -> jax.Array:
  """1 / sqrt(var + 1e-8), or 1 where the mask is too small to have a variance."""
  _, count = masked_sum_count(x, mask)
  scale = jax.lax.rsqrt(masked_var(x, mask, unbiased=unbiased) + VARIANCE_EPSILON)
  return jnp.where(count > unbiased, scale, 1.0)


def whiten(
  x: jax.Array,
  mask: jax.Array,
  *,
  statistics_mask: jax.Array | None = None,
  shift_mean: bool,
  unbiased: bool,
) -> jax.Array:
  """(x - mean) / sqrt(var + 1e-8), plus the mean again unless shift_mean.

  Every position is transformed, outside the mask too. Where the variance is undefined (no token,
  or one token if unbiased) nothing is divided, so an empty mask returns x; the reference returns
  NaN there.

  Args:
    x: [B, T] float.
    mask: [B, T] bool.
    statistics_mask: [B, T] bool, the tokens that mean and variance are taken over, such as the
      probability mask; if it is None or empty, `mask` is used (as in the reference).
    shift_mean: whether the result has mean zero.
    unbiased: divisor n - 1 instead of n.

  Returns:
    [B, T] float32.
  """
  chex.assert_rank(x, 2)
  chex.assert_equal_shape([x, mask])
  if statistics_mask is not None:
    chex.assert_equal_shape([mask, statistics_mask])
    mask = jnp.where(jnp.any(statistics_mask), statistics_mask, mask)
  mean = masked_mean(x, mask)
  whitened = (x - mean) * _inverse_std(x, mask, unbiased=unbiased)
  return whitened if shift_mean else whitened + mean


def rescale(x: jax.Array, mask: jax.Array, *, unbiased: bool) -> jax.Array:
  """x / sqrt(var + 1e-8): whitening that keeps every sign.

  Where the variance is undefined (no token, or one token if unbiased) x is returned; the
  reference returns NaN there.

  Args:
    x: [B, T] float.
    mask: [B, T] bool.
    unbiased: divisor n - 1 instead of n.

  Returns:
    [B, T] float32.
  """
  chex.assert_rank(x, 2)
  chex.assert_equal_shape([x, mask])
  return x * _inverse_std(x, mask, unbiased=unbiased)
