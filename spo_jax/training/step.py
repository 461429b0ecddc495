"""The optimiser steps on packed forests: of the policy, of a critic of its own, and the supervised
step of the warm start.

Batches are [M, B, T]: M micro-batches, of which a traced number is used, so that a batch of any
size runs in one compiled program. Losses are sums divided by counts of the whole batch: gradient
accumulation is exact.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.algorithms import critic, losses
from spo_jax.models.decoder import DecoderConfig
from spo_jax.training.objective import (
  LossConfig,
  Scale,
  forest_states,
  policy_objective,
  state_values,
  states_loss,
  unit_scale,
  value_sums,
)
from spo_jax.training.optimizer import OptimizerConfig, make_optimizer
from spo_jax.training.packing import PackedForest


class TrainState(NamedTuple):
  """What the optimiser changes."""

  params: Any
  opt_state: Any
  step: jax.Array  # scalar int32, updates done


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
  leaves, treedef = jax.tree.flatten(state_shardings(params, optimizer_cfg)[1:])
  return TrainState(params, *_jit_rest(optimizer_cfg, treedef, tuple(leaves))(params))


@functools.cache
def _jit_rest(optimizer_cfg: OptimizerConfig, treedef, shardings):
  """One function for all states that lie alike: a run may begin anew at every iteration."""
  lies = jax.tree.unflatten(treedef, shardings)
  return jax.jit(lambda params: new_state(params, optimizer_cfg)[1:], out_shardings=lies)


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
  gradient = jax.jit(jax.grad(loss_fn, has_aux=True))  # traced once, for its shapes and the loop
  shapes = jax.eval_shape(gradient, params, micro_batch(0))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(i, total):
    return jax.tree.map(jnp.add, total, gradient(params, micro_batch(start + i)))

  return jax.lax.fori_loop(0, count, add, zeros)


def _apply(optimizer_cfg, state: TrainState, grads) -> TrainState:
  updates, opt_state = make_optimizer(optimizer_cfg).update(grads, state.opt_state, state.params)
  return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def _per(count: jax.Array) -> jax.Array:
  return 1 / jnp.maximum(count, 1)


def _in_use(batch: PackedForest, start, count) -> jax.Array:
  """[M] bool, micro-batches start .. start + count - 1."""
  index_M = jnp.arange(batch.episodes.shape[0])
  return (index_M >= start) & (index_M < start + count)


def _tokens(mask: jax.Array | None, used_M: jax.Array) -> jax.Array:
  """How many tokens of a mask [M, B, R] the micro-batches in use have, scalar float32."""
  if mask is None:
    return jnp.zeros(())
  return jnp.sum(mask & used_M[:, None, None], dtype=jnp.float32)


def policy_gradient(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  params,
  batch: PackedForest,
  start: jax.Array,
  count: jax.Array,
  kl_coef: jax.Array | None = None,
  ref_params=None,
):
  """The gradient of `policy_objective` over micro-batches start .. start + count - 1.

  Args: as of `train_step`.

  Returns:
    (gradient, metrics): a pytree like params, and scalars, those of `train_step` but for
    `skipped`.
  """
  used_M = _in_use(batch, start, count)
  tokens = _tokens(batch.loss_mask, used_M)
  scale = Scale(
    per_token=_per(tokens),
    per_episode=_per(jnp.sum(batch.episodes * used_M)),
    per_value=_per(_tokens(batch.value_mask, used_M)),
    per_unit=unit_scale(loss_cfg, batch, used_M),
  )
  kl_coef = loss_cfg.kl_coef if kl_coef is None else kl_coef
  loss_fn = lambda params, micro: policy_objective(
    cfg, loss_cfg, params, ref_params, micro, scale, kl_coef
  )
  grads, aux = _accumulate(loss_fn, params, batch, start, count)
  sums = aux["sums"]
  metrics = {
    "loss": aux["loss"],
    "kl": aux["kl"],
    "policy_kl": sums.policy_kl * scale.per_token,
    "clip_fraction": sums.clipped * scale.per_token,
    "ratio": sums.ratio * scale.per_token,
    "grad_norm": optax.tree.norm(grads),
    "tokens": tokens,
  }
  if "sampler" in aux:
    metrics["logprob_gap"] = aux["sampler"].gap * scale.per_token
    metrics["importance_weight"] = aux["sampler"].weight * scale.per_token
  if "forward_kl" in aux:
    metrics["forward_kl"] = aux["forward_kl"]
  if "pairs" in aux:
    metrics["pairs_ordered"] = aux["pairs"].ordered * scale.per_unit
    metrics["pairs_lowered"] = aux["pairs"].lowered * scale.per_unit
  if "values" in aux:
    metrics |= _value_metrics(aux["values"])
  return grads, metrics


def _value_metrics(sums: critic.ValueSums) -> dict[str, jax.Array]:
  per_token = _per(sums.count)
  return {
    "value_loss": sums.loss * per_token,
    "value": sums.values * per_token,
    "value_clip_fraction": sums.clipped * per_token,
    "explained_variance": critic.explained_variance(sums),
  }


def _unless(skipped: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  return jax.tree.map(lambda new, old: jnp.where(skipped, old, new), new, old)


@_in_place
def train_step(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  optimizer_cfg: OptimizerConfig,
  state: TrainState,
  batch: PackedForest,
  start: jax.Array,
  count: jax.Array,
  kl_coef: jax.Array | None = None,
  ref_params=None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from micro-batches start .. start + count - 1, by `objective.policy_objective`.

  A batch whose mean ratio exceeds `ratio_threshold`, whose gradient is not finite, or without a
  token in its loss mask, changes nothing, to the last bit: with gradient 0 Adam would go on along
  its moments, decay the weights, and count an update of the schedule. The ratio is that of
  "ppo_clip"; other losses may go as far as they like.

  Args:
    cfg: decoder geometry.
    loss_cfg: the loss.
    optimizer_cfg: the optimiser.
    state: donated.
    batch: [M, B, T] arrays from `prepare`.
    start: scalar int32.
    count: scalar int32.
    kl_coef: weight of the KL, where it changes during a run; None is the config's.
    ref_params: parameters of the reference policy, for the forward KL.

  Returns:
    (state, metrics): scalars `loss`, `kl` (to the reference policy, mean a token), `policy_kl` (to
    the policy of the old log-probs), `clip_fraction`, `ratio`, `grad_norm`, `tokens`, `skipped`,
    `unstable` (skipped, though there were tokens);
    `logprob_gap` and `importance_weight` (means a token; see `SamplerSums`), `forward_kl` (mean a
    token), `pairs_ordered` and `pairs_lowered` (shares; see `PreferenceSums`), and those of
    `critic_step`, where there are such.
  """
  grads, metrics = policy_gradient(
    cfg, loss_cfg, state.params, batch, start, count, kl_coef, ref_params
  )
  near = metrics["ratio"] <= loss_cfg.ratio_threshold if loss_cfg.kind == "ppo_clip" else True
  unstable = ~(near & jnp.isfinite(metrics["grad_norm"]))
  skipped = unstable | (metrics["tokens"] == 0)
  state = _unless(skipped, _apply(optimizer_cfg, state, grads), state)
  told = {"skipped": skipped, "unstable": unstable & (metrics["tokens"] > 0)}
  return state, metrics | {name: flag.astype(jnp.float32) for name, flag in told.items()}


