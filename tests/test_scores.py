"""Figures of an evaluation, worked out by hand."""

import pytest

from spo_jax.scores import scores, table


def line(subject, level, responses, prompt_tokens=10):
  """A problem; a response is (tokens, finished, {context: (reward, vote, truncated)})."""
  return {
    "subject": subject,
    "level": level,
    "prompt_tokens": prompt_tokens,
    "responses": [
      {
        "tokens": tokens,
        "finished": finished,
        "at": {
          str(context): {
            "reward": reward,
            "vote": vote,
            "truncated": truncated,
            "grader_failed": vote == "hang",
          }
          for context, (reward, vote, truncated) in at.items()
        },
      }
      for tokens, finished, at in responses
    ],
  }


LINES = [
  line(
    "algebra",
    "1",
    [
      (30, True, {20: (0.0, None, True), 50: (1.0, "4", False)}),
      (5, True, {20: (1.0, "4", False), 50: (1.0, "4", False)}),
      (5, True, {20: (0.0, "5", False), 50: (0.0, "5", False)}),
    ],
  ),
  line(
    "geometry",
    "2",
    [
      (40, False, {20: (0.0, None, True), 50: (0.0, None, True)}),
      (8, True, {20: (0.0, "hang", False), 50: (0.0, "7", False)}),
      (9, True, {20: (0.0, "7", False), 50: (0.0, "7", False)}),
    ],
  ),
]


def test_scores():
  found = scores(LINES, [50, 20])
  assert (found["problems"], found["samples"]) == (2, 3)
  assert list(found["contexts"]) == ["20", "50"]
  short, long = found["contexts"].values()
  assert short["accuracy"] == pytest.approx(1 / 6) and long["accuracy"] == pytest.approx(1 / 3)
  assert long["stderr"] == pytest.approx(1 / 3)  # of 2/3 and 0
  assert short["pass_at"] == pytest.approx({"1": 1 / 6, "2": 1 / 3, "3": 1 / 2})
  # At 20 a right vote, a wrong one and none: of two votes that disagree each wins half the time.
  assert short["maj_at"] == pytest.approx({"1": 1 / 6, "2": (0.5 + 1 + 0) / 3 / 2, "3": 0.25})
  assert long["maj_at"] == pytest.approx({"1": 1 / 3, "2": (1 + 0.5 + 0.5) / 3 / 2, "3": 0.5})
  assert short["mean_tokens"] == pytest.approx((10 + 5 + 5 + 10 + 8 + 9) / 6)
  assert long["mean_tokens"] == pytest.approx((30 + 5 + 5 + 40 + 8 + 9) / 6)
  assert short["truncated"] == pytest.approx(1 / 3) and long["truncated"] == pytest.approx(1 / 6)
  assert (short["grader_failures"], long["grader_failures"]) == (1, 0)
  assert found["by_subject"]["algebra"] == {
    "problems": 1,
    "accuracy": pytest.approx({"20": 1 / 3, "50": 2 / 3}),
  }
  assert found["by_level"]["2"]["accuracy"]["50"] == 0


def test_what_is_not_known_is_not_reported():
  plain = line("", "", [(3, True, {20: (1.0, None, False)})])
  found = scores([plain], [20])
  assert "by_subject" not in found and "by_level" not in found
  assert "maj_at" not in found["contexts"]["20"]
  assert found["contexts"]["20"]["stderr"] == 0


def test_table():
  summary = {"model": "m", "data": "d", "split": "test"} | scores(LINES, [20, 50])
  rows = {row[:28].strip(): row[28:].split() for row in table(summary)[1:]}
  assert table(summary)[0] == "m on d test: 2 problems, 3 responses each"
  assert rows["context"] == ["20", "50"]
  assert rows["avg@3"] == ["16.7", "±", "16.7", "%", "33.3", "±", "33.3", "%"]
  assert rows["pass@3"] == ["50.0", "%", "50.0", "%"] and "pass@1" not in rows
  assert rows["maj@2"] == ["25.0", "%", "33.3", "%"]
  assert rows["grader failures"] == ["1", "0"]
  assert rows["algebra (1)"] == ["33.3", "%", "66.7", "%"]
  assert rows["level 2 (1)"] == ["0.0", "%", "0.0", "%"]
