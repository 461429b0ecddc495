"""One optimiser step on packed forests: a policy-gradient step, and the supervised step of the warm
start.

Batches are [M, B, T]: M micro-batches, of which a traced number is used, so that a batch of any
size runs in one compiled program. Losses are sums divided by counts of the whole batch: gradient
accumulation is exact.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.algorithms import losses, masking
from spo_jax.models.attention import PackedContext, attend_packed
from spo_jax.models.decoder import DecoderConfig, forward, unembedding
from spo_jax.training.optimizer import OptimizerConfig, make_optimizer
from spo_jax.training.packing import PackedForest


class TrainState(NamedTuple):
  """What the optimiser changes."""

  params: Any
  opt_state: Any
  step: jax.Array  # scalar int32, updates done


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss; hashable, a static argument of jitted functions."""

  temperature: float  # of sampling: log-probs are under softmax(logits / temperature)
  use_probability_mask: bool  # train only tokens that the sampling policy found unlikely
  probability_threshold: float  # below it a token is unlikely
  scaling: str  # of advantages: "whiten", "rescale" or "none"
  epsilon_low: float
  epsilon_high: float
  log_ratio_bound: float
  ratio_threshold: float  # a batch with a larger mean ratio is skipped
  kl_coef: float  # weight of the KL to the reference policy; 0 leaves the reference policy out
  kl_estimator: str
  kl_clip_max: float  # bound on a token's KL estimate, from both sides
  logprob_chunk: int  # tokens a row that are unembedded at a time


def forest_logprobs(
  cfg: DecoderConfig, params, batch: PackedForest, *, temperature: float, chunk: int
) -> jax.Array:
  """Log-probs of a micro-batch's tokens, each predicted from the hidden state at `prev`.

  Args:
    cfg: decoder geometry.
    params: its parameters.
    batch: one micro-batch, arrays [B, T].
    temperature: as in `losses.token_logprobs`.
    chunk: likewise.

  Returns:
    [B, T] float32; of no meaning at roots and padding.
  """
  context = PackedContext(batch.until, batch.key_blocks)
  hidden_BxTxD, _ = forward(cfg, attend_packed, params, batch.tokens, batch.positions, context)
  # Gathered before the unembedding: siblings share the state at the end of their parent.
  prev_BxT = jnp.maximum(batch.prev, 0)
  hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, prev_BxT[..., None], axis=1)
  return losses.token_logprobs(
    hidden_BxTxD,
    unembedding(cfg, params),
    batch.tokens,
    chunk=chunk,
    temperature=temperature,
    logit_cap=cfg.logit_cap,
  )


def new_state(params, optimizer_cfg: OptimizerConfig) -> TrainState:
  """The state before the first update."""
  opt_state = make_optimizer(optimizer_cfg).init(params)
  return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def state_shardings(params, optimizer_cfg: OptimizerConfig) -> TrainState:
  """Where a state lies: moments where their parameters do, counts everywhere.

  Args:
    params: parameters, or their shapes with shardings.
    optimizer_cfg: the optimiser.
  """
  home = jax.tree.leaves(params)[0].sharding
  whole = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else home
  optimizer = make_optimizer(optimizer_cfg)
  opt_state = optax.tree.map_params(
    optimizer,
    lambda _, param: param.sharding,
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda _: whole,
  )
  return TrainState(jax.tree.map(lambda param: param.sharding, params), opt_state, whole)


def init_state(params, optimizer_cfg: OptimizerConfig) -> TrainState:
  """The state before the first update, where `state_shardings` puts it."""
  state = new_state(params, optimizer_cfg)
  return jax.device_put(state, state_shardings(params, optimizer_cfg))


