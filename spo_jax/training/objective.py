"""What is minimised on a micro-batch of packed forests: the policy's losses, and the critic's.

Everything is a sum that the caller's `Scale` divides by counts of the whole update, so that
micro-batches add up exactly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spo_jax.algorithms import critic, losses, masking, preference
from spo_jax.algorithms.logprobs import token_logprobs, token_loss
from spo_jax.infra import hosts
from spo_jax.infra.mesh import split_tokens
from spo_jax.models.attention import PackedContext, attend_packed
from spo_jax.models.decoder import DecoderConfig, forward, unembedding
from spo_jax.training.packing import PackedForest

VALUE_HEAD = "value_head"  # [D] float32 beside the decoder's parameters


@dataclasses.dataclass(frozen=True)
class CriticConfig:
  """The critic; hashable, a static argument of jitted functions."""

  trunk: str  # "own": a decoder of its own; "shared": a head on the policy's
  gamma: float
  lam: float  # λ of GAE
  target: str  # "return" or "lambda_return"
  whiten_rewards: bool
  value_clip: float  # bound on a value's change in an iteration
  coef: float  # weight of the value loss beside the policy's, where the trunk is shared


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss; hashable, a static argument of jitted functions."""

  kind: str  # "ppo_clip", "likelihood" or "dpo_positive"
  temperature: float  # of sampling: log-probs are under softmax(logits / temperature)
  use_probability_mask: bool  # train only tokens that the sampling policy found unlikely
  probability_threshold: float  # below it a token is unlikely
  scaling: str  # of advantages: "whiten", "rescale" or "none"
  normalization: str  # the loss is divided by: "token", "sequence" or "constant"
  response_tokens: int  # longest response; the "constant", times sequences
  epsilon_low: float
  epsilon_high: float
  log_ratio_bound: float
  ratio_threshold: float  # a batch with a larger mean ratio is skipped
  importance_cap: float  # bound on the weight π_old / π_sampler of a token; 0: they are the same
  kl_coef: float  # weight of the KL to the reference policy; 0 leaves it out
  kl_in: str  # "loss", or "reward" for a critic
  kl_estimator: str
  kl_clip_max: float  # bound on a token's KL estimate, from both sides
  forward_kl_coef: float  # weight of KL(reference, policy) over the vocabulary; 0 leaves it out
  forward_kl_clip_max: float  # bound on a token's, from both sides
  dpo_beta: float  # β of "dpo_positive"
  dpo_penalty: float  # λ of "dpo_positive"
  logprob_chunk: int  # tokens a row that are unembedded at a time
  critic: CriticConfig | None

  @property
  def needs_reference(self) -> bool:
    """Whether the loss reads a reference policy."""
    return bool(self.kl_coef or self.forward_kl_coef) or self.kind == "dpo_positive"


class SamplerSums(NamedTuple):
  """How far the sampler was from the policy: sums over the loss mask, float32 scalars."""

  gap: jax.Array  # |log π_old - log π_sampler|
  weight: jax.Array  # importance weights


class TokenColumns(NamedTuple):
  """What the terms that are sums over tokens read of each, [B, R] or fewer; see `PackedForest`."""

  old_logprobs: jax.Array
  advantages: jax.Array
  ref_logprobs: jax.Array
  weights: jax.Array | None
  sampler_logprobs: jax.Array | None


class Scale(NamedTuple):
  """What sums over the tokens of an update are multiplied by, scalars."""

  per_token: jax.Array  # 1 / loss tokens
  per_episode: jax.Array  # 1 / episodes, see `PackedForest`
  per_value: jax.Array  # 1 / tokens that a critic learns from
  per_unit: jax.Array  # 1 / what the policy loss is a mean over; see `unit_scale`


def forest_states(cfg: DecoderConfig, params, batch: PackedForest) -> jax.Array:
  """[B, R, D]: the hidden state that predicts each target, which is the one at `prev`.

  Siblings share the state at the end of their parent. Of no meaning at roots and padding.
  """
  context = PackedContext(batch.until, batch.key_blocks)
  read = jnp.maximum(batch.prev, 0)
  tokens, positions = (split_tokens(cfg.mesh, x) for x in (batch.tokens, batch.positions))
  hidden_BxRxD, _ = forward(cfg, attend_packed, params, tokens, positions, context, read_BxR=read)
  return hidden_BxRxD


def states_logprobs(
  cfg: DecoderConfig, params, hidden: jax.Array, targets: jax.Array, *, temperature, chunk
) -> jax.Array:
  """[B, R] float32 log-probs of targets [B, R] from the states [B, R, D] that predict them."""
  return token_logprobs(
    hidden,
    unembedding(cfg, params),
    targets,
    chunk=chunk,
    temperature=temperature,
    logit_cap=cfg.logit_cap,
  )


