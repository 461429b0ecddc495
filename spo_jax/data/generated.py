"""What generated tasks share: an example, and splits that follow from a hash."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np

SPLIT_SIZES = {"train": 20000, "validation": 512, "test": 512}
_MAX_IDLE_DRAWS = 20_000  # So many in succession without a new question: there are no more.


@dataclasses.dataclass(frozen=True)
class Example:
  """A problem: its question, a worked solution, and what its grader calls the answer."""

  question: str
  solution: str
  answer: str


def split_of(text: str, buckets: int) -> str:
  """The split that a problem belongs to: one of `buckets` hash values each is held out."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  held_out = {0: "validation", 1: "test"}
  return held_out.get(int.from_bytes(digest, "little") % buckets, "train")


def make_splits(
  draw: Callable[[np.random.Generator], Example],
  split: Callable[[Example], str],
  sizes: Mapping[str, int],
  seed: int,
) -> dict[str, list[Example]]:
  """Draws splits without repeated questions.

  A split's first n examples do not depend on the sizes asked for.

  Args:
    draw: Makes an example; every call advances the generator by the same amount.
    split: The split that an example belongs to; a function of the problem alone.
    sizes: Number of examples of each split.
    seed: Seed of the stream of examples.

  Raises:
    ValueError: If a split's name is unknown, or there are fewer questions than asked for.
  """
  unknown = set(sizes) - set(SPLIT_SIZES)
  if unknown:
    raise ValueError(f"unknown splits {sorted(unknown)}, known are {sorted(SPLIT_SIZES)}")
  rng = np.random.Generator(np.random.PCG64(seed))
  splits = {name: [] for name in sizes}
  missing = {name for name, size in sizes.items() if size > 0}
  seen = set()
  idle = 0
  while missing:
    example = draw(rng)
    name = split(example)
    if name not in missing or example.question in seen:
      idle += 1
      if idle == _MAX_IDLE_DRAWS:
        found = {name: len(splits[name]) for name in sorted(missing)}
        raise ValueError(f"no more different questions than {found} are found, wanted {sizes}")
      continue
    idle = 0
    seen.add(example.question)
    splits[name].append(example)
    if len(splits[name]) == sizes[name]:
      missing.remove(name)
  return splits
