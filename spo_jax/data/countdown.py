"""The embedded task countdown: a target is to be made of three numbers, each used once.

A question reads `3;5;7=22 ?`, its solution `3*5=15;15+7=22`: a first operation on two of the
numbers, a second on the result and the third. Three in five first operations are dead ends, from
which the target cannot be reached, and nothing says so. Half of the solutions hold such a try, one
or two steps of it: `3+5=8;8+7=15;wait 3*5=15;15+7=22`.

Questions have a solution in which the numbers stay in their order, and worked solutions do so (with
free order a model of 0.1 M parameters hardly learnt which number was left). A policy may do else.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from spo_jax.data import generated
from spo_jax.data.builder import TextBuilder
from spo_jax.data.generated import Example

NUMBERS = (1, 12)  # Given; both ends inclusive.
LIMIT = 40  # Neither a result nor a target exceeds it; the least is 1.
SPLIT_SIZES = {"train": 6400, "validation": 512, "test": 512}  # of 8627 questions
RETRY = "wait "
FAILED_SHARE = 0.5  # of solutions that hold a failed try
SEED = 20251123

_BUCKETS = 10  # One of them is validation's, one is test's, the others are train's.
_DRAWS = 8  # Random numbers set aside for one example.


class Operation(NamedTuple):
  """`left sign right = result`, a step of a try."""

  left: int
  sign: str
  right: int
  result: int

  def __str__(self):
    return f"{self.left}{self.sign}{self.right}={self.result}"


def operations(a: int, b: int) -> list[Operation]:
  """What may be done with two numbers in this order."""
  results = (("+", a + b), ("*", a * b), ("-", a - b))
  return [Operation(a, sign, b, result) for sign, result in results if 1 <= result <= LIMIT]


def tries(numbers: tuple[int, int, int]) -> list[tuple[Operation, Operation]]:
  """Every way to use three numbers, which stay in their order, in two operations."""
  a, b, c = numbers
  ways = [(first, second) for first in operations(a, b) for second in operations(first.result, c)]
  ways += [(first, second) for first in operations(b, c) for second in operations(a, first.result)]
  return list(dict.fromkeys(ways))


@functools.cache
def problems() -> list[tuple[tuple[int, int, int], int]]:
  """Every three numbers with every target that they make in their order."""
  found = []
  for numbers in itertools.product(range(NUMBERS[0], NUMBERS[1] + 1), repeat=3):
    results = {second.result for _, second in tries(numbers)}
    found += [(numbers, result) for result in sorted(results)]
  return found


def make_example(rng: np.random.Generator) -> Example:
  """Draws one problem with a worked solution.

  Args:
    rng: Source of randomness; every call advances it by the same amount.
  """
  draws = iter(rng.integers(0, 2**32, size=_DRAWS, dtype=np.uint32).tolist())

  def choose(options):
    return options[next(draws) % len(options)]

  numbers, target = choose(problems())
  ways = tries(numbers)
  good = [way for way in ways if way[1].result == target]
  dead = [way for way in ways if not _can_make(way[1].left, way[1].right, target)]
  solution = ";".join(map(str, choose(good)))
  if dead and next(draws) < FAILED_SHARE * 2**32:
    failed = choose(dead)[: choose((1, 2))]
    solution = ";".join(map(str, failed)) + ";" + RETRY + solution
  answer = f"{';'.join(map(str, numbers))}={target}"
  return Example(f"{answer} ?", solution, answer)


def _can_make(a: int, b: int, target: int) -> bool:
  """Whether one operation on two numbers, in any order, has this result."""
  return target in (a + b, a * b, abs(a - b))


def make_splits(sizes: Mapping[str, int], *, seed: int = SEED) -> dict[str, list[Example]]:
  """Draws disjoint splits without repeated questions.

  A problem is in the same split whatever the order of its numbers.

  Args:
    sizes: Number of examples of each split; names among train, validation and test.
    seed: Seed of the stream of examples.

  Raises:
    ValueError: If a split's name is unknown.
  """
  return generated.make_splits(make_example, lambda e: split_of(e.answer), sizes, seed)


def split_of(answer: str) -> str:
  """The split that a problem belongs to; a function of its numbers and target alone."""
  numbers, _, target = answer.partition("=")
  ascending = sorted(map(int, numbers.split(";")))
  return generated.split_of(f"{ascending}={target}", _BUCKETS)


class Countdown(TextBuilder):
  """Splits of the task."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain", description="Half with a failed try.")]
  RECORD = Example
  DESCRIPTION = "Countdown with three numbers and worked solutions."

  def _make_splits(self):
    return make_splits(SPLIT_SIZES)
