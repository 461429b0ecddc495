import json
import pathlib
import time

import numpy as np
import pytest

from spo_jax import rewards
from spo_jax.errors import UserError
from spo_jax.rewards import numbers

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "grading_gsm8k.json"

# Where our verdict differs from the reference's `correct`, and why.
DEVIATIONS = {
  ("#### 42.", "42"): "a full stop ends the sentence, not the number",
  ("#### 42.0", "42"): "equal as numbers",
  ("#### 1250", "1,250"): "commas of the reference answer are ignored too",
  ("#### 1,250", "1,250"): "commas of the reference answer are ignored too",
  ("#### $18", "18"): "currency is dropped",
  ("#### 18 dollars", "18"): "a unit is dropped",
  ("#### 0.50", "0.5"): "equal as numbers",
  ("#### 20%", "20"): "a percent sign is dropped",
  ("### 15", "15"): "a marker may be shorter, as in the embedded task",
  ("#####42", "42"): "a marker may be longer",
  ("#### 12\n#### 15", "15"): "two answers are none; the reference's reward is -2",
  ("a #### 3 b #### 3", "3"): "two answers are none; the reference's reward is -2",
  ("The answer is 42.", "42"): "a full stop ends the sentence, not the number",
  ("He has 10-4 apples", "-4"): "a minus after a digit is a subtraction: the last number is 4",
  ("ratio 3/4", "4"): "the last number is three quarters",
}


def test_agrees_with_reference_but_for_named_deviations():
  rows = [r for r in json.loads(FIXTURE.read_text()) if r["mode"] != "preprocess"]
  assert len(rows) == 32
  graders = {"hash": numbers.grade, "last_number": numbers.grade_last_number}
  differing = {
    (r["text"], r["gold"])
    for r in rows
    if graders[r["mode"]](r["text"], r["gold"]) != float(r["correct"])
  }
  assert differing == set(DEVIATIONS)


def test_reads_reference_answers_of_gsm8k():
  rows = [r for r in json.loads(FIXTURE.read_text()) if r["mode"] == "preprocess"]
  assert len(rows) == 2
  for row in rows:
    assert numbers.extract_answer(row["raw"]["answer"]) == row["gold_from_raw_answer"]


@pytest.mark.parametrize(
  "response, expected",
  [
    ("19-9=10;2*4=8;#13", "13"),
    ("no answer", None),
    ("", None),
    ("#", None),
    ("### \n ", None),
    ("#13;#13", None),
    ("#1 #### 2", "2"),
    ("# Solution\n## Step\n#### 42 ", "42"),
    ("#### 1\n#####2", None),
    ("#\n 7\nand more", "7\nand more"),
    ("The final answer is: #### 1.5. I hope it is correct", "1.5"),
  ],
)
def test_extract_answer(response, expected):
  assert numbers.extract_answer(response) == expected


@pytest.mark.parametrize(
  "a, b",
  [
    ("42", "42.0"),
    ("42.", "42"),
    ("042", "42"),
    ("+42", "42"),
    ("-7", "−7"),
    ("1,234,567", "1234567"),
    ("0.50", "1/2"),
    ("2/4", ".5"),
    ("1e3", "1000"),
    ("2.5E-1", "1/4"),
    ("3 million", "3,000,000"),
    ("1.5 Thousand dollars", "1500"),
    ("0", "-0"),
    ("$1,250.00", "1250"),
    (r"\$18", "18"),
    ("-$5", "$-5"),
    ("18 $", "18"),
    ("20 %", "20"),
    (r"20\%", "20"),
    ("18 dollars per day.", "18"),
    ("30km", "30"),
    ("  9 \n", "9"),
    ("12345678901234567890123", "12345678901234567890123.0"),
  ],
)
def test_equal(a, b):
  assert numbers.numbers_equal(a, b) and numbers.numbers_equal(b, a)


@pytest.mark.parametrize(
  "a, b",
  [
    ("4", "42"),
    ("-7", "7"),
    ("0.333", "1/3"),
    ("12345678901234567890123", "12345678901234567890124"),
    ("42 43", "42"),
    ("2,3", "23"),
    ("12,34", "1234"),
    ("3 million", "3"),
    ("42 or 43", "42"),
    ("42\n43", "42"),
    ("42\nwait", "42"),
    ("42 a b c d", "42"),
    ("not 42", "42"),
    ("1/0", "1/0"),
    ("1/2/3", "1/6"),
    ("x", "x"),
    ("", ""),
    (".", "0"),
    ("nan", "nan"),
    ("inf", "inf"),
    ("٤٢", "42"),
    ("²", "2"),
    ("5²", "5"),
    ("5½", "5"),
    ("1_000", "1000"),
    ("0x10", "16"),
    ("--7", "7"),
    ("6*7", "42"),
    ("1e9999", "1e9999"),
    ("7" + "0" * 200, "7" + "0" * 200),
  ],
)
def test_unequal(a, b):
  assert not numbers.numbers_equal(a, b)
  assert not numbers.numbers_equal(b, a)


