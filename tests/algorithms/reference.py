"""What the reference's methods are in terms of ours, and how its fixtures are laid out."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.algorithms import advantages, losses, values
from tests.conftest import FIXTURES


def load_json(name):
  return json.loads((FIXTURES / f"{name}.json").read_text())


def padded(array, *shape):
  """Pads an array with zeros, at the ends, so that many cases share one compilation."""
  return np.pad(array, [(0, size - old) for size, old in zip(shape, array.shape, strict=True)])


def terminal_rewards(scores, attention_mask):
  """[B], [B, S] -> [B, S - 1]: a row's score at the shifted index of its last attended token."""
  rewards = np.zeros((len(scores), attention_mask.shape[1] - 1), np.float32)
  rewards[np.arange(len(scores)), attention_mask.sum(axis=1) - 2] = scores
  return rewards


def inner(mask):
  """[B, T] mask of one response a row -> where the next token is of the response too."""
  return mask & np.pad(mask[:, 1:], ((0, 0), (0, 1)))


class Forest(NamedTuple):
  parent: np.ndarray
  depth: np.ndarray
  rewards: np.ndarray
  leaf: np.ndarray
  counted: np.ndarray


def make_forest(nodes):
  """[(parent, depth, reward, leaf, counted), ...] -> Forest."""
  dtypes = [np.int32, np.int32, np.float64, bool, bool]
  columns = zip(*nodes, strict=True)
  return Forest(*[np.array(x, t) for x, t in zip(columns, dtypes, strict=True)])


def concatenate(forests):
  """One flat forest, and the offset of each part in it."""
  offsets = np.cumsum([0] + [len(forest.parent) for forest in forests])[:-1]
  shifted = [
    forest._replace(parent=np.where(forest.parent >= 0, forest.parent + offset, -1))
    for forest, offset in zip(forests, offsets, strict=True)
  ]
  whole = Forest(*[np.concatenate(columns) for columns in zip(*shifted, strict=True)])
  return whole._replace(parent=whole.parent.astype(np.int32)), offsets


def path_forest(probes, score):
  """The forest of one trajectory: node i is the state before segment i, the last one its end.

  probes[i] are the rewards of the probe rollouts from node i, possibly none; node 0 is the
  prompt. The probes follow the path in the arrays.
  """
  path = [(i - 1, i, np.nan, False, False) for i in range(len(probes))]
  path.append((len(probes) - 1, len(probes), score, True, False))
  hanging = [(i, i + 1, r, True, True) for i, rewards in enumerate(probes) for r in rewards]
  return make_forest(path + hanging)


def group_forest(group_id, score):
  """Prompts are the first nodes, responses follow."""
  prompts = [(-1, 0, np.nan, False, False)] * (int(max(group_id)) + 1)
  responses = [(g, 1, s, True, True) for g, s in zip(group_id, score, strict=True)]
  return make_forest(prompts + responses)


PROVER_WEIGHT = 5.0


@functools.partial(jax.jit, static_argnames="max_depth")
def _solve(forest, *, max_depth):
  nodes = values.forest_values(*forest, max_depth=max_depth)
  by_kind = {
    kind: advantages.make_advantage(
      kind, eps=1e-8, best_of=4, prover_weight=PROVER_WEIGHT, max_depth=max_depth
    )(nodes, forest.parent, depth=forest.depth, counted=forest.counted)
    for kind in advantages.ADVANTAGES
  }
  return nodes, by_kind


def solve(forest, *, max_depth, x64=False):
  """Forest -> (ForestValues, advantages by kind), as numpy arrays of the chosen precision."""
  with jax.enable_x64(x64):
    return jax.device_get(_solve(forest, max_depth=max_depth))


def actor_loss(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  ref_logprobs,
  logits,
  ref_logits,
  *,
  estimator,
  hyper,
  temperature=1.0,
):
  """The reference's `_compute_actor_loss` -> (loss, metrics), composed of sums.

  hyper holds the numbers that fixtures name: cliprange, ratio_threshold, kl_coef, num_rows,
  kl_penalty_loss_clip_min/max and forward_kl_penalty_coef/clip_min/clip_max.
  """
  sums = losses.ppo_clip(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    epsilon_low=hyper["cliprange"],
    epsilon_high=hyper["cliprange"],
    log_ratio_bound=10.0,
  )
  divergence = losses.kl_loss(
    logprobs,
    ref_logprobs,
    mask,
    estimator=estimator,
    clip_min=hyper["kl_penalty_loss_clip_min"],
    clip_max=hyper["kl_penalty_loss_clip_max"],
  )
  identity = jnp.eye(logits.shape[-1], dtype=jnp.float32)
  forward = losses.forward_kl(
    logits,
    identity,
    ref_logits,
    identity,
    mask,
    chunk=4,
    temperature=temperature,
    clip_min=hyper["forward_kl_penalty_clip_min"],
    clip_max=hyper["forward_kl_penalty_clip_max"],
  )
  tokens = jnp.maximum(sums.count, 1)
  forward_loss = hyper["forward_kl_penalty_coef"] * forward / tokens
  kl_loss = hyper["kl_coef"] * divergence / hyper["num_rows"]
  skipped = sums.ratio / tokens > hyper["ratio_threshold"]
  metrics = {
    "actor/approx_kl": sums.approx_kl / tokens,
    "actor/policy_kl": sums.policy_kl / tokens,
    "actor/clip_frac": sums.clipped / tokens,
    "actor/ratio": sums.ratio / tokens,
    "actor/ref_kl_loss": kl_loss,
    "actor/fkl_loss": forward_loss,
    "count": sums.count,
    "skipped": skipped,
  }
  return jnp.where(skipped, 0, sums.loss / tokens + forward_loss + kl_loss), metrics
