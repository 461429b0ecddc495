"""Gradients of methods at a fixed policy, from batches of the same number of sampled tokens.

C batches, D parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from spo_jax.analysis.policy import Method
from spo_jax.batches import sample
from spo_jax.config import Config
from spo_jax.data import source
from spo_jax.errors import UserError
from spo_jax.forest import Forest, prune
from spo_jax.infra.mesh import shard_batch
from spo_jax.learner import loss_config
from spo_jax.run import Run
from spo_jax.training import packing
from spo_jax.training.estimate import estimate
from spo_jax.training.objective import LossConfig, unit_scale
from spo_jax.training.prepare import prepare
from spo_jax.training.step import policy_gradient
from spo_jax.training.weights import segment_weights

MICRO_BATCHES = 8  # that a batch has room for at first; a larger one is compiled again


class Gradients(NamedTuple):
  """Of C batches, each a sum over tokens and what the loss divides it by.

  The gradient of several batches together is sum / sum, to the last bit of mathematics if
  advantages are not scaled over the batch.
  """

  sums: np.ndarray  # [C, D] float32
  units: np.ndarray  # [C] float64
  tokens: np.ndarray  # [C] int64, sampled
  prompts: int  # of a batch

  def pooled(self, size: int) -> np.ndarray:
    """[C // size, D] float32, gradients of batches `size` times as large."""
    count = len(self.units) // size
    sums = self.sums[: count * size].reshape(count, size, -1).sum(1)
    return sums / self.units[: count * size].reshape(count, size).sum(1)[:, None].astype(np.float32)


class Batches:
  """Graded forests of fresh prompts, cut into batches of about so many sampled tokens."""

  def __init__(self, run: Run, params: Any, config: Config, split: str, *, prompts: int):
    """Samples `prompts` prompts at a time, whose random numbers depend on config.seed."""
    rollout = dataclasses.replace(config.rollout, prompts=prompts, parts=1)
    self._run = dataclasses.replace(run, config=dataclasses.replace(config, rollout=rollout))
    self._params, self._prompts = params, prompts
    self._iterator = source.make_iterator(
      run.task.split(split), batch_size=prompts, seed=config.seed
    )

  def take(self, tokens: int, count: int) -> Iterator[tuple[Forest, np.ndarray, int]]:
    """Yields `count` times (forest, rewards [N], prompts), each of as many prompts as are worth
    `tokens` sampled tokens, by the first sample.

    Raises:
      UserError: if these are more prompts than are sampled at a time.
    """
    forest, rewards, _ = self._sample()
    size = max(1, round(tokens * self._prompts / _sampled(forest)))
    if size > self._prompts:
      raise UserError(
        f"{tokens} sampled tokens are {size} prompts, and {self._prompts} are sampled at once: "
        "raise --sampled_at_once or lower the first of --budgets"
      )
    while True:
      for first in range(0, self._prompts - size + 1, size):
        part, nodes = prune(forest, (forest.tree >= first) & (forest.tree < first + size))
        yield part, rewards[nodes], size
        count -= 1
        if not count:
          return
      forest, rewards, _ = self._sample()

  def _sample(self):
    return sample(self._run, self._params, next(self._iterator))


def _sampled(forest: Forest) -> int:
  return int(forest.lengths[forest.depth > 0].sum())


def measure(
  run: Run,
  params: Any,
  methods: Sequence[Method],
  split: str,
  *,
  tokens: int,
  batches: int,
  prompts: int,
  advance: Callable[..., None],
  critic_params: Any = None,
) -> dict[str, Gradients]:
  """Gradients of methods, each from `batches` batches of about `tokens` sampled tokens.

  Methods that sample alike are given the same forests.
  """
  found: dict[str, list] = {method.name: [] for method in methods}
  for config, alike in _by_rollout(methods):
    for forest, rewards, size in Batches(run, params, config, split, prompts=prompts).take(
      tokens, batches
    ):
      for method in alike:
        total, units = summed_gradient(run, params, method.config, forest, rewards, critic_params)
        found[method.name].append((total, units, _sampled(forest), size))
        advance(1)
  result = {}
  for name, rows in found.items():
    sums, units, sampled, sizes = zip(*rows, strict=True)
    result[name] = Gradients(np.stack(sums), np.array(units), np.array(sampled), sizes[0])
  return result


def _by_rollout(methods: Sequence[Method]) -> list[tuple[Config, list[Method]]]:
  """Methods that sample alike together, with the config to sample by."""
  groups: dict[Any, list[Method]] = {}
  for method in methods:
    config = method.config
    chain = config.rollout.strategy == "chain"
    partition = (config.partition, config.probability_threshold) if chain else None
    unfinished = (config.advantage.grade_unfinished, config.advantage.unfinished_penalty)
    rollout = config.rollout
    key = (config.branches if not chain else None, config.budgets, partition, unfinished)
    key += (rollout.samples, rollout.probes, rollout.probe_where) if chain else ()
    groups.setdefault(key, []).append(method)
  return [(members[0].config, members) for members in groups.values()]


def summed_gradient(
  run: Run, params: Any, config: Config, forest: Forest, rewards: np.ndarray, critic_params=None
) -> tuple[np.ndarray, float]:
  """The gradient of a method's loss on a batch, at the policy that sampled it.

  Args:
    run: model, mesh.
    params: parameters of the policy.
    config: the method; its loss is without KL.
    forest: N nodes.
    rewards: [N] float32, read at the leaves.
    critic_params: of a critic, for a method that has one.

  Returns:
    ([D] float32 sum over tokens, what the loss divides it by).
  """
  estimated = estimate(forest, rewards, config.advantage, probed=config.rollout.strategy == "chain")
  weights = segment_weights(forest, estimated.trained, config)
  if weights is None:
    weights = np.ones(len(rewards), np.float32)
  packed, counts = packing.pack(
    forest, estimated.advantages, estimated.trained, _pack_config(config), weights=weights
  )
  loss_cfg = loss_config(config)
  count = jnp.int32(counts["micro_batches"])
  batch = prepare(
    run.model, loss_cfg, None, shard_batch(run.mesh, packed), count, critic_params=critic_params
  )
  batch = batch._replace(values=None, returns=None, value_mask=None)
  used_M = jnp.arange(len(batch.episodes)) < count
  total = _summed_gradient(run.model, _same_loss(loss_cfg), params, batch, count)
  return np.asarray(total), float(1 / unit_scale(loss_cfg, batch, used_M))


def _pack_config(config: Config) -> packing.PackConfig:
  """The same for all methods: every query block may see the whole row."""
  rows = config.packing
  return packing.PackConfig(
    rows.row_length,
    rows.rows,
    rows.query_block,
    rows.key_block,
    key_blocks=rows.row_length // rows.key_block,
    min_micro_batches=MICRO_BATCHES,
  )


def _same_loss(loss_cfg: LossConfig) -> LossConfig:
  """What methods differ in is in the prepared batch: so they share a compiled program."""
  return dataclasses.replace(
    loss_cfg,
    use_probability_mask=False,
    probability_threshold=1.0,
    scaling="none",
    normalization="token",
    critic=None,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed_gradient(cfg, loss_cfg, params, batch, count):
  grads, _ = policy_gradient(cfg, loss_cfg, params, batch, jnp.int32(0), count)
  used_M = jnp.arange(batch.episodes.shape[0]) < count
  return ravel_pytree(grads)[0] / unit_scale(loss_cfg, batch, used_M)