def states_loss(
  cfg: DecoderConfig,
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  params,
  hidden: jax.Array,
  micro: PackedForest,
  columns: Any = None,
  scalars: Any = None,
  *,
  temperature: float,
  chunk: int,
) -> tuple[jax.Array, Any]:
  """`logprobs.token_loss` of a micro-batch's loss tokens from the states [B, R, D] that predict
  them."""
  return token_loss(
    loss_fn,
    hidden,
    unembedding(cfg, params),
    micro.targets,
    micro.loss_mask,
    columns,
    scalars,
    chunk=chunk,
    temperature=temperature,
    logit_cap=cfg.logit_cap,
  )


def forest_logprobs(
  cfg: DecoderConfig, params, batch: PackedForest, *, temperature: float, chunk: int
) -> jax.Array:
  """Log-probs of a micro-batch's targets, each predicted from the hidden state at `prev`.

  Args:
    cfg: decoder geometry.
    params: its parameters.
    batch: one micro-batch, arrays [B, ...].
    temperature: as in `logprobs.token_logprobs`.
    chunk: likewise.

  Returns:
    [B, R] float32; of no meaning at roots and padding.
  """
  hidden = forest_states(cfg, params, batch)
  return states_logprobs(cfg, params, hidden, batch.targets, temperature=temperature, chunk=chunk)


def with_value_head(params, mesh: Mesh):
  """Parameters with a value head of zeros: V = 0 at first, and GAE the return."""
  width = params["embedding"].shape[1]
  head = hosts.put(np.zeros(width, np.float32), lambda _: NamedSharding(mesh, PartitionSpec()))
  return params | {VALUE_HEAD: head}


def state_values(params, hidden: jax.Array) -> jax.Array:
  """[B, R] float32 values of states [B, R, D], by the value head of `params`."""
  return jnp.einsum("brd,d->br", hidden.astype(jnp.float32), params[VALUE_HEAD])


def unit_scale(loss_cfg: LossConfig, batch: PackedForest, used_M: jax.Array) -> jax.Array:
  """1 / what the policy loss is a mean over, in the micro-batches `used_M` [M] bool.

  "token": loss tokens, by their weights (DAPO, arXiv 2503.14476, eq. 12). "sequence": sequences,
  whose tokens weigh 1 / their number (GRPO, arXiv 2402.03300, eq. 3). "constant": segments,
  which are responses in a group, times the longest response (Dr. GRPO, arXiv 2503.20783). Pairs
  for "dpo_positive".
  """
  if loss_cfg.kind == "dpo_positive":
    units = jnp.sum((batch.pairs[..., 0] >= 0) & used_M[:, None], dtype=jnp.float32)
  elif loss_cfg.normalization == "constant":
    units = loss_cfg.response_tokens * jnp.sum(batch.episodes * used_M)
  else:
    weights = batch.loss_mask if batch.weights is None else batch.weights * batch.loss_mask
    units = jnp.sum(jnp.where(used_M[:, None, None], weights, 0), dtype=jnp.float32)
  return 1 / jnp.where(units > 0, units, 1)


def policy_objective(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  params,
  ref_params,
  micro: PackedForest,
  scale: Scale,
  kl_coef: jax.Array | float,
) -> tuple[jax.Array, dict[str, Any]]:
  """A micro-batch's share of the loss.

    loss = Σ_tokens w · PPO-clip / Σ w + kl_coef Σ_tokens KL / episodes
           + forward_kl_coef Σ_tokens KL(reference, policy) / tokens

  In place of the first term `loss_cfg.kind` may have -Σ w A log π / Σ w ("likelihood"), or
  DPO-positive over pairs of responses. A token's PPO-clip is multiplied by its importance weight,
  if there is an `importance_cap`; the divisor is not, so the sum estimates the policy's own mean.
  The KL is summed over an episode's tokens and averaged over episodes, as in the reference: one is
  a segment of a tree, or a whole response.

  Args:
    cfg: decoder geometry.
    loss_cfg: the loss.
    params: parameters.
    ref_params: of the reference policy; read for the forward KL alone.
    micro: one micro-batch of a prepared batch, arrays [B, ...].
    scale: see `Scale`.
    kl_coef: weight of the KL in the loss.

  Returns:
    (share of the loss, what adds up to the metrics).
  """
  hidden = forest_states(cfg, params, micro)
  columns = TokenColumns(*(getattr(micro, name) for name in TokenColumns._fields))
  factors = scale.per_unit, kl_coef * scale.per_episode
  if loss_cfg.kind == "dpo_positive":  # a pair's loss is no sum over tokens
    logprobs = states_logprobs(
      cfg,
      params,
      hidden,
      micro.targets,
      temperature=loss_cfg.temperature,
      chunk=loss_cfg.logprob_chunk,
    )
    loss, aux = _token_terms(loss_cfg, logprobs, micro.loss_mask, columns, factors)
    aux["pairs"] = _preference(loss_cfg, logprobs, micro)
    loss = loss + aux["pairs"].loss * scale.per_unit
  else:
    loss, aux = states_loss(
      cfg,
      functools.partial(_token_terms, loss_cfg),
      params,
      hidden,
      micro,
      columns,
      factors,
      temperature=loss_cfg.temperature,
      chunk=loss_cfg.logprob_chunk,
    )
  if loss_cfg.forward_kl_coef:
    divergence = _forward_kl(cfg, loss_cfg, params, ref_params, hidden, micro) * scale.per_token
    loss = loss + loss_cfg.forward_kl_coef * divergence
    aux["forward_kl"] = divergence
  if loss_cfg.critic is not None and loss_cfg.critic.trunk == "shared":
    values = value_sums(loss_cfg.critic, state_values(params, hidden), micro)
    loss = loss + loss_cfg.critic.coef * values.loss * scale.per_value
    aux["values"] = values
  return loss, aux | {"loss": loss, "kl": aux["kl"] * scale.per_token}


