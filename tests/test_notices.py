"""What is amiss with an iteration is told, once."""

import types

import numpy as np
import pytest

from spo_jax.config import AdvantageConfig, Config, CriticConfig
from spo_jax.notices import Notices

QUIET = {
  "train/skipped": 1.0,
  "train/tokens": 0.0,
  "train/segments": 0,
  "train/advantage_abs": 0.3,
  "train/ratio": 1.0,
  "train/grader_failures": 0,
  "train/copies": 1.0,
}


def told(config, rewards, finished=True, iterations=1, **metrics) -> list[str]:
  """Lines of iterations that are alike: a prompt and its responses."""
  nodes = len(rewards) + 1
  forest = types.SimpleNamespace(leaf=np.arange(nodes) > 0, finished=np.full(nodes, finished))
  rewards = np.array([np.nan, *rewards], np.float32)
  metrics = QUIET | {f"train/{name}": value for name, value in metrics.items()}
  lines = []
  notices = Notices(lines.append)
  for iteration in range(1, iterations + 1):
    notices.look(config, iteration, forest, rewards, metrics)
  return lines


def test_an_iteration_that_trains_is_not_told():
  assert told(Config(), [0, 1], skipped=0.0, tokens=9.0, segments=2) == []
  assert told(Config(), [0, 1], skipped=0.5, tokens=9.0, segments=2) == []


def test_segments_without_an_advantage_that_are_trained_are_told():
  trains = {"skipped": 0.0, "tokens": 9.0, "segments": 2, "advantage_abs": 0.0}
  (line,) = told(Config(), [1, 1], iterations=2, **trains)
  assert line == "iteration 1 has no advantage to train on: all 2 responses have reward 1"
  assert told(Config(critic=CriticConfig(trunk="own")), [1, 1], **trains) == []


@pytest.mark.parametrize(
  "rewards, metrics, line",
  [
    ([1, 1], {}, "all 2 responses have reward 1"),
    (
      [0, 0, 0],
      {},
      "no reward yet, all 3 responses have reward 0 from config.data.grader 'numbers'; "
      "rollouts/ has some to read",
    ),
    ([0, 1], {}, "rewards differ from prompt to prompt, but not between responses to one"),
    (
      [0, 1],
      {"segments": 7},
      "all tokens of the 7 segments with an advantage had a probability of "
      "config.probability_threshold 0.9 or more when sampled",
    ),
    (
      [0, 1],
      {"segments": 7, "tokens": 9.0, "ratio": 12.345},
      "the mean ratio to the sampling policy is 12.3, above config.loss.ratio_threshold 10",
    ),
    ([0, 1], {"segments": 7, "tokens": 9.0, "ratio": np.nan}, "the gradient is not finite"),
  ],
)
def test_each_reason_is_told_once(rewards, metrics, line):
  assert told(Config(), rewards, iterations=3, **metrics) == [f"iteration 1 trains nothing: {line}"]


def test_what_may_be_behind_equal_rewards_is_told():
  (line,) = told(Config(), [0, 0], finished=False, grader_failures=1)
  assert "; 2 were cut off at config.rollout.max_response_tokens 46, " in line
  assert "for config.advantage.unfinished_penalty 0; the grader failed on 1; " in line
  graded = Config(advantage=AdvantageConfig(grade_unfinished=True))
  (line,) = told(graded, [0, 0], finished=False)
  assert "max_response_tokens 46; rollouts/" in line
  (line,) = told(Config(), [-1, -1])
  assert "no reward yet, all 2 responses have reward -1 " in line


def test_rows_too_short_for_their_trees_are_told_once():
  trains = {"skipped": 0.0, "tokens": 9.0, "segments": 2}
  assert told(Config(), [0, 1], copies=1.5, **trains) == []
  (line,) = told(Config(), [0, 1], iterations=2, copies=2.65, **trains)
  assert "a token through the model 2.6 times" in line and "row_length 288 tokens" in line
  assert len(told(Config(), [0, 1], copies=2.65)) == 2
