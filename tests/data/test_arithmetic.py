import hashlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from spo_jax.data import arithmetic

REPOSITORY = pathlib.Path(__file__).parents[2]
GAINS = {"buys", "finds", "gets", "wins", "picks", "makes"}
LOSSES = {"loses", "drops", "sells", "eats", "breaks", "spends"}
FACTORS = {"doubles": 2, "triples": 3, "has twice as many": 2, "has 3 times as many": 3}
EQUATION = re.compile(r"(?:([a-z ]+) )?(\d+)([+*-])(\d+)=(\d+)")


def equations_by_reading(question):
  """The equations that a question asks for, read off its text without the generator's help."""
  story = question.rsplit(" how many", 1)[0]
  opening, *sentences = [part.removeprefix("then ") for part in story.split(" . ")]
  (value,) = map(int, re.findall(r"\d+", opening))
  equations = []
  for sentence in sentences:
    numbers = [int(n) for n in re.findall(r"\d+", sentence)]
    if sentence in FACTORS:
      steps = [(value, "*", FACTORS[sentence])]
    elif len(numbers) == 2:
      sign = "-" if sentence.endswith(" each") else "+"
      assert sign == "-" or " of " in sentence
      steps = [(numbers[0], "*", numbers[1]), (value, sign, numbers[0] * numbers[1])]
    else:
      verb = sentence.split()[0]
      assert verb in GAINS | LOSSES
      steps = [(value, "+" if verb in GAINS else "-", numbers[0])]
    for left, sign, right in steps:
      value = {"+": left + right, "-": left - right, "*": left * right}[sign]
      equations.append((left, sign, right, value))
  return equations


@pytest.fixture(
  scope="module",
  params=[
    (False, arithmetic.Difficulty()),
    (True, arithmetic.Difficulty()),
    (False, arithmetic.LONG),
  ],
  ids=["plain", "filler", "long"],
)
def variant(request):
  filler, difficulty = request.param
  examples = arithmetic.make_examples("train", 3000, filler=filler, difficulty=difficulty)
  return filler, difficulty, examples


@pytest.fixture(scope="module")
def examples(variant):
  return variant[-1]


def test_solutions_follow_from_their_questions(variant):
  filler, difficulty, examples = variant
  for example in examples:
    *lines, last = example.solution.split(";")
    matches = [EQUATION.fullmatch(line) for line in lines]
    equations = [(int(m[2]), m[3], int(m[4]), int(m[5])) for m in matches]
    assert equations == equations_by_reading(example.question)
    assert len(equations) == difficulty.equations
    assert last == f"#{equations[-1][3]}" == f"#{example.answer}"
    fillers = [(m[1] or "").split() for m in matches]
    assert not fillers[0]
    assert all(1 <= len(words) <= 3 if filler else not words for words in fillers[1:])


def test_ranges_and_text_form(examples):
  results = [r for e in examples for *_, r in equations_by_reading(e.question)]
  assert 1 <= min(results) and max(results) <= 40
  two_digit = np.mean([r > 9 for r in results])
  assert 0.2 < two_digit < 0.8
  known = set(arithmetic.task_words())
  for example in examples:
    for text in (example.question, example.solution):
      assert text == " ".join(text.lower().split())
      assert set(re.findall("[a-z]+", text)) <= known


def test_all_operations_occur(examples):
  text = " ".join(e.question for e in examples)
  for word in [*GAINS, *LOSSES, *FACTORS, " each", " of ", *arithmetic.NAMES, *arithmetic.THINGS]:
    assert word in text
  # A share of the answers so large that guessing pays would be no task.
  _, counts = np.unique([e.answer for e in examples], return_counts=True)
  assert counts.max() < 0.1 * len(examples)


def test_steps_come_in_every_order(variant):
  _, difficulty, examples = variant
  orders = set()
  for example in examples:
    sentences = example.question.rsplit(" how many", 1)[0].split(" . ")[1:]
    orders.add(tuple(len(re.findall(r"\d+", sentence)) == 2 for sentence in sentences))
  # Two of three steps, or one of four, take two equations; in the long variant 2 to 4 of 8 to 6.
  assert len(orders) == {5: 3 + 4, 10: 28 + 35 + 15}[difficulty.equations]


def test_variants_share_questions():
  plain = arithmetic.make_examples("test", 50, filler=False)
  filler = arithmetic.make_examples("test", 50, filler=True)
  assert [e.question for e in plain] == [e.question for e in filler]
  assert [e.answer for e in plain] == [e.answer for e in filler]
  assert all(p.solution != f.solution for p, f in zip(plain, filler, strict=True))


