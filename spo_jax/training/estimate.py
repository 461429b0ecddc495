"""From a graded forest to the advantage of every segment: the shell of `algorithms/values.py`."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from spo_jax.algorithms import advantages as advantage_kinds
from spo_jax.algorithms import values as value_ops
from spo_jax.config import AdvantageConfig
from spo_jax.forest import Forest


class Estimate(NamedTuple):
  """Per node, on the host."""

  values: np.ndarray  # [N] float32, of the state in which the segment ends
  known: np.ndarray  # [N] bool
  advantages: np.ndarray  # [N] float32
  trained: np.ndarray  # [N] bool, segments that enter the loss; never prompts


def estimate(
  forest: Forest, rewards: np.ndarray, cfg: AdvantageConfig, *, probed: bool
) -> Estimate:
  """Values and advantages of all nodes of a forest.

  Args:
    forest: N nodes.
    rewards: [N] float32, read at the leaves.
    cfg: kind of advantage, tolerance.
    probed: values come from probes (SPO-chain), alone or with the trajectory's own continuation by
      `cfg.pool_trajectory`; otherwise from all children.

  Returns:
    Estimates of the N nodes.
  """
  counted = (forest.depth > 0) & (forest.probe | cfg.pool_trajectory | (not probed))
  # Sizes are rounded up, so that forests of many shapes share a compiled program.
  room = _power_of_two(len(rewards)) - len(rewards)
  pad = lambda x, value: np.pad(x, (0, room), constant_values=value)
  result = _estimate(
    pad(forest.parent, -1),
    pad(forest.depth, -1),
    pad(rewards, 0),
    pad(forest.leaf, False),
    pad(forest.probe, False),
    pad(counted, False),
    max_depth=_power_of_two(int(forest.depth.max())),
    cfg=cfg,
  )
  return Estimate(*(np.asarray(x)[: len(rewards)] for x in result))


def _power_of_two(size: int) -> int:
  return 1 << (size - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("max_depth", "cfg"))
def _estimate(parent, depth, rewards, leaf, probe, counted, *, max_depth, cfg):
  forest = value_ops.forest_values(parent, depth, rewards, leaf, counted, max_depth=max_depth)
  advantages = advantage_kinds.make_advantage(
    cfg.kind,
    eps=cfg.eps,
    best_of=cfg.best_of,
    prover_weight=cfg.prover_weight,
    max_depth=max_depth,
  )(forest, parent, depth=depth, counted=counted)
  trained = (depth > 0) & (~probe | cfg.train_probes)
  if not cfg.train_zero:
    trained &= advantage_kinds.nonzero(advantages, tolerance=cfg.tolerance)
  return Estimate(forest.values, forest.known, advantages, trained)
