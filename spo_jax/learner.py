"""The policy in training, with its reference and its critic: from estimates to updates."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.algorithms.kl_control import KL_CONTROLS
from spo_jax.config import Config
from spo_jax.forest import Forest
from spo_jax.infra import hosts
from spo_jax.infra.mesh import shard_batch
from spo_jax.run import Run
from spo_jax.training import objective, packing
from spo_jax.training.prepare import prepare
from spo_jax.training.step import TrainState, critic_step, init_state, train_step
from spo_jax.training.trimming import read_tokens, reads_unlikely_alone, trim
from spo_jax.training.weights import episode_shares, segment_weights

NO_TOKENS_WEIGHT = 1e-9  # of an optimiser step without tokens in the metrics' means


class TrainingSet(NamedTuple):
  """What an iteration trains: N nodes, on the host."""

  forest: Forest
  advantages: np.ndarray  # [N] float32
  trained: np.ndarray  # [N] bool, segments that enter the loss
  pairs: np.ndarray | None = None  # [P, 2] node ids of responses, chosen and rejected


class Learner:
  """What is trained. `arrays` and `record` are its part of a checkpoint."""

  def __init__(self, run: Run, params: Any):
    """Begins with a policy; its arrays are the learner's from now on, and are donated."""
    self._run = run
    self._config = config = run.config
    self._loss_cfg = loss_config(config)
    # Copies: training donates its parameters.
    copy = lambda: jax.tree.map(jnp.copy, params)
    self._ref_params = copy() if needs_reference(config) else None
    self._critic: TrainState | None = None
    if config.critic.trunk == "own":
      self._critic = init_state(
        objective.with_value_head(copy(), run.mesh), config.critic_optimizer
      )
    if config.critic.trunk == "shared":
      params = objective.with_value_head(params, run.mesh)
    self._policy = init_state(params, config.optimizer)
    self._kl_coef = config.loss.kl_coef

  @property
  def params(self) -> Any:
    """Parameters of the policy."""
    return self._policy.params

  def arrays(self) -> Any:
    """What checkpoints hold."""
    return self._policy if self._critic is None else (self._policy, self._critic)

  def record(self) -> dict[str, float]:
    """Numbers that checkpoints hold."""
    return {"kl_coef": self._kl_coef}

  def load(self, arrays: Any, record: dict[str, float]) -> None:
    """Takes up what `arrays` and `record` gave."""
    if self._critic is None:
      self._policy = arrays
    else:
      self._policy, self._critic = arrays
    self._kl_coef = record["kl_coef"]

  def update(self, chosen: TrainingSet) -> dict[str, float]:
    """Packs the trained segments and takes the iteration's optimiser steps; returns metrics."""
    config = self._config
    forest, advantages, trained, pairs = chosen
    began = time.perf_counter()
    if config.restart:
      self._policy = init_state(jax.tree.map(jnp.copy, self._ref_params), config.optimizer)
    trimmed, in_loss = trim(forest, trained, config)
    packed, counts = packing.pack(
      trimmed,
      advantages,
      in_loss,
      pack_config(config),
      read=read_tokens(trimmed, in_loss, config),
      episodes=episode_shares(forest, trained, config),
      weights=segment_weights(forest, trained, config),
      pairs=pairs,
      most_pairs=most_pairs(config),
    )
    packed_at = time.perf_counter()
    batch = self._prepare(packed, counts["micro_batches"])
    steps = self._steps(batch, counts["micro_batches"])
    metrics = _mean(steps)
    if config.loss.kl_control == "adaptive":
      metrics["kl_coef"] = self._kl_coef
    tokens = float(sum(step["tokens"] for step in steps))
    if tokens and math.isfinite(metrics["kl"]):  # else no KL was measured
      self._kl_coef = KL_CONTROLS[config.loss.kl_control](
        self._kl_coef,
        metrics["kl"],
        target=config.loss.kl_target,
        horizon=config.loss.kl_horizon,
        samples=config.responses,
      )
    size = np.abs(advantages[trained])
    return {
      **{f"train/{name}": value for name, value in metrics.items() if name != "tokens"},
      "train/tokens": tokens,
      "train/segments": int(trained.sum()),
      "train/advantage_abs": float(np.mean(size)) if len(size) else 0.0,
      "train/packed_tokens": counts["packed_tokens"],
      "train/copies": counts["packed_tokens"] / max(1, counts["distinct_tokens"]),
      "train/row_fill": counts["packed_tokens"]
      / max(1, counts["rows"] * config.packing.row_length),
      "time/pack_s": packed_at - began,
      "time/update_s": time.perf_counter() - packed_at,
    }

  def _prepare(self, packed: packing.PackedForest, used: int) -> packing.PackedForest:
    config, run = self._config, self._run
    critic = self._policy if config.critic.trunk == "shared" else self._critic
    return prepare(
      run.model,
      self._loss_cfg,
      self._ref_params if self._loss_cfg.needs_reference else None,
      shard_batch(run.mesh, packed),
      jnp.int32(used),
      critic_params=None if critic is None else critic.params,
      kl_coef=self._traced_kl_coef(),
      params=self._policy.params if self._loss_cfg.importance_cap else None,
    )

  def _traced_kl_coef(self) -> jax.Array | None:
    adaptive = self._config.loss.kl_control == "adaptive"
    return jnp.float32(self._kl_coef) if adaptive else None

  def _steps(self, batch: packing.PackedForest, used: int) -> list[dict[str, Any]]:
    """Metrics of the updates, each from its share of the micro-batches."""
    config, run = self._config, self._run
    edges = np.linspace(0, used, config.minibatches + 1).astype(np.int32)
    spans = list(zip(edges[:-1], edges[1:], strict=True)) * config.epochs
    ref_params = self._ref_params if config.loss.forward_kl_coef else None
    steps = []
    with run.progress.bar("update", total=len(spans)) as advance:
      for start, stop in spans:
        share = (batch, jnp.int32(start), jnp.int32(stop - start))
        self._policy, metrics = train_step(
          run.model,
          self._loss_cfg,
          config.optimizer,
          self._policy,
          *share,
          self._traced_kl_coef(),
          ref_params,
        )
        if self._critic is not None:
          self._critic, of_critic = critic_step(
            run.model, self._loss_cfg, config.critic_optimizer, self._critic, *share
          )
          metrics |= of_critic
        steps.append(metrics)
        advance(1)
      return hosts.fetch(steps)


