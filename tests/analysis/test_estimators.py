"""Expectations of methods' advantages on states of known value, and how they are judged."""

import dataclasses

import numpy as np
import pytest

from spo_jax.analysis import designs, estimators, sizes
from spo_jax.analysis.truth import Trajectory
from spo_jax.config import Config
from tests.analysis.worlds import make_world

ROLLOUTS, DRAWS = 40, 300
VALUES = (0.3, 0.5, 0.2, 0.6, 0.9, 1.0)  # V* of the states of a response of 5 tokens


def bank(value, rng, size=ROLLOUTS):
  rewards = (np.arange(size) < round(value * size)).astype(np.float32)
  return rng.permutation(rewards)


def trajectory(values=VALUES, seed=0, prompt=0, logprobs=None):
  rng = np.random.default_rng(seed)
  length = len(values) - 1
  return Trajectory(
    prompt=prompt,
    prompt_tokens=np.array([2, 3], np.int32),
    tokens=np.arange(2, 2 + length, dtype=np.int32),
    logprobs=np.full(length, -1.0, np.float32) if logprobs is None else logprobs,
    rewards=np.stack([bank(v, rng) for v in values]),
  )


def config(strategy, kind, **advantage):
  base = Config()
  return dataclasses.replace(
    base,
    rollout=dataclasses.replace(
      base.rollout, strategy=strategy, branches=(2, 3), segment_tokens=(2,), samples=4
    ),
    advantage=dataclasses.replace(base.advantage, kind=kind, **advantage),
  )


def expectation(design, config):
  """([S] mean over draws, [S] its standard error)."""
  draws = designs.draw_advantages(design, config, DRAWS, np.random.default_rng(1))
  return draws.mean(0), np.maximum(draws.std(0) / np.sqrt(DRAWS), 1e-6)


def every(length):
  return lambda tokens, logprobs, mask: np.arange(tokens.shape[1])[None] % length == 0


def test_rloo_compares_with_the_prompt_not_with_the_state_before():
  t = trajectory()
  mean, error = expectation(designs.group_design([t], 4), config("group", "leave_one_out"))
  assert np.all(np.abs(mean - (t.values[1:] - t.values[0])) < 4 * error)
  assert np.max(np.abs(mean - t.advantages) / error) > 10


def test_a_group_mean_that_counts_the_response_shrinks_its_advantage():
  t = trajectory()
  mean, error = expectation(designs.group_design([t], 4), config("group", "difference"))
  assert np.all(np.abs(mean - 3 / 4 * (t.values[1:] - t.values[0])) < 4 * error)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_chain_gives_a_segment_what_its_value_gains(length):
  t = trajectory()
  design = designs.chain_design([t], every(length), probes=3)
  mean, error = expectation(design, config("chain", "difference"))
  for start in range(0, 5, length):
    end = min(start + length, 5)
    gain = t.values[end] - t.values[start]
    assert np.all(np.abs(mean[start:end] - gain) < 4 * error[start:end])
    assert np.ptp(mean[start:end]) == 0


def test_pooling_the_trajectory_shrinks_all_but_the_last_segment():
  t = trajectory()
  design = designs.chain_design([t], every(2), probes=3)
  mean, error = expectation(design, config("chain", "difference", pool_trajectory=True))
  pooled = [0.0] * 3 + [1.0]  # states 0, 2, 4, 5
  for number in (2, 1, 0):
    pooled[number] = (3 * t.values[2 * number] + pooled[number + 1]) / 4
  gains = np.repeat(np.diff(pooled), (2, 2, 1))
  assert np.all(np.abs(mean - gains) < 4 * error)


@pytest.mark.parametrize("kind, shrunk", [("difference", True), ("leave_one_out", False)])
def test_a_tree_gives_a_segment_what_its_value_gains(kind, shrunk):
  t = trajectory()
  rng = np.random.default_rng(2)
  # Children's values have the spread that their subtrees leave; their mean is V* of the state.
  noise = lambda: rng.permutation(np.linspace(-0.2, 0.2, 20))
  banks = {(0, 0): t.values[0] + noise(), (0, 1): t.values[2] + noise()}
  design = designs.tree_design([t], (2, 3), (2, 9), lambda i, level: banks[i, level])
  mean, error = expectation(design, config("tree", kind))
  gains = np.repeat([t.values[2] - t.values[0], t.values[5] - t.values[2]], (2, 3))
  shrink = np.repeat([1 / 2, 2 / 3], (2, 3)) if shrunk else 1
  assert np.all(np.abs(mean - shrink * gains) < 4 * error)


