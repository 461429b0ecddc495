"""Learning from pairs of responses to one prompt, a right and a wrong one: DPO and DPO-positive."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from spo_jax.algorithms import masking


class PreferenceSums(NamedTuple):
  """Sums over the valid pairs, float32 scalars."""

  loss: jax.Array
  count: jax.Array  # pairs
  ordered: jax.Array  # pairs whose chosen response gained more than the rejected one
  lowered: jax.Array  # pairs whose chosen response is less likely than under the reference


def sequence_logprobs(logprobs: jax.Array, sequence: jax.Array, *, num_sequences: int) -> jax.Array:
  """log π(response) of the responses in a batch: sums of their tokens' log-probabilities.

  Args:
    logprobs: [B, T] float; may be anything (NaN too) where sequence is -1.
    sequence: [B, T] int32 below num_sequences, the response that a token belongs to; -1: none.
    num_sequences: S.

  Returns:
    [S] float32; 0 for a response without tokens.
  """
  chex.assert_rank(logprobs, 2)
  chex.assert_equal_shape([logprobs, sequence])
  chex.assert_type([logprobs, sequence], [float, int])
  # What has an id outside [0, S) is dropped.
  return jax.ops.segment_sum(
    logprobs.astype(jnp.float32).reshape(-1), sequence.reshape(-1), num_segments=num_sequences
  )


def dpo_positive(
  chosen: jax.Array,
  rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  valid: jax.Array,
  *,
  beta: float,
  penalty: float,
) -> PreferenceSums:
  """DPO-positive of "Smaug" by Pal et al. (https://arxiv.org/abs/2402.13228).

    loss = Σ -log σ(β (gain(chosen) - gain(rejected) - λ max(0, -gain(chosen))))
    gain = log π - log π_ref

  Plain DPO (https://arxiv.org/abs/2305.18290, λ = 0) may make both responses less likely as long as
  the rejected one falls further; λ makes a fall of the chosen one cost. Where policy and reference
  agree the loss is log 2 a pair, with DPO's gradient.

  Args:
    chosen: [P] float, log-probabilities of the chosen responses under the trained policy.
    rejected: [P] float, of the rejected ones.
    ref_chosen: [P] float, under the reference policy.
    ref_rejected: [P] float, likewise.
    valid: [P] bool; the rest is padding.
    beta: β, how far the policy is held to the reference.
    penalty: λ >= 0; 0 is DPO.

  Returns:
    `PreferenceSums`.
  """
  chex.assert_rank(chosen, 1)
  chex.assert_equal_shape([chosen, rejected, ref_chosen, ref_rejected, valid])
  chex.assert_type([chosen, rejected, ref_chosen, ref_rejected, valid], [float] * 4 + [bool])
  keep = lambda x: jnp.where(valid, x, 0)
  chosen_gain = keep(chosen) - keep(ref_chosen)
  rejected_gain = keep(rejected) - keep(ref_rejected)
  # relu's gradient is 0 at 0, where training starts; that of maximum would be 1/2.
  margin = chosen_gain - rejected_gain - penalty * jax.nn.relu(-chosen_gain)
  loss, count = masking.masked_sum_count(-jax.nn.log_sigmoid(beta * margin), valid)
  return PreferenceSums(
    loss=loss,
    count=count,
    ordered=jnp.sum(chosen_gain > rejected_gain, dtype=jnp.float32),
    lowered=jnp.sum(chosen_gain < 0, dtype=jnp.float32),
  )
