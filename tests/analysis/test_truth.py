"""Values by brute force against values by all responses."""

import numpy as np
import pytest

from spo_jax.analysis.truth import sample_trajectories, self_check
from tests.analysis.worlds import EOS, LONGEST, PROMPTS, distribution, make_world, reward, value

ROLLOUTS, PROMPTS_AT_ONCE = 256, 2


@pytest.fixture(scope="module")
def sampled():
  run, params = make_world()
  records = [{"ordinal": i, "answer": i % len(PROMPTS)} for i in range(3)]
  trajectories = sample_trajectories(
    run,
    params,
    records,
    samples=3,
    rollouts=ROLLOUTS,
    prompts=PROMPTS_AT_ONCE,
    seed=0,
    advance=lambda *_: None,
  )
  return run, params, records, trajectories


def test_trajectories_are_whole_responses_of_their_prompts(sampled):
  _, _, records, trajectories = sampled
  assert [t.prompt for t in trajectories] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  for t in trajectories:
    answer = records[t.prompt]["answer"]
    assert tuple(t.prompt_tokens) == PROMPTS[answer]
    assert (t.tokens[-1] == EOS or len(t.tokens) == LONGEST) and EOS not in t.tokens[:-1]
    assert t.rewards.shape == (len(t.tokens) + 1, ROLLOUTS)
    assert np.all(t.rewards[-1] == reward(t.tokens, answer)) and t.errors[-1] == 0


def test_values_are_those_of_all_responses(sampled):
  run, params, records, trajectories = sampled
  chances = [distribution(run, params, answer) for answer in range(len(PROMPTS))]
  scores = []
  for t in trajectories:
    for length in range(len(t.tokens)):
      answer = records[t.prompt]["answer"]
      exact = value(chances[answer], answer, t.tokens[:length])
      scores.append((t.values[length] - exact) / np.sqrt(exact * (1 - exact) / ROLLOUTS))
  assert np.max(np.abs(scores)) < 4
  assert 0.4 < np.mean(np.square(scores)) < 1.8
  assert np.allclose(
    [t.advantages.sum() for t in trajectories], [t.values[-1] - t.values[0] for t in trajectories]
  )


def test_halves_agree_as_their_errors_say(sampled):
  *_, trajectories = sampled
  check = self_check(trajectories)
  assert check["tokens"] == sum(len(t.tokens) for t in trajectories)
  assert check["correlation"] > 0.9 and check["reliability"] > check["correlation"]
  expected = check["spread"] ** 2 / (check["spread"] ** 2 + 2 * check["error"] ** 2)
  assert abs(check["correlation"] - expected) < 0.05