def _token_terms(
  loss_cfg: LossConfig,
  logprobs: jax.Array,
  mask: jax.Array,
  columns: TokenColumns,
  factors: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, dict[str, Any]]:
  """The terms of the loss that are sums over tokens, and what adds up to their metrics.

  `factors` are of the policy loss and of the KL.
  """
  per_unit, kl_factor = factors
  aux, weights = {}, columns.weights
  if loss_cfg.importance_cap:
    importance = losses.importance_weights(
      columns.old_logprobs, columns.sampler_logprobs, mask, cap=loss_cfg.importance_cap
    )
    weights = importance if weights is None else importance * weights
    aux["sampler"] = _sampler_sums(importance, mask, columns)
  aux["sums"] = losses.ppo_clip(
    logprobs,
    columns.old_logprobs,
    columns.advantages,
    mask,
    weights=weights,
    epsilon_low=loss_cfg.epsilon_low,
    epsilon_high=loss_cfg.epsilon_high,
    log_ratio_bound=loss_cfg.log_ratio_bound,
  )
  loss = jnp.zeros(())
  if loss_cfg.kind == "ppo_clip":
    loss = aux["sums"].loss * per_unit
  elif loss_cfg.kind == "likelihood":
    nll = losses.weighted_nll(logprobs, columns.advantages, mask, weights=columns.weights)
    loss = nll * per_unit
  aux["kl"] = jnp.zeros(())
  if loss_cfg.kl_coef:
    aux["kl"] = _kl(loss_cfg, logprobs, mask, columns)
    if loss_cfg.kl_in == "loss":
      loss = loss + kl_factor * aux["kl"]
  return loss, aux


def _sampler_sums(importance: jax.Array, mask: jax.Array, columns: TokenColumns) -> SamplerSums:
  gap = jnp.abs(columns.old_logprobs - columns.sampler_logprobs)
  total = lambda x: masking.masked_sum_count(x, mask)[0]
  return SamplerSums(total(gap), total(importance))


def _kl(loss_cfg: LossConfig, logprobs, mask, columns: TokenColumns) -> jax.Array:
  return losses.kl_loss(
    logprobs,
    columns.ref_logprobs,
    mask,
    estimator=loss_cfg.kl_estimator,
    clip_min=-loss_cfg.kl_clip_max,
    clip_max=loss_cfg.kl_clip_max,
  )


def _forward_kl(
  cfg: DecoderConfig, loss_cfg: LossConfig, params, ref_params, hidden, micro: PackedForest
) -> jax.Array:
  return losses.forward_kl(
    hidden,
    unembedding(cfg, params),
    micro.ref_hidden,
    unembedding(cfg, ref_params),
    micro.loss_mask,
    chunk=loss_cfg.logprob_chunk,
    temperature=loss_cfg.temperature,
    logit_cap=cfg.logit_cap,
    clip_min=-loss_cfg.forward_kl_clip_max,
    clip_max=loss_cfg.forward_kl_clip_max,
  )


def _preference(loss_cfg: LossConfig, logprobs, micro: PackedForest) -> preference.PreferenceSums:
  most = 2 * micro.pairs.shape[0]  # sequences of a micro-batch are those of its pairs
  total = lambda x: preference.sequence_logprobs(x, micro.sequence, num_sequences=most)
  chosen, rejected = jnp.maximum(micro.pairs, 0).T
  new, ref = total(logprobs), total(micro.ref_logprobs)
  return preference.dpo_positive(
    new[chosen],
    new[rejected],
    ref[chosen],
    ref[rejected],
    micro.pairs[:, 0] >= 0,
    beta=loss_cfg.dpo_beta,
    penalty=loss_cfg.dpo_penalty,
  )


def value_sums(
  critic_cfg: CriticConfig, values: jax.Array, micro: PackedForest
) -> critic.ValueSums:
  """The critic's loss on a micro-batch of a prepared batch; values [B, R]."""
  return critic.value_loss(
    values, micro.values, micro.returns, micro.value_mask, value_clip=critic_cfg.value_clip
  )
