"""The embedded task: word problems of five equations, generated, with chains of thought.

A question reads `ann has 19 pens . loses 9 . gives 2 friends 4 each . doubles . buys 9 how many ?`
and its solution `19-9=10;2*4=8;10-8=2;2*2=4;4+9=13;#13`. In the variant `filler` one to three words
without a bearing on the answer stand before every equation but the first:
`19-9=10;so well 2*4=8;hmm 10-8=2;...`. Both variants have the same questions in the same order.
The variant `long` has twice as many equations.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from spo_jax.data import generated
from spo_jax.data.builder import TextBuilder
from spo_jax.data.generated import SPLIT_SIZES, Example

NAMES = (
  "ann bob cleo dan eve finn gina hugo iris jack kate leo "
  "mia noah olga paul quinn rosa sam tess uma vera will zoe"
).split()
THINGS = (
  "pens books coins stamps shells marbles cards apples pears plums figs eggs "
  "cakes buns nuts beads balls kites hats rings keys stones seeds leaves"
).split()
OPENINGS = (
  "{name} has {number} {things}",
  "{name} owns {number} {things}",
  "{name} starts with {number} {things}",
  "{number} {things} for {name}",
)
ENDINGS = ("how many ?", "how many now ?", "how many in all ?", "how many {things} ?")
JOINERS = (" . ", " . ", " . ", " . then ")
GAIN_VERBS = "buys finds gets wins picks makes".split()
LOSS_VERBS = "loses drops sells eats breaks spends".split()
SHARE_VERBS = "gives hands sends".split()
PEOPLE = "friends kids pals teams".split()
CONTAINERS = "boxes bags packs jars".split()
MULTIPLICATIONS = (
  ("doubles", 2),
  ("has twice as many", 2),
  ("triples", 3),
  ("has 3 times as many", 3),
)
FILLER_WORDS = "so well hmm okay right next also thus yes just wait let me see and fine".split()

SEED = 20250523

_BUCKETS = 40  # One of them is validation's, one is test's, the others are train's.
_MAX_FILLER_WORDS = 10
_MAX_EQUATIONS = 16
_DRAWS_OF_EQUATION = 16  # Random numbers set aside for an example: for each, and as many again.


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """Length of a problem, and ranges of its numbers; all of them inclusive.

  Raises:
    ValueError: If the ranges can lead to a state in which no operation keeps within the limit.
  """

  equations: int = 5
  start: tuple[int, int] = (2, 19)
  operand: tuple[int, int] = (1, 9)  # Of a single addition or subtraction.
  groups: tuple[int, int] = (2, 3)  # Friends who are given some, boxes that are found.
  each: tuple[int, int] = (2, 4)  # What one friend gets, what one box holds.
  limit: int = 25  # No intermediate result exceeds it; the least is 1.
  double_steps: tuple[int, int] = (1, 2)  # Operations that take two equations.
  filler_words: tuple[int, int] = (1, 3)  # In each gap between equations.

  def __post_init__(self):
    if not 1 <= self.equations <= _MAX_EQUATIONS:
      raise ValueError(f"equations must be 1 to {_MAX_EQUATIONS}, not {self.equations}")
    for name in ("start", "operand", "groups", "each", "filler_words"):
      low, high = getattr(self, name)
      if not 1 <= low <= high:
        raise ValueError(f"{name} must be a range of numbers from 1, not {low} to {high}")
    if self.filler_words[1] > _MAX_FILLER_WORDS:
      raise ValueError(f"filler_words {self.filler_words} exceeds {_MAX_FILLER_WORDS} words")
    largest_product = self.groups[1] * self.each[1]
    if not max(2 * largest_product, self.start[1], 2 * self.operand[0]) <= self.limit <= 99:
      raise ValueError(
        f"limit {self.limit} must be at most 99 and at least the largest start ({self.start[1]}) "
        f"and twice the largest product ({largest_product})"
      )
    if not 0 <= self.double_steps[0] <= self.double_steps[1] <= self.equations // 2:
      raise ValueError(f"double_steps {self.double_steps} does not fit {self.equations} equations")


LONG = Difficulty(equations=10, double_steps=(2, 4))


def make_example(
  rng: np.random.Generator, *, filler: bool, difficulty: Difficulty = Difficulty()
) -> Example:
  """Draws one problem, with a worked solution that ends in `#answer`.

  Args:
    rng: Source of randomness; every call advances it by the same amount.
    filler: Whether random words stand between the equations of the solution. The question does
      not depend on it.
    difficulty: Length of the problem, and ranges of its numbers.
  """
  # One call of NumPy for all draws: calls for each of them would take most of the build's time.
  count = _DRAWS_OF_EQUATION * (difficulty.equations + 1)
  draws = iter(rng.integers(0, 2**32, size=count, dtype=np.uint32).tolist())

  def between(low, high):
    return low + next(draws) % (high - low + 1)

  def choose(options):
    return options[next(draws) % len(options)]

  value = between(*difficulty.start)
  words = {"name": choose(NAMES), "things": choose(THINGS), "number": value}
  question = choose(OPENINGS).format(**words)
  steps, equations = [], []
  for is_double in _step_kinds(between(*difficulty.double_steps), difficulty.equations, between):
    make_step = _double_step if is_double else _single_step
    text, new_equations, value = make_step(value, between, choose, difficulty)
    steps.append(text)
    equations.extend(new_equations)
  for i, step in enumerate(steps):
    question += (choose(JOINERS) if i else " . ") + step
  question += " " + choose(ENDINGS).format(**words)

  solution = equations[0]
  for equation in equations[1:]:
    count = between(*difficulty.filler_words) if filler else 0
    solution += ";" + "".join(choose(FILLER_WORDS) + " " for _ in range(count)) + equation
  return Example(question, f"{solution};#{value}", str(value))


def make_splits(
  sizes: Mapping[str, int], *, filler: bool, seed: int = SEED, difficulty: Difficulty = Difficulty()
) -> dict[str, list[Example]]:
  """Draws disjoint splits without repeated questions.

  A question's split follows from a hash of its text, so that a split's first n examples do not
  depend on the sizes asked for.

  Args:
    sizes: Number of examples of each split; names among train, validation and test.
    filler: As in `make_example`.
    seed: Seed of the stream of examples.
    difficulty: Length of the problem, and ranges of its numbers.

  Raises:
    ValueError: If a split's name is unknown.
  """
  return generated.make_splits(
    lambda rng: make_example(rng, filler=filler, difficulty=difficulty),
    lambda example: split_of(example.question),
    sizes,
    seed,
  )


def make_examples(
  split: str, count: int, *, filler: bool, difficulty: Difficulty = Difficulty()
) -> list[Example]:
  """The first `count` examples of a split."""
  return make_splits({split: count}, filler=filler, difficulty=difficulty)[split]


def split_of(question: str) -> str:
  """The split that a question belongs to; a function of its text alone."""
  return generated.split_of(question, _BUCKETS)


def task_words() -> list[str]:
  """Every word that a question or a solution may hold, sorted; numbers and signs left out."""
  phrases = [*NAMES, *THINGS, *OPENINGS, *ENDINGS, *JOINERS, *GAIN_VERBS, *LOSS_VERBS]
  phrases += [*SHARE_VERBS, *PEOPLE, *CONTAINERS, *FILLER_WORDS, "each", "of"]
  phrases += [phrase for phrase, _ in MULTIPLICATIONS]
  return sorted({word for phrase in phrases for word in phrase.split() if word.isalpha()})


def _step_kinds(num_double, equations, between):
  """A random order of the steps, True where a step takes two equations."""
  kinds = [True] * num_double + [False] * (equations - 2 * num_double)
  for i in range(len(kinds) - 1, 0, -1):
    j = between(0, i)
    kinds[i], kinds[j] = kinds[j], kinds[i]
  return kinds


def _single_step(value, between, choose, difficulty):
  """A step of one equation: (text, equations, new value)."""
  low, high = difficulty.operand
  products = [(text, by) for text, by in MULTIPLICATIONS if value * by <= difficulty.limit]
  kinds = ["multiply"] if products else []
  if value + low <= difficulty.limit:
    kinds.append("gain")
  if value - low >= 1:
    kinds.append("lose")
  kind = choose(kinds)
  if kind == "multiply":
    text, by = choose(products)
    return text, [f"{value}*{by}={value * by}"], value * by
  if kind == "gain":
    by = between(low, min(high, difficulty.limit - value))
    return f"{choose(GAIN_VERBS)} {by}", [f"{value}+{by}={value + by}"], value + by
  by = between(low, min(high, value - 1))
  return f"{choose(LOSS_VERBS)} {by}", [f"{value}-{by}={value - by}"], value - by


def _double_step(value, between, choose, difficulty):
  """A step of two equations, a product and what it does: (text, equations, new value)."""
  groups, each = between(*difficulty.groups), between(*difficulty.each)
  product = groups * each
  kinds = ["gain"] if value + product <= difficulty.limit else []
  if value - product >= 1:
    kinds.append("share")
  if choose(kinds) == "gain":
    text = f"{choose(GAIN_VERBS)} {groups} {choose(CONTAINERS)} of {each}"
    sign, result = "+", value + product
  else:
    text = f"{choose(SHARE_VERBS)} {groups} {choose(PEOPLE)} {each} each"
    sign, result = "-", value - product
  equations = [f"{groups}*{each}={product}", f"{value}{sign}{product}={result}"]
  return text, equations, result


@dataclasses.dataclass(eq=False)
class ArithmeticConfig(tfds.core.BuilderConfig):
  """A variant of the task; fields as in `make_example`."""

  filler: bool = False
  difficulty: Difficulty = Difficulty()


class Arithmetic(TextBuilder):
  """Splits of the task."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    ArithmeticConfig(name="plain", description="Equations alone.", filler=False),
    ArithmeticConfig(name="filler", description="Random words between equations.", filler=True),
    ArithmeticConfig(name="long", description="Ten equations.", difficulty=LONG),
  ]
  RECORD = Example
  DESCRIPTION = "Arithmetic word problems with worked solutions."

  def _make_splits(self):
    variant = self.builder_config
    return make_splits(SPLIT_SIZES, filler=variant.filler, difficulty=variant.difficulty)
