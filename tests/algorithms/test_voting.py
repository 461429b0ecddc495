"""pass@k and maj@k against all subsets of k samples, counted out."""

import collections
import fractions
import itertools

import numpy as np
import pytest

from spo_jax.algorithms.voting import majority_at_k, pass_at_k


def over_subsets(figure, n, k):
  subsets = list(itertools.combinations(range(n), k))
  return float(fractions.Fraction(sum(figure(s) for s in subsets), len(subsets)))


def plurality(votes, correct):
  """Of a subset: 1 / (number of answers that share the lead) if a right one is among them."""

  def figure(subset):
    ballots = ["right" if correct[i] else votes[i] for i in subset]
    counts = collections.Counter(ballot for ballot in ballots if ballot is not None)
    lead = max(counts.values(), default=0)
    leaders = [answer for answer, count in counts.items() if count == lead]
    return fractions.Fraction("right" in leaders, max(len(leaders), 1))

  return figure


def test_pass_at_k_is_the_mean_over_subsets():
  for n, correct, k in [(1, 1, 1), (5, 0, 2), (6, 2, 3), (6, 6, 2), (7, 1, 7), (8, 3, 6)]:
    want = over_subsets(lambda s, c=correct: int(min(s) < c), n, k)
    assert pass_at_k(n, correct, k) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_majority_at_k_is_the_mean_over_subsets(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(5, 9))
  votes = [[None, "a", "b", "c", "d"][i] for i in rng.integers(0, 5, n)]
  correct = [vote == "a" for vote in votes]
  if seed == 5:  # right answers that are written in two ways vote together
    votes, correct = ["1/2", "0.5", "2", "2", None, "3"], [True, True, False, False, False, False]
    n = 6
  for k in range(1, n + 1):
    want = over_subsets(plurality(votes, correct), n, k)
    assert majority_at_k(votes, correct, k) == pytest.approx(want, abs=1e-12)


def test_many_samples_stay_exact():
  votes = ["a"] * 20 + ["b"] * 19 + [str(i) for i in range(20)] + [None] * 5
  correct = [vote == "a" for vote in votes]
  assert majority_at_k(votes, correct, 64) == pytest.approx(1.0, abs=1e-9)
  assert majority_at_k(votes, correct, 1) == pytest.approx(20 / 64, abs=1e-9)
  swapped = [vote == "b" for vote in votes]
  assert majority_at_k(votes, swapped, 64) == 0.0
  assert 0.3 < majority_at_k(votes, swapped, 16) < majority_at_k(votes, correct, 16) < 0.7


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match="1..n"):
    pass_at_k(4, 1, 5)
  with pytest.raises(ValueError, match="0..n"):
    pass_at_k(4, 5, 2)
  with pytest.raises(ValueError, match="1..n"):
    majority_at_k(["a"], [True], 2)
  with pytest.raises(ValueError, match="n at most 1024"):
    majority_at_k(["a"] * 1025, [True] * 1025, 512)
