"""How close the advantages that a method gives to tokens of fixed trajectories are to the truth.

S tokens, K repetitions. What is drawn and what is compared with come from different halves of the
rollouts, so that their noise is independent and can be taken out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spo_jax.analysis.alignment import Figure
from spo_jax.analysis.truth import Trajectory

TINY = 1e-30  # so that advantages of 0 have correlation 0


class Tokens(NamedTuple):
  """True advantages of the tokens of all trajectories, from either half of the rollouts."""

  advantages: np.ndarray  # [2, S] float64
  errors: np.ndarray  # [2, S] float64, standard errors
  prompt: np.ndarray  # [S]

  def take(self, keep: np.ndarray) -> "Tokens":
    """Those of a mask [S]."""
    return Tokens(self.advantages[:, keep], self.errors[:, keep], self.prompt[keep])


class Judgement(NamedTuple):
  """Of a method's advantages, over tokens and repetitions."""

  slope: Figure  # E[Â A*] / E[A*²]: 1 if a method gives each token its due on average
  correlation: Figure  # of Â and A*
  rmse: float  # root of the mean of (Â - A*)²
  bias: float  # root of the mean square of E Â - A*, given the trajectory
  deviation: float  # root of the mean variance of Â, given the trajectory
  sign: float  # share of draws with the sign of A*, where that is certain; 0 counts half


def token_truth(trajectories: Sequence[Trajectory]) -> Tokens:
  """The truth about all tokens of trajectories, end to end."""
  halves = [[t.half(i) for t in trajectories] for i in (0, 1)]
  errors = lambda t: np.hypot(t.errors[1:], t.errors[:-1])
  return Tokens(
    np.stack([np.concatenate([t.advantages for t in half]) for half in halves]),
    np.stack([np.concatenate([errors(t) for t in half]) for half in halves]),
    np.concatenate([np.full(len(t.tokens), t.prompt) for t in trajectories]),
  )


def judge(draws: np.ndarray, tokens: Tokens) -> Judgement:
  """Compares draws with the truth.

  Args:
    draws: [2, K, S] advantages drawn from the first and the second half of the rollouts.
    tokens: the truth about the S tokens.

  Returns:
    The judgement; errors are by the jackknife over prompts.
  """
  draws = draws.astype(np.float64)
  # Sums of products of what is independent, a row a token.
  columns = np.stack(
    [
      np.mean(draws[0] * tokens.advantages[1] + draws[1] * tokens.advantages[0], axis=0) / 2,
      np.prod(tokens.advantages, axis=0),
      np.mean(draws**2, axis=(0, 1)),
    ]
  )
  by_prompt = np.stack(
    [np.bincount(tokens.prompt, column, minlength=tokens.prompt.max() + 1) for column in columns]
  )
  by_prompt = by_prompt[:, np.bincount(tokens.prompt) > 0]
  slope = lambda sums: sums[0] / sums[1]
  correlation = lambda sums: sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], TINY))
  crossed = draws - tokens.advantages[::-1, None]  # noise of both halves
  square = np.mean(crossed**2) - np.mean(tokens.errors**2)
  bias = np.mean(np.prod(draws.mean(1) - tokens.advantages, axis=0))
  return Judgement(
    slope=_jackknifed(slope, by_prompt),
    correlation=_jackknifed(correlation, by_prompt),
    rmse=_root(square),
    bias=_root(bias),
    deviation=_root(square - bias),
    sign=_sign_agreement(draws, tokens),
  )


def _root(square: float) -> float:
  return float(np.sqrt(max(square, 0.0)))


def _jackknifed(statistic, by_prompt: np.ndarray) -> Figure:
  total = by_prompt.sum(1)
  if by_prompt.shape[1] < 2:
    return Figure(float(statistic(total)), float("nan"))
  values = np.array([statistic(total - without) for without in by_prompt.T])
  error = np.sqrt((len(values) - 1) * values.var())
  return Figure(float(statistic(total)), float(error))


def _sign_agreement(draws: np.ndarray, tokens: Tokens) -> float:
  shares = []
  for drawn, truth, error in zip(draws, tokens.advantages[::-1], tokens.errors[::-1], strict=True):
    sure = np.abs(truth) > 2 * error
    agreement = np.sign(drawn[:, sure]) * np.sign(truth[sure])
    shares.append((agreement + 1).reshape(-1) / 2)
  shares = np.concatenate(shares)
  return float(shares.mean()) if len(shares) else float("nan")


def ranking(trajectories: Sequence[Trajectory], tokens: int, values: np.ndarray) -> Figure:
  """How often the better of two continuations of a prompt is given the higher value.

  Args:
    trajectories: those whose states are valued.
    tokens: of a continuation; shorter responses are left out.
    values: [K, n] drawn values of the trajectories' states behind so many tokens.

  Returns:
    Share of pairs, over K, of those whose true values differ by more than 2 standard errors; equal
    values count half. The error is by the jackknife over prompts.
  """
  right, prompts = [], []
  for i, a in enumerate(trajectories):
    for j in range(i + 1, len(trajectories)):
      b = trajectories[j]
      if a.prompt != b.prompt or min(len(a.tokens), len(b.tokens)) < tokens:
        continue
      gap = a.values[tokens] - b.values[tokens]
      if np.abs(gap) > 2 * np.hypot(a.errors[tokens], b.errors[tokens]):
        agreement = np.sign(values[:, i] - values[:, j]) * np.sign(gap)
        right.append(np.mean(agreement + 1) / 2)
        prompts.append(a.prompt)
  if not right:
    return Figure(float("nan"), float("nan"))
  sums = np.stack([np.bincount(prompts, right), np.bincount(prompts)])
  return _jackknifed(lambda s: s[0] / s[1], sums[:, sums[1] > 0])
