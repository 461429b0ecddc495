import hashlib
import itertools
import re

import numpy as np
import pytest

from configs.embedded import EMBEDDED
from spo_jax.data import countdown, source, tokenizer
from spo_jax.rewards.countdown import grade

EQUATION = re.compile(r"([0-9]+)([+*-])([0-9]+)=([0-9]+)")
SIZES = {"train": 30, "validation": 6, "test": 5}


def puzzle(example):
  """(numbers, target) of an answer `3;5;7=22`."""
  numbers, target = example.answer.split("=")
  return [int(number) for number in numbers.split(";")], int(target)


def results(a, b):
  """What two numbers give, found without the generator's help."""
  return {r for r in (a + b, a * b, a - b, b - a) if 1 <= r <= countdown.LIMIT}


def reachable(numbers):
  """Results of the first operation on two of three numbers -> results of the second."""
  found = {}
  for a, b, c in itertools.permutations(numbers):
    for first in results(a, b):
      found.setdefault((tuple(sorted((a, b))), first), set()).update(results(first, c))
  return found


@pytest.fixture(scope="module")
def examples():
  return countdown.make_splits({"train": 2000})["train"]


def test_solutions_solve_their_problems(examples):
  for example in examples:
    numbers, target = puzzle(example)
    assert example.question == f"{example.answer} ?"
    *failed, last = example.solution.split(";wait ")
    assert len(failed) <= 1
    for attempt in (*failed, last):
      left = list(numbers)
      for equation in attempt.split(";"):
        a, sign, b, result = EQUATION.fullmatch(equation).groups()
        left.remove(int(a))
        left.remove(int(b))
        left.append(int(result))
        assert int(result) == eval(a + sign + b) and 1 <= int(result) <= countdown.LIMIT
      assert (left == [target]) == (attempt is last)
    assert grade(example.solution, example.answer) == 1.0


def test_a_failed_try_could_not_have_been_finished(examples):
  lengths = []
  for example in examples:
    numbers, target = puzzle(example)
    *failed, _ = example.solution.split(";wait ")
    lengths.append(sum(attempt.count(";") + 1 for attempt in failed))
    for attempt in failed:
      a, _, b, result = EQUATION.match(attempt).groups()
      pair = tuple(sorted((int(a), int(b))))
      assert target not in reachable(numbers)[pair, int(result)]
  none, short, whole = np.bincount(lengths, minlength=3) / len(lengths)
  share = countdown.FAILED_SHARE
  assert abs(none - (1 - share)) < 0.05 and abs(short - whole) < 0.05


def test_problems_are_all_that_can_be_solved_in_order():
  signs = list(itertools.product("+-*", repeat=2))
  within = lambda *results: all(1 <= result <= countdown.LIMIT for result in results)
  expected = set()
  for a, b, c in itertools.product(range(1, 13), repeat=3):
    for first, second in signs:
      left, right = eval(f"{a}{first}{b}"), eval(f"{b}{first}{c}")
      targets = eval(f"{left}{second}{c}"), eval(f"{a}{second}{right}")
      expected |= {
        ((a, b, c), t) for r, t in zip((left, right), targets, strict=True) if within(r, t)
      }
  assert len(countdown.problems()) == len(expected) and set(countdown.problems()) == expected


def test_most_first_operations_are_dead_ends():
  shares = []
  for numbers, target in countdown.problems():
    seconds = reachable(numbers).values()
    shares.append(np.mean([target in second for second in seconds]))
  assert np.mean(shares) < 0.4


def test_splits_share_no_problem_in_any_order():
  splits = countdown.make_splits({"train": 1500, "validation": 64, "test": 64})
  kinds = {}
  for name, members in splits.items():
    for example in members:
      numbers, target = puzzle(example)
      kinds.setdefault((*sorted(numbers), target), set()).add(name)
      assert countdown.split_of(example.answer) == name
  assert all(len(names) == 1 for names in kinds.values())
  questions = [e.question for members in splits.values() for e in members]
  assert len(set(questions)) == len(questions) == 1628


@pytest.mark.parametrize(
  "answer, split",
  [("3;5;7=22", "train"), ("7;3;5=22", "train"), ("2;3;4=24", "test"), ("4;2;3=24", "test")],
)
def test_split_of_a_problem_never_changes(answer, split):
  assert countdown.split_of(answer) == split


def test_split_does_not_depend_on_sizes_of_others():
  alone = countdown.make_splits({"validation": 20})["validation"]
  together = countdown.make_splits({"train": 10, "validation": 30})
  assert together["validation"][:20] == alone


def test_content_belongs_to_version():
  content = repr(countdown.make_splits({"train": 200}))
  digest = hashlib.sha256(content.encode()).hexdigest()[:16]
  # If this fails on purpose: raise Countdown.VERSION, and write the new digest here.
  assert (str(countdown.Countdown.VERSION), digest) == ("1.0.0", "a0f46df520c01665")


def test_sizes_that_cannot_be_had_are_refused(monkeypatch):
  with pytest.raises(ValueError, match="dev"):
    countdown.make_splits({"dev": 1})
  few = countdown.problems()[:40]
  monkeypatch.setattr(countdown, "problems", lambda: few)
  with pytest.raises(ValueError, match="no more different questions than {'train': "):
    countdown.make_splits({"train": 1000})


def test_texts_fit_the_embedded_tokenizer_and_the_configs_lengths(examples, tmp_path):
  embedded = tokenizer.load_tokenizer("", work_dir=str(tmp_path))
  task = EMBEDDED["countdown"]
  for texts, longest in (
    ([e.question for e in examples], task.max_prompt_tokens),
    ([e.solution for e in examples], task.max_response_tokens - 1),  # and the end
  ):
    ids = embedded(texts)["input_ids"]
    assert embedded.batch_decode(ids) == texts
    assert not any(embedded.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= longest


def test_load_split_holds_what_was_generated(tmp_path, monkeypatch):
  monkeypatch.setattr(countdown, "SPLIT_SIZES", SIZES)
  expected = countdown.make_splits(SIZES)
  for split, size in SIZES.items():
    loaded = source.load_split("countdown", "plain", split, str(tmp_path))
    assert len(loaded) == size
    for i, (record, example) in enumerate(zip(loaded, expected[split], strict=True)):
      assert record == {"id": i, **vars(example)}
