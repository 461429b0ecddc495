"""The advantages of methods on fixed trajectories, at equal sampled tokens a prompt, judged."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spo_jax.analysis import designs, estimators, sizes, subtrees
from spo_jax.analysis.alignment import Figure
from spo_jax.analysis.policy import Method
from spo_jax.analysis.truth import Trajectory
from spo_jax.config import Config
from spo_jax.run import Run


class Judged(NamedTuple):
  """A method at a size, on the same tokens as the others."""

  method: str
  share: int  # sampled tokens a prompt that it may take
  size: str
  tokens: float  # sampled tokens a prompt that it takes
  decisions: estimators.Judgement  # over the tokens that the policy found unlikely
  all_tokens: estimators.Judgement
  ranking: Figure


class Drawn(NamedTuple):
  """A judged method and its draws, for pictures."""

  judged: Judged
  advantages: np.ndarray  # [2, K, S] float32
  of_response: bool  # one advantage for all tokens of a response

  def of_trajectory(self, first: int, length: int) -> np.ndarray:
    """[2 K, length] advantages of a trajectory's tokens, if it goes on as it did."""
    draws = self.advantages[:, :, first : first + length].reshape(-1, length)
    return np.repeat(draws[:, -1:], length, axis=1) if self.of_response else draws


@dataclasses.dataclass(frozen=True)
class Bench:
  """What methods are judged on."""

  run: Run
  params: Any
  trajectories: Sequence[Trajectory]
  answers: Sequence[str]  # to the trajectories' prompts
  draws: int  # K, of each half of the rollouts
  children: int  # of a state, whose subtrees are sampled to draw siblings from
  threshold: float  # ρ: a token below it is a decision
  rank_tokens: int  # of the continuations that are ranked
  seed: int


def judge_methods(
  bench: Bench, methods: Sequence[Method], shares: Sequence[int], advance: Callable[..., None]
) -> list[Drawn]:
  """Judges methods, each in the largest size for each share of sampled tokens.

  Methods that do not fit a share are left out there, and those whose advantages depend on more than
  a prompt's own rollouts everywhere; of those that estimate alike the first is judged.
  """
  found = []
  for share in shares:
    seen = set()
    for method in methods:
      advance(1)
      config = sizes.fitted(bench.run, method.config, bench.trajectories, share)
      if config is None:
        continue
      estimator = dataclasses.replace(config.advantage, train_probes=False, train_zero=False)
      key = (config.rollout, config.partition, config.probability_threshold, estimator)
      if not _of_own_rollouts(config) or key in seen:
        continue
      seen.add(key)
      found.append(_judge(bench, Method(method.name, config), share))
  return found


def _of_own_rollouts(config: Config) -> bool:
  """Whether advantages depend on the prompt's own rollouts alone, on no critic or other prompt."""
  return config.critic.trunk == "none" and config.advantage.kind != "shrinkage"


def _judge(bench: Bench, method: Method, share: int) -> Drawn:
  config = dataclasses.replace(method.config, seed=bench.seed)
  rng = np.random.default_rng(bench.seed)
  banks = _sibling_banks(bench, config) if config.rollout.strategy == "tree" else {}
  halves, ranked = [], []
  for half in (0, 1):
    trajectories = [t.half(half) for t in bench.trajectories]
    values = {key: bank[half::2] for key, bank in banks.items()}
    design = _design(bench.run, config, trajectories, values)
    halves.append(designs.draw_advantages(design, config, bench.draws, rng))
    ranked.append(_state_values(bench, config, trajectories, values, rng))
  draws = np.stack(halves)
  tokens = estimators.token_truth(bench.trajectories)
  likely = np.concatenate([t.logprobs for t in bench.trajectories]) >= np.log(bench.threshold)
  judged = Judged(
    method.name,
    share,
    _size(config),
    sizes.prompt_tokens(bench.run, config, bench.trajectories),
    estimators.judge(draws[..., ~likely], tokens.take(~likely)),
    estimators.judge(draws, tokens),
    estimators.ranking(bench.trajectories, bench.rank_tokens, np.concatenate(ranked)),
  )
  return Drawn(judged, draws, config.rollout.strategy == "group")


def _size(config: Config) -> str:
  rollout = config.rollout
  if rollout.strategy == "group":
    return f"{rollout.samples} responses"
  if rollout.strategy == "chain":
    return f"{rollout.samples} trajectories, {rollout.probes} probes"
  return "-".join(str(b) for b in config.branches)


def _design(
  run: Run, config: Config, trajectories: Sequence[Trajectory], banks: dict
) -> designs.Design:
  rollout = config.rollout
  if rollout.strategy == "group":
    return designs.group_design(trajectories, rollout.samples)
  if rollout.strategy == "chain":
    return designs.chain_design(trajectories, sizes.partition_of(run, config), rollout.probes)
  child_values = lambda index, level: banks[index, level]
  return designs.tree_design(trajectories, config.branches, config.budgets, child_values)


def _sibling_banks(bench: Bench, config: Config) -> dict[tuple[int, int], np.ndarray]:
  """Values of children of the states of every trajectory, by (trajectory, level)."""
  banks = {}
  start = 0
  for level, budget in enumerate(config.budgets):
    within = [i for i, t in enumerate(bench.trajectories) if len(t.tokens) > start]
    if within:
      values = subtrees.child_values(
        bench.run,
        bench.params,
        config,
        [bench.trajectories[i] for i in within],
        [bench.answers[i] for i in within],
        level=level,
        children=bench.children,
      )
      banks |= {(i, level): row for i, row in zip(within, values, strict=True)}
    start += budget
  return banks


def _state_values(bench: Bench, config: Config, trajectories, banks, rng) -> np.ndarray:
  """[K, n] values that the method would draw for the states behind the continuations to rank.

  A response method has the reward of the response, a chain the mean of its probes, a tree the mean
  of the children of the segment, which stands for its first one.
  """
  columns = []
  for index, trajectory in enumerate(trajectories):
    state = min(bench.rank_tokens, len(trajectory.tokens))
    bank, count = trajectory.rewards[state], 1
    if config.rollout.strategy == "chain":
      count = config.rollout.probes
    elif config.rollout.strategy == "tree" and (index, 1) in banks:
      bank, count = banks[index, 1], config.branches[1]
    begin = rng.integers(len(bank), size=bench.draws)
    members = (begin[:, None] + np.arange(count)) % len(bank)
    columns.append(bank[members].mean(1))
  return np.stack(columns, axis=1)
