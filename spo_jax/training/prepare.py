"""What is computed once an iteration, before any update: log-probs of the policy and the reference,
a critic's values and advantages, probability mask, scaled advantages.
"""

import functools

import jax
import jax.numpy as jnp

from spo_jax.algorithms import masking, returns
from spo_jax.models.decoder import DecoderConfig
from spo_jax.training.objective import (
  LossConfig,
  forest_logprobs,
  forest_states,
  state_values,
)
from spo_jax.training.packing import PackedForest


@functools.partial(jax.jit, static_argnums=(0, 1))
def prepare(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  ref_params,
  batch: PackedForest,
  micro_batches: jax.Array,
  critic_params=None,
  kl_coef: jax.Array | None = None,
  params=None,
) -> PackedForest:
  """Completes a packed batch.

  Statistics of the advantages are over all loss tokens of the iteration.

  Args:
    cfg: decoder geometry.
    loss_cfg: the loss.
    ref_params: parameters of the reference policy; read if the loss needs it.
    batch: arrays from `packing.pack`. With a critic the advantages are the responses'
      rewards.
    micro_batches: scalar int32, micro-batches in use.
    critic_params: parameters with a value head; read if there is a critic.
    kl_coef: weight of the KL in the reward; None is the config's.
    params: parameters of the policy; read if there is an `importance_cap`.

  Returns:
    The batch with `ref_logprobs`, `loss_mask` and `advantages` replaced; with `ref_hidden` for a
    forward KL, and `values`, `returns` and `value_mask` for a critic. With an `importance_cap`
    `old_logprobs` are those of `params`, and `sampler_logprobs` what they were.

  Raises:
    ValueError: if `loss_cfg.scaling` is unknown.
  """
  score = functools.partial(_for_each, batch, micro_batches)
  logprobs_of = lambda params: functools.partial(
    forest_logprobs,
    cfg,
    params,
    temperature=loss_cfg.temperature,
    chunk=loss_cfg.logprob_chunk,
  )
  if loss_cfg.importance_cap:
    sampled = batch.old_logprobs
    batch = batch._replace(
      old_logprobs=score(logprobs_of(params), sampled), sampler_logprobs=sampled
    )
  if loss_cfg.needs_reference:
    batch = batch._replace(ref_logprobs=score(logprobs_of(ref_params), batch.ref_logprobs))
    if loss_cfg.forward_kl_coef:
      hidden = functools.partial(forest_states, cfg, ref_params)
      room = jnp.zeros((*batch.targets.shape, cfg.width), cfg.dtype)
      batch = batch._replace(ref_hidden=score(hidden, room))
  if loss_cfg.critic is not None:
    values = score(
      lambda micro: state_values(critic_params, forest_states(cfg, critic_params, micro)),
      jnp.zeros(batch.targets.shape, jnp.float32),
    )
    coef = loss_cfg.kl_coef if kl_coef is None else kl_coef
    batch = _add_critic_advantages(loss_cfg, batch, values, coef)
  return _mask_and_scale(loss_cfg, batch)


def _for_each(batch: PackedForest, micro_batches: jax.Array, function, room: jax.Array):
  """function(micro-batch) -> [B, R, ...], of those in use, into `room` [M, B, R, ...]."""

  def one(i, store):
    return store.at[i].set(function(jax.tree.map(lambda x: x[i], batch)).astype(store.dtype))

  return jax.lax.fori_loop(0, micro_batches, one, room)


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _add_critic_advantages(
  loss_cfg: LossConfig, batch: PackedForest, values, kl_coef
) -> PackedForest:
  """GAE over each response; the packed rows hold responses end to end, each contiguous.

  Needs every token at its own place: R = T.
  """
  critic_cfg = loss_cfg.critic
  mask = _flat(batch.loss_mask)
  values = jnp.where(mask, _flat(values), 0)
  index = jnp.arange(mask.shape[1])[None]
  follows = jnp.roll(_flat(batch.prev), -1, axis=1) == index  # the next token continues this one
  continues = mask & jnp.roll(mask, -1, axis=1) & follows
  scores = jnp.where(mask & ~continues, _flat(batch.advantages), 0)
  rewards = scores
  if loss_cfg.kl_coef and loss_cfg.kl_in == "reward":
    rewards = returns.token_rewards(
      scores,
      _flat(batch.old_logprobs),
      _flat(batch.ref_logprobs),
      mask,
      kl_coef=kl_coef,
      estimator=loss_cfg.kl_estimator,
      clip_min=-loss_cfg.kl_clip_max,
      clip_max=loss_cfg.kl_clip_max,
    )
  if critic_cfg.whiten_rewards:
    rewards = masking.whiten(rewards, mask, shift_mean=False, unbiased=False)
  advantages = returns.gae(rewards, values, continues, gamma=critic_cfg.gamma, lam=critic_cfg.lam)
  if critic_cfg.target == "return":
    targets = returns.discounted_returns(rewards, continues, gamma=critic_cfg.gamma)
  else:
    targets = advantages + values
  shape = batch.targets.shape
  return batch._replace(
    advantages=advantages.reshape(shape),
    values=values.reshape(shape),
    returns=targets.reshape(shape),
    value_mask=batch.loss_mask,  # all of them: a probability mask is the policy's alone
  )


def _mask_and_scale(loss_cfg: LossConfig, batch: PackedForest) -> PackedForest:
  segment_mask, advantages = _flat(batch.loss_mask), _flat(batch.advantages)
  mask = segment_mask
  if loss_cfg.use_probability_mask:
    corrected = batch.sampler_logprobs is not None
    found = batch.sampler_logprobs if corrected else batch.old_logprobs
    mask = masking.probability_mask(_flat(found), mask, threshold=loss_cfg.probability_threshold)
  if loss_cfg.scaling == "whiten":
    advantages = masking.whiten(
      advantages, segment_mask, statistics_mask=mask, shift_mean=True, unbiased=True
    )
  elif loss_cfg.scaling == "rescale":
    advantages = masking.rescale(advantages, segment_mask, unbiased=True)
  elif loss_cfg.scaling != "none":
    raise ValueError(f"unknown scaling {loss_cfg.scaling!r}, one of whiten, rescale, none")
  shape = batch.targets.shape
  return batch._replace(loss_mask=mask.reshape(shape), advantages=advantages.reshape(shape))