def _mean(steps: list[dict[str, Any]]) -> dict[str, float]:
  """Means over updates, each weighing as many as it has tokens."""
  weights = np.maximum([step["tokens"] for step in steps], NO_TOKENS_WEIGHT)
  return {
    name: float(np.average([step[name] for step in steps], weights=weights)) for name in steps[0]
  }


def needs_reference(config: Config) -> bool:
  """Whether a run keeps the parameters that it began with."""
  return loss_config(config).needs_reference or config.restart


def most_pairs(config: Config) -> int:
  """Pairs of responses that an iteration can have."""
  return config.rollout.prompts * config.rollout.samples // 2


def pack_config(config: Config) -> packing.PackConfig:
  """The shape of the packed batch, fixed for the whole run."""
  rows = config.packing
  shape = packing.PackConfig(
    rows.row_length,
    rows.rows,
    rows.query_block,
    rows.key_block,
    updates=config.minibatches,
    loss_length=rows.loss_length if reads_unlikely_alone(config) else 0,
  )
  return packing.with_room(
    shape, config.longest_segments, config.longest_tree, config.rollout.prompts
  )


def loss_config(config: Config) -> objective.LossConfig:
  """The fields of the loss, from where the config keeps them."""
  critic = None
  if config.critic.trunk != "none":
    critic = objective.CriticConfig(**dataclasses.asdict(config.critic))
  loss = dataclasses.asdict(config.loss)
  names = {field.name for field in dataclasses.fields(objective.LossConfig)}
  return objective.LossConfig(
    temperature=config.rollout.temperature,
    probability_threshold=config.probability_threshold,
    response_tokens=config.rollout.max_response_tokens,
    logprob_chunk=config.packing.logprob_chunk,
    critic=critic,
    **{name: value for name, value in loss.items() if name in names},
  )