@functools.partial(jax.jit, static_argnums=(0, 1))
def prepare(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  ref_params,
  batch: PackedForest,
  micro_batches: jax.Array,
) -> PackedForest:
  """What is computed once an iteration, before any update: reference log-probs, probability mask,
  scaled advantages.

  Statistics of the advantages are over all loss tokens of the iteration.

  Args:
    cfg: decoder geometry.
    loss_cfg: the loss.
    ref_params: parameters of the reference policy; read if `kl_coef` is not 0.
    batch: [M, B, T] arrays from `packing.pack`.
    micro_batches: scalar int32, micro-batches in use.

  Returns:
    The batch with `ref_logprobs`, `loss_mask` and `advantages` replaced.

  Raises:
    ValueError: if `loss_cfg.scaling` is unknown.
  """
  flat = lambda x: x.reshape(-1, x.shape[-1])
  segment_mask, advantages = flat(batch.loss_mask), flat(batch.advantages)
  mask = segment_mask
  if loss_cfg.use_probability_mask:
    mask = masking.probability_mask(
      flat(batch.old_logprobs), mask, threshold=loss_cfg.probability_threshold
    )
  if loss_cfg.scaling == "whiten":
    advantages = masking.whiten(
      advantages, segment_mask, statistics_mask=mask, shift_mean=True, unbiased=True
    )
  elif loss_cfg.scaling == "rescale":
    advantages = masking.rescale(advantages, segment_mask, unbiased=True)
  elif loss_cfg.scaling != "none":
    raise ValueError(f"unknown scaling {loss_cfg.scaling!r}, one of whiten, rescale, none")
  shape = batch.tokens.shape
  batch = batch._replace(loss_mask=mask.reshape(shape), advantages=advantages.reshape(shape))
  if loss_cfg.kl_coef == 0:
    return batch

  def score(i, ref_logprobs):
    micro = jax.tree.map(lambda x: x[i], batch)
    logprobs = forest_logprobs(
      cfg, ref_params, micro, temperature=loss_cfg.temperature, chunk=loss_cfg.logprob_chunk
    )
    return ref_logprobs.at[i].set(logprobs)

  ref_logprobs = jax.lax.fori_loop(0, micro_batches, score, batch.ref_logprobs)
  return batch._replace(ref_logprobs=ref_logprobs)


@functools.cache
def _jit(step, treedef, shardings):
  lies = (jax.tree.unflatten(treedef, shardings), None)
  return jax.jit(step, static_argnums=(0, 1, 2), donate_argnums=3, out_shardings=lies)


def compiled_step(step, state: TrainState):
  """The jitted form of `train_step` or `supervised_step` for states that lie as this one does."""
  leaves, treedef = jax.tree.flatten(state)
  return _jit(step.__wrapped__, treedef, tuple(leaf.sharding for leaf in leaves))


def _in_place(step):
  """Compiles step(static, static, static, state, ...) -> (state, ...) so that the state stays put.

  The state is donated, and the new one has the old one's shardings: left to the compiler they may
  change from step to step, and every change would compile all programs that take it again.
  """

  @functools.wraps(step)
  def run(cfg, loss_cfg, optimizer_cfg, state, *batch):
    return compiled_step(run, state)(cfg, loss_cfg, optimizer_cfg, state, *batch)

  return run


def _accumulate(loss_fn, params, batch: PackedForest, start, count):
  """Sums loss_fn(params, micro) -> (loss, aux) and its gradient over `count` micro-batches."""
  micro_batch = lambda i: jax.tree.map(lambda x: x[i], batch)
  gradient = jax.grad(loss_fn, has_aux=True)
  shapes = jax.eval_shape(gradient, params, micro_batch(0))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(i, total):
    return jax.tree.map(jnp.add, total, gradient(params, micro_batch(start + i)))

  return jax.lax.fori_loop(0, count, add, zeros)


def _apply(optimizer_cfg, state: TrainState, grads) -> TrainState:
  updates, opt_state = make_optimizer(optimizer_cfg).update(grads, state.opt_state, state.params)
  return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


