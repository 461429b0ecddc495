"""Losses over tokens, as sums that the caller divides by counts of the whole batch.

Sums add up over micro-batches and devices, so gradient accumulation is exact; the reference
averages the means of micro-batches. Whatever stands outside the mask (-1e9, NaN) neither changes
a sum nor reaches a gradient.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms import kl, masking
from spo_jax.algorithms.logprobs import chunk_logits, map_chunks


class PPOSums(NamedTuple):
  """Sums over the loss mask, float32 scalars."""

  loss: jax.Array
  count: jax.Array  # tokens
  clipped: jax.Array  # tokens whose clipped branch is the larger loss
  ratio: jax.Array  # π / π_old
  approx_kl: jax.Array  # (log π - log π_old)² / 2
  policy_kl: jax.Array  # log π_old - log π


def ppo_clip(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  epsilon_low: float,
  epsilon_high: float,
  log_ratio_bound: float,
  weights: jax.Array | None = None,
) -> PPOSums:
  """PPO's clipped surrogate (https://arxiv.org/abs/1707.06347, eq. 7).

    rₜ = exp(clip(log πₜ - log π_oldₜ, ±log_ratio_bound))
    loss = Σₜ wₜ max(-Aₜ rₜ, -Aₜ clip(rₜ, 1 - ε_low, 1 + ε_high))

  With the probability mask in loss_mask this is SPO's loss; with every response token in it,
  GRPO's and PPO's. An empty mask gives loss 0 and gradient 0; the reference gives NaN.

  Args:
    logprobs: [B, T] float, log-probabilities under the trained policy.
    old_logprobs: [B, T] float, under the behaviour policy.
    advantages: [B, T] float.
    loss_mask: [B, T] bool.
    epsilon_low: ε_low, 0.2 in the paper.
    epsilon_high: ε_high, 0.2 in the paper.
    log_ratio_bound: beyond it the ratio is constant; 10 in the reference.
    weights: [B, T] float, wₜ; None: all are 1. Only the loss is weighted.

  Returns:
    `PPOSums`.
  """
  chex.assert_rank(logprobs, 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages, loss_mask])
  chex.assert_type([logprobs, old_logprobs, advantages, loss_mask], [float, float, float, bool])
  keep = lambda x: jnp.where(loss_mask, x, 0)
  # Masked before the exponential, not only after: see the FAQ on gradients of where,
  # https://docs.jax.dev/en/latest/faq.html
  log_ratios = keep(logprobs) - keep(old_logprobs)
  ratios = jnp.exp(kl.clip(log_ratios, -log_ratio_bound, log_ratio_bound))
  unclipped = -keep(advantages) * ratios
  clipped = -keep(advantages) * kl.clip(ratios, 1 - epsilon_low, 1 + epsilon_high)
  surrogate = jnp.maximum(unclipped, clipped)
  if weights is not None:
    surrogate = surrogate * keep(weights)
  loss, count = masking.masked_sum_count(surrogate, loss_mask)
  return PPOSums(
    loss=loss,
    count=count,
    clipped=jnp.sum(clipped > unclipped, dtype=jnp.float32),
    ratio=jnp.sum(keep(ratios), dtype=jnp.float32),
    approx_kl=jnp.sum(jnp.square(log_ratios) / 2, dtype=jnp.float32),
    policy_kl=jnp.sum(-log_ratios, dtype=jnp.float32),
  )


def importance_weights(
  old_logprobs: jax.Array, sampler_logprobs: jax.Array, loss_mask: jax.Array, *, cap: float
) -> jax.Array:
  """min(π_oldₜ / π_samplerₜ, cap): what a token weighs that another policy sampled.

  The clipped ratio then tells how far the policy went from π_old, and this weight whose sample it
  was: decoupled PPO (https://arxiv.org/abs/2110.00641), with the truncation that bounds the
  variance where the sampler is a copy of the policy in other numerics
  (https://openreview.net/forum?id=xsonlP8DRV).

  Args:
    old_logprobs: [B, T] float, log-probabilities under the policy before the update.
    sampler_logprobs: [B, T] float, under what the tokens were drawn from.
    loss_mask: [B, T] bool.
    cap: largest weight, at least 1.

  Returns:
    [B, T] float32 without a gradient, 1 outside the mask.
  """
  chex.assert_rank(old_logprobs, 2)
  chex.assert_equal_shape([old_logprobs, sampler_logprobs, loss_mask])
  chex.assert_type([old_logprobs, sampler_logprobs, loss_mask], [float, float, bool])
  log_ratios = jnp.where(loss_mask, old_logprobs - sampler_logprobs, 0)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratios), cap))


def kl_loss(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  loss_mask: jax.Array,
  *,
  estimator: str,
  clip_min: float | jax.Array,
  clip_max: float | jax.Array,
) -> jax.Array:
  """Σₜ clip(kₜ, clip_min, clip_max) over the mask, k an estimator of KL(policy, reference).

  The reference divides this sum by the number of rows, not of tokens. It clips masked tokens too,
  which adds a constant without gradient if 0 is outside the clip.

  Args:
    logprobs: [B, T] float, log-probabilities under the trained policy.
    ref_logprobs: [B, T] float, under the reference policy.
    loss_mask: [B, T] bool.
    estimator: as in `kl.token_kl`.
    clip_min: likewise.
    clip_max: likewise.

  Returns:
    float32 scalar.

  Raises:
    ValueError: If estimator is unknown.
  """
  divergence = kl.token_kl(
    logprobs, ref_logprobs, loss_mask, estimator=estimator, clip_min=clip_min, clip_max=clip_max
  )
  return jnp.sum(divergence, dtype=jnp.float32)


def nll(logprobs: jax.Array, loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood -Σₜ log πₜ over the mask, for the supervised warm start.

  Args:
    logprobs: [B, T] float.
    loss_mask: [B, T] bool.

  Returns:
    (sum, count), float32 scalars.
  """
  return masking.masked_sum_count(-logprobs, loss_mask)


def weighted_nll(
  logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  weights: jax.Array | None = None,
) -> jax.Array:
  """-Σₜ wₜ Aₜ log πₜ over the mask: with rewards for advantages what RestEM maximises
  (https://arxiv.org/abs/2312.06585, eq. 4), with others REINFORCE.

  Args:
    logprobs: [B, T] float.
    advantages: [B, T] float.
    loss_mask: [B, T] bool.
    weights: [B, T] float, wₜ; None: all are 1.

  Returns:
    float32 scalar.
  """
  keep = lambda x: jnp.where(loss_mask, x, 0)
  weighted = keep(advantages) if weights is None else keep(advantages) * keep(weights)
  total, _ = nll(keep(logprobs) * weighted, loss_mask)
  return total


def forward_kl(
  hidden: jax.Array,
  unembed: jax.Array,
  ref_hidden: jax.Array,
  ref_unembed: jax.Array,
  loss_mask: jax.Array,
  *,
  chunk: int,
  temperature: float | jax.Array,
  logit_cap: float | None = None,
  clip_min: float | jax.Array,
  clip_max: float | jax.Array,
) -> jax.Array:
  """Σₜ clip(KL(reference, policy)ₜ, clip_min, clip_max) over the mask, of whole distributions.

    KLₜ = Σᵥ π_refₜ(v) (log π_refₜ(v) - log πₜ(v))

  It spreads the policy over all that the reference holds likely, where `kl_loss` keeps it from what
  the reference holds unlikely. Chunks of tokens as in `logprobs.token_logprobs`, with the logits of
  both policies: the peak is twice as large. The reference gets no gradient.

  Args:
    hidden: [B, T, D] float, of the trained policy.
    unembed: [D, V] float.
    ref_hidden: [B, T, E] float, of the reference policy.
    ref_unembed: [E, V] float.
    loss_mask: [B, T] bool.
    chunk: as in `logprobs.token_logprobs`.
    temperature: likewise, of both policies.
    logit_cap: likewise.
    clip_min: lower bound of a token's KL.
    clip_max: upper bound.

  Returns:
    float32 scalar.
  """
  chex.assert_rank([hidden, unembed, ref_hidden, ref_unembed, loss_mask], [3, 2, 3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, ref_hidden, loss_mask], 2)
  chex.assert_equal(unembed.shape[1], ref_unembed.shape[1])
  chex.assert_type(loss_mask, bool)
  keep = lambda x: jnp.where(loss_mask[..., None], x, 0)
  ref_unembed = jax.lax.stop_gradient(ref_unembed)

  def chunk_divergence(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    states, ref_states = inputs  # [B, C, D], [B, C, E]
    logprobs = jax.nn.log_softmax(chunk_logits(states, unembed, temperature, logit_cap))
    ref_logprobs = jax.nn.log_softmax(chunk_logits(ref_states, ref_unembed, temperature, logit_cap))
    return kl.full(ref_logprobs, logprobs)

  states = keep(hidden), keep(jax.lax.stop_gradient(ref_hidden))
  # A scan cannot be merged with its own recomputation, so the barrier against it is not needed.
  recomputed = jax.checkpoint(chunk_divergence, prevent_cse=False)
  divergence = kl.clip(map_chunks(recomputed, states, chunk), clip_min, clip_max)
  total, _ = masking.masked_sum_count(divergence, loss_mask)
  return total