def test_splits_are_disjoint_and_without_repeats():
  splits = arithmetic.make_splits({"train": 4000, "validation": 64, "test": 64}, filler=False)
  questions = [e.question for examples in splits.values() for e in examples]
  assert len(questions) == len(set(questions)) == 4128
  for name, examples in splits.items():
    assert all(arithmetic.split_of(e.question) == name for e in examples)


@pytest.mark.parametrize(
  "name, count, split", [("ann", 9, "train"), ("dan", 1, "validation"), ("olga", 4, "test")]
)
def test_split_of_a_question_never_changes(name, count, split):
  question = f"{name} has 19 pens . loses 9 . gives 2 friends 4 each . doubles . buys {count}"
  assert arithmetic.split_of(question + " how many ?") == split


def test_repeated_draws_are_dropped(monkeypatch):
  for words in ("NAMES", "THINGS", "OPENINGS", "ENDINGS", "JOINERS", "GAIN_VERBS", "CONTAINERS"):
    monkeypatch.setattr(arithmetic, words, getattr(arithmetic, words)[:1])
  tiny = arithmetic.Difficulty(start=(2, 2), operand=(1, 1), groups=(2, 2), each=(2, 2))
  draw = arithmetic.make_splits({"train": 2000}, filler=False, difficulty=tiny)["train"]
  rng = np.random.Generator(np.random.PCG64(arithmetic.SEED))
  raw = [arithmetic.make_example(rng, filler=False, difficulty=tiny).question for _ in range(2000)]
  assert len(set(raw)) < 2000
  assert len({e.question for e in draw}) == 2000


def test_split_does_not_depend_on_sizes_of_others():
  alone = arithmetic.make_examples("validation", 20, filler=True)
  together = arithmetic.make_splits({"train": 10, "validation": 30}, filler=True)
  assert together["validation"][:20] == alone
  assert arithmetic.make_splits({"test": 0}, filler=True) == {"test": []}


def test_content_belongs_to_version():
  examples = {
    "plain": arithmetic.make_examples("train", 200, filler=False),
    "filler": arithmetic.make_examples("train", 200, filler=True),
    "long": arithmetic.make_examples("train", 200, filler=False, difficulty=arithmetic.LONG),
  }
  digests = {n: hashlib.sha256(repr(e).encode()).hexdigest()[:16] for n, e in examples.items()}
  # If this fails on purpose: raise Arithmetic.VERSION, and write the new digests here.
  assert (str(arithmetic.Arithmetic.VERSION), digests) == (
    "1.0.0",
    {"plain": "d9cc8733d54eac1e", "filler": "029da3e8e875d9b3", "long": "a8fff2ddaaf84b5b"},
  )


@pytest.mark.parametrize(
  "ranges",
  [
    {"equations": 0},
    {"equations": 17},
    {"limit": 100},
    {"limit": 20},
    {"start": (2, 41)},
    {"double_steps": (1, 3)},
    {"operand": (0, 9)},
    {"each": (4, 3)},
    {"filler_words": (1, 99)},
  ],
)
def test_impossible_difficulty_is_refused(ranges):
  with pytest.raises(ValueError):
    arithmetic.Difficulty(**ranges)


def test_the_longest_problem_has_enough_draws():
  longest = arithmetic.Difficulty(equations=16, double_steps=(0, 8), filler_words=(10, 10))
  rng = np.random.default_rng(0)
  for _ in range(2000):
    example = arithmetic.make_example(rng, filler=True, difficulty=longest)
    assert len(equations_by_reading(example.question)) == 16


def test_tight_difficulty_still_works():
  tight = arithmetic.Difficulty(start=(1, 32), operand=(4, 9), limit=32)
  rng = np.random.default_rng(0)
  for _ in range(2000):
    example = arithmetic.make_example(rng, filler=False, difficulty=tight)
    results = [r for *_, r in equations_by_reading(example.question)]
    assert 1 <= min(results) and max(results) <= 32


def test_unknown_split_is_refused():
  with pytest.raises(ValueError, match="dev"):
    arithmetic.make_splits({"dev": 1}, filler=False)


def test_builds_without_tensorflow(tmp_path):
  program = f"""
import sys
from spo_jax.data import arithmetic, source
arithmetic.SPLIT_SIZES = {{"train": 8, "validation": 4, "test": 4}}
records = source.load_split("arithmetic", "filler", "train", {str(tmp_path)!r})
assert [r["id"] for r in records] == list(range(8))
assert not {{"tensorflow", "apache_beam"}} & set(sys.modules)
"""
  command = [sys.executable, "-c", program]
  result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
  assert result.returncode == 0, result.stderr
  assert result.stdout == ""