@_in_place
def train_step(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  optimizer_cfg: OptimizerConfig,
  state: TrainState,
  batch: PackedForest,
  start: jax.Array,
  count: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from micro-batches start .. start + count - 1.

    loss = Σ_tokens PPO-clip / tokens + kl_coef Σ_tokens KL / segments

  The KL is summed over a segment's tokens and averaged over segments, as in the reference. A batch
  whose mean ratio exceeds `ratio_threshold`, whose gradient is not finite, or without a token in
  its loss mask, changes nothing, to the last bit: with gradient 0 Adam would go on along its
  moments, decay the weights, and count an update of the schedule.

  Args:
    cfg: decoder geometry.
    loss_cfg: the loss.
    optimizer_cfg: the optimiser.
    state: donated.
    batch: [M, B, T] arrays from `prepare`.
    start: scalar int32.
    count: scalar int32.

  Returns:
    (state, metrics): scalars `loss`, `kl` (to the reference policy, mean a token), `policy_kl` (to
    the sampling policy), `clip_fraction`, `ratio`, `grad_norm`, `tokens`, `skipped`.
  """
  used_M = jnp.arange(batch.segments.shape[0])
  used_M = (used_M >= start) & (used_M < start + count)
  tokens = jnp.sum(batch.loss_mask & used_M[:, None, None], dtype=jnp.float32)
  segments = jnp.sum(batch.segments * used_M)
  per_token, per_segment = 1 / jnp.maximum(tokens, 1), 1 / jnp.maximum(segments, 1)

  def loss_fn(params, micro: PackedForest):
    logprobs = forest_logprobs(
      cfg, params, micro, temperature=loss_cfg.temperature, chunk=loss_cfg.logprob_chunk
    )
    sums = losses.ppo_clip(
      logprobs,
      micro.old_logprobs,
      micro.advantages,
      micro.loss_mask,
      epsilon_low=loss_cfg.epsilon_low,
      epsilon_high=loss_cfg.epsilon_high,
      log_ratio_bound=loss_cfg.log_ratio_bound,
    )
    loss, kl = sums.loss * per_token, jnp.zeros(())
    if loss_cfg.kl_coef:
      kl = losses.kl_loss(
        logprobs,
        micro.ref_logprobs,
        micro.loss_mask,
        estimator=loss_cfg.kl_estimator,
        clip_min=-loss_cfg.kl_clip_max,
        clip_max=loss_cfg.kl_clip_max,
      )
      loss = loss + loss_cfg.kl_coef * kl * per_segment
    return loss, {"loss": loss, "kl": kl * per_token, "sums": sums}

  grads, aux = _accumulate(loss_fn, state.params, batch, start, count)
  sums = aux["sums"]
  ratio = sums.ratio * per_token
  grad_norm = optax.tree.norm(grads)
  skipped = ~((ratio <= loss_cfg.ratio_threshold) & jnp.isfinite(grad_norm) & (tokens > 0))
  updated = _apply(optimizer_cfg, state, grads)
  state = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), updated, state)
  metrics = {
    "loss": aux["loss"],
    "kl": aux["kl"],
    "policy_kl": sums.policy_kl * per_token,
    "clip_fraction": sums.clipped * per_token,
    "ratio": ratio,
    "grad_norm": grad_norm,
    "tokens": tokens,
    "skipped": skipped.astype(jnp.float32),
  }
  return state, metrics


@_in_place
def supervised_step(
  cfg: DecoderConfig,
  logprob_chunk: int,
  optimizer_cfg: OptimizerConfig,
  state: TrainState,
  batch: PackedForest,
  count: jax.Array,
) -> tuple[TrainState, jax.Array]:
  """One update of the warm start: the mean negative log-likelihood a loss token over `count`
  micro-batches.

  Returns:
    (state, loss before the update).
  """
  tokens = jnp.sum(batch.loss_mask, dtype=jnp.float32)

  def loss_fn(params, micro: PackedForest):
    logprobs = forest_logprobs(cfg, params, micro, temperature=1.0, chunk=logprob_chunk)
    loss, _ = losses.nll(logprobs, micro.loss_mask)
    loss = loss / jnp.maximum(tokens, 1)
    return loss, loss

  grads, loss = _accumulate(loss_fn, state.params, batch, 0, count)
  return _apply(optimizer_cfg, state, grads), loss