@pytest.mark.parametrize(
  "response",
  [
    "#" * 10**7,
    "# " * 10**6,
    "#" + " " * 10**6,
    "#1" + "a " * 10**6,
    "### " * 10**6,
    "x" * 10**6,
    "#1" + "\n" * 10**6 + "b",
    "#" + "9" * 10**6,
    "#1e999999",
    "#1e-999/1e999",
    "#" + "9" * 100,
    "#1" + "a" * 97 + "!",
    "#1" + " a" * 48 + "!",
    "#" + "1," * 50,
    "#\ud800\x00",
  ],
)
def test_odd_texts_are_quick_and_wrong(response):
  start = time.perf_counter()
  assert numbers.grade(response, "1") == 0.0
  assert time.perf_counter() - start < 2.0


def test_never_raises_on_noise():
  rng = np.random.default_rng(0)
  alphabet = list("#0123456789.,-+/eE$% \nab\\")
  for _ in range(3000):
    text = "#" + "".join(rng.choice(alphabet, size=rng.integers(0, 12)))
    assert numbers.grade(text, "5") in (0.0, 1.0)
    numbers.numbers_equal(text[1:], text[1:])


def test_grade_all():
  graded, failed = rewards.grade_all(["#1", "#2", "3", "#4 #4"], ["1", "3", "3", "4"], "numbers")
  assert graded.dtype == np.float32
  assert graded.tolist() == [1, 0, 0, 0] and not failed.any()


def test_failing_grader_costs_only_its_response():
  def grader(response, answer):
    if response == "nan":
      return float("nan")
    return {"good": 0.5, "none": None}[response]

  graded, failed = rewards.grade_all(["bad", "good", "none", "nan"], ["a"] * 4, grader)
  assert graded.tolist() == [0, 0.5, 0, 0] and failed.sum() == 3


@pytest.mark.parametrize(
  "response, expected",
  [
    ("2 + 2 is 4, so 4.", "4."),
    ("from -3 to −5", "−5"),
    ("10-4", "4"),
    ("x-4 (y)-5", "5"),
    ("a loss of -$4", "-$4"),
    ("1,234 and 12,34", "34"),
    ("3/4 of it", "3/4"),
    (".5 or 1e-3", "1e-3"),
    ("1" * 20_000, "1" * 10_000),
    ("no", None),
    ("", None),
  ],
)
def test_last_number(response, expected):
  assert numbers.last_number(response) == expected


def test_several_markers_may_cost_a_penalty():
  responses = ["#### 1", "#### 1 #### 1", "a ####\n####b ####", "### 1"]
  graded, _ = rewards.grade_all(responses, ["1"] * 4, "numbers")
  assert graded.tolist() == [1, 0, 0, 1]
  assert rewards.shape(graded, responses, -2.0).tolist() == [1, -2, -2, 1]
  assert rewards.shape(np.ones(4), responses, 0.0).tolist() == [1, 1, 1, 1]


def test_a_response_cut_off_by_the_limit_gets_the_penalty():
  graded, cut_off = np.array([1, 1, np.nan], np.float32), np.array([False, True, True])
  shaped = rewards.shape_unfinished(graded, cut_off, -0.5)
  assert shaped.tolist() == [1, -0.5, -0.5] and shaped.dtype == np.float32


def test_grade_all_arguments():
  with pytest.raises(ValueError, match="2 responses but 1 answers"):
    rewards.grade_all(["a", "b"], ["a"], "numbers")
  with pytest.raises(
    UserError, match="unknown grader 'maths', known are: countdown, game24, gsm8k"
  ):
    rewards.grade_all([], [], "maths")
  empty, failed = rewards.grade_all([], [], "numbers")
  assert empty.shape == (0,) and not failed.any()


def test_equal_answers_are_equal_votes():
  assert numbers.vote("#### 1,000.50") == numbers.vote("#### $2001/2") == "2001/2"
  assert numbers.vote("#### ten") == "ten" and numbers.vote("no marker") is None
  assert numbers.vote_last_number("it is 3.0 or so") == "3" and numbers.vote_last_number("") is None
  assert numbers.vote("#### 1e999") != numbers.vote("#### 1e998")