def test_siblings_are_different_rollouts():
  t = trajectory((0.5, 1.0))
  design = designs.group_design([t], 4)
  draws = designs.draw_advantages(
    design, config("group", "leave_one_out"), 2000, np.random.default_rng(0)
  )
  # 1 - mean of 3 rewards of deviation 1/2
  assert abs(draws.std() - 0.5 / np.sqrt(3)) < 0.03


def synthetic(slope, noise, seed=0, tokens=400, draws=6):
  """Draws slope * A* + noise, from halves whose truth has errors of its own."""
  rng = np.random.default_rng(seed)
  truth, error = rng.normal(size=tokens), 0.3
  halves = truth + error * rng.normal(size=(2, tokens))
  of_half = slope * halves[:, None] + noise * rng.normal(size=(2, draws, tokens))
  prompt = np.arange(tokens) % 20
  return of_half, estimators.Tokens(halves, np.full((2, tokens), error), prompt)


def test_judgement_takes_the_noise_of_the_truth_out():
  judged = estimators.judge(*synthetic(0.5, 0.8))
  assert abs(judged.slope.value - 0.5) < 3 * judged.slope.error < 0.1
  assert abs(judged.correlation.value - 0.5 / np.hypot(np.hypot(0.5, 0.15), 0.8)) < 0.05
  assert abs(judged.bias - 0.5) < 0.04
  assert abs(judged.deviation - np.hypot(0.8, 0.15)) < 0.05
  assert abs(judged.rmse**2 - judged.bias**2 - judged.deviation**2) < 1e-6


def test_signs_count_where_they_are_certain():
  draws, tokens = synthetic(1.0, 0.0)
  assert estimators.judge(draws, tokens).sign > 0.97
  assert estimators.judge(-draws, tokens).sign < 0.03
  assert estimators.judge(0 * draws, tokens).sign == 0.5


def test_ranking_is_of_pairs_of_one_prompt_that_differ_for_certain():
  better = trajectory((0.5, 0.9, 1.0))
  worse = trajectory((0.5, 0.1, 0.0), seed=1)
  alike = trajectory((0.5, 0.9, 0.0), seed=2)
  other = trajectory((0.5, 0.1, 0.0), prompt=1)
  values = np.array([[1.0, 0.0, 0.0, 5.0], [0.0, 1.0, 1.0, 5.0]])
  found = estimators.ranking([better, worse, alike, other], 1, values)
  # better > worse once in two; alike > worse: equal, then equal: half.
  assert found.value == 0.5
  values = np.array([[1.0, 0.0, 0.5, 5.0]])
  assert estimators.ranking([better, worse, alike, other], 1, values).value == 1.0
  assert np.isnan(estimators.ranking([better, other], 1, values[:, :2]).value)


def test_sizes_are_the_largest_that_fit():
  t = trajectory()
  for strategy, at_five in (("group", 20), ("tree", 2 * 2 + 6 * 3)):
    method = config(strategy, "difference")
    assert sizes.prompt_tokens(None, method, [t]) == at_five
  assert sizes.fitted(None, config("group", "difference"), [t], 37).rollout.samples == 7
  tree = sizes.fitted(None, config("tree", "difference"), [t], 4 * 2 + 24 * 3)
  assert tree.branches == (4, 6)
  assert sizes.fitted(None, config("group", "difference"), [t], 9) is None


def test_a_chain_probes_its_prompt_once_for_all_trajectories():
  t = trajectory()
  base = config("chain", "difference")
  method = dataclasses.replace(
    base,
    rollout=dataclasses.replace(base.rollout, samples=2, probes=3),
    partition=dataclasses.replace(base.partition, kind="fixed", length=2, delimiter=";"),
  )
  # Trajectories: 2 x 5; probes at the prompt: 3 x 5, behind 2 and 4 tokens: 2 x 3 x (3 + 1).
  assert sizes.prompt_tokens(make_world()[0], method, [t]) == 10 + 15 + 24
