import time

import pytest

from spo_jax.rewards import countdown, grade_all

PUZZLE = "3;5;7=22"
SOLUTION = "3*5=15;15+7=22"


@pytest.mark.parametrize(
  "response, answer",
  [
    (SOLUTION, PUZZLE),
    ("7+15=22", "15;7=22"),
    ("5*3=15;7+15=22", PUZZLE),
    ("3+5=8;8*7=56;wait 3*5=15;15+7=22", PUZZLE),
    ("3+5=8;wait 5+7=12;wait 3*5=15;15+7=22", PUZZLE),
    ("3*5=15;15+7=22;wait 3*5=15;15+7=22", PUZZLE),  # a try that is dropped may be anything
    ("8*8=64;64-9=55", "8;9;8=55"),
    ("5-5=0;0+22=22", "5;22;5=22"),
    ("9*9=81;99*81=8019", "99;9;9=8019"),
  ],
)
def test_right_responses(response, answer):
  assert countdown.grade(response, answer) == 1.0


@pytest.mark.parametrize(
  "response",
  [
    "",
    ";",
    "22",
    "=22",
    "15+7=22",  # a result that no step made
    "3*5=15",
    "3*5=15;15+8=23",
    "3*5=15;15+7=23",  # wrong sum, and not the target
    "3*5=14;14+8=22",  # 8 is not given
    "3*5=16;15+7=22",
    "3*7=17;17+5=22",
    "3+5=15;15+7=22",
    "3*5=15;7+7=14;15+7=22",  # 7 twice
    "3+5=8;8+7=15;15+7=22",  # 7 twice, after all were used
    "3*5=15;15+7=22;22+0=22",
    "3*5=15;15+7=22;",
    ";3*5=15;15+7=22",
    "3*5=15;15+7=22;wait ",
    "wait 3*5=15;15+7=22",
    "3*5=15;wait 15+7=22",  # a new try begins with the given numbers
    "3*5=15;wait3*5=15;15+7=22",
    "3*5=15;wait  3*5=15;15+7=22",
    "3*5=15 wait 3*5=15;15+7=22",
    "3+5=9;wait 3*5=15;15+7=22",  # a failed try must be right as well
    "8+5=13;wait 3*5=15;15+7=22",
    "3*5=15;15+7=22;#22",
    "3*5=15;15+7=22 how",
    "3*5=15; 15+7=22",
    "3*5=15\n15+7=22",
    SOLUTION + "\n",
    SOLUTION + " ",
    "3*5+7=22",
    "(3*5)=15;15+7=22",
    "3*5=15;15+7=22=22",
    "3-5=-2;7--2=9",
    "--3*5=-15;15+7=22",
    "3*5=+15;15+7=22",
    "03*5=15;15+7=22",
    "3*5=015;15+7=22",
    "3*5=15.0;15+7=22",
    "3×5=15;15+7=22",
    "3/0=22",
    "7/0=5;5*3=22",
    "٣*5=15;15+7=22",  # digits of another script
    "3*5=1٥;15+7=22",
    "3*5=１５;１５+7=22",
    "3*5=1_5;15+7=22",
    "3²*5=15;15+7=22",
    "22;22",
  ],
)
def test_wrong_responses(response):
  assert countdown.grade(response, PUZZLE) == 0.0


def test_all_numbers_must_be_used():
  assert countdown.grade("15+7=22", "15;7;9=22") == 0.0
  assert countdown.grade("15+7=22", "15;7;22=22") == 0.0
  assert countdown.grade("15+7=22;22*1=22", "15;7;1=22") == 1.0


@pytest.mark.parametrize(
  "response",
  [
    "9" * 10**6 + "*5=15;15+7=22",
    "9999*9999=99980001",
    "9**9**9**9=22",
    "-" * 10**6 + "3",
    ";wait " * 10**6,
    "3*5=15;wait " * 10**6 + SOLUTION,
    "(" * 10**6,
    SOLUTION + "\x00",
    "\ud800",
    "__import__('os').abort()",
  ],
)
def test_hostile_texts_are_quick_and_wrong(response):
  start = time.perf_counter()
  assert countdown.grade(response, PUZZLE) == 0.0
  assert time.perf_counter() - start < 1.0


def test_the_registry_knows_it():
  rewards, failed = grade_all([SOLUTION, SOLUTION], [PUZZLE, "3;5;7=23"], "countdown")
  assert rewards.tolist() == [1.0, 0.0] and not failed.any()