@_in_place
def critic_step(
  cfg: DecoderConfig,
  loss_cfg: LossConfig,
  optimizer_cfg: OptimizerConfig,
  state: TrainState,
  batch: PackedForest,
  start: jax.Array,
  count: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of a critic with a trunk of its own, from micro-batches start .. start + count - 1.

  What is not finite, or without a token, changes nothing.

  Args:
    cfg: decoder geometry.
    loss_cfg: its `critic`.
    optimizer_cfg: the critic's optimiser.
    state: the critic's, donated.
    batch: [M, B, T] arrays from `prepare`.
    start: scalar int32.
    count: scalar int32.

  Returns:
    (state, metrics): scalars `value_loss`, `value`, `value_clip_fraction` (means a token),
    `explained_variance` (of the returns, by the values before the update), `value_grad_norm`.
  """
  tokens = _tokens(batch.value_mask, _in_use(batch, start, count))

  def loss_fn(params, micro: PackedForest):
    sums = value_sums(
      loss_cfg.critic, state_values(params, forest_states(cfg, params, micro)), micro
    )
    return sums.loss * _per(tokens), sums

  grads, sums = _accumulate(loss_fn, state.params, batch, start, count)
  norm = optax.tree.norm(grads)
  skipped = ~(jnp.isfinite(norm) & (tokens > 0))
  state = _unless(skipped, _apply(optimizer_cfg, state, grads), state)
  return state, _value_metrics(sums) | {"value_grad_norm": norm}


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
    hidden = forest_states(cfg, params, micro)
    nll = lambda logprobs, mask, *_: losses.nll(logprobs, mask)
    loss, _ = states_loss(cfg, nll, params, hidden, micro, temperature=1.0, chunk=logprob_chunk)
    loss = loss / jnp.maximum(tokens, 1)
    return loss, loss

  grads, loss = _accumulate(loss_fn, state.params, batch, 0, count)
  return _apply(optimizer_cfg, state, grads), loss
