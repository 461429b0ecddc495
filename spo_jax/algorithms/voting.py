"""pass@k and maj@k of a problem from n samples: expectations over the k of them that are drawn.

Host code on counts, exact: no subsets are sampled.
"""

import math
from collections.abc import Sequence

import numpy as np

MOST_SAMPLES = 1024  # of a problem: the ways to draw half of more are beyond float64


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Probability that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

  The unbiased estimator of arXiv 2107.03374, section 2.1.

  Args:
    n: samples.
    correct: c of them that are right.
    k: draws without replacement, at most n.

  Raises:
    ValueError: if k is not in 1..n, or `correct` not in 0..n.
  """
  if not 1 <= k <= n or not 0 <= correct <= n:
    raise ValueError(f"pass@{k} of {correct} right in {n}: k must be in 1..n, correct in 0..n")
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(votes: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
  """Probability that the most frequent answer of k samples is right (self-consistency, maj@k).

  Ties are broken at random. A sample without an answer does not vote; k of these are wrong. All
  right answers are one answer, however they are written.

  Args:
    votes: [n] answers; None abstains.
    correct: [n] whether the sample is right; one that abstains is not.
    k: draws without replacement, at most n.

  Raises:
    ValueError: if k is not in 1..n, or n above `MOST_SAMPLES`.
  """
  n = len(votes)
  if not 1 <= k <= n <= MOST_SAMPLES:
    raise ValueError(f"maj@{k} of {n} samples: k must be in 1..n, n at most {MOST_SAMPLES}")
  right = sum(correct)
  wrong: dict[str, int] = {}
  abstaining = 0
  for vote, is_right in zip(votes, correct, strict=True):
    if is_right:
      continue
    if vote is None:
      abstaining += 1
    else:
      wrong[vote] = wrong.get(vote, 0) + 1
  won = sum(
    math.comb(right, x) * _chance_against(list(wrong.values()), abstaining, k - x, x)
    for x in range(1, min(right, k) + 1)
  )
  return won / math.comb(n, k)


def _chance_against(wrong: Sequence[int], abstaining: int, draws: int, most: int) -> float:
  """Sum over the ways to draw the other samples of the chance that `most` equal votes win.

  Args:
    wrong: samples of each wrong answer.
    abstaining: samples without an answer.
    draws: samples to draw from all of these together.
    most: votes of the right answer; no other may have more, and t with as many leave 1 / (t + 1).
  """
  # ways[d, t]: ways to draw d samples so that t answers have `most` votes and none has more.
  ways = np.zeros((draws + 1, draws // most + 1))
  ways[:, 0] = [math.comb(abstaining, d) for d in range(draws + 1)]
  for count in wrong:
    longer = np.zeros_like(ways)
    for x in range(min(count, most, draws) + 1):
      moved = math.comb(count, x) * ways[: draws + 1 - x]
      if x < most:
        longer[x:] += moved
      else:
        longer[x:, 1:] += moved[:, :-1]
    ways = longer
  return float(ways[draws] @ (1.0 / np.arange(1, ways.shape[1] + 1)))
