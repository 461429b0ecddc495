"""The embedded task countdown: a target is to be made of three numbers, each used once.

A question reads `3;5;7=22 ?`, its solution `3*5=15;15+7=22`: a first operation on two of the
numbers, a second on the result and the third. Three in four first operations lead nowhere, and
which do shows only later. So half of the solutions hold a failed try, left where it was seen to
fail: `3+5=8;8*7=56;wait 3*5=15;15+7=22`.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from spo_jax.data import generated
from spo_jax.data.builder import TextBuilder
from spo_jax.data.generated import SPLIT_SIZES, Example

NUMBERS = (1, 20)  # Given, both ends inclusive, as are all ranges here.
TARGETS = (10, 99)
LIMIT = 99  # No result exceeds it; the least is 1.
RETRY = "wait "
FAILED_SHARE = 0.5  # of solutions that hold a failed try
SEED = 20251123

_BUCKETS = 20  # One of them is validation's, one is test's, the others are train's.
_DRAWS = 16  # Random numbers set aside for one example.


class Operation(NamedTuple):
  """`left sign right = result`, a step of a try."""

  left: int
  sign: str
  right: int
  result: int

  def __str__(self):
    return f"{self.left}{self.sign}{self.right}={self.result}"


def operations(a: int, b: int) -> list[Operation]:
  """What may be done with two numbers; the smaller is taken from the larger."""
  found = [Operation(a, "+", b, a + b), Operation(a, "*", b, a * b)]
  large, small = max(a, b), min(a, b)
  found.append(Operation(large, "-", small, large - small))
  return [operation for operation in found if 1 <= operation.result <= LIMIT]


def tries(numbers: Sequence[int]) -> list[tuple[Operation, Operation]]:
  """Every way to use three numbers in two operations, each once."""
  ways = {}
  for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
    for first in operations(numbers[i], numbers[j]):
      for second in operations(first.result, numbers[k]):
        ways[first, second] = None
  return list(ways)


@functools.cache
def problems() -> list[tuple[tuple[int, ...], int]]:
  """Every set of three numbers, ascending, with every target that can be made of it."""
  low, high = TARGETS
  found = []
  for numbers in itertools.combinations_with_replacement(range(NUMBERS[0], NUMBERS[1] + 1), 3):
    results = {second.result for _, second in tries(numbers)}
    found += [(numbers, result) for result in sorted(results) if low <= result <= high]
  return found


def make_example(rng: np.random.Generator) -> Example:
  """Draws one problem, its numbers in any order, with a worked solution.

  Args:
    rng: Source of randomness; every call advances it by the same amount.
  """
  draws = iter(rng.integers(0, 2**32, size=_DRAWS, dtype=np.uint32).tolist())

  def choose(options):
    return options[next(draws) % len(options)]

  numbers, target = choose(problems())
  numbers = choose(list(itertools.permutations(numbers)))
  ways = tries(numbers)
  good = [way for way in ways if way[1].result == target]
  dead = [way for way in ways if way[0] not in {first for first, _ in good}]
  solution = ";".join(map(str, choose(good)))
  if dead and next(draws) < FAILED_SHARE * 2**32:
    failed = choose(dead)[: choose((1, 2))]
    solution = ";".join(map(str, failed)) + ";" + RETRY + solution
  answer = f"{';'.join(map(str, numbers))}={target}"
  return Example(f"{answer} ?", solution, answer)


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
