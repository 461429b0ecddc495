"""The true values of a policy's states, by brute force: many rollouts from every token boundary."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spo_jax.batches import sample
from spo_jax.config import Config, PartitionConfig
from spo_jax.forest import Forest
from spo_jax.run import Run


class Trajectory(NamedTuple):
  """A sampled response of L tokens, with R rewards of rollouts from each of its L + 1 states.

  State t is the prompt and the first t tokens; from the last one nothing is sampled, its rewards
  are the response's own, R times.
  """

  prompt: int  # number of the prompt; trajectories of one prompt share the rewards of state 0
  prompt_tokens: np.ndarray  # [length] int32
  tokens: np.ndarray  # [L] int32
  logprobs: np.ndarray  # [L] float32, of the sampling policy
  rewards: np.ndarray  # [L + 1, R] float32

  @property
  def values(self) -> np.ndarray:
    """[L + 1] float64, V*."""
    return self.rewards.mean(1, dtype=np.float64)

  @property
  def errors(self) -> np.ndarray:
    """[L + 1] float64, standard errors of V*."""
    count = self.rewards.shape[1]
    return self.rewards.std(1, ddof=1, dtype=np.float64) / np.sqrt(count)

  @property
  def advantages(self) -> np.ndarray:
    """[L] float64, A* = V*(after the token) - V*(before it)."""
    return np.diff(self.values)

  def half(self, which: int) -> "Trajectory":
    """The same with every second rollout, 0 the even ones, 1 the odd ones."""
    return self._replace(rewards=self.rewards[:, which::2])


def sample_trajectories(
  run: Run,
  params: Any,
  records: Sequence[dict[str, Any]],
  *,
  samples: int,
  rollouts: int,
  prompts: int,
  seed: int,
  advance: Callable[..., None],
) -> list[Trajectory]:
  """Samples `samples` trajectories a prompt and `rollouts` rollouts from each of their states.

  Args:
    run: the task, the model and the lengths.
    params: parameters of the policy.
    records: prompts, with `ordinal`.
    samples: trajectories a prompt.
    rollouts: R.
    prompts: that are worked on at a time, which bounds the memory.
    seed: of the random numbers.
    advance: called with the number of prompts done.

  Returns:
    The trajectories, those of a prompt together.
  """
  config = _every_token(run.config, samples=samples, rollouts=rollouts, prompts=prompts, seed=seed)
  run = dataclasses.replace(run, config=config)
  found = []
  for first in range(0, len(records), prompts):
    chunk = list(records[first : first + prompts])
    filled = [chunk[i % len(chunk)] for i in range(prompts)]  # one shape, compiled once
    forest, rewards, _ = sample(run, params, filled)
    found += [t for t in read_trajectories(forest, rewards, first) if t.prompt < len(records)]
    advance(len(chunk))
  return found


def _every_token(config: Config, *, samples, rollouts, prompts, seed) -> Config:
  rollout = dataclasses.replace(
    config.rollout,
    strategy="chain",
    samples=samples,
    probes=rollouts,
    prompts=prompts,
    parts=1,
    cuts_per_group=1,
    slots=samples * prompts,
  )
  return dataclasses.replace(
    config, seed=seed, rollout=rollout, partition=PartitionConfig(kind="token")
  )


def read_trajectories(forest: Forest, rewards: np.ndarray, first_prompt: int) -> list[Trajectory]:
  """Reads the trajectories of a chain that is probed at every token.

  Args:
    forest: N nodes, every segment a token.
    rewards: [N] float32, read at the leaves.
    first_prompt: number of the first tree's prompt.
  """
  probes = np.flatnonzero(forest.probe)
  probes = probes[np.argsort(forest.parent[probes], kind="stable")]
  owner = forest.parent[probes]
  from_state = lambda node: rewards[probes[slice(*np.searchsorted(owner, [node, node + 1]))]]
  own = (forest.depth > 0) & ~forest.probe
  following = np.full(len(own), -1)
  following[forest.parent[own]] = np.flatnonzero(own)  # sole, but for the roots
  found = []
  for start in np.flatnonzero(own & (forest.depth == 1)):
    root = forest.parent[start]
    path = [start]
    while (after := following[path[-1]]) >= 0:
      path.append(after)
    banks = [from_state(node) for node in (root, *path[:-1])]
    banks.append(np.full_like(banks[0], rewards[path[-1]]))
    where = forest.offsets[np.array(path)]
    found.append(
      Trajectory(
        prompt=int(forest.tree[root]) + first_prompt,
        prompt_tokens=forest.node_tokens(root),
        tokens=forest.tokens[where],
        logprobs=forest.logprobs[where],
        rewards=np.stack(banks),
      )
    )
  return found


def self_check(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """The truth against itself: its advantages from one half of the rollouts and from the other.

  Returns:
    `correlation` of the two, the expected one of their mean to the truth (`reliability`), the
    mean `error` of an advantage, and the `spread` of true advantages with the noise taken out.
  """
  halves = [np.concatenate([t.half(i).advantages for t in trajectories]) for i in (0, 1)]
  correlation = float(np.corrcoef(*halves)[0, 1])
  errors = np.concatenate([np.hypot(t.errors[1:], t.errors[:-1]) for t in trajectories])
  covariance = float(np.cov(*halves)[0, 1])
  return {
    "correlation": correlation,
    "reliability": float(np.sqrt(max(2 * correlation / (1 + correlation), 0.0))),
    "error": float(np.sqrt(np.mean(errors**2))),
    "spread": float(np.sqrt(max(covariance, 0.0))),
    "tokens": len(errors),
  }
